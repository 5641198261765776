"""TinyCLIP's training pairs: their views, and the order in which a stage sees them.

Authors' code wkcn/TinyCLIP@ad981bf, cited as `U:` (its `src/`).
"""

import math
from collections.abc import Iterator

import numpy as np
import open_clip
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from shared import data, run
from tinyclip.config import Config


def image_transform(size: int, train: bool = False) -> transforms.Compose:
    """PIL RGB -> (3, size, size) with CLIP's statistics; no flip, no colours. U:open_clip/transform.py:71."""
    bicubic = InterpolationMode.BICUBIC
    if train:
        steps = [transforms.RandomResizedCrop(size, scale=(0.9, 1.0), interpolation=bicubic)]
    else:
        steps = [transforms.Resize(size, bicubic), transforms.CenterCrop(size)]
    normalise = data.ToNormalizedTensor(open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    return transforms.Compose([*steps, normalise])


class Pairs(Dataset):
    """Row -> (row, image (3, R, R), tokens (S,), broken samples passed over). A view is a function of (seed, row)."""

    def __init__(self, pairs, transform, tokenizer, seed: tuple[int, ...] = (0,)):
        self.pairs, self.transform, self.tokenizer, self.seed = pairs, transform, tokenizer, seed

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, row: int) -> tuple[int, Tensor, Tensor, list[data.Broken]]:
        broken: list[data.Broken] = []
        pair = data.read_or_next(self.pairs, int(row), broken)
        torch.default_generator.manual_seed(data.stable_hash(*self.seed, int(row)))  # CPU only: cheap
        return int(row), self.transform(pair.image), self.tokenizer(pair.caption)[0], broken


def collate(items: list) -> tuple[Tensor, Tensor, Tensor, list[data.Broken]]:
    rows, images, tokens, broken = zip(*items, strict=True)
    return torch.tensor(rows), torch.stack(images), torch.stack(tokens), [b for each in broken for b in each]


def epoch_batches(cfg: Config, n: int, process: run.Process, epoch: int, step: int) -> list[np.ndarray]:
    """This process's rows of each step of an epoch that is not before `step`; the short last batch is left out."""
    per_epoch, size = n // cfg.batch_size, cfg.batch_size // process.world_size
    start = max(step - epoch * per_epoch, 0)
    batches = data.batches(n, size, (cfg.seed, epoch), process.rank, process.world_size, start)
    return batches[: per_epoch - start]


def epochs(cfg: Config, n: int, step: int) -> range:
    """The epochs that a stage of `cfg.steps` steps still needs at `step`."""
    per_epoch = n // cfg.batch_size
    return range(step // per_epoch, math.ceil(cfg.steps / per_epoch))


def loaded(cfg: Config, pairs: Pairs, process: run.Process, step: int) -> Iterator[tuple]:
    """(rows, images, tokens, broken) of every step from `step` on, read by `cfg.workers` processes."""
    for epoch in epochs(cfg, len(pairs), step):
        yield from DataLoader(
            Pairs(pairs.pairs, pairs.transform, pairs.tokenizer, (cfg.seed, epoch)),
            batch_sampler=[rows.tolist() for rows in epoch_batches(cfg, len(pairs), process, epoch, step)],
            num_workers=cfg.workers,
            collate_fn=collate,
            pin_memory=process.device.type == "cuda",
            generator=torch.Generator().manual_seed(0),  # keeps the loader off the global generator
        )


def remembered(cfg: Config, images: Tensor, tokens: Tensor, process: run.Process, step: int) -> Iterator[tuple]:
    """(rows, images, tokens) of every step from `step` on, out of memory."""
    for epoch in epochs(cfg, len(images), step):
        for rows in map(torch.from_numpy, epoch_batches(cfg, len(images), process, epoch, step)):
            yield rows, images[rows], tokens[rows]
