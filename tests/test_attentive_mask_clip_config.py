"""Presets, dry runs and settings that are refused before a run starts."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from attentive_mask_clip_runs import TINY
from scripts import ROOT, one_sentence

from attentive_mask_clip import config, train
from attentive_mask_clip.model import ACLIP, create_model

SCRIPT = "attentive_mask_clip.train"

ERRORS = {
    "paper preset without data": (["yfcc15m-vitb16"], "--data is missing"),
    "missing shard": (["emoji", "--data", "/nowhere/{0..3}.tar"], "/nowhere/0.tar does not exist"),
    "empty folder": (["emoji", "--data", str(ROOT / "shared")], "holds no .tar shard"),
    "unknown model": (["emoji", "--model", "vit_b32"], "--model is one of vit_s16"),
    "patches that do not tile": (["emoji", "--image-size", "22"], "patches of 5"),
    "blocks that do not tile": (["emoji", "--image-size", "25"], "blocks of 2x2"),
    "EMA view that does not tile": (["emoji", "--ema-image-size", "11"], "--ema-image-size 11 cannot be cut"),
    "nothing kept": (["emoji", "--keep-ratio", "0"], "--keep-ratio must be above 0"),
    "too much kept": (["emoji", "--keep-ratio", "1.5"], "--keep-ratio must be at most 1"),
    "a text tower that unlearns": (["emoji", "--text-lr", "-1"], "--text-lr must be at least 0"),
    "no learning rate": (["emoji", "--lr", "nan"], "--lr must be finite"),
    "a loss that rewards": (["emoji", "--byol-weight", "-3"], "--byol-weight must be at least 0"),
    "no temperature": (["emoji", "--temperature", "0"], "--temperature must be above 0"),
    "less than no data": (["emoji", "--dataset-size", "-7"], "--dataset-size must be at least 1"),
    "fewer than no workers": (["emoji", "--workers", "-1"], "--workers must be at least 0"),
    "no batch": (["emoji", "--dry-run", "--batch-size", "0"], "--batch-size must be at least 1"),
    "an uneven plan": (["emoji", "--dry-run", "--accumulate", "3"], "--batch-size 32 cannot be divided evenly"),
    "a beta that forgets nothing": (["emoji", "--beta2", "1"], "--beta2 must be below 1"),
    "no pixels": (["emoji", "--dry-run", "--image-size", "0"], "--image-size must be at least 1"),
    "no crop for SimCLR": (["emoji", "--ssl-crop-scale", "0"], "--ssl-crop-scale must be above 0"),
    "momentum above 1": (["emoji", "--ema-momentum", "1.1"], "--ema-momentum must be at most 1"),
    "long warm-up": (["emoji", "--warmup-epochs", "4"], "--warmup-epochs 4.0 must be in 0..3"),
    "less than a batch": (["emoji", "--dataset-size", "31"], "batch of 32"),
    "one pair for BatchNorm": (["emoji", "--batch-size", "1"], "BatchNorm"),
    "uneven micro-batches": (["emoji", "--accumulate", "3"], "--batch-size 32 cannot be divided evenly"),
    "no steps between logs": (["emoji", "--log-every", "0"], "--log-every must be at least 1"),
    "fp16 on a CPU": (["emoji", "--precision", "fp16", "--device", "cpu"], "fp16 needs a GPU"),
    "the best of nothing": (["emoji", "--keep-best"], "--eval-every"),
    "no evaluation set of CC3M": (["cc3m-vitb16", "--data", "x"], "--eval-set data/wds_imagenet1k does not exist"),
    "no evaluation set": (
        ["emoji", "--eval-every", "1", "--eval-set", "/nowhere"],
        "--eval-set /nowhere does not exist",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_command_line_errors(embedded_corpus: None, in_process, tmp_path: Path, case: str):
    (preset, *options), message = ERRORS[case]
    defaults = TINY if preset == "emoji" else []
    result = in_process(preset, *defaults, "--out", tmp_path / "run", *options)
    assert result.code == 2 and message in result.err and one_sentence(result.err), result.err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("choice", [["--mask", "low"], ["--views", "3"]])
def test_unknown_choices_are_refused(in_process, choice: list[str]):
    result = in_process("emoji", *choice)
    assert result.code == 2 and choice[0] in result.err and "Traceback" not in result.err


def thin_towers(method: str, preset: str, **settings):
    """Replace the towers by small ones with the preset's geometry."""
    geometry = dict(image_size=40, patch_size=5) if preset == "emoji" else dict(image_size=224, patch_size=16)
    return create_model(method, "emoji", **{**geometry, "vision_layers": 1, "text_layers": 1, **settings})


@pytest.mark.parametrize("preset", config.PRESETS)
@pytest.mark.usefixtures("no_initial_values")
def test_dry_run(embedded_corpus: None, in_process, preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)  # where there is no data
    cfg = config.PRESETS[preset][1]
    if preset not in ("emoji", "small", "small-slip", "small-clip", "yfcc15m-vits16"):
        monkeypatch.setattr("attentive_mask_clip.model.create_model", thin_towers)
    emoji = cfg.data == "data/emoji/train"
    if emoji:  # counts the samples of the corpus
        (tmp_path / "data").symlink_to(ROOT / "data")
    samples = cfg.dataset_size or 500_000  # nobody has said how much of CC3M and CC12M there was
    given = [] if emoji or cfg.dataset_size else ["--dataset-size", samples]
    result = in_process(preset, "--dry-run", *given)
    assert result.code == 0 and result.err == "" and {path.name for path in tmp_path.iterdir()} <= {"data"}
    assert all(word in result.out for word in ("parameters", "learning rate", "samples", "batch", "patches"))
    assert float(re.search(r"memory estimate +([\d.]+) GiB", result.out)[1]) > 0
    assert ("EMA momentum 9." in result.out) == (cfg.method == "aclip")
    if not cfg.data:
        assert re.search(rf"^steps +{samples // cfg.batch_size * cfg.epochs:,}$", result.out, re.MULTILINE)
    if not cfg.data and not preset.startswith("small"):
        masked = cfg.method == "aclip"
        kept = {"random": 98, "attentive": 100, "high": 100}[cfg.mask]
        found = re.search(rf"^patches +196, {kept} .* {cfg.views} views", result.out, re.MULTILINE)
        assert bool(found) == masked


def test_a_dry_run_plans_for_captions_of_full_length():
    model = create_model("aclip", "test")
    images, boxes, tokens = train.blank_batch(model, config.Config(model="test", views=1))
    assert (len(images), boxes.shape) == (2, (2, 2, 4)) and (tokens.argmax(dim=1) == model.context_length - 1).all()


def test_dry_run_without_a_number_of_samples(in_process, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("attentive_mask_clip.model.create_model", thin_towers)
    result = in_process("cc3m-vitb16", "--dry-run")
    assert result.code == 0 and "--data" in result.out and "learning rate" not in result.out


@pytest.mark.parametrize("preset", config.PRESETS)
def test_sizes_of_presets(preset: str):
    cfg = config.PRESETS[preset][1]
    cfg.check_patches()
    with torch.device("meta"):
        model = create_model(cfg.method, cfg.model, **cfg.model_settings())
    expected = {"emoji": 0.6, "scenes": 0.6, "vit_s16": 21.7, "vit_b16": 85.8, "vit_l16": 303.3}[cfg.model]
    assert round(sum(p.numel() for p in model.visual.parameters()) / 1e6, 1) == expected


def test_parameters_of_the_paper():
    for method, expected in {"clip": 149.6, "slip": 170.6, "aclip": 176.9}.items():
        with torch.device("meta"):
            model = create_model(
                method, "vit_b16", **dataclasses.replace(config.Config(), method=method).model_settings()
            )
        ema = 0 if not isinstance(model, ACLIP) else sum(online.numel() for _, online in model._pairs())
        total = sum(p.numel() for p in model.parameters()) - ema
        assert round(total / 1e6, 1) == expected, (method, total)
