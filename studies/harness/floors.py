"""Floors for a table of arms: metrics for which no encoder is trained. Ceilings are in ceiling.py.

Floors are chance, and the nearest neighbour among training images on raw pixels or on features of a pretrained tower.
A claim counts only if the stronger of its arms is above the floors. Functions return {metric: percent}, with the metric
names of eval.py.
"""

import functools
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.feature_extraction.text import CountVectorizer
from torch import Tensor

from shared import probes
from shared.evalsets import EvalSet

SIDE = 24  # pixels


@dataclass(frozen=True)
class Floor:
    """A row of the table of arms for which no arm is trained: a floor, or with `ceiling` a reference that arms need not
    exceed."""

    name: str
    measure: Callable[..., dict[str, float]]
    """() -> {metric: value}; with `by_seed`, it takes a seed."""
    ceiling: bool = False
    arms: tuple[str, ...] = ()
    """Arms that the floor applies to, such as those with a pretrained tower; empty: all arms. It counts for claims
    whose stronger arm is one of these, and is measured if one of these is compared."""
    by_seed: bool = False
    """Whether it is computed from what a stage made with a seed. It is then the mean over the seeds of its arms."""

    def values(self, seeds: Sequence[int]) -> dict[str, float]:
        """{metric: value}, of these seeds if the floor depends on them; scores of single pictures are left out."""
        found = [self.measure(seed) for seed in seeds] if self.by_seed else [self.measure()]
        numbers = [metric for metric, value in found[0].items() if not isinstance(value, str)]
        return {metric: float(np.mean([of_seed[metric] for of_seed in found])) for metric in numbers}


def chance(sets: Iterable[str | Path]) -> dict[str, float]:
    """{"SET/top1": 100 / classes}; for retrieval sets, the expected R@1, 5 and 10 of a random ranking, both ways.

    With n captions, c of them the image's, k random captions contain one of the image's with probability
    1 - C(n - c, k) / C(n, k).
    """
    found = {}
    for path in sets:
        evaluation = EvalSet(path, None)
        if evaluation.kind != "retrieval":
            found[f"{evaluation.name}/top1"] = 100 / len(evaluation.classnames)
            continue
        counts = np.array([len(captions) for _, captions in evaluation.targets()])
        n, recalls = counts.sum(), {}
        for k in (1, 5, 10):
            taken = np.arange(min(k, n))[:, None]
            missed = np.clip((n - counts - taken) / (n - taken), 0, None).prod(axis=0)
            recalls[f"image_to_text_R@{k}"] = 100 * float(1 - missed.mean())
            recalls[f"text_to_image_R@{k}"] = 100 * min(k, len(counts)) / len(counts)
        recalls["mean_recall"] = sum(recalls.values()) / len(recalls)
        found |= {f"{evaluation.name}/{metric}": value for metric, value in recalls.items()}
    return found


def raw_pixels(image: Image.Image) -> Tensor:
    """RGB image -> (3 * SIDE * SIDE,) pixels with mean 0, so that cosine similarity is correlation."""
    small = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(small)).flatten().float()
    return pixels - pixels.mean()


def join(batches: Iterable[Tensor]) -> Tensor:
    """Batches of features, unchanged, as one tensor."""
    return torch.cat(list(batches))


def read(
    path: str | Path,
    split: str,
    features: Callable[[Iterable[Tensor]], Tensor] = join,
    transform: Callable[[Image.Image], Tensor] = raw_pixels,
) -> tuple[Tensor, Tensor]:
    """Features (N, D), by default raw pixels, and labels (N,) of one split of a classification set.

    features: batches of transformed images -> (N, D). Sets that share their shards by hard links are read once.
    """
    stats = map(os.stat, EvalSet(path, transform, split).shards)
    files = tuple((stat.st_dev, stat.st_ino, stat.st_mtime_ns, stat.st_size) for stat in stats)
    return _read(FIRST_WITH.setdefault(files, path), split, features, transform)


FIRST_WITH: dict[tuple, str | Path] = {}
"""{files of a split, as (device, inode, time of change, bytes) each: the first set that was read from them}."""


@functools.lru_cache(maxsize=6)  # several floors read the same split
def _read(
    path: str | Path,
    split: str,
    features: Callable[[Iterable[Tensor]], Tensor],
    transform: Callable[[Image.Image], Tensor],
) -> tuple[Tensor, Tensor]:
    labels = []

    def images() -> Iterable[Tensor]:
        for batch, label in EvalSet(path, transform, split).batches(256):
            labels.append(label)
            yield batch

    return features(images()).float(), torch.cat(labels)


def nearest_neighbour(
    sets: Iterable[str | Path],
    features: Callable[[Iterable[Tensor]], Tensor] = join,
    transform: Callable[[Image.Image], Tensor] = raw_pixels,
    metrics: Iterable[str] = ("top1",),
) -> dict[str, float]:
    """{"SET/METRIC": top-1 of nearest-neighbour classification by cosine among the images of the set's `train` split}.

    Each of `metrics` gets the same number.
    """
    found = {}
    for path in sets:
        train, test = (read(path, split, features, transform) for split in ("train", "test"))
        top1 = probes.nearest_neighbour(*train, *test)
        found |= {f"{Path(path).name}/{metric}": top1 for metric in metrics}
    return found


def captions_of_neighbours(
    test: Tensor, train: Tensor, captions: Sequence[str], bags: CountVectorizer, texts: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """Unit bags of words of the caption of each test image's nearest training image, and of `texts`.

    test (N, D), train (M, D): unit rows. captions: of the M training images. bags: fitted. Returns (N, words) and
    (len(texts), words); captions and texts without a known word are zero rows.
    """
    nearest = (test @ train.T).argmax(1)
    of_images, of_texts = (
        F.normalize(torch.from_numpy(bags.transform(lines).toarray()).float(), dim=-1)
        for lines in ([captions[row] for row in nearest], texts)
    )
    return of_images, of_texts
