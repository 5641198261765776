"""Views of small pictures: their geometry and colours, in halves as in one call, and the text tower's start."""

import math

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from shared import clip, data, views

HALF = torch.full((1, views.NOISE), 0.5)
NONE = torch.zeros(3), torch.ones(3)  # mean and std that leave pixels between 0 and 1


def noise(**numbers: float) -> torch.Tensor:
    """Noise that leaves the picture unchanged, but for some numbers in -1..1."""
    names = ["zoom", "ratio", "turn", "x", "y", "hue", "red", "green", "blue"]
    return torch.tensor([[(1 + numbers.get(name, 0.0)) / 2 for name in names]])


def picture(side: int = 8) -> torch.Tensor:
    return torch.randint(0, 256, (1, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_noise_of_a_half_is_the_whole_picture():
    pixels = picture()
    torch.testing.assert_close(views.small_views(pixels, HALF, 8, *NONE), pixels / 255)
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 1.0, 2.0])
    expected = (pixels / 255 - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(views.small_views(pixels, HALF, 8, mean, std), expected)


def test_a_shift_moves_the_picture_and_leaves_white():
    pixels, share = picture(20), views.SHIFT  # of the side: one pixel
    moved = views.small_views(pixels, noise(x=1.0), 20, *NONE)
    assert share * 20 == 1
    torch.testing.assert_close(moved[..., :-1], pixels[..., 1:] / 255, atol=1e-4, rtol=0)
    torch.testing.assert_close(moved[..., -1], torch.ones(1, 3, 20), atol=1e-4, rtol=0)


def test_zoom_ratio_and_turn_place_the_view():
    (view,) = views.placement(2 * noise(zoom=1.0, ratio=1.0)[:, :5] - 1)
    width, height = views.ZOOM * views.RATIO**0.5, views.ZOOM / views.RATIO**0.5
    torch.testing.assert_close(view, torch.tensor([[width, 0.0, 0.0], [0.0, height, 0.0]]))
    (view,) = views.placement(2 * noise(turn=1.0)[:, :5] - 1)
    cosine, sine = math.cos(math.radians(views.ANGLE)), math.sin(math.radians(views.ANGLE))
    torch.testing.assert_close(view, torch.tensor([[cosine, -sine, 0.0], [sine, cosine, 0.0]]))


def test_colours_keep_white_and_grey_and_scale_ink():
    white = torch.full((1, 3, 4, 4), 255, dtype=torch.uint8)
    torch.testing.assert_close(views.small_views(white, noise(hue=1.0, red=1.0), 4, *NONE), torch.ones(1, 3, 4, 4))
    grey = torch.full((1, 3, 4, 4), 100, dtype=torch.uint8)
    turned = views.small_views(grey, noise(hue=1.0), 4, *NONE)[..., 1:3, 1:3]
    torch.testing.assert_close(turned, torch.full((1, 3, 2, 2), 100 / 255))
    redder = views.small_views(grey, noise(red=1.0), 4, *NONE)[0, :, 1, 1]
    torch.testing.assert_close(redder, torch.tensor([1 - 1.3 * 155 / 255, 100 / 255, 100 / 255]))
    red = torch.tensor([255, 0, 0], dtype=torch.uint8)[None, :, None, None].expand(1, 3, 4, 4)
    angle = math.radians(views.HUE)  # ink (0, 1, 1) is turned about grey
    channel = [2 / 3 * (1 - math.cos(angle)), 2 / 3 + math.cos(angle) / 3, 2 / 3 + math.cos(angle) / 3]
    sine = math.sin(angle) / math.sqrt(3)
    expected = 1 - torch.tensor([channel[0], channel[1] - sine, channel[2] + sine])
    torch.testing.assert_close(views.small_views(red, noise(hue=1.0), 4, *NONE)[0, :, 1, 1], expected)


@pytest.mark.parametrize("size", [(8, 8), (30, 20)])
def test_halves_are_the_view(size: tuple[int, int]):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
    view = views.SmallView(4, *clip.STATISTICS)
    torch.manual_seed(0)
    whole = view(image)
    torch.manual_seed(0)
    pixels, normalise = data.split_normalisation(view)
    square, drawn = pixels(image)
    assert square.shape == (3, 8, 8) and square.dtype == torch.uint8 and drawn.shape == (views.NOISE,)
    torch.testing.assert_close(normalise([square[None], drawn[None]])[0], whole)


def test_a_text_tower_of_one_layer_starts_as_an_average():
    model = open_clip.create_model("ConvNet-emoji").eval()
    clip.average_at_start(model)
    tokens = open_clip.SimpleTokenizer(context_length=24)(["a red cat"])
    length = int(tokens.argmax()) + 1
    with torch.no_grad():
        embedded = model.token_embedding(tokens)[0, :length]
        block = model.transformer.resblocks[0]
        expected = embedded[-1] + block.ln_1(embedded).mean(0)
        text = model.ln_final(expected) @ model.text_projection
        torch.testing.assert_close(model.encode_text(tokens)[0], text)
    large = open_clip.create_model("ViT-emoji")
    before = {name: value.clone() for name, value in large.state_dict().items()}
    clip.average_at_start(large)
    assert all(torch.equal(value, before[name]) for name, value in large.state_dict().items())
