"""Presets, dry runs and settings that are refused before a run starts."""

import copy
import dataclasses
import re
from pathlib import Path

import pytest
import torch

from tinyclip import config
from tinyclip.config import PRESETS
from tinyclip.geometry import CONFIGS
from tinyclip.inheritance import random_student
from tinyclip.model import CLIP

SCRIPT = "tinyclip.train"


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
