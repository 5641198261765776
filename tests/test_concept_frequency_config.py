"""Presets, dry runs, settings that are refused before a run starts, and the paper's models."""

import dataclasses

import open_clip
import pytest
from concept_frequency_runs import TINY, shards  # noqa: F401
from scripts import refused

from concept_frequency import train
from concept_frequency.config import MODELS, PRESETS
from concept_frequency.published.numbers import CURVE_MODELS, TABLE9


@pytest.mark.parametrize(("change", "message"), [
    ({"eval_set": "nowhere"}, "--eval-set nowhere does not exist"),
    ({"dataset_size": 39}, "cannot hold each"),
    ({"dataset_size": 40, "batch_size": 64}, "less than one batch"),
    ({"law": "log-uniform", "exponent": 0.5}, "--law zipf"),
    ({"keep_in_memory": False}, "in memory"),
])  # fmt: skip
def test_training_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change).check(2)


def test_an_unknown_model_is_refused(in_process):
    refused(in_process("emoji", "--model", "none", "--dry-run", module="concept_frequency.train"), "open_clip")


def test_dry_run_needs_no_data(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, (_, preset) in PRESETS.items():
        train.main(dataclasses.replace(preset, model="ViT-emoji", dry_run=True, device="cpu"))
        out = capsys.readouterr().out
        assert all(word in out for word in ("parameters", "frequencies", "learning rate", "memory")), name


def test_models_of_the_paper():
    assert set(CURVE_MODELS) | set(TABLE9) == set(MODELS) and len(MODELS) == 41
    for name, tag in MODELS.values():
        assert name.startswith("hf-hub:") or not tag or tag in open_clip.list_pretrained_tags_by_model(name), (
            name,
            tag,
        )
