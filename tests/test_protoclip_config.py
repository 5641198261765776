"""Presets, dry runs and settings that are refused before a run starts."""

import re
from pathlib import Path

import pytest
from protoclip_runs import TINY
from scripts import ROOT, SHARDS, one_sentence

from protoclip import config, train

SCRIPT = "protoclip.train"

ERRORS = {
    "paper preset without data": (["cc3m-rn50"], "--data is missing"),
    "paper preset without teacher": (["cc3m-rn50", "--data", f"{SHARDS}/00000.tar"], "--external-teacher is missing"),
    "missing shard": (["emoji", "--data", "/nowhere/{0..3}.tar"], "/nowhere/0.tar does not exist"),
    "empty folder": (["emoji", "--data", str(ROOT / "shared")], "holds no .tar shard"),
    "missing teacher file": (["emoji", "--external-teacher", "no.npz"], "no.npz does not exist"),
    "teacher that is none": (["emoji", "--external-teacher", f"{SHARDS}/00000.tar"], "is no teacher file"),
    "teacher without PBT": (["emoji", "--no-back-translate"], "needs back translation"),
    "unknown model": (["emoji", "--model", "RN51"], "RN51"),
    "model without a plain text tower": (["emoji", "--model", "ViT-B-16-SigLIP"], "custom text tower"),
    "a rate that is no number": (["emoji", "--lr", "nan"], "--lr must be finite"),
    "gradients that ascend": (["emoji", "--max-grad-norm", "-1"], "--max-grad-norm must be above 0"),
    "no heads' width": (["emoji", "--projection-dim", "0"], "--projection-dim must be at least 1"),
    "no batch to plan": (["emoji", "--dry-run", "--batch-size", "0"], "--batch-size must be at least 1"),
    "no decay to plan": (["emoji", "--dry-run", "--beta2", "nan"], "--beta2 must be finite"),
    "nothing to keep": (["emoji", "--dry-run", "--keep-every", "-1"], "--keep-every must be at least 0"),
    "captions to classify": (
        ["emoji", "--eval-every", "1", "--eval-set", str(SHARDS.parent / "eval/retrieval_id")],
        "is a retrieval set",
    ),
    "more prototypes than samples": (["emoji", "--k", "161"], "--k 161 prototypes"),
    "less than a batch": (["emoji", "--episode-size", "31"], "--episode-size 31"),
    "LiT too late": (["emoji", "--lit-start", "4"], "2..3"),
    "no steps between logs": (["emoji", "--log-every", "0"], "--log-every must be at least 1"),
    "fp16 on a CPU": (["emoji", "--precision", "fp16", "--device", "cpu"], "fp16 needs a GPU"),
    "no evaluation set": (
        ["emoji", "--eval-every", "1", "--eval-set", "/nowhere"],
        "--eval-set /nowhere does not exist",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_command_line_errors(in_process, tmp_path: Path, case: str):
    (preset, *options), message = ERRORS[case]
    defaults = TINY if preset == "emoji" else []
    result = in_process(preset, *defaults, "--out", tmp_path / "run", *options)
    assert result.code == 2 and message in result.err and one_sentence(result.err), result.err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


DRY_RUNS = {  # parameters, steps
    "small": (None, None),  # no published numbers
    "small-clip": (None, None),
    "emoji": (None, None),
    "emoji-clip": (None, None),
    "cc3m-rn50": ("106.7", 156_400),
    "cc3m-rn50-clip": ("102.0", 156_256),
    "cc3m-rn50-clip-light": ("102.0", 156_256),
    "cc3m-rn50-1gpu": ("106.7", 312_500),
    "cc3m-rn50-1gpu-clip": ("102.0", 312_504),
}


@pytest.mark.parametrize("preset", train.PRESETS)
@pytest.mark.usefixtures("no_initial_values")
def test_dry_run(in_process, preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)  # where there is no data
    parameters, steps = DRY_RUNS[preset]
    cfg = config.PRESETS[preset][1]
    result = in_process(preset, "--dry-run")
    assert result.code == 0 and result.err == "" and not list(tmp_path.iterdir())
    total = int(re.search(r"parameters +([\d,]+) trained", result.out)[1].replace(",", ""))
    assert parameters is None or f"{total / 1e6:.1f}" == parameters
    assert re.search(rf"^steps +{steps or cfg.episodes * cfg.steps_per_episode:,}$", result.out, re.MULTILINE)
    assert float(re.search(r"memory estimate +([\d.]+) GiB", result.out)[1]) > 0


def test_recipes_of_the_paper_gather_as_upstream_does():
    """Gathering without gradients of other processes' rows, so gradient clipping sees upstream's norms."""
    for name, (_, cfg) in config.PRESETS.items():
        assert cfg.gather_with_grad == name.startswith(("emoji", "small")), name
