"""Data that does not fit: windows of a few shards are fetched ahead, read, and removed.

A pass deals the shards, shuffled by (seed, epoch), to the ranks, and cuts each rank's share into windows of S shards.
A window gives a fixed number of batches, of its rows in random order. If it has fewer rows they come again; if it has
more, the rest is left out. So the sample of every (epoch, batch, rank) is known before any shard is read, and a run
goes on in the middle of a window.

Where `data.Shards` has rows, `Windowed` has positions 0 .. N-1 of a pass: position p is item p % B of batch
p // B // W on rank p // B % W, with B items a rank and W ranks.
"""

import concurrent.futures
import contextlib
import math
import os
import shutil
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

    def evict(self, urls: Sequence[str]) -> None:
        """Removes copies, and the index of these shards as they were opened: together."""
        local = lambda url: Path(url.removeprefix("file:"))  # noqa: E731
        paths = [data.cached_path(url, self.cache) if data.is_remote(url) else local(url) for url in urls]
        index.forget([str(path) for path in paths], self.cache)
        for url, path in zip(urls, paths, strict=True):
            if data.is_remote(url):
                path.unlink(missing_ok=True)
                path.with_suffix(".lock").unlink(missing_ok=True)

    def close(self) -> None:
        """Forgets what has not begun, and waits for what has."""
        self.pool.shutdown(cancel_futures=True)


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
        if len(set(urls)) < len(urls):
            raise ValueError("--data names a shard more than once, which --window-shards cannot read")
        self.urls, self.samples, self.strict = list(urls), samples, strict
        self.cache = cache / f"window-{process.rank}"  # this process' own: nobody else removes what is in it
        self.rank, self.world_size = process.rank, process.world_size
        self.steps, self.batch_size = samples // batch_size, batch_size // process.world_size
        most = min(len(urls) // self.world_size, self.steps)  # a shard and a batch each, at least
        self.count = min(math.ceil(len(urls) / (shards * self.world_size)), most)  # windows of a pass
        self.fingerprint = data.fingerprint(repr((self.urls, shards, samples, self.world_size)).encode())
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
            pairs = self.pairs_of(window, rank)
            order = np.random.default_rng((*self.seed, rank, window)).permutation(len(pairs))
            self.opened[window, rank] = pairs, order
        return self.opened[window, rank]

    def pairs_of(self, window: int, rank: int, tried: int = 1) -> data.Shards:
        """Pairs of a window; where none can be read, those of the next one, with what was broken in this one."""
        paths = [data.fetch(url, self.cache) for url in self.shards_of(window, rank)]
        try:
            return data.Shards(paths, strict=self.strict, cache=self.cache)
        except data.NoPairs as error:
            if tried == self.count:
                raise
            pairs = self.pairs_of((window + 1) % self.count, rank, tried + 1)
            pairs.broken = [*error.broken, *pairs.broken]
            return pairs

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
        pairs, window = self.pairs, None
        shards = lambda window: pairs.shards_of(window, pairs.rank)  # noqa: E731
        clear(pairs.cache, shards(pairs.window_of(self.start)))
        fetcher, batches = Fetcher(pairs.cache), iter(self.loader)  # workers are forked while no thread runs
        fetcher.start(shards(pairs.window_of(self.start)))
        try:
            for number in range(self.start, pairs.steps):
                new = pairs.window_of(number) != window
                if new:
                    fetcher.wait(shards(pairs.window_of(number)))
                batch = next(batches)
                if new:
                    if window is not None:
                        fetcher.evict(shards(window))
                    window = pairs.window_of(number)
                    if window + 1 < pairs.count:
                        fetcher.start(shards(window + 1))
                    batch[-1].extend(pairs.open(window, pairs.rank)[0].broken)
                yield batch
        finally:
            fetcher.close()
            del batches  # and its workers, which may be reading
            clear(pairs.cache, [])


def clear(cache: Path, wanted: Sequence[str]) -> None:
    """Empties a process' own cache of all but the copies of `wanted`: what a run that was killed has left."""
    kept = {data.cached_path(url, cache).name for url in wanted if data.is_remote(url)}
    for path in cache.iterdir() if cache.is_dir() else ():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name not in kept:
            path.unlink(missing_ok=True)
    if not wanted:
        with contextlib.suppress(OSError):
            cache.rmdir()


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
    cache = Path(cfg.cache) / f"{Path(cfg.out).name}-{data.stable_hash(os.path.abspath(cfg.out)):016x}"
    return Windowed(urls, cfg.window_shards, cfg.dataset_size, cfg.batch_size, process, cache, cfg.strict)
