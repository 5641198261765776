"""`make presets`: one row for each preset, with the paper's names."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from scripts import one_sentence
from short_runs import offered

from shared import presets


@pytest.mark.parametrize("folder", presets.folders())
def test_the_table_lists_every_preset_with_its_row(folder: str, capsys: pytest.CaptureFixture):
    listed = {
        f"{script} {name}": row for script, of in presets.scripts(folder).items() for name, (row, _) in of.items()
    }
    models = {name for name in listed if name.startswith("evaluate ")}  # of a table of models, not of presets
    assert set(listed) - models == set(offered(folder)) and all(listed.values())
    presets.main(folder)
    printed = capsys.readouterr().out
    assert all(f"{folder}.{name} " in printed and row in printed for name, row in listed.items())


CORPUS = set(  # what an emoji preset may say beside its small one: where the corpus is, and what suits drawings
    """data eval_set eval_every sets language_sets gallery language_gallery bank captions raw short long states backbone
    vocab teacher init external_teacher w_external groups num_concepts model image_size episodes lr warmup
    crop_scale augmentation epochs ignore_equal_captions""".split()
)


BACKBONE = {
    "protoclip": {"k", "nredo"},
    "lexvla": set("adapter_hidden adapter_width lambda_image lambda_text penalty_warmup warmup lowercase".split()),
}


def small_presets(folder: str) -> dict[str, Any]:
    return {name: cfg for name, cfg in offered(folder).items() if name.split()[1].startswith("small")}


@pytest.mark.parametrize("folder", presets.folders())
def test_small_presets_are_the_embedded_ones_without_the_corpus(folder: str):
    known, small = offered(folder), small_presets(folder)
    assert small and {name.split()[0] for name in small} & {"train", "pretrain"}
    for name, cfg in small.items():
        assert not cfg.data and "emoji/" not in repr(cfg) and not getattr(cfg, "eval_every", 0), name
        name = name.replace("small", "emoji")
        if folder in ("nmtune", "tldr_reduction"):  # they have no embedded presets
            continue
        ours, theirs = (dataclasses.asdict(each) for each in (cfg, known[name]))
        assert {field for field in ours if ours[field] != theirs[field]} <= CORPUS | BACKBONE.get(folder, set()), name


@pytest.mark.parametrize("folder", presets.folders())
def test_small_presets_ask_for_data(folder: str, in_process, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for name in small_presets(folder):
        script, preset = name.split()
        result = in_process(preset, module=f"{folder}.{script}")
        assert result.code == 2 and one_sentence(result.err) and "--data is missing" in result.err, (name, result.err)
        assert not list(tmp_path.iterdir())


def test_command_line(in_process):
    wrong = in_process("blip", module="shared.presets")
    assert wrong.code == 2 and "blip is not a paper's folder" in wrong.err and one_sentence(wrong.err)
