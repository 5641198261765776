"""Presets, dry runs and settings that are refused before a run starts."""

import dataclasses
import re
from pathlib import Path

import pytest
from scripts import ROOT, one_sentence
from test_protoclip_train import SCRIPT, SECONDS, SHARDS, TEACHER, TINY  # noqa: F401

from protoclip import config, train

ERRORS = {
    "paper preset without data": (["cc3m-rn50"], "--data is missing: it takes image-text shards"),
    "paper preset without teacher": (["cc3m-rn50", "--data", f"{SHARDS}/00000.tar"], "--external-teacher is missing"),
    "missing shard": (["emoji", "--data", "/nowhere/{0..3}.tar"], "shard /nowhere/0.tar does not exist"),
    "empty folder": (["emoji", "--data", str(ROOT / "shared")], "holds no .tar shard"),
    "missing teacher file": (["emoji", "--external-teacher", "no.npz"], "teacher file no.npz does not exist"),
    "teacher that is none": (["emoji", "--external-teacher", f"{SHARDS}/00000.tar"], "is no teacher file"),
    "teacher without PBT": (["emoji", "--no-back-translate"], "needs back translation"),
    "unknown model": (["emoji", "--model", "RN51"], "model 'RN51' is not an open_clip config"),
    "model without a plain text tower": (["emoji", "--model", "ViT-B-16-SigLIP"], "custom text tower"),
    "a rate that is no number": (["emoji", "--lr-text", "nan"], "--lr-text must be at least 0, not nan"),
    "gradients that ascend": (["emoji", "--max-grad-norm", "-1"], "--max-grad-norm must be above 0, not -1"),
    "no heads' width": (["emoji", "--projection-dim", "0"], "--projection-dim must be at least 1, not 0"),
    "no batch to plan": (["emoji", "--dry-run", "--batch-size", "0"], "--batch-size must be at least 1, not 0"),
    "no decay to plan": (["emoji", "--dry-run", "--beta2", "nan"], "--beta2 must be at least 0, not nan"),
    "an end before the start": (["emoji", "--dry-run", "--text-end", "-1"], "--text-end must be at least 0, not -1"),
    "nothing to keep": (["emoji", "--dry-run", "--keep-every", "-1"], "--keep-every must be at least 0, not -1"),
    "captions to classify": (
        ["emoji", "--eval-every", "1", "--eval-set", str(SHARDS.parent / "eval/retrieval_id")],
        "is a retrieval set: it must be a classification set",
    ),
    "more prototypes than samples": (["emoji", "--k", "161"], "--k 161 prototypes"),
    "less than a batch": (["emoji", "--episode-size", "31"], "--episode-size 31 is less than one batch of 32"),
    "LiT too late": (["emoji", "--lit-start", "4"], "--lit-start 4 is not in 2..3"),
    "no steps between logs": (["emoji", "--log-every", "0"], "--log-every must be at least 1"),
    "fp16 on a CPU": (["emoji", "--precision", "fp16", "--device", "cpu"], "fp16 needs a GPU"),
    "no evaluation set": (
        ["emoji", "--eval-every", "1", "--eval-set", "/nowhere"],
        "--eval-set /nowhere does not exist",
    ),
    "too large a window": (
        ["emoji", "--episode-shards", "2"],
        "--episode-shards must be in 1..1, the number of shards, not 2",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_command_line_errors(in_process, tmp_path: Path, case: str):
    (preset, *options), message = ERRORS[case]
    defaults = TINY if preset == "emoji" else []
    result = in_process(preset, *defaults, "--out", tmp_path / "run", *options)
    assert result.code == 2 and message in result.err and one_sentence(result.err), result.err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


DRY_RUNS = {  # parameters, projection heads, steps
    "small": (None, None, None),  # no published numbers
    "small-clip": (None, 0, None),
    "emoji": (None, None, None),
    "emoji-clip": (None, 0, None),
    "cc3m-rn50": ("106.7", 4.73, 156_400),
    "cc3m-rn50-clip": ("102.0", 0, 156_256),
    "cc3m-rn50-clip-light": ("102.0", 0, 156_256),
    "cc3m-rn50-1gpu": ("106.7", 4.73, 312_500),
    "cc3m-rn50-1gpu-clip": ("102.0", 0, 312_504),
}


@pytest.mark.parametrize("preset", train.PRESETS)
def test_dry_run(in_process, preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)  # where there is no data
    parameters, heads, steps = DRY_RUNS[preset]
    cfg = config.PRESETS[preset][1]
    steps = steps or cfg.episodes * cfg.steps_per_episode()
    result = in_process(preset, "--dry-run")
    assert result.code == 0 and result.err == "" and not list(tmp_path.iterdir())
    total, projection = (
        int(n.replace(",", "")) for n in re.search(r"parameters +([\d,]+) .*heads ([\d,]+)", result.out).groups()
    )
    assert parameters is None or f"{total / 1e6:.1f}" == parameters
    assert heads is None or round(projection / 1e6, 2) == heads
    assert re.search(rf"^steps +{steps:,} ", result.out, re.MULTILINE)
    assert float(re.search(r"memory estimate +([\d.]+) GiB", result.out)[1]) > 0
    assert all(word in result.out for word in ("learning rate", "samples", "batch", "loss weights"))


def test_dry_run_of_the_published_eight_processes(capsys):
    cfg = dataclasses.replace(config.PRESETS["cc3m-rn50"][1], model="ViT-emoji", image_size=16)
    train.dry_run(cfg, world_size=8)
    out = capsys.readouterr().out
    assert re.search(r"steps +156,400 \(391 an episode\)", out) and re.search(
        r"batch +512 \(64 in each of 8 processes\)", out
    )
    assert "at step 15,625" in out and "5.000e-04 image tower" in out


def test_recipes_of_the_paper_gather_as_upstream_does():
    """Gathering without gradients of other processes' rows, so gradient clipping sees upstream's norms."""
    for name, (_, cfg) in config.PRESETS.items():
        assert cfg.gather_with_grad == name.startswith(("emoji", "small")), name
