"""The small residual network: its size, and that open_clip's configs find it by name."""

import open_clip
import pytest
import timm
import torch

import shared.resnet
import shared.run  # noqa: F401  (open_clip finds the emoji-scale configs)
from shared.clip import image_side


@pytest.mark.parametrize("name, width", [("ResNet-emoji", 256), ("RN-emoji", 128)])
def test_open_clip_builds_small_ones_from_their_configs(name: str, width: int):
    model = open_clip.create_model(name).eval()
    images, tokens = (
        torch.zeros(2, 3, image_side(model), image_side(model)),
        open_clip.SimpleTokenizer(context_length=24)(["a cat", "a dog"]),
    )
    with torch.no_grad():
        assert model.encode_image(images).shape == model.encode_text(tokens).shape == (2, width)


def test_sizes():
    network = timm.create_model("resnet7_small", num_classes=0)
    assert 1.1e6 < sum(p.numel() for p in network.parameters()) < 1.3e6
    for side in (24, shared.resnet.SIZE, 48):
        assert network.eval().forward_features(torch.zeros(1, 3, side, side)).shape[1] == 256
