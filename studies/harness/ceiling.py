"""A ceiling for a table of arms: an arm's image tower, trained on the labels of an evaluation set's `train` split."""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import functional

from shared import data, run
from shared.clip import STATISTICS, image_side, open_clip_config, quiet_open_clip
from shared.evalsets import EvalSet
from shared.zeroshot import percent


def read(folder: str | Path, split: str, side: int) -> tuple[Tensor, Tensor]:
    """Images (N, 3, side, side) uint8 and labels (N,) of one split of a classification set."""
    view = functools.partial(square_pixels, side=side)
    images, labels = zip(*EvalSet(folder, view, split).batches(256), strict=True)
    return torch.cat(images), torch.cat(labels)


def square_pixels(image: Image.Image, side: int) -> Tensor:
    """RGB image -> its centre square (3, side, side) uint8, as open_clip's transform and clip-benchmark take it."""
    resized = functional.resize(image, side, functional.InterpolationMode.BICUBIC)
    return data.to_pixels(functional.center_crop(resized, side))


def labelled_by_caption(shards: str, classnames: Sequence[str], side: int) -> tuple[Tensor, Tensor]:
    """Images (N, 3, side, side) uint8 and labels (N,) of training pairs whose captions are class names."""
    pairs, images, labels = data.open_pairs(shards), [], []
    for row in range(len(pairs)):
        pair = data.read_or_next(pairs, row, [])
        images.append(square_pixels(pair.image, side))
        labels.append(classnames.index(pair.caption))
    return torch.stack(images), torch.tensor(labels)


class Tower(NamedTuple):
    """An image tower: images (B, 3, side, side) -> features (B, width)."""

    network: nn.Module
    width: int
    side: int


def open_clip_tower(model: str) -> Tower:
    """The image tower of an open_clip config, with random weights."""
    with quiet_open_clip():
        clip = open_clip.create_model(model)
    return Tower(clip.visual, open_clip_config(model)["embed_dim"], image_side(clip))


CPU = torch.device("cpu")


def random_boxes(count: int, scale: tuple[float, float], ratio: tuple[float, float] = (0.85, 1.18)) -> Tensor:
    """(count, 4) left, top, width, height in units of the image's side; area and aspect ratio are drawn as in
    torchvision's RandomResizedCrop. With areas above 1, boxes reach beyond the image."""
    u, low, high = torch.rand(count, 4), *map(math.log, ratio)
    area, shape = scale[0] + (scale[1] - scale[0]) * u[:, 0], (low + (high - low) * u[:, 1]).exp()
    size = torch.stack([area * shape, area / shape], dim=1).sqrt().clamp(max=max(1.0, math.sqrt(scale[1])))
    return torch.cat([u[:, 2:] * (1 - size), size], dim=1)


def views(pixels: Tensor, boxes: Tensor, side: int) -> Tensor:
    """Boxes (B, 4) of stored images (B, 3, H, H) -> normalised images (B, 3, side, side). Beyond an image, its border
    is repeated."""
    left, top, width, height = boxes.unbind(1)
    none = torch.zeros_like(left)
    rows = [torch.stack(row, 1) for row in ((width, none, 2 * left + width - 1), (none, height, 2 * top + height - 1))]
    grid = F.affine_grid(torch.stack(rows, 1), (len(pixels), 3, side, side), align_corners=False)
    images = F.grid_sample(pixels.float(), grid, padding_mode="border", align_corners=False)
    mean, std = (255 * torch.tensor(values)[:, None, None] for values in STATISTICS)
    return images.sub_(mean).div_(std).contiguous(memory_format=torch.channels_last)


def fit(
    network: nn.Module, pixels: Tensor, labels: Tensor, side: int, epochs: int, batch_size: int, lr: float,
    weight_decay: float, crop: tuple[float, float],
) -> None:  # fmt: skip
    """Train a classifier of images of `side` pixels, in place, on stored images (N, 3, H, H) and labels (N,).

    AdamW, a warm-up of one epoch, then a cosine; random crops whose area is in the range `crop`.
    """
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=weight_decay, fused=True)
    batch_size = min(batch_size, len(labels))
    steps, precision = len(labels) // batch_size, run.resolve_precision("auto", CPU)
    for epoch in range(epochs):
        order = torch.randperm(len(labels)).split(batch_size)[:steps]
        for step, batch in enumerate(order, epoch * steps):
            rate = (step + 1) / steps if step < steps else (1 + math.cos(math.pi * step / (epochs * steps))) / 2
            optimizer.param_groups[0]["lr"] = lr * rate
            boxes = random_boxes(len(batch), crop)
            with run.autocast(precision, CPU):
                logits = network(views(pixels[batch], boxes, side))
            optimizer.zero_grad()
            F.cross_entropy(logits.float(), labels[batch]).backward()
            optimizer.step()


def trained_on_labels(
    make_tower: Callable[[], Tower],
    sets: Iterable[str | Path],
    metrics: Iterable[str] = ("top1",),
    epochs: int = 20,
    batch_size: int = 256,
    lr: float = 3e-3,
    weight_decay: float = 0.2,
    crop: tuple[float, float] = (0.7, 1.4),
    seed: int = 0,
    shards: str | None = None,
    stored: int = 2,
    classes: Sequence[str] | None = None,
) -> dict[str, float]:
    """{"SET/METRIC": top-1 in percent} of one tower, trained on the `train` split that `sets` share.

    A linear layer is added to the tower, and both are trained by `fit` on images stored at `stored` times the tower's
    side. shards: training pairs whose captions are class names, to train on instead of the `train` split. classes: the
    only classes to use; None: all.
    """
    torch.manual_seed(seed)
    tower, sets = make_tower(), list(sets)
    size, classnames = tower.side, EvalSet(sets[0], None).classnames
    number = {name: i for i, name in enumerate(classes or classnames)}
    place = torch.tensor([number.get(name, -1) for name in classnames])

    def of_classes(pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        labels = place[labels]
        return pixels[labels >= 0], labels[labels >= 0]

    if shards is None:
        pixels, labels = of_classes(*read(sets[0], "train", stored * size))
    else:
        pixels, labels = of_classes(*labelled_by_caption(shards, classnames, stored * size))
    network = nn.Sequential(tower.network, nn.Linear(tower.width, len(number)))
    fit(network, pixels, labels, size, epochs, batch_size, lr, weight_decay, crop)
    network.eval()
    found, precision = {}, run.resolve_precision("auto", CPU)
    for folder in sets:
        images, truth = of_classes(*read(folder, "test", stored * size))
        whole = torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(len(images), 4)
        with torch.no_grad(), run.autocast(precision, CPU):
            logits = [network(views(x, b, size)) for x, b in zip(images.split(256), whole.split(256), strict=True)]
        top1 = percent(torch.cat(logits).argmax(dim=1) == truth)
        found |= {f"{Path(folder).name}/{metric}": top1 for metric in metrics}
    return found
