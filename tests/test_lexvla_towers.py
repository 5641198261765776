"""Towers by name: LoRA of a configuration, tokens of the frozen backbone."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from open_clip.transformer import QuickGELU, VisionTransformer
from test_lexvla_model import tiny_lm
from test_lexvla_train import SCRIPT, SECONDS, SHARDS, backbone, folder  # noqa: F401
from timm.models.vision_transformer import checkpoint_filter_fn
from torch.utils.data import Subset

from lexvla import config, towers, train
from lexvla.config import Config
from lexvla.model import ImageEncoder, LoRALinear
from lexvla.towers import with_lora
from shared import data, pretrained, run


def test_lora_targets_of_a_run():
    lm = with_lora(tiny_lm(), Config(lora_rank=2, lora_targets=("q_proj", "down_proj")))
    assert sum(isinstance(module, LoRALinear) for module in lm.modules()) == 4  # two layers in each of two blocks
    lm = with_lora(tiny_lm(), Config(lora_rank=2, lora_targets=("q_proj", "down_proj"), states="states.pt"))
    assert [name for name, m in lm.named_modules() if isinstance(m, LoRALinear)] == ["model.layers.1.mlp.down_proj"]
    for targets, sentence in (
        (("q_proj", "v_prj"), "--lora-targets v_prj: the LM's layers are down_proj, gate_proj"),
        (("q_proj", "lm_head"), "text codebook"),
    ):
        with pytest.raises(ValueError, match=sentence):
            with_lora(tiny_lm(), Config(lora_rank=2, lora_targets=targets))
    with pytest.raises(ValueError, match="none of q_proj"):
        with_lora(tiny_lm(), Config(lora_rank=2, lora_targets=("q_proj",), states="states.pt"))


def test_frozen_tokens_are_the_backbones_and_are_kept(backbone: Path, tmp_path: Path):
    cfg = dataclasses.replace(config.EMOJI, backbone=str(backbone), image_size=16, adapter_width=None)
    image = towers.create_image_encoder(cfg, torch.randn(40, 8), -1.0)
    pairs, alone = data.open_pairs(f"{SHARDS}/00000.tar", 30), run.Process(0, 1, torch.device("cpu"))
    transform = towers.eval_transform(cfg.backbone, 16)
    file = tmp_path / "cache/tokens.npy"
    encoded = train.TokenDataset(pairs, transform, image, alone, "fp32", file)
    pixels = torch.stack([transform(pairs.read(row).image) for row in range(30)])
    tokens = torch.stack([encoded[i][0] for i in range(30)])
    torch.testing.assert_close(tokens, image.frozen(pixels), rtol=1e-3, atol=1e-3)  # kept in half precision
    torch.testing.assert_close(image(tokens), image(pixels), rtol=1e-2, atol=1e-2)
    assert [encoded[i][1] for i in range(30)] == [pairs.caption(row) for row in range(30)]
    again = train.TokenDataset(
        pairs, transform, image, alone, "fp32", file
    )  # from the file, where the first image agrees
    assert isinstance(again.tokens, np.memmap) and all(torch.equal(again[i][0], encoded[i][0]) for i in range(30))
    assert [again[i][1:] for i in range(30)] == [encoded[i][1:] for i in range(30)]
    zeros = np.zeros_like(encoded.tokens)
    file.unlink()  # the old one stays, where it is mapped
    np.save(file, zeros)
    third = train.TokenDataset(pairs, transform, image, alone, "fp32", file)
    assert torch.equal(third[7][0], encoded[7][0]) and np.load(file).any()
    file.unlink()
    file.write_bytes(b"no array")
    assert torch.equal(train.TokenDataset(pairs, transform, image, alone, "fp32", file)[7][0], encoded[7][0])


def test_tokens_of_replaced_images_have_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Under the same names, as a .tsv has them."""
    monkeypatch.setattr(train, "backbone_fingerprint", lambda image: "the same")
    monkeypatch.setattr(train, "TokenDataset", lambda *given: given[-1])
    (tmp_path / "pairs.tsv").write_text(f"title\tfilepath\none\t{tmp_path}/a.png\n")
    pairs, files = data.open_pairs(str(tmp_path / "pairs.tsv")), []
    for content in (b"one", b"one", b"another"):
        if not files or content != b"one":
            (tmp_path / "a.png").write_bytes(content)
        files.append(train.training_set(config.EMOJI, pairs, None, None, "fp32"))
    assert files[0] == files[1] != files[2]


def test_equal_images_are_encoded_once(backbone: Path, monkeypatch: pytest.MonkeyPatch):
    cfg = dataclasses.replace(config.EMOJI, backbone=str(backbone), image_size=16, adapter_width=None)
    image = towers.create_image_encoder(cfg, torch.randn(40, 8), -1.0)
    pairs, one = data.open_pairs(f"{SHARDS}/00000.tar", 6), run.Process(0, 1, torch.device("cpu"))
    views = train.PairDataset(pairs, towers.eval_transform(cfg.backbone, 16))
    [(_, alone, captions, _)] = train.encoded(views, views.normalise, image, one, "fp32")
    rows, frozen, asked = [0, 0, 3, 0, 5, 3], image.frozen, []
    monkeypatch.setattr(image, "frozen", lambda pixels: asked.append(len(pixels)) or frozen(pixels))
    [(_, tokens, said, _)] = train.encoded(Subset(views, rows), views.normalise, image, one, "fp32")
    assert asked == [3] and said == [captions[row] for row in rows]
    np.testing.assert_allclose(tokens, alone[rows], atol=1e-3)


def test_processes_share_out_the_images_of_frozen_tokens(
    backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Two processes encode each image once, together, and both have the tokens that one alone has."""
    cfg = dataclasses.replace(config.EMOJI, backbone=str(backbone), image_size=16, adapter_width=None)
    image = towers.create_image_encoder(cfg, torch.randn(40, 8), -1.0)
    pairs, transform = data.open_pairs(f"{SHARDS}/00000.tar", 600), towers.eval_transform(cfg.backbone, 16)
    one, *two = (run.Process(rank, size, torch.device("cpu")) for rank, size in ((0, 1), (0, 2), (1, 2)))
    whole = train.TokenDataset(pairs, transform, image, one, "fp32", tmp_path / "one.npy")
    views = train.PairDataset(pairs, transform)
    parts = [train.encoded(views, views.normalise, image, process, "fp32") for process in two]
    assert [[number for number, *_ in part] for part in parts] == [[0, 2], [1]]
    said = iter([[True, False], [*parts[1], *parts[0]]])  # one of them has a file
    monkeypatch.setattr(run, "gather_lists", lambda items, process: next(said))
    monkeypatch.setattr(train, "encoded", lambda views, *rest: [(0, whole.tokens[:1])] if len(views) == 1 else None)
    for process in two[1:]:
        found = train.TokenDataset(pairs, transform, image, process, "fp32", tmp_path / "one.npy")
        assert np.array_equal(found.tokens, whole.tokens) and found.captions == whole.captions
        assert isinstance(found.tokens, np.memmap) and len(found) == 600


def test_maps_of_efficientnet_lite0_are_tokens(backbone: Path):
    """Of the pretrained network: its two maps, each normalised; wider tokens are mapped to the adapter's width."""
    network, maps = pretrained.efficientnet_lite0(), towers.create_backbone(config.LITE0, 128)[0].eval()
    pixels = torch.randn(2, 3, 128, 64)
    with torch.no_grad():
        tokens, x = maps.forward_features(pixels), network.bn1(network.conv_stem(pixels))
        for number, stage in enumerate(network.blocks):
            x = stage(x)
            if number == 4:
                torch.testing.assert_close(tokens[:, 1:, :112], normalized(x), rtol=1e-3, atol=1e-3)
    assert tokens.shape == (2, 1 + 8 * 4, 432)
    last = torch.nn.functional.interpolate(x, scale_factor=2, mode="bilinear")
    torch.testing.assert_close(tokens[:, 1:, 112:], normalized(last), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(tokens[:, 0], tokens[:, 1:].mean(1))
    cfg = dataclasses.replace(config.EMOJI, adapter_width=24, adapter_hidden=32)
    image = towers.create_image_encoder(cfg, torch.randn(40, 8), -1.0, pretrained=False)
    assert image(pixels).shape == (2, 40) and image.adapter.reduce.weight.shape == (24, 432)
    assert towers.patch_side(image.backbone) == 16 and towers.side_step(image.backbone) == 32
    assert towers.side_step(towers.create_backbone(str(backbone), 16)[0]) == 8 and not image.backbone.training


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
