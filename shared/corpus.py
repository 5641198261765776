"""Image-text pairs as batches on the device: `for rows, images, texts in corpus.epoch(epoch, view): ...`.

Whether images lie in memory, on a disk or in a stream is decided here, and cannot be seen in a paper's code.

By row (`Corpus`), order and views are functions of (seed, epoch, row) alone: they depend neither on the number of
processes and workers nor on resuming. Remote data, or data larger than the disk, are a `streams.Stream`.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data import default_collate as collate

from shared import data, run
from shared.errors import UserError
from shared.streams import Stream


class Corpus:
    """Pairs by row. `text(pair)` -> tensor(s) of a sample's text, computed in a loader process.

    `pairs` may be a paper's own: it has a length, `keys`, `broken`, `strict`, `fingerprint`, and `read(row)`, a
    named tuple with the image. `cut_padding`: texts, or the first of their parts, are tokens whose padding, 0, is cut
    off. `side`: with --keep-in-memory, shorter sides of larger images are reduced to it.
    """

    def __init__(
        self,
        cfg: Any,
        process: run.Process,
        text: Callable[[Any], Any],
        pairs: Any = None,
        cut_padding: bool = False,
        side: int | None = None,
    ):
        self.cfg, self.process, self.cut_padding = cfg, process, cut_padding
        if pairs is None:
            pairs = data.open_pairs(cfg.data, cfg.dataset_size, cfg.strict, Path(cfg.cache))
        if len(pairs) < cfg.batch_size:
            raise UserError(f"{cfg.data} holds {len(pairs):,} pairs, less than one batch of {cfg.batch_size}")
        data.say_size(pairs, cfg, process)
        self.pairs = InMemory(pairs, side, process) if cfg.keep_in_memory else pairs
        self.labels = caption_labels(self.pairs) if cfg.distinct_captions else None
        self.samples, self.loader, self.replaced = Samples(self.pairs, text), None, []

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def fingerprint(self) -> str:
        return self.pairs.fingerprint

    @property
    def steps(self) -> int:
        """Whole batches of an epoch."""
        return len(self) // self.cfg.batch_size

    def epoch(self, epoch: int, view: Callable, start: int = 0, drop_last: bool = True) -> Iterator[tuple]:
        """`batches` of a pass over all rows."""
        rows = np.arange(len(self))
        seed, label = (self.cfg.seed, epoch), f"epoch {epoch + 1}"
        return self.batches(rows, view, seed, start=start, drop_last=drop_last, label=label)

    def batches(
        self, rows: np.ndarray, view: Callable, seed: Sequence[int], *, start: int = 0, drop_last: bool = False,
        label: str = "",
    ) -> Iterator[tuple[Tensor, Any, Any]]:  # fmt: skip
        """This rank's batches of one shuffled pass over `rows` (N,) of the data, on the device.

        Yields (positions in `rows` (B,), images, texts), where an image is `view(image)` of a PIL image, normalised on
        the device. The pass begins with batch `start`; `drop_last` leaves out a short last batch. `label` names the
        pass in its progress bar.
        """
        order = self.order(rows, seed, start, drop_last)
        number, normalise = self.samples.number(view)
        items = [[(number, seed, int(i), int(rows[i])) for i in batch] for batch in order]
        label = f"{Path(self.cfg.out).name} {label}"
        batches = run.progress(self.loaded(items), len(items), label, self.cfg.batch_size, self.process)
        for positions, images, texts, broken in batches:
            self.replaced += broken
            yield data.on_device((positions, images, texts), self.process.device, normalise, self.cut_padding)

    def order(self, rows: np.ndarray, seed: Sequence[int], start: int, drop_last: bool) -> list[np.ndarray]:
        """This rank's batches of positions in `rows`."""
        (rank, world_size, _), batch = self.process, self.cfg.batch_size
        size = batch // world_size
        if self.labels is None:
            found = data.batches(len(rows), size, seed, rank, world_size, start)
        else:
            whole = distinct_batches(np.random.default_rng(seed).permutation(len(rows)), self.labels[rows], batch)
            found = [positions[rank * size : (rank + 1) * size] for positions in whole[start:]]
        if drop_last:
            found = found[: max(len(rows) // batch - start, 0)]
        return [positions for positions in found if len(positions)]

    def loaded(self, items: list) -> Iterator:
        """Batches of these lists of items. The same loader processes serve all passes."""
        known = 0 if self.loader is None else self.loader.views
        if known < len(self.samples.views):  # loader processes know the views that there were at their start
            self.loader = DataLoader(
                self.samples,
                batch_sampler=Order(),
                num_workers=self.cfg.workers,
                persistent_workers=self.cfg.workers > 0,
                collate_fn=collated,
                pin_memory=self.process.device.type == "cuda",
                generator=torch.Generator().manual_seed(0),  # so that the loader does not use the global generator
            )
            self.loader.views = len(self.samples.views)
        self.loader.batch_sampler.items = items
        return iter(self.loader)

    def report_broken(self, label: str) -> None:
        """Print the samples of all ranks that were left out, or replaced since the last report, with reasons."""
        data.report_broken([*self.pairs.broken, *self.replaced], self.process, label)
        self.replaced.clear()


def open_corpus(
    cfg: Any,
    process: run.Process,
    text: Callable,
    pairs: Any = None,
    cut_padding: bool = False,
    side: int | None = None,
) -> "Corpus | Stream":
    """The corpus of --data: by row, or with --stream a `Stream`, which has no `batches` of chosen rows."""
    if cfg.stream:
        return Stream(cfg, process, text, cut_padding)
    return Corpus(cfg, process, text, pairs, cut_padding, side)


class Order:
    """A batch sampler whose batches can be replaced between passes."""

    items: list = []

    def __iter__(self) -> Iterator:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)


class Samples(Dataset):
    """Item (number of a view, seed, position, row) -> (position, image, text, broken samples that were skipped)."""

    def __init__(self, pairs: Any, text: Callable):
        self.pairs, self.text, self.views = pairs, text, []

    def number(self, view: Callable) -> tuple[int, Callable]:
        """(number of a view, its normalisation of batches on the device)."""
        for number, (known, _, normalise) in enumerate(self.views):
            if known is view:
                return number, normalise
        self.views.append((view, *data.split_normalisation(view)))
        return len(self.views) - 1, self.views[-1][2]

    def __getitem__(self, item: tuple[int, Sequence[int], int, int]) -> tuple[int, Any, Any, list[data.Broken]]:
        number, seed, position, row = item
        broken: list[data.Broken] = []
        pair = data.read_or_next(self.pairs, row, broken)
        torch.default_generator.manual_seed(run.stable_hash(*seed, position))  # the view depends on (seed, position)
        features = isinstance(pair.image, Tensor)  # of a locked tower: they have no views
        image = pair.image if features else self.views[number][1](pair.image)
        return position, image, self.text(pair), broken


def collated(items: list) -> tuple[Tensor, Any, Any, list[data.Broken]]:
    positions, images, texts, broken = zip(*items, strict=True)
    return torch.tensor(positions), collate(images), collate(texts), [one for each in broken for one in each]


# ------------------------------------------------------------------------------------------------------ small corpora


class InMemory:
    """Pairs whose samples are read once and kept: images decoded, equal ones once, reduced to `side` pixels.

    A sample that cannot be read is read again, and fails again, each time it is asked for.
    """

    def __init__(self, pairs: Any, side: int | None, process: run.Process):
        self.pairs, self.kept = pairs, {}
        self.keys, self.strict, self.fingerprint, self.broken = (
            pairs.keys,
            pairs.strict,
            pairs.fingerprint,
            pairs.broken,
        )
        room = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2 / process.world_size
        distinct: dict[bytes, Any] = {}  # by hash of the pixels
        size = 0
        for row in run.progress(range(len(pairs)), len(pairs), "reading", 1, process):
            try:
                pair = pairs.read(row)
            except data.BrokenSample:
                continue
            image = reduced(pair.image, side)
            content = image.numpy().tobytes() if isinstance(image, Tensor) else image.tobytes()
            key = data.file_hash(content)
            size += 0 if key in distinct else len(content)
            self.kept[row] = pair._replace(image=distinct.setdefault(key, image))
            if size > room:
                raise UserError(
                    f"{len(pairs):,} images take more than half of the machine's memory: pass --no-keep-in-memory"
                )

    def __len__(self) -> int:
        return len(self.pairs)

    def read(self, row: int) -> Any:
        return self.kept[row] if row in self.kept else self.pairs.read(row)

    def caption(self, row: int) -> str:
        return self.kept[row].caption if row in self.kept else self.pairs.caption(row)


def reduced(image: Any, side: int | None) -> Any:
    """The image, its shorter side at most `side` pixels; features are unchanged."""
    if side is None or isinstance(image, Tensor) or min(image.size) <= side:
        return image
    scale = side / min(image.size)
    return image.resize([max(round(length * scale), side) for length in image.size], data.Image.Resampling.BICUBIC)


def caption_labels(pairs: Any) -> np.ndarray:
    """(N,) int64, the same for equal captions."""
    return np.unique([pairs.caption(row) for row in range(len(pairs))], return_inverse=True)[1]


def distinct_batches(order: np.ndarray, labels: np.ndarray, size: int) -> list[np.ndarray]:
    """Split the items of `order` into batches of `size`, with distinct labels where possible.

    An item whose label is already in the batch is moved to the next batch. The last batch may be short.
    """
    waiting, cut = list(order), []
    while waiting:
        seen, batch, later = set(), [], []
        for item in waiting:
            label = labels[item]
            if len(batch) < size and label not in seen:
                seen.add(label)
                batch.append(item)
            else:
                later.append(item)
        missing = min(size - len(batch), len(later))
        cut.append(np.array(batch + later[:missing]))
        waiting = later[missing:]
    return cut
