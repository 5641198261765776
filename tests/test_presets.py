"""`make presets`: one row for each preset, with the paper's names."""

import dataclasses
import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from scripts import ROOT, finished, one_sentence

from shared import presets


def offered(folder: str) -> dict[str, Any]:
    """{`SCRIPT PRESET`: configuration} of the presets of a folder's scripts; for recipes, the fields that they set."""
    found = {}
    for file in (ROOT / folder).glob("*.py"):
        for table in re.findall(r"preset_cli\((\w+)\)", file.read_text()):
            known = getattr(importlib.import_module(f"{folder}.{file.stem}"), table)
            found |= {f"{file.stem} {name}": config for name, (_, config) in known.items()}
    if folder == "tldr_reduction":
        recipes = importlib.import_module("tldr_reduction.config").RECIPES
        found |= {f"reduce --recipe {name}": recipe for name, recipe in recipes.items()}
    return found


@pytest.mark.parametrize("folder", presets.folders())
def test_each_preset_has_a_row_and_each_row_a_preset(folder: str):
    listed = [row["preset"] for row in presets.rows(folder)]
    models = [name for name in listed if name.startswith("measure ")]  # of a table of models, not of presets
    assert len(listed) == len(set(listed)) and set(listed) - set(models) == set(offered(folder))
    known = importlib.import_module(f"{folder}.config").MODELS if models else {}
    assert {name.removeprefix("measure ").strip("'") for name in models} == set(known)


@pytest.mark.parametrize("folder", presets.folders())
def test_what_has_no_preset_is_named_with_the_reason(folder: str, capsys: pytest.CaptureFixture):
    sources = {row["paper's table and row"] for row in presets.rows(folder)}
    missing = presets.left_out(folder)
    assert missing and all(row["no preset"] and row["paper's table and row"] not in sources for row in missing)
    presets.main(folder)
    printed = capsys.readouterr().out
    assert all(row["paper's table and row"] in printed and row["no preset"] in printed for row in missing)


@pytest.mark.parametrize("folder", presets.folders())
def test_each_setting_of_a_papers_tables_has_a_preset_or_a_reason(folder: str):
    """tests/presets/tables.json lists the settings of tables and figures, as far as they could be read."""
    listed = json.loads((ROOT / "tests/presets/tables.json").read_text(encoding="utf-8"))[folder]
    sources = {row["paper's table and row"] for row in presets.rows(folder)}
    reasons = {row["paper's table and row"] for row in presets.left_out(folder)}
    assert len(listed) == len(set(listed))
    assert not set(listed) - sources - reasons, "neither a preset nor in LEFT_OUT"
    assert not reasons - set(listed), "in LEFT_OUT, but not in tables.json"


@pytest.mark.parametrize("folder", presets.folders())
def test_embedded_presets_and_no_others_run_on_a_cpu(folder: str):
    for row in presets.rows(folder):
        name = row["preset"].split()[-1]
        assert (row["data"] == "embedded corpus") == (name.split("-")[0] in ("emoji", "minilm", "scenes")), row
        assert all(row.values()), row


CORPUS = set(  # what an emoji preset may say beside its small one: where the corpus is, and what suits drawings
    """data eval_set eval_every sets language_sets gallery language_gallery bank captions raw short long states backbone
    vocab teacher init external_teacher w_external groups num_concepts model image_size crop crop_ratio crop_scale
    augmentation epochs ignore_equal_captions""".split()
)


BACKBONE = {"lexvla": set("adapter_hidden adapter_width lambda_image lambda_text penalty_warmup warmup".split())}


def small_presets(folder: str) -> dict[str, Any]:
    return {name: cfg for name, cfg in offered(folder).items() if name.split()[1].startswith("small")}


@pytest.mark.parametrize("folder", presets.folders())
def test_small_presets_are_the_embedded_ones_without_the_corpus(folder: str):
    known, small = offered(folder), small_presets(folder)
    assert small and {name.split()[0] for name in small} & {"train", "pretrain"}
    for name, cfg in small.items():
        assert not cfg.data and "emoji/" not in repr(cfg) and not getattr(cfg, "eval_every", 0), name
        name = name.replace("small", "emoji")
        ours, theirs = (dataclasses.asdict(each) for each in (cfg, known.get(name) or known[f"{name}-00"]))
        assert {field for field in ours if ours[field] != theirs[field]} <= CORPUS | BACKBONE.get(folder, set()), name


@pytest.mark.parametrize("folder", presets.folders())
def test_small_presets_ask_for_data(folder: str, in_process, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for name in small_presets(folder):
        script, preset = name.split()
        result = in_process(preset, module=f"{folder}.{script}")
        assert result.code == 2 and one_sentence(result.err) and "--data is missing" in result.err, (name, result.err)
        assert not list(tmp_path.iterdir())


def test_numbers_of_claims_are_the_papers():
    """Differences that study.py attributes to the papers follow from the numbers of this table."""
    number = {
        row["preset"]: row["the authors' number"]
        for f in ("protoclip", "attentive_mask_clip")
        for row in presets.rows(f)
    }

    def imagenet(name: str) -> float:
        return float(re.search(r"ImageNet zero-shot ([\d.]+)", number["train " + name])[1])

    assert imagenet("cc3m-rn50") - imagenet("cc3m-rn50-clip") == pytest.approx(2.01)
    one, none = imagenet("yfcc15m-vitb16-attentive-1x50"), imagenet("yfcc15m-vitb16-random-1x50")
    assert one - none == pytest.approx(4.5)


def test_command_line(in_process):
    found = in_process("flame", "--json", module="shared.presets")
    assert json.loads(finished(found).out) == presets.rows("flame")
    wrong = in_process("blip", module="shared.presets")
    assert wrong.code == 2 and "blip is not a paper's folder" in wrong.err and one_sentence(wrong.err)
