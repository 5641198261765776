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
from torchvision import transforms
from torchvision.transforms import functional

from shared import data, run
from shared.clip import STATISTICS, image_side, open_clip_config, quiet_open_clip
from shared.evalsets import EvalSet
from shared.views import NOISE, small_views
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


def whole(pixels: Tensor, side: int) -> Tensor:
    """uint8 images (B, 3, H, H) -> (B, 3, side, side), normalised."""
    return small_views(pixels, torch.full((len(pixels), NOISE), 0.5), side, *map(torch.tensor, STATISTICS))


def view_of(side: int, crop: tuple[float, float] | None) -> Callable[[Tensor], Tensor]:
    """uint8 images (B, 3, H, H) -> random views (B, 3, side, side), normalised: the small views of the emoji arms, or
    crops whose share of the area is in the range `crop`, as scenes have them."""
    if crop is None:
        return lambda x: small_views(x, torch.rand(len(x), NOISE), side, *map(torch.tensor, STATISTICS))
    cut = transforms.RandomResizedCrop(side, crop)
    return lambda x: whole(torch.stack([cut(image) for image in x]), side)


def fit(
    network: nn.Module, pixels: Tensor, labels: Tensor, view: Callable[[Tensor], Tensor], epochs: int, batch_size: int,
    lr: float, weight_decay: float,
) -> None:  # fmt: skip
    """Train a classifier, in place, on views of images (N, 3, H, H) and labels (N,).

    AdamW, a warm-up of one epoch, then a cosine.
    """
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=weight_decay, fused=True)
    batch_size = min(batch_size, len(labels))
    steps, precision = len(labels) // batch_size, run.resolve_precision("auto", CPU)
    for epoch in range(epochs):
        order = torch.randperm(len(labels)).split(batch_size)[:steps]
        for step, batch in enumerate(order, epoch * steps):
            rate = (step + 1) / steps if step < steps else (1 + math.cos(math.pi * step / (epochs * steps))) / 2
            optimizer.param_groups[0]["lr"] = lr * rate
            with run.autocast(precision, CPU):
                logits = network(view(pixels[batch]).contiguous(memory_format=torch.channels_last))
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
    crop: tuple[float, float] | None = None,
    seed: int = 0,
    shards: str | None = None,
    stored: int = 2,
    classes: Sequence[str] | None = None,
) -> dict[str, float]:
    """{"SET/METRIC": top-1 in percent} of one tower, trained on the `train` split that `sets` share.

    A linear layer is added to the tower, and both are trained by `fit` on views (see `view_of`) of images stored at
    `stored` times the tower's side. shards: training pairs whose captions are class names, to train on instead of the
    `train` split. classes: the only classes to use; None: all.
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
    fit(network, pixels, labels, view_of(size, crop), epochs, batch_size, lr, weight_decay)
    network.eval()
    found, precision = {}, run.resolve_precision("auto", CPU)
    for folder in sets:
        images, truth = of_classes(*read(folder, "test", stored * size))
        with torch.no_grad(), run.autocast(precision, CPU):
            logits = [network(whole(x, size)) for x in images.split(256)]
        top1 = percent(torch.cat(logits).argmax(dim=1) == truth)
        found |= {f"{Path(folder).name}/{metric}": top1 for metric in metrics}
    return found
