"""Data that does not fit: windows of a few shards are fetched ahead, read, and removed.

A pass deals the shards, shuffled by (seed, epoch), to the ranks, and cuts each rank's share into windows of S shards.
A window gives a fixed number of batches, of its rows in random order. If it has fewer rows they come again; if it has
more, the rest is left out. So the sample of every (epoch, batch, rank) is known before any shard is read, and a run
goes on in the middle of a window.

Where `data.Shards` has rows, `Windowed` has positions 0 .. N-1 of a pass: position p is item p % B of batch
p // B // W on rank p // B % W, with B items a rank and W ranks.
"""

import concurrent.futures
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset

from shared import data, index, run


class Fetcher:
    """Fetches shards in the background, and removes their copies; local shards stay where they are."""

    def __init__(self, cache: Path):
        self.cache, self.coming = cache, {}
        self.pool = ThreadPoolExecutor(4, "fetch")  # its threads start with the first fetch

    def start(self, urls: Iterable[str]) -> None:
        """Begins to fetch; returns at once. What fails is tried again, and told, by the one who opens the shard."""
        for url in urls:
            if data.is_remote(url):
                self.coming[url] = self.pool.submit(data.fetch, url, self.cache)

    def wait(self, urls: Iterable[str]) -> None:
        """Waits until these are there, or have failed."""
        concurrent.futures.wait([self.coming.pop(url) for url in urls if url in self.coming])

    def evict(self, urls: Iterable[str]) -> None:
        """Removes copies, and the index of these shards."""
        urls = list(urls)
        paths = [data.cached_path(url, self.cache) if data.is_remote(url) else Path(url) for url in urls]
        index.forget([str(path) for path in paths], self.cache)  # of all of them together, as they were opened
        for url, path in zip(urls, paths, strict=True):
            if data.is_remote(url):
                path.unlink(missing_ok=True)
                path.with_suffix(".lock").unlink(missing_ok=True)


class Windowed:
    """Pairs of a pass over shards, by position; what `data.Shards` is to shards that fit."""

    def __init__(
        self,
        urls: Sequence[str],
        shards: int,
        samples: int,
        batch_size: int,
        process: run.Process,
        cache: Path,
        strict: bool = False,
    ):
        if len(urls) < process.world_size:
            raise ValueError(f"--window-shards: {len(urls)} shards are fewer than the {process.world_size} processes")
        if samples < batch_size:
            raise ValueError(f"--dataset-size {samples} is less than one batch of {batch_size}")
        self.urls, self.samples, self.cache, self.strict = list(urls), samples, cache, strict
        self.rank, self.world_size = process.rank, process.world_size
        self.steps, self.batch_size = samples // batch_size, batch_size // process.world_size
        self.count = min(math.ceil(len(urls) / (shards * self.world_size)), self.steps)  # windows of a pass
        self.fingerprint = data.fingerprint(repr((self.urls, shards, samples)).encode())
        self.broken: list[data.Broken] = []
        self.begin((0, 0))

    def begin(self, seed: Sequence[int]) -> None:
        """Begin the pass that a seed stands for, (run seed, epoch)."""
        self.order = np.random.default_rng(seed).permutation(len(self.urls))
        self.seed, self.opened = tuple(seed), {}

    def shards_of(self, window: int, rank: int) -> list[str]:
        share = self.order[rank :: self.world_size]
        return [self.urls[i] for i in np.array_split(share, self.count)[window]]

    def window_of(self, batch: int) -> int:
        return batch * self.count // self.steps

    def __len__(self) -> int:
        return self.samples

    def open(self, window: int, rank: int) -> tuple[data.Shards, np.ndarray]:
        """(pairs of a window, their random order); the last two stay open."""
        if (window, rank) not in self.opened:
            while len(self.opened) > 1:
                self.opened.pop(next(iter(self.opened)))
            paths = [data.fetch(url, self.cache) for url in self.shards_of(window, rank)]
            pairs = data.Shards(paths, strict=self.strict, cache=self.cache)
            order = np.random.default_rng((*self.seed, rank, window)).permutation(len(pairs))
            self.opened[window, rank] = pairs, order
        return self.opened[window, rank]

    def place(self, position: int) -> tuple[data.Shards, int]:
        """Position -> (pairs of its window, row in them)."""
        batch, item = divmod(position, self.batch_size)
        batch, rank = divmod(batch, self.world_size)
        window = self.window_of(batch)
        pairs, order = self.open(window, rank)
        first = math.ceil(window * self.steps / self.count)  # batch of the window
        return pairs, int(order[((batch - first) * self.batch_size + item) % len(order)])

    def __getstate__(self) -> dict:
        return self.__dict__ | {"opened": {}}


class WindowLoader:
    """Batches of a loader over `Windowed`, from batch `start` on; the next window is fetched meanwhile.

    The last item of a batch lists broken samples; a window's first batch brings those that its shards' index found.
    """

    def __init__(self, loader: DataLoader, pairs: Windowed, start: int):
        self.loader, self.pairs, self.start = loader, pairs, start

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator:
        pairs, fetcher, window = self.pairs, Fetcher(self.pairs.cache), None
        batches = iter(self.loader)  # workers are forked while no thread runs
        for number in range(self.start, pairs.steps):
            new = pairs.window_of(number) != window
            if new:
                fetcher.wait(pairs.shards_of(pairs.window_of(number), pairs.rank))
            batch = next(batches)
            if new:
                if window is not None:
                    fetcher.evict(pairs.shards_of(window, pairs.rank))
                window = pairs.window_of(number)
                if window + 1 < pairs.count:
                    fetcher.start(pairs.shards_of(window + 1, pairs.rank))
                batch[-1].extend(pairs.open(window, pairs.rank)[0].broken)
            yield batch
        if window is not None:
            fetcher.evict(pairs.shards_of(window, pairs.rank))


def epoch_loader(
    dataset: Dataset, collate: Callable, cfg: Any, process: run.Process, seed: Sequence[int], start: int = 0
) -> DataLoader | WindowLoader:
    """`data.epoch_loader` of a dataset over its `pairs`, by row or by window."""
    pairs = dataset.pairs
    if not isinstance(pairs, Windowed):
        return data.epoch_loader(dataset, collate, cfg, process, seed, start)
    pairs.begin(seed)
    size, width = pairs.batch_size, process.world_size
    firsts = [(batch * width + process.rank) * size for batch in range(start, pairs.steps)]
    batches = [range(first, first + size) for first in firsts]
    return WindowLoader(data.loader_of(dataset, batches, collate, cfg, process), pairs, start)


def open_pairs(cfg: Any, process: run.Process) -> data.Shards | data.TSV | Windowed:
    """What a training reads: by row, or with --window-shards by window. ValueError where one cannot be."""
    if cfg.window_shards < 0:
        raise ValueError(f"--window-shards {cfg.window_shards} is a number of shards, or 0 to read by row")
    if not cfg.window_shards:
        return data.open_pairs(cfg.data, cfg.dataset_size, cfg.strict, Path(cfg.cache))
    if cfg.data.endswith((".tsv", ".csv")):
        raise ValueError("--window-shards reads tar shards; a .tsv is read by row")
    if not cfg.dataset_size:
        raise ValueError("--window-shards needs --dataset-size, the number of samples of an epoch")
    urls = data.expand_shards(cfg.data)
    return Windowed(urls, cfg.window_shards, cfg.dataset_size, cfg.batch_size, process, Path(cfg.cache), cfg.strict)
