"""Presets, dry runs, and settings that are refused before a run starts."""

import dataclasses

import pytest
import torch
from scripts import refused

from shared import run
from tldr_reduction import config, train

SCRIPT = "tldr_reduction.train"

X = ["--data", "x.tar"]
WRONG = {
    "no init": (["small-finetune", *X], "--init is missing"),
    "patch": (["small-captioner", *X, "--image-size", "60"], "--patch-size 16"),
    "codes": (["small-captioner", *X, "--code-dim", "48"], "--code-dim 48"),
    "queue": (["small-blip", *X, "--queue-size", "8"], "--queue-size 8 is smaller"),
    "tokens": (["small-clip", *X, "--max-length", "99"], "2..40"),
    "a BLIP in parts": (["small-blip", *X, "--accumulate", "2"], "--accumulate"),
    "chosen samples": (["small-captioner", *X, "--stream", "--dataset-size", "64"], "chosen samples"),
    "device": (["small-clip", "--device", "cuda"], "--device cpu"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_training_flags(in_process, case):
    if case == "device" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    arguments, words = WRONG[case]
    refused(in_process(*arguments, module=SCRIPT), words)


@pytest.mark.parametrize("preset", config.PRESETS)
def test_dry_runs_need_no_data(preset, capsys):
    cfg = config.PRESETS[preset][1]
    small = dict(width=64, layers=1, heads=2, text_width=64, text_layers=1, text_heads=2, code_dim=64, queue_size=1260)
    small |= dict(dataset_size=100_000, clip_model="ViT-emoji", image_size=32)  # to save time
    small = {name: value for name, value in small.items() if hasattr(cfg, name)}
    train.dry_run(dataclasses.replace(cfg, **small), run.Process(0, 1, torch.device("cpu")))
    printed = capsys.readouterr().out
    for word in ("parameters", "samples", "batch", "steps", "learning rate", "memory estimate"):
        assert word in printed


def test_a_run_has_exactly_its_steps_and_the_same_total_decay():
    preset = config.Config(epochs=7, warmup=31, lr_decay_rate=0.65)
    whole = config.for_steps(dataclasses.replace(preset, steps=217), 31)
    assert dataclasses.replace(whole, steps=None) == preset  # the preset has seven epochs, of 31 steps here
    third = config.for_steps(dataclasses.replace(preset, steps=217), 10)
    assert (third.epochs, third.warmup) == (22, 10)  # the last epoch has seven steps
    assert third.lr_decay_rate**21.7 == pytest.approx(preset.lr_decay_rate**preset.epochs)
    assert config.total_steps(whole, 31) == config.total_steps(third, 10) == 217
    assert config.for_steps(preset, 10) is preset and config.total_steps(preset, 10) == 70
    assert config.for_steps(dataclasses.replace(preset, steps=3), 10).epochs == 1
    with pytest.raises(ValueError, match="--steps must be at least 1"):
        dataclasses.replace(preset, steps=0).check(1)
