"""A ceiling for a table of arms: an arm's image tower, trained on the labels of an evaluation set's `train` split."""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared import data, export, memory, run
from shared.clip import image_side, quiet_open_clip
from shared.evalsets import EvalSet
from shared.zeroshot import percent


def read(folder: str | Path, split: str, side: int) -> tuple[Tensor, Tensor]:
    """Images (N, 3, side, side) uint8 and labels (N,) of one split of a classification set."""
    view = functools.partial(memory.square_pixels, side=side)
    images, labels = zip(*EvalSet(folder, view, split).batches(256), strict=True)
    return torch.cat(images), torch.cat(labels)


def labelled_by_caption(shards: str, classnames: Sequence[str], side: int) -> tuple[Tensor, Tensor]:
    """Images (N, 3, side, side) uint8 and labels (N,) of training pairs whose captions are class names."""
    captions: list[str] = []

    def number(texts: list[str]) -> Tensor:
        captions.extend(texts)
        return torch.zeros(len(texts), 1)

    corpus = memory.read(data.open_pairs(shards), side, number)
    return corpus.pixels, torch.tensor([classnames.index(caption) for caption in captions])


class Tower(NamedTuple):
    """An image tower: images (B, 3, side, side) -> features (B, width)."""

    network: nn.Module
    width: int
    side: int


def open_clip_tower(model: str) -> Tower:
    """The image tower of an open_clip config, with random weights."""
    with quiet_open_clip():
        clip = open_clip.create_model(model)
    return Tower(clip.visual, export.open_clip_config(model)["embed_dim"], image_side(clip))


CPU = torch.device("cpu")


def views(pixels: Tensor, boxes: Tensor, side: int) -> Tensor:
    """Boxes (B, 4) of stored images (B, 3, H, H) -> normalised images (B, 3, side, side)."""
    return memory.normalized(memory.crop_and_resize(pixels, boxes, side))


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
            boxes = memory.random_crops(torch.rand(len(batch), 4), crop, (0.85, 1.18))
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
