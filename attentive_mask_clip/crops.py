"""Crops of an image: A-CLIP's three boxes, the augmentations of the three methods, and their views of a sample.

Authors' code: microsoft/A-CLIP@0e51942, cited as `U:`, and facebookresearch/SLIP@c6faf5d, cited as `S:`.
"""

import functools

import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.functional import resized_crop

from shared import data

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, in training and evaluation
RATIO = (3 / 4, 4 / 3)
NORMALISE = data.ToNormalizedTensor(MEAN, STD).normalise

# ----------------------------------------------------------------------------------------------------------- boxes


def _randint(low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, (1,)))


def three_boxes(
    image: Image.Image, scale: tuple[float, float] = (0.5, 1.0), released_boxes: bool = False, views: int = 2
) -> Tensor:
    """(V+1, 4) int64 boxes (top, left, height, width): V random crops and a larger one for the EMA. U:datasets.py:240.

    The top left corner of the EMA box is drawn above and left of all crops, its other corner below and right of them.
    `released_boxes` uses upstream's formula (two views only): the left edge mixes up coordinates, and height and
    width are drawn as if the corner had not moved, so that a crop may extend beyond the box.
    """
    width, height = image.size
    crops = [RandomResizedCrop.get_params(image, scale, RATIO) for _ in range(views)]
    tops, lefts, heights, widths = zip(*crops, strict=True)
    top, left = min(tops), min(lefts)
    bottom = max(t + h for t, h in zip(tops, heights, strict=True))
    right = max(x + w for x, w in zip(lefts, widths, strict=True))
    if released_boxes:
        left = min(lefts[0], heights[1])  # U:datasets.py:263
        tall, wide = bottom - top, right - left
        top = _randint(0, top) if top > 0 else top
        left = _randint(0, left) if left > 0 else left
        tall = _randint(tall, height - top) if tall < height else tall
        wide = _randint(wide, width - left) if wide < width else wide
    else:
        top = _randint(0, top) if top > 0 else top
        left = _randint(0, left) if left > 0 else left
        tall = (_randint(bottom, height) if bottom < height else bottom) - top
        wide = (_randint(right, width) if right < width else right) - left
    return torch.tensor([*crops, (top, left, tall, wide)])


def crop(image: Image.Image, box: Tensor, size: int) -> Image.Image:
    return resized_crop(image, *box.tolist(), [size, size])


# --------------------------------------------------------------------------------------------------- augmentations


class GaussianBlur:
    """PIL's Gaussian blur with a radius from U(0.1, 2) pixels. U:utils.py:263."""

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(torch.empty(1).uniform_(0.1, 2.0).item()))


def view_transform(kind: str = "aclip") -> transforms.Compose:
    """PIL crop -> normalised (3, S, S). `kind` is aclip (U:main.py:171), slip (its SSL views without the crop,
    U:datasets.py:282) or plain (the EMA view, CLIP's view)."""
    apply, jitter = transforms.RandomApply, transforms.ColorJitter
    steps = {
        "aclip": [
            apply([jitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
            transforms.RandomGrayscale(p=0.2),
            apply([GaussianBlur()], p=0.1),
            transforms.RandomSolarize(threshold=128, p=0.2),
        ],
        "slip": [
            apply([jitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            transforms.RandomGrayscale(p=0.2),
            apply([GaussianBlur()], p=0.5),
            transforms.RandomHorizontalFlip(),
        ],
        "plain": [],
    }
    return transforms.Compose([*steps[kind], data.ToNormalizedTensor(MEAN, STD)])


@functools.cache  # the same object each time, so that `quick_top1` can reuse its images
def eval_transform(size: int = 224, resize: int | None = None) -> transforms.Compose:
    """Shorter side to `resize` (default: size), centre crop. U:eval_zeroshot.py:68; the linear probe resizes to 8/7 of
    the size, 256 for 224 (U:main_linear.py:190)."""
    return transforms.Compose(
        [
            transforms.Resize(resize or size),
            transforms.CenterCrop(size),
            data.ToNormalizedTensor(MEAN, STD),
        ]
    )


# --------------------------------------------------------------------------------------------------------- dataset


def title_and_description(text: str) -> list[str]:
    """[title (first line), description (other lines, joined)] of a caption file, without blank ones. U:datasets.py:68.

    Descriptions of YFCC15M contain line breaks, so a line alone is not a caption.
    """
    title, _, description = text.partition("\n")
    return [line for part in (title, description) if (line := " ".join(part.split()))]


class Views:
    """Image -> (list of views (3, S, S), boxes (V+1, 4)): the method's views in uint8; `normalise` is for batches.

    aclip: V masked views and, with `ema_view`, the EMA view; slip: CLIP's view and two for SimCLR; clip: one view. The
    first crop is the same for all methods.
    """

    def __init__(self, cfg, size: int, ema_view: bool):
        self.cfg, self.size, self.ema_view = cfg, size, ema_view
        own = {"aclip": "aclip", "slip": "plain", "clip": "plain"}[cfg.method]
        online, ssl = ("plain", "plain") if cfg.augmentation == "crop" else (own, "slip")
        self.online, self.ssl, self.plain = (
            data.split_normalisation(view_transform(kind))[0] for kind in (online, ssl, "plain")
        )

    def pixels(self, image: Image.Image) -> tuple[list[Tensor], Tensor]:
        cfg = self.cfg
        count = cfg.views if cfg.method == "aclip" else 1
        boxes = three_boxes(image, (cfg.crop_scale, 1.0), cfg.released_boxes and count == 2, count)
        views = [self.online(crop(image, box, self.size)) for box in boxes[:-1]]
        if self.ema_view:
            views.append(self.plain(crop(image, boxes[-1], cfg.ema_image_size or self.size)))
        if cfg.method == "slip":
            scale = (cfg.ssl_crop_scale, 1.0)
            augmented = [torch.tensor(RandomResizedCrop.get_params(image, scale, RATIO)) for _ in range(2)]
            views += [self.ssl(crop(image, box, self.size)) for box in augmented]
        return views, boxes

    @staticmethod
    def normalise(found: tuple[list[Tensor], Tensor]) -> tuple[list[Tensor], Tensor]:
        views, boxes = found
        return [NORMALISE(view) for view in views], boxes


def drawn_caption(caption: str, lines: bool) -> str:
    """The caption; with `lines`, its title or its description, drawn at random."""
    if not lines:
        return caption
    captions = title_and_description(caption)
    return captions[_randint(0, len(captions) - 1)]
