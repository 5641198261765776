"""Presets, dry runs and settings that are refused before a run starts."""

import re
from pathlib import Path

import pytest
import torch
from flame_runs import EVAL, bank, captions, embed_flags, tiny, tiny_llm  # noqa: F401
from scripts import SHARDS, one_sentence

from flame import config
from flame.model import create_model

SCRIPT = "flame.train"

ERRORS = {
    "paper preset without data": (["cc3m-vitb16"], "--data is missing"),
    "paper preset without bank": (["cc3m-vitb16", "--data", f"{SHARDS}/00000.tar"], "--bank is missing"),
    "missing shard": (["emoji", "--data", "/nowhere/{0..3}.tar"], "shard /nowhere/0.tar does not exist"),
    "missing bank": (["emoji", "--bank", "/nowhere"], "flame.embed"),
    "unknown model": (["emoji", "--model", "RN-1"], "'RN-1' is not an open_clip config"),
    "bank of other data": (["emoji", "--data", f"{SHARDS}/00001.tar"], "has no embeddings of sample"),
    "no caption file": (["emoji-clip", "--captions", "no.json"], "caption file no.json does not exist"),
    "image that patches do not tile": (["emoji", "--image-size", "41"], "patches of 8 pixels do not tile"),
    "too many facets": (["emoji", "--facet-ids", "0", "1", "--facets", "3"], "--facets 3"),
    "facets beyond the bank": (["emoji", "--facet-ids", "11", "--facets", "1"], "has 11 facets an image"),
    "facets twice": (["emoji", "--facet-ids", "1", "1", "--facets", "1"], "should be different numbers"),
    "less than a batch": (["emoji", "--batch-size", "161"], "less than one batch of 161"),
    "no steps between logs": (["emoji", "--log-every", "0"], "--log-every must be at least 1"),
    "fp16 on a CPU": (["emoji", "--precision", "fp16", "--device", "cpu"], "fp16 needs a GPU"),
    "no learning": (["emoji", "--lr", "0"], "--lr must be above 0"),
    "no width": (["emoji", "--hidden-dim", "0"], "--hidden-dim must be at least 1"),
    "negative decay": (["emoji", "--weight-decay", "-1"], "--weight-decay must be at least 0"),
    "scale beyond its clamp": (["emoji", "--logit-scale", "1000"], "--logit-scale must be in 1..100"),
    "bias that is no number": (["emoji", "--dry-run", "--logit-bias", "nan"], "--logit-bias must be finite"),
    "no epsilon": (["emoji", "--dry-run", "--eps", "nan"], "--eps must be finite"),
    "negative size": (["emoji", "--dataset-size", "-3"], "--dataset-size must be at least 1"),
    "curve of a retrieval set": (
        ["emoji-clip", "--eval-every", "1", "--eval-set", EVAL / "retrieval_ood"],
        "is a retrieval set",
    ),
    "curve of texts that are not embedded": (
        ["emoji", "--eval-every", "1", "--eval-set", EVAL / "subgroups_ood"],
        "not embedded",
    ),
    "no evaluation set": (["emoji", "--eval-every", "1", "--eval-set", "/nowhere"], "/nowhere does not exist"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_command_line_errors(in_process, tiny: list, tmp_path: Path, case: str):
    (preset, *options), message = ERRORS[case]
    defaults = tiny if preset.startswith("emoji") else ["--precision", "fp32"]
    result = in_process(preset, *defaults, "--out", tmp_path / "run", *options)
    assert result.code == 2 and message in result.err and one_sentence(result.err), result.err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("preset", ["emoji", "emoji-clip", "cc3m-vitb16"])
@pytest.mark.usefixtures("no_initial_values")
def test_dry_run(in_process, preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)  # where there is no data
    result = in_process(preset, "--dry-run")
    assert result.code == 0 and not list(tmp_path.iterdir()), result.err
    assert all(word in result.out for word in ("parameters", "samples", "batch", "steps"))
    assert float(re.search(r"memory estimate +([\d.]+) GiB", result.out)[1]) > 0
    if preset == "cc3m-vitb16":
        assert re.search(r"steps +30,240\b", result.out) and "327.3 GB" in result.out
        assert re.search(r"learning rate +lr 5.000e-04 at step 2,000", result.out)


def test_the_nce_preset_has_no_bias():
    with torch.device("meta"):
        assert create_model(config.PRESETS["cc3m-vitb16-nce"][1], 8).logit_bias is None
