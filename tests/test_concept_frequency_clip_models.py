"""Checkpoints of other authors load as open_clip models."""

import numpy as np
import open_clip
import pytest
import torch
from authors_files import beside_weights
from PIL import Image

from concept_frequency import clip_models
from shared import data


def test_checkpoints_in_other_layouts(tmp_path):
    device = torch.device("cpu")
    model = open_clip.create_model("ViT-emoji", load_weights=False)
    weights = {f"module.{k}": v for k, v in model.state_dict().items()}
    torch.save(beside_weights(state_dict=weights), tmp_path / "ddp.pt")
    loaded, transform, _ = clip_models.load_model("ViT-emoji", str(tmp_path / "ddp.pt"), device)
    assert_in_two(transform)
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    with pytest.raises(ValueError, match="does not hold the weights of RN50"):
        clip_models.load_model("RN50", str(tmp_path / "ddp.pt"), device)

    state = slip_state(width=64, layers=2, dim=32)
    torch.save(beside_weights(state_dict={f"module.{k}": v for k, v in state.items()}), tmp_path / "slip.pt")
    slip, transform, tokenizer = clip_models.load_model("ViT-B-16", str(tmp_path / "slip.pt"), device)
    with torch.no_grad():
        assert_in_two(transform)
        image = transform(Image.new("RGB", (300, 250)))[None]
        token = slip.visual.trunk.forward_features(image)[:, 0]
        torch.testing.assert_close(slip.encode_image(image), token @ state["image_projection"])
        assert slip.encode_text(tokenizer(["a dog"])).shape == (1, 32)


def assert_in_two(transform) -> None:
    """The transform can be split in two: decoder processes give uint8, and normalising later gives equal bits."""
    pixels, normalise = data.split_normalisation(transform)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 250, 3), dtype=np.uint8))
    assert pixels(image).dtype == torch.uint8
    assert torch.equal(normalise(pixels(image)), transform(image))


def slip_state(width: int, layers: int, dim: int) -> dict[str, torch.Tensor]:
    """Keys and shapes of SLIP's CLIP with a small text tower; the image tower is timm's ViT-S/16."""
    import timm

    text = open_clip.transformer.TextTransformer(
        77, 49408, width, width // 64, layers, output_dim=dim, pool_type="argmax"
    )
    keep = ("transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection")
    state = {k: v for k, v in text.state_dict().items() if k.startswith(keep)}
    vision = timm.create_model("vit_small_patch16_224", num_classes=0)
    state |= {f"visual.{k}": v for k, v in vision.state_dict().items()}
    return state | {"image_projection": torch.randn(384, dim), "logit_scale": torch.tensor(4.6)}
