"""The small residual network: its size, and that open_clip's configs find it by name."""

import open_clip
import timm
import torch

import shared.resnet
import shared.run  # noqa: F401  (open_clip finds the emoji-scale configs)


def test_open_clip_builds_it_from_its_config():
    model = open_clip.create_model("ResNet-emoji").eval()
    images, tokens = torch.zeros(2, 3, 32, 32), open_clip.SimpleTokenizer(context_length=24)(["a cat", "a dog"])
    with torch.no_grad():
        assert model.encode_image(images).shape == model.encode_text(tokens).shape == (2, 256)


def test_sizes():
    network = timm.create_model("resnet7_small", num_classes=0)
    assert 1.1e6 < sum(p.numel() for p in network.parameters()) < 1.3e6
    for side in (24, shared.resnet.SIZE, 48):
        assert network.eval().forward_features(torch.zeros(1, 3, side, side)).shape[1] == 256
