"""Presets, dry runs, and settings that are refused before a run starts."""

import dataclasses

import pytest
import torch
from test_tldr_reduction_train import PROGRAMS, SCRIPT, refused  # noqa: F401

from tldr_reduction import captioner, config, finetune, retrieval, train
from tldr_reduction.config import RECIPES

CAPTIONER, FINETUNE = PROGRAMS["captioner"][0], PROGRAMS["finetune"][0]
SCRIPTS = (
    (captioner, config.CAPTIONERS),
    (finetune, config.FINETUNES),
    (retrieval, config.RETRIEVALS),
    (train, config.PRESETS),
)
WRONG = {
    "no data": (["blip-cc3m"], "--data is missing"),
    "missing shard": (
        ["emoji-clip", "--data", "nowhere/{000..002}.tar", "--eval-every", "0"],
        "nowhere/000.tar does not",
    ),
    "no init": (["emoji", "--data", "x.tar"], "--init is missing", FINETUNE),
    "patch": (["emoji", "--data", "x.tar", "--image-size", "60"], "no multiple of --patch-size 16", CAPTIONER),
    "codes": (["emoji", "--data", "x.tar", "--code-dim", "48"], "cut into codes of --code-dim 48", CAPTIONER),
    "queue": (["emoji-blip", "--data", "x.tar", "--queue-size", "8", "--eval-every", "0"], "--queue-size 8 is smaller"),
    "tokens": (["emoji-clip", "--data", "x.tar", "--max-length", "99"], "--max-length 99 is not in 2..40"),
    "batch": (["emoji-clip", "--data", "x.tar", "--batch-size", "0"], "--batch-size must be at least 1"),
    "a BLIP in parts": (["emoji-blip", "--data", "x.tar", "--accumulate", "2"], "--accumulate is for --objective clip"),
    "a bag of words for a BLIP": (["emoji-blip", "--data", "x.tar", "--bag-of-words"], "is for --objective clip"),
    "rate": (["emoji-clip", "--data", "x.tar", "--lr-decay-rate", "-1"], "--lr-decay-rate must be at least 0"),
    "share": (["emoji-blip", "--data", "x.tar", "--momentum", "1.5"], "--momentum 1.5 is not in [0, 1]"),
    "width": (["emoji-blip", "--data", "x.tar", "--text-width", "0"], "--text-width must be at least 1"),
    "workers": (["emoji-blip", "--data", "x.tar", "--workers", "-1"], "--workers must be at least 0"),
    "uneven": (["emoji-clip", "--data", "x.tar", "--accumulate", "3"], "among 1 processes and 3 micro-batches in each"),
    "a lock without weights": (
        ["emoji-clip", "--data", "x.tar", "--eval-every", "0", "--lock-image"],
        "--lock-image has weights of EfficientNet-Lite0 only: --objective clip --clip-model Lite0-emoji, not ViT",
    ),
    "a lock by window": (
        ["emoji-scenes", "--data", "x.tar", "--window-shards", "1", "--dataset-size", "256"],
        "--lock-image computes the features of all images once",
    ),
    "device": (["emoji-clip", "--device", "cuda"], "--device cpu"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_training_flags(in_process, case):
    if case == "device" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    arguments, words, *module = WRONG[case]
    refused(in_process(*arguments, module=module[0] if module else SCRIPT), words)


def test_presets_are_the_tables():
    assert {"paper", "release_comment", "cc12m", "yfcc15m", "laion40m", "ratio-10", "clusters-10000"} <= set(RECIPES)
    presets = {name: cfg for name, (_, cfg) in config.PRESETS.items()}
    for name, (full, reduced, size) in config.SETS.items():
        assert (presets[f"blip-{name}"].expected, presets[f"blip-{name}-tldr"].expected) == (full, reduced)
        assert presets[f"blip-{name}"].image_size == size
    starts = {name: config.CAPTIONERS[name][1] for name in ("released", "paper", "xavier", "tags")}
    assert [cfg.num_codes for cfg in starts.values()] == [1024, 3000, 3000, 1600]
    assert [cfg.codebook_init for cfg in starts.values()] == ["uniform", "keywords", "xavier", "keywords"]
    assert all(cfg.text_init == "bert-base-uncased" for cfg in starts.values())


@pytest.mark.parametrize(("script", "preset"), [(script, name) for script, presets in SCRIPTS for name in presets])
def test_dry_runs_need_no_data(script, preset, capsys):
    cfg = dict(SCRIPTS)[script][preset][1]
    small = dict(width=64, layers=1, heads=2, text_width=64, text_layers=1, text_heads=2, code_dim=64, queue_size=1260)
    small |= dict(
        dataset_size=100_000, clip_model="ViT-emoji", lock_image=False, data="", image_size=32
    )  # to save time
    small = {name: value for name, value in small.items() if hasattr(cfg, name)}
    script.dry_run(dataclasses.replace(cfg, **small))
    printed = capsys.readouterr().out
    for word in ("parameters", "samples", "batch", "steps", "learning rate", "memory estimate"):
        assert word in printed


def test_a_run_has_exactly_its_steps_and_the_same_total_decay():
    preset = config.PRESETS["emoji-scenes"][1]
    whole = config.for_steps(dataclasses.replace(preset, steps=217), 31)
    assert dataclasses.replace(whole, steps=None) == preset  # the preset has seven epochs, of 31 steps here
    third = config.for_steps(dataclasses.replace(preset, steps=217), 10)
    assert (third.epochs, third.warmup) == (22, 10)  # the last epoch has seven steps
    assert third.lr_decay_rate**21.7 == pytest.approx(preset.lr_decay_rate**preset.epochs)
    assert config.total_steps(whole, 31) == config.total_steps(third, 10) == 217
    assert config.for_steps(preset, 10) is preset and config.total_steps(preset, 10) == 70
    assert config.for_steps(dataclasses.replace(preset, steps=3), 10).epochs == 1
    with pytest.raises(ValueError, match="--steps must be at least 1"):
        config.check_sizes(dataclasses.replace(preset, steps=0), 1)
