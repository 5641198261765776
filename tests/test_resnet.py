"""The small residual network: its size, and open_clip's configs that use it."""

import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

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


@pytest.mark.parametrize(("side", "stride"), [(1, 1), (2, 1), (3, 2), (4, 2), (4, 1), (9, 2)])
def test_convolutions_of_tiny_maps_are_convolutions(side: int, stride: int):
    """Values and gradients equal a convolution, for maps below and above the size that is computed by a matrix
    product."""
    torch.manual_seed(0)
    ours = nn.Conv2d(5, 7, 3, stride, 1, bias=False, dtype=torch.float64)
    kernel = ours.weight.detach().clone().requires_grad_()
    ours.__class__ = shared.resnet.Conv3x3
    images = [torch.randn(3, 5, side, side, dtype=torch.float64).requires_grad_()]
    images.append(images[0].detach().clone().requires_grad_())
    outputs = ours(images[0]), F.conv2d(images[1], kernel, stride=stride, padding=1)
    torch.testing.assert_close(*outputs)
    for output in outputs:
        output.pow(2).sum().backward()
    torch.testing.assert_close(images[0].grad, images[1].grad)
    torch.testing.assert_close(ours.weight.grad, kernel.grad)
    ours.float()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = ours(images[0].float())
    assert rounded.dtype == torch.bfloat16 and rounded.sub(outputs[0]).abs().max() < 0.05


def test_the_network_has_them_and_keeps_its_keys():
    network = timm.create_model("resnet7_small", num_classes=0)
    convolutions = {name: module for name, module in network.named_modules() if isinstance(module, nn.Conv2d)}
    tiny = [name for name, module in convolutions.items() if type(module) is shared.resnet.Conv3x3]
    assert len(tiny) == 7 and all(f"{name}.weight" in network.state_dict() for name in tiny)
