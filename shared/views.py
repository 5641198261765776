"""Random views of small pictures on white, such as emoji: zoom, turn, shift and colour, for a batch at once.

A loader process draws a picture's random numbers; the device makes the views of the batch by one `grid_sample` and one
matrix of colours a picture.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import center_crop, resize

from shared.data import to_pixels

ZOOM, RATIO = 1.2, 1.18  # at most: factors of the side, and of width / height
ANGLE, SHIFT, HUE, GAIN = 10.0, 0.05, 18.0, 0.3  # at most: degrees, share of the side, degrees, share of the ink
NOISE = 9  # random numbers of a view


def placement(u: Tensor) -> Tensor:
    """Numbers (B, 5) in -1..1 -> affine maps (B, 2, 3) from a view's coordinates to the picture's, both -1..1."""
    zoom, ratio = ZOOM ** u[:, 0], RATIO ** (u[:, 1] / 2)
    angle = u[:, 2] * math.radians(ANGLE)
    cosine, sine, (x, y) = angle.cos(), angle.sin(), 2 * SHIFT * u[:, 3:].T
    width, height = zoom * ratio, zoom / ratio
    return torch.stack([width * cosine, -height * sine, x, width * sine, height * cosine, y], dim=1).view(-1, 2, 3)


def colours(u: Tensor) -> Tensor:
    """Numbers (B, 4) in -1..1 -> matrices (B, 3, 3) of RGB ink: a turn of the hue about grey, then a gain a channel."""
    hue = u[:, 0] * math.radians(HUE)
    even, side = (1 - hue.cos()) / 3, hue.sin() / math.sqrt(3)
    same, before, after = hue.cos() + even, even - side, even + side
    rows = [same, before, after, after, same, before, before, after, same]
    return (1 + GAIN * u[:, 1:, None]) * torch.stack(rows, dim=1).view(-1, 3, 3)


def views_at(
    pixels: Tensor, maps: Tensor, inks: Tensor, size: int, mean: Tensor, std: Tensor, outside: str = "zeros"
) -> Tensor:
    """uint8 (B, 3, H, W), maps of `placement`, matrices of `colours` -> views (B, 3, S, S), normalised.

    outside: what lies beyond a picture: "zeros" is white, "reflection" its mirror image.
    """
    grid = F.affine_grid(maps, [len(pixels), 3, size, size], align_corners=False)
    ink = F.grid_sample(255 - pixels.float(), grid, padding_mode=outside, align_corners=False)
    white, scale = ((1 - mean) / std)[:, None], (255 * std)[:, None]
    return torch.baddbmm(white, inks / -scale, ink.flatten(2)).view_as(ink)


def small_views(pixels: Tensor, noise: Tensor, size: int, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) and uniform noise (B, NOISE) in 0..1 -> views (B, 3, S, S), normalised.

    What lies beyond a picture is white. Noise of 0.5 gives the whole picture, unchanged.
    """
    u = 2 * noise - 1
    return views_at(pixels, placement(u[:, :5]), colours(u[:, 5:]), size, mean, std)


class SmallView:
    """RGB image -> random view (3, S, S), normalised. `pixels` and `normalise` are its halves (see
    `data.split_normalisation`)."""

    def __init__(self, size: int, mean: Sequence[float], std: Sequence[float]):
        self.size, self.statistics = size, (torch.as_tensor(mean), torch.as_tensor(std))

    def __call__(self, image: Image.Image) -> Tensor:
        return self.normalise([part[None] for part in self.pixels(image)])[0]

    def pixels(self, image: Image.Image) -> tuple[Tensor, Tensor]:
        """RGB image -> (its centre square (3, 2S, 2S) uint8, the view's noise (NOISE,))."""
        side = 2 * self.size
        if image.size != (side, side):
            image = center_crop(resize(image, side), side)
        return to_pixels(image), torch.rand(NOISE)

    def normalise(self, batch: Sequence[Tensor]) -> Tensor:
        """[squares (B, 3, H, H) uint8, noise (B, NOISE)] -> views (B, 3, S, S)."""
        pixels, noise = batch
        self.statistics = tuple(values.to(pixels.device) for values in self.statistics)  # copied once
        return small_views(pixels, noise, self.size, *self.statistics)
