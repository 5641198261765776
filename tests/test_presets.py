"""`make presets`: one row for each preset, in the words of the paper."""

import importlib
import json
import re
from typing import Any

import pytest
from scripts import ROOT, finished, one_sentence

from shared import presets


def offered(folder: str) -> dict[str, Any]:
    """Presets as the folder's scripts offer them: `SCRIPT PRESET` -> configuration, of recipes what they set."""
    found = {}
    for file in (ROOT / folder).glob("*.py"):
        for table in re.findall(r"overridable_config_cli\((\w+)\)", file.read_text()):
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
    assert {name.removeprefix("measure ").strip("'") for name in models} <= set(known)


@pytest.mark.parametrize("folder", presets.folders())
def test_embedded_presets_and_no_others_run_on_a_cpu(folder: str):
    for row in presets.rows(folder):
        name = row["preset"].split()[-1]
        assert (row["data"] == "embedded corpus") == (name.split("-")[0] in ("emoji", "minilm")), row
        assert all(row.values()), row


def test_numbers_of_claims_are_the_papers():
    """The differences that study.py says the papers report follow from this table's numbers."""
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
    assert wrong.code == 2 and "blip is no paper's folder" in wrong.err and one_sentence(wrong.err)
