"""Towers by name: LoRA of a configuration, tokens of the frozen backbone."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from lexvla_runs import backbone, tiny_lm  # noqa: F401
from open_clip.transformer import QuickGELU, VisionTransformer
from scripts import SHARDS
from short_runs import add_sample, small_corpus
from timm.models.vision_transformer import checkpoint_filter_fn

from lexvla import config, lite0, tokens, towers
from lexvla.config import Config
from lexvla.model import ImageEncoder, LoRALinear
from lexvla.towers import with_lora
from shared import data, pretrained, run

SCRIPT = "lexvla.train"


def test_lora_of_a_run():
    """On all linear layers of the language model; on those of the last MLP, if what comes before is computed once."""
    lm = with_lora(tiny_lm(), Config(lora_rank=2))
    assert sum(isinstance(module, LoRALinear) for module in lm.modules()) == 14  # seven layers in each of two blocks
    lm = with_lora(tiny_lm(), Config(lora_rank=2, states="states.pt"))
    names = [name for name, module in lm.named_modules() if isinstance(module, LoRALinear)]
    assert names == [f"model.layers.1.mlp.{kind}_proj" for kind in ("gate", "up", "down")]


def encoder(backbone: Path, tmp_path: Path) -> tuple[Config, ImageEncoder]:
    cfg = dataclasses.replace(config.EMOJI, backbone=str(backbone), image_size=16, adapter_width=None, batch_size=8)
    cfg = dataclasses.replace(cfg, cache=str(tmp_path / "cache"), precision="fp32", out=str(tmp_path / "run"))
    return cfg, towers.create_image_encoder(cfg, torch.randn(40, 8), -1.0)


ALONE = run.Process(0, 1, torch.device("cpu"))


def test_frozen_tokens_are_the_backbones_and_are_kept(backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    cfg, image = encoder(backbone, tmp_path)
    pairs, transform = data.open_pairs(f"{SHARDS}/00000.tar", 30), towers.eval_transform(cfg.backbone, 16)
    encoded = tokens.frozen_tokens(cfg, pairs, image, ALONE)
    pixels = torch.stack([transform(pairs.read(row).image) for row in range(30)])
    found = torch.stack([encoded.read(row).image for row in range(30)])
    torch.testing.assert_close(found, image.frozen(pixels), rtol=1e-3, atol=1e-3)  # kept in half precision
    whole, image.backbone = image(pixels), tokens.Precomputed()
    torch.testing.assert_close(image(found), whole, rtol=1e-2, atol=1e-2)
    assert [encoded.read(row).caption for row in range(30)] == [pairs.caption(row) for row in range(30)]
    cfg, image = encoder(backbone, tmp_path)
    monkeypatch.setattr(tokens, "encoded", lambda *_: pytest.fail("encoded again"))
    again = tokens.frozen_tokens(cfg, pairs, image, ALONE)
    assert isinstance(again.tokens, np.memmap) and np.array_equal(again.tokens, encoded.tokens)


def test_tokens_of_replaced_images_have_another_file(backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Under the same names, as a .tsv has them."""
    cfg, image = encoder(backbone, tmp_path)
    (tmp_path / "pairs.tsv").write_text(f"title\tfilepath\none\t{tmp_path}/a.png\n")
    (tmp_path / "a.png").write_bytes(b"one")
    pairs, made = data.open_pairs(str(tmp_path / "pairs.tsv")), []
    monkeypatch.setattr(tokens, "encoded", lambda *_: made.append(1) or np.zeros((1, 2, 3), np.float16))
    for content in (b"one", b"another"):
        (tmp_path / "a.png").write_bytes(content) if content != b"one" else None
        tokens.frozen_tokens(cfg, pairs, image, ALONE)
        tokens.frozen_tokens(cfg, pairs, image, ALONE)
    assert len(made) == 2


def test_images_that_cannot_be_read_have_no_tokens(backbone: Path, tmp_path: Path):
    """The sample after them takes their place, as without tokens, and they are named with the reason."""
    folder = small_corpus(tmp_path / "corpus", 30, 1)
    add_sample(folder / "00000.tar", "broken", b"\x89PNG\r\n\x1a\n?", b"no picture")
    cfg, image = encoder(backbone, tmp_path)
    pairs = data.open_pairs(str(folder / "00000.tar"))
    encoded = tokens.frozen_tokens(cfg, pairs, image, ALONE)
    (lost,) = [row for row in range(len(pairs)) if np.isnan(encoded.tokens[row]).any()]
    assert str(pairs.keys[lost]) == "broken"
    broken = []
    assert data.read_or_next(encoded, lost, broken).key == str(pairs.keys[(lost + 1) % len(pairs)])
    assert [one.key for one in broken] == ["broken"]


def test_processes_share_out_the_images(backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    cfg, image = encoder(backbone, tmp_path)
    pairs, parts = data.open_pairs(f"{SHARDS}/00000.tar", 30), []
    whole = tokens.encoded(cfg, pairs, image, ALONE)
    monkeypatch.setattr(run, "gather_lists", lambda items, process: parts.extend(items) or parts)
    for rank in range(2):
        both = tokens.encoded(cfg, pairs, image, run.Process(rank, 2, torch.device("cpu")))
    assert sorted(row for rows, _ in parts for row in rows.tolist()) == list(range(30))
    np.testing.assert_allclose(both, whole, rtol=1e-3, atol=1e-3)


def test_maps_of_efficientnet_lite0_are_tokens(backbone: Path):
    """Of the pretrained network: its two maps, each normalised; wider tokens are mapped to the adapter's width."""
    network, maps = pretrained.efficientnet_lite0(), towers.create_backbone(lite0.NAME, 128)[0].eval()
    pixels = torch.randn(2, 3, 128, 64)
    with torch.no_grad():
        found, x = maps.forward_features(pixels), network.bn1(network.conv_stem(pixels))
        for number, stage in enumerate(network.blocks):
            x = stage(x)
            if number == 4:
                torch.testing.assert_close(found[:, 1:, :112], normalized(x), rtol=1e-3, atol=1e-3)
    assert found.shape == (2, 1 + 8 * 4, 432)
    last = torch.nn.functional.interpolate(x, scale_factor=2, mode="bilinear")
    torch.testing.assert_close(found[:, 1:, 112:], normalized(last), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found[:, 0], found[:, 1:].mean(1))
    cfg = dataclasses.replace(config.EMOJI, adapter_width=24, adapter_hidden=32)
    image = towers.create_image_encoder(cfg, torch.randn(40, 8), -1.0, pretrained=False)
    assert image(pixels).shape == (2, 40) and image.adapter.reduce.weight.shape == (24, 432)
    assert towers.patch_side(image.backbone) == 16 and not image.backbone.training
    assert towers.patch_side(towers.create_backbone(str(backbone), 16)[0]) == 8
    with pytest.raises(ValueError, match="multiples of 32"):
        image.frozen(torch.randn(1, 3, 48, 48))


def normalized(maps: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) -> (B, H W, C) of mean 0 and variance 1 over channels."""
    rows = maps.flatten(2).transpose(1, 2)
    rows = rows - rows.mean(-1, keepdim=True)
    return rows / (rows.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()


def test_clips_tower_has_the_activation_that_its_weights_were_trained_with():
    """The preset's tower and open_clip's of the same random state give the same tokens; with GELU they do not."""
    torch.manual_seed(0)
    sizes = dict(image_size=224, patch_size=16, width=768, layers=12, heads=12, mlp_ratio=4.0, output_tokens=True)
    theirs = VisionTransformer(**sizes, act_layer=QuickGELU).eval()
    state = {f"visual.{name}": value for name, value in theirs.state_dict().items()}
    pixels = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        x = theirs._embeds(pixels)
        tokens = theirs.ln_post(theirs.transformer(x))
        for name, agrees in ((config.PRESETS["cc12m-clip"][1].backbone, True), ("vit_base_patch16_clip_224", False)):
            ours, width = towers.create_backbone(name, 224, pretrained=False)
            kept = checkpoint_filter_fn(dict(state), ours)
            ours.load_state_dict({key: value for key, value in kept.items() if not key.startswith("head.")})
            image = ImageEncoder(ours, torch.nn.Identity(), torch.randn(4, 768))
            assert (width, towers.patch_side(ours)) == (768, 16)
            assert torch.allclose(image.frozen(pixels), tokens, rtol=1e-3, atol=1e-3) == agrees, name
    assert config.PRESETS["cc12m-clip"][1].backbone.endswith(".openai")


def test_images_have_the_statistics_of_the_backbones_own_configuration(tmp_path: Path):
    clip, imagenet, half = (0.48145466, 0.4578275, 0.40821073), (0.485, 0.456, 0.406), (0.5, 0.5, 0.5)
    for name in ("vit-clip", "vit", "mean"):
        (tmp_path / name).mkdir()
    made = {"image_processor_type": "ViTImageProcessor", "image_mean": half, "image_std": (0.2, 0.3, 0.4)}
    (tmp_path / "mean/preprocessor_config.json").write_text(json.dumps(made))
    for name, mean in (
        (config.PRESETS["cc12m-clip"][1].backbone, clip),
        ("vit_base_patch16_224", half),  # of timm's weights, unlike most others
        ("vit_small_patch14_dinov2", imagenet),
        (f"{tmp_path}/mean", half),
        (f"{tmp_path}/vit-clip", clip),  # by the name, since these folders do not state any
        (f"{tmp_path}/vit", imagenet),
    ):
        assert towers.statistics(name)[0] == pytest.approx(mean), name
    assert towers.statistics(f"{tmp_path}/mean")[1] == [0.2, 0.3, 0.4]
