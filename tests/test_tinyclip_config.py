"""Presets, dry runs and settings that are refused before a run starts."""

import copy
import dataclasses
import re
from pathlib import Path

import pytest
import torch
from scripts import SHARDS, one_sentence
from tinyclip_runs import MASKS, TINY

from tinyclip import config
from tinyclip.config import PRESETS
from tinyclip.geometry import CONFIGS
from tinyclip.inheritance import random_student
from tinyclip.model import CLIP

SCRIPT = "tinyclip.train"

ERRORS = {
    "paper preset without data": (["manual-61M-29M"], "--data is missing"),
    "missing shard": (["emoji-teacher", "--data", "/nowhere/{0..3}.tar"], "/nowhere/0.tar does not exist"),
    "missing teacher": (["emoji", "--init", "None", "--teacher", "/nowhere"], "--teacher /nowhere does not exist"),
    "missing weights": (["emoji-contrastive", "--init", "/nowhere"], "--init /nowhere does not exist"),
    "a teacher that is none": (["emoji", "--init", "None", "--teacher", f"{SHARDS}/00000.tar"], "is not a checkpoint"),
    "other weights": (
        ["emoji", "--init", "None", "--teacher", "ViT-L-14@nothing"],
        "ViT-L-14@nothing",
    ),
    "affinity without a teacher": (["emoji", "--teacher", "None"], "needs --teacher"),
    "unknown model": (["emoji-teacher", "--model", "RN51"], "--model 'RN51' is none of"),
    "alpha": (["emoji-teacher", "--alpha", "2"], "--alpha must be at most 1"),
    "temperature": (["emoji-teacher", "--logit-scale", "0"], "--logit-scale must be above 0"),
    "pruning too late": (["emoji-auto", "--prune-step", "8"], "--prune-step 8"),
    "falling sparsity": (["emoji-auto", *MASKS, "--start-sparsity", "0.9"], "--start-sparsity 0.9"),
    "masks on a ResNet": (["emoji-auto", *MASKS, "--model", "RN50", "--image-size", "32"], "ResNet"),
    "too few pairs": (["emoji-teacher", "--batch-size", "97"], "96 pairs"),
    "no steps": (["emoji-teacher", "--steps", "0"], "--steps must be at least 1"),
    "no steps between logs": (["emoji-teacher", "--log-every", "0"], "--log-every must be at least 1"),
    "a stream in memory": (["emoji-teacher", "--stream"], "leave out --keep-in-memory"),
    "one tower of none": (["emoji-teacher", "--inherit-only", "image"], "--inherit-only"),
    "one tower under masks": (["emoji-auto", *MASKS, "--inherit-only", "text"], "--init without --masks"),
    "random channels of nothing": (["emoji-teacher", "--inherit", "random"], "--init"),
    "a beta that forgets nothing": (["emoji-teacher", "--beta2", "1"], "--beta2 must be below 1"),
    "steps of no length": (["emoji-teacher", "--eps", "inf"], "--eps must be finite"),
    "patches that do not fit": (["emoji-teacher", "--image-size", "20"], "multiple of patch_size 8"),
    "fp16 on a CPU": (["emoji-teacher", "--precision", "fp16", "--device", "cpu"], "fp16 needs a GPU"),
    "a rate that is no number": (["emoji-teacher", "--lr", "nan"], "--lr must be finite"),
    "a loss that rewards": (["emoji-teacher", "--weight", "-1"], "--weight must be at least 0"),
    "gradients of no norm": (["emoji-teacher", "--max-grad-norm", "0"], "--max-grad-norm must be above 0"),
    "less than no data": (["emoji-teacher", "--dataset-size", "-3"], "--dataset-size must be at least 1"),
    "gates that close nothing": (["emoji-auto", *MASKS, "--lambda-lr", "0.2"], "--lambda-lr must be below 0"),
    "a ResNet of few pixels": (["emoji-teacher", "--model", "RN50"], "--image-size 16 is too small"),
    "a teacher that is a folder": (["emoji", "--teacher", "."], "folder without weights"),
    "no batch to plan": (["emoji-teacher", "--dry-run", "--batch-size", "0"], "--batch-size must be at least 1"),
    "scenes that are not there": (["emoji", "--data", "data/scenes-x/train"], "builds it"),
    "captions to classify": (
        ["emoji-teacher", "--eval-every", "1", "--eval-set", str(SHARDS.parent / "eval/retrieval_id")],
        "is a retrieval set",
    ),
    "no pixels": (["emoji-teacher", "--image-size", "0"], "--image-size must be at least 1"),
    "evaluation before it starts": (["emoji-teacher", "--eval-every", "-1"], "--eval-every must be at least 0"),
    "no evaluation set": (["emoji-teacher", "--eval-every", "1", "--eval-set", "/nowhere"], "--eval-set /nowhere"),
}


@pytest.mark.usefixtures("embedded_corpus")
@pytest.mark.parametrize("case", ERRORS)
def test_command_line_errors(in_process, tmp_path: Path, case: str):
    (preset, *options), message = ERRORS[case]
    defaults = TINY if preset.startswith("emoji") else []
    result = in_process(preset, *defaults, "--out", tmp_path / "run", *options)
    assert result.code == 2 and message in result.err and one_sentence(result.err), result.err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.usefixtures("no_initial_values")
def test_dry_run(in_process, preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)  # where there is no data
    cfg = config.PRESETS[preset][1]
    result = in_process(preset, "--dry-run")
    assert result.code == 0 and result.err == "" and not list(tmp_path.iterdir())
    total = int(re.search(r"parameters +([\d,]+) ", result.out)[1].replace(",", ""))
    shape = copy.deepcopy(CONFIGS[cfg.model])
    shape["vision"]["image_size"] = cfg.image_size or shape["vision"]["image_size"]
    with torch.device("meta"):
        student = random_student(cfg)
    assert student.clip.geometry == CLIP(**shape).geometry | {"quick_gelu": False}
    assert total == sum(p.numel() for p in student.parameters())
    steps = ".* --data" if cfg.epochs else f"{cfg.steps:,}"
    assert re.search(rf"^steps +{steps}$", result.out, re.MULTILINE) and ("masks  " in result.out) == cfg.masks
    assert cfg.epochs or f"{cfg.steps * cfg.batch_size:,}" in result.out
    assert float(re.search(r"memory estimate +([\d.]+) GiB", result.out)[1]) > 0


def test_epochs_stretch_the_schedule(in_process):
    """`small-auto` has 300 steps, 120 of them with masks; two epochs of 5,120 pairs have 40 steps."""
    result = in_process("small-auto", "--dry-run", "--epochs", "2", "--dataset-size", "5120")
    assert re.search(r"^steps +40$", result.out, re.M) and re.search(r"^pruned +at step 16,", result.out, re.M)
    cfg = PRESETS["small-auto"][1].in_steps(20)
    assert (cfg.steps, cfg.warmup, cfg.sparsity_warmup, cfg.prune_step) == (240, 24, 48, 96)
    with pytest.raises(ValueError, match="--prune-step 1"):
        dataclasses.replace(cfg, epochs=1).in_steps(1)
    assert PRESETS["emoji"][1].in_steps(7) == PRESETS["emoji"][1]


def test_every_row_of_the_model_zoo_is_a_preset():
    models = {cfg.model for _, cfg in PRESETS.values()}
    assert {name for name in CONFIGS if name.startswith("TinyCLIP")} <= models
