"""The small convolutional network: its size, and open_clip's configs that use it."""

import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import shared.convnet
import shared.run  # noqa: F401  (open_clip finds the emoji-scale configs)
from shared.clip import image_side


def test_open_clip_builds_a_small_one_from_its_config():
    model = open_clip.create_model("ConvNet-emoji").eval()
    images, tokens = (
        torch.zeros(2, 3, image_side(model), image_side(model)),
        open_clip.SimpleTokenizer(context_length=24)(["a cat", "a dog"]),
    )
    with torch.no_grad():
        assert model.encode_image(images).shape == model.encode_text(tokens).shape == (2, 256)


def test_sizes():
    flat, pooled = (timm.create_model(name, num_classes=0).eval() for name in ("convnet_small", "convnet_small_pooled"))
    pooled.load_state_dict(flat.state_dict())
    images = torch.randn(2, 3, 32, 32)
    assert sum(p.numel() for p in flat.parameters()) == 27 * 32 + 9 * (32 * 64 + 64 * 128 + 128 * 256) + 2 * 480
    assert flat(images).shape == (2, flat.num_features) == (2, 1024) and pooled.num_features == 256
    torch.testing.assert_close(flat(images).unflatten(1, (256, 4)).mean(2), pooled(images))


@pytest.mark.parametrize(("side", "stride"), [(1, 1), (2, 1), (3, 2), (4, 2), (4, 1), (9, 2)])
def test_convolutions_of_tiny_maps_are_convolutions(side: int, stride: int):
    """Values and gradients equal a convolution, for maps below and above the size that is computed by a matrix
    product."""
    torch.manual_seed(0)
    ours = nn.Conv2d(5, 7, 3, stride, 1, bias=False, dtype=torch.float64)
    kernel = ours.weight.detach().clone().requires_grad_()
    ours.__class__ = shared.convnet.Conv3x3
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
