"""Presets, dry runs and settings that are refused before a run starts."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from scripts import ROOT

from attentive_mask_clip import config, train
from attentive_mask_clip.model import ACLIP, create_model

SCRIPT = "attentive_mask_clip.train"


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
