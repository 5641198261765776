"""Presets, dry runs, and settings that are refused before a run starts."""

import dataclasses

import pytest
import torch
from test_tldr_reduction_train import SCRIPT, refused  # noqa: F401

from tldr_reduction import config, train
from tldr_reduction.config import RECIPES

WRONG = {
    "no data": (["blip-cc3m"], "--data is missing"),
    "missing shard": (
        ["emoji-clip", "--data", "nowhere/{000..002}.tar", "--eval-every", "0"],
        "nowhere/000.tar does not",
    ),
    "no init": (["emoji-finetune", "--data", "x.tar"], "--init is missing"),
    "patch": (["emoji-captioner", "--data", "x.tar", "--image-size", "60"], "no multiple of --patch-size 16"),
    "codes": (["emoji-captioner", "--data", "x.tar", "--code-dim", "48"], "cannot be cut into codes of --code-dim 48"),
    "queue": (["emoji-blip", "--data", "x.tar", "--queue-size", "8", "--eval-every", "0"], "--queue-size 8 is smaller"),
    "tokens": (["emoji-clip", "--data", "x.tar", "--max-length", "99"], "--max-length 99 is not in 2..40"),
    "batch": (["emoji-clip", "--data", "x.tar", "--batch-size", "0"], "--batch-size must be at least 1"),
    "a BLIP in parts": (["emoji-blip", "--data", "x.tar", "--accumulate", "2"], "--accumulate is for stage clip"),
    "uneven": (["emoji-clip", "--data", "x.tar", "--accumulate", "3"], "over 1 processes and 3 micro-batches in each"),
    "device": (["emoji-clip", "--device", "cuda"], "--device cpu"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_training_flags(in_process, case):
    if case == "device" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    arguments, words = WRONG[case]
    refused(in_process(*arguments), words)


def test_presets_are_the_tables():
    assert {"paper", "release_comment", "cc12m", "yfcc15m", "laion40m", "ratio-10", "clusters-10000"} <= set(RECIPES)
    presets = {name: cfg for name, (_, cfg) in config.PRESETS.items()}
    for name, (full, reduced, size) in config.SETS.items():
        assert (presets[f"blip-{name}"].expected, presets[f"blip-{name}-tldr"].expected) == (full, reduced)
        assert presets[f"blip-{name}"].image_size == size
    starts = {name: presets[f"captioner{name}"] for name in ("", "-paper", "-xavier", "-tags")}
    assert [cfg.num_codes for cfg in starts.values()] == [1024, 3000, 3000, 1600]
    assert [cfg.codebook_init for cfg in starts.values()] == ["uniform", "keywords", "xavier", "keywords"]
    assert all(cfg.text_init == "bert-base-uncased" for cfg in starts.values())


@pytest.mark.parametrize("preset", config.PRESETS)
def test_dry_runs_need_no_data(preset, capsys):
    cfg = config.PRESETS[preset][1]
    small = dict(width=64, layers=1, heads=2, text_width=64, text_layers=1, text_heads=2, code_dim=64, queue_size=1260)
    cfg = dataclasses.replace(
        cfg, **small, dataset_size=100_000, clip_model="ViT-emoji", data=""
    )  # for the time it takes
    train.dry_run(dataclasses.replace(cfg, image_size=32))
    printed = capsys.readouterr().out
    for word in ("parameters", "samples", "batch", "steps", "learning rate", "memory estimate"):
        assert word in printed
