"""For data that do not fit on the disk: fetches windows of a few shards ahead, reads and removes them.

In each epoch the shards are shuffled by (seed, epoch), divided among the ranks, and each rank's share is split into
windows of S shards. A window gives a fixed number of batches, from its samples in random order. If it has too few
samples, they are repeated; if it has more, the rest is left out. So (epoch, batch, rank) determines the window and the
position in it before any shard is read, and a run can resume in the middle of a window.

`data.Shards` finds a sample by its index in the data set; `Windowed` has positions 0 .. N-1 of an epoch instead.
Position p is item p % B of batch p // B // W on rank p // B % W, with B items per rank and W ranks. Item e N + p of a
run is position p of epoch e.
"""

import concurrent.futures
import contextlib
import itertools
import math
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset

from shared import data, index, run
from shared.errors import UserError
from shared.fetch import cached_path

AHEAD = 4  # shards fetched at a time


class Fetcher:
    """Fetches remote shards in background threads, and removes their copies; local shards are not touched.

    Its threads start with the first fetch. Do not fork processes while a fetch is running: a forked process could wait
    forever for a lock held by the fetching thread. Fork before the first fetch, or after `wait`.
    """

    def __init__(self, cache: Path):
        self.cache, self.coming = cache, {}
        self.pool = ThreadPoolExecutor(AHEAD, "fetch")

    def start(self, urls: Iterable[str]) -> None:
        """Starts fetching and returns. A failed fetch is repeated, and its error raised, when the shard is opened."""
        for url in urls:
            if data.is_remote(url) and url not in self.coming:
                self.coming[url] = self.pool.submit(data.fetch, url, self.cache)

    def wait(self, urls: Iterable[str]) -> None:
        """Waits until these shards are fetched or have failed."""
        concurrent.futures.wait([self.coming.pop(url) for url in urls if url in self.coming])

    def evict(self, urls: Sequence[str], wanted: Collection[str] = ()) -> None:
        """Removes the index of these shards, and the copies of those that are not `wanted`."""
        paths = [
            cached_path(url, self.cache) if data.is_remote(url) else Path(url.removeprefix("file:")) for url in urls
        ]
        index.forget([str(path) for path in paths], self.cache)
        for url, path in zip(urls, paths, strict=True):
            if data.is_remote(url) and url not in wanted:
                path.unlink(missing_ok=True)
                path.with_suffix(".lock").unlink(missing_ok=True)

    def close(self) -> None:
        """Cancels fetches that have not started, and waits for the others."""
        self.pool.shutdown(cancel_futures=True)


class Windowed:
    """Pairs read by window, with an item of a run as index; the counterpart of `data.Shards`."""

    def __init__(
        self,
        urls: Sequence[str],
        shards: int,
        samples: int,
        batch_size: int,
        seed: int,
        process: run.Process,
        cache: Path,
        strict: bool = False,
    ):
        if len(urls) < process.world_size:
            raise UserError(f"--window-shards: {len(urls)} shards are fewer than the {process.world_size} processes")
        if samples < batch_size:
            raise UserError(f"--dataset-size {samples} is less than one batch of {batch_size}")
        if len(set(urls)) < len(urls):
            raise UserError("--data names a shard more than once, which --window-shards cannot read")
        self.urls, self.samples, self.seed, self.strict = list(urls), samples, seed, strict
        self.cache = cache / f"window-{process.rank}"  # used by this process only
        self.rank, self.world_size = process.rank, process.world_size
        self.steps, self.batch_size = samples // batch_size, batch_size // process.world_size
        most = min(len(urls) // self.world_size, self.steps)  # a window has at least one shard and one batch
        self.count = min(math.ceil(len(urls) / (shards * self.world_size)), most)  # windows per epoch
        self.fingerprint = data.fingerprint(repr((self.urls, shards, samples, self.world_size)).encode())
        self.broken: list[data.Broken] = []
        self.opened: dict[tuple[int, int, int], tuple[data.Shards, np.ndarray]] = {}

    def shards_of(self, epoch: int, window: int, rank: int) -> list[str]:
        share = np.random.default_rng((self.seed, epoch)).permutation(len(self.urls))[rank :: self.world_size]
        return [self.urls[i] for i in np.array_split(share, self.count)[window]]

    def window_of(self, batch: int) -> int:
        return batch * self.count // self.steps

    def batches_of(self, window: int) -> range:
        """Batches of a window."""
        return range(*(-(-each * self.steps // self.count) for each in (window, window + 1)))

    def __len__(self) -> int:
        return self.samples

    def open(self, epoch: int, window: int, rank: int) -> tuple[data.Shards, np.ndarray]:
        """(pairs of a window, their random order); the last two windows stay open."""
        which = epoch, window, rank
        if which not in self.opened:
            while len(self.opened) > 1:
                self.opened.pop(next(iter(self.opened)))
            pairs = self.pairs_of(*which)
            order = np.random.default_rng((self.seed, epoch, rank, window)).permutation(len(pairs))
            self.opened[which] = pairs, order
        return self.opened[which]

    def pairs_of(self, epoch: int, window: int, rank: int, tried: int = 1) -> data.Shards:
        """Pairs of a window. If none is readable: those of the next window, with the broken samples of both."""
        paths = [data.fetch(url, self.cache) for url in self.shards_of(epoch, window, rank)]
        try:
            return data.Shards(paths, strict=self.strict, cache=self.cache)
        except data.NoPairs as error:
            if tried == self.count:
                raise
            pairs = self.pairs_of(epoch, (window + 1) % self.count, rank, tried + 1)
            pairs.broken = [*error.broken, *pairs.broken]
            return pairs

    def place(self, item: int) -> tuple[data.Shards, int]:
        """Item -> (pairs of its window, index of its sample in them)."""
        epoch, position = divmod(item, self.samples)
        batch, i = divmod(position, self.batch_size)
        batch, rank = divmod(batch, self.world_size)
        window = self.window_of(batch)
        pairs, order = self.open(epoch, window, rank)
        batch -= self.batches_of(window).start
        return pairs, int(order[(batch * self.batch_size + i) % len(order)])

    def __getstate__(self) -> dict:
        return self.__dict__ | {"opened": {}}


def fetched_ahead(loader: DataLoader, pairs: Windowed, epochs: range, start: int) -> Iterator:
    """Batches of a loader over `Windowed`, from batch `start` of the first epoch on, while the next window is fetched.

    The last item of a batch lists broken samples; a window's first batch also lists those found by indexing.
    """
    turns = [(epoch, window) for epoch in epochs for window in range(pairs.count)][pairs.window_of(start) :]

    def shards(number: int) -> list[str]:
        return pairs.shards_of(*turns[number], pairs.rank) if number < len(turns) else []

    read_ahead = loader.num_workers * (loader.prefetch_factor or 0)  # batches, maybe of windows after the next
    reach = 1 + math.ceil(read_ahead / (pairs.steps // pairs.count))
    clear(pairs.cache, shards(0))
    batches, fetcher = iter(loader), Fetcher(pairs.cache)  # forks workers, before the fetcher's threads start
    fetcher.start(shards(0))
    try:
        for number, (epoch, window) in enumerate(turns):
            fetcher.wait(shards(number))
            run.wait()  # a rank's shards may arrive later than the default timeout of the next step
            batch = next(batches)
            if number:
                wanted = {url for step in range(reach + 1) for url in shards(number + step)}
                fetcher.evict(shards(number - 1), wanted)
            batch[-1].extend(pairs.open(epoch, window, pairs.rank)[0].broken)  # may fork, so before the next fetch
            fetcher.start(shards(number + 1))
            yield batch
            of_window = pairs.batches_of(window)
            done = start - of_window.start if number == 0 and epoch == epochs[0] else 0
            yield from itertools.islice(batches, len(of_window) - done - 1)
    finally:
        fetcher.close()
        del batches  # stops the workers, which may be reading
        clear(pairs.cache, [])


def clear(cache: Path, wanted: Sequence[str]) -> None:
    """Removes all but the copies of `wanted` from a process's cache, such as leftovers of a killed run."""
    kept = {cached_path(url, cache).name for url in wanted if data.is_remote(url)}
    for path in cache.iterdir() if cache.is_dir() else ():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name not in kept:
            path.unlink(missing_ok=True)
    if not wanted:
        with contextlib.suppress(OSError):
            cache.rmdir()


def captions(pairs: data.Shards | data.TSV | Windowed, rank: int = 0, world_size: int = 1) -> Iterator[str]:
    """Captions of this rank: every world_size-th one from `rank` on; for `Windowed`, of every world_size-th shard.

    A window's shards are fetched ahead, once each, and removed after reading.
    """
    if not isinstance(pairs, Windowed):
        yield from (pairs.caption(i) for i in range(rank, len(pairs), world_size))
        return
    urls, fetcher = pairs.urls[rank::world_size], Fetcher(pairs.cache)
    try:
        for number, url in enumerate(urls):
            fetcher.start(urls[number : number + AHEAD])
            fetcher.wait([url])
            with contextlib.suppress(data.NoPairs):  # reported by training
                shard = data.Shards([data.fetch(url, pairs.cache)], strict=pairs.strict, cache=pairs.cache)
                yield from map(shard.caption, range(len(shard)))
            fetcher.evict([url])
    finally:
        fetcher.close()


def training_batches(
    dataset: Dataset, collate: Callable, cfg: Any, process: run.Process, epochs: range, start: int = 0
) -> Iterator:
    """Batches like those of `data.training_batches`, for a dataset whose `pairs` are read by index or by window."""
    pairs = dataset.pairs
    if not isinstance(pairs, Windowed):
        return data.training_batches(dataset, collate, cfg, process, epochs, start)
    firsts = (
        epoch * len(pairs) + (batch * process.world_size + process.rank) * pairs.batch_size
        for epoch in epochs
        for batch in range(start if epoch == epochs[0] else 0, pairs.steps)
    )
    order = (range(first, first + pairs.batch_size) for first in firsts)
    return fetched_ahead(data.loader_of(dataset, order, collate, cfg, process), pairs, epochs, start)


def open_pairs(cfg: Any, process: run.Process) -> data.Shards | data.TSV | Windowed:
    """Training pairs, read by index, or with --window-shards by window. ValueError on invalid settings."""
    if cfg.window_shards < 0:
        raise UserError(
            f"--window-shards must be a number of shards, or 0 to shuffle all samples, not {cfg.window_shards}"
        )
    if not cfg.window_shards:
        return data.open_pairs(cfg.data, cfg.dataset_size, cfg.strict, Path(cfg.cache))
    if not cfg.dataset_size:
        raise UserError("--window-shards needs --dataset-size, the number of samples of an epoch")
    if (ending := Path(cfg.data).suffix) in (".tsv", ".csv", ".json"):
        raise UserError(f"--window-shards needs tar shards; leave it out for a {ending} file")
    urls = data.expand_shards(cfg.data)
    return Windowed(
        urls, cfg.window_shards, cfg.dataset_size, cfg.batch_size, cfg.seed, process, own_cache(cfg), cfg.strict
    )


def evaluation_workers(cfg: Any) -> int:
    """Number of loader processes for an evaluation between training steps: 0 if shards are read by window or episode,
    since forking while a thread fetches may deadlock; else `cfg.workers`."""
    fetching = getattr(cfg, "window_shards", 0) or getattr(cfg, "episode_shards", 0)
    return 0 if fetching else cfg.workers


def own_cache(cfg: Any) -> Path:
    """A folder in --cache that only this run uses."""
    return Path(cfg.cache) / f"{Path(cfg.out).name}-{data.stable_hash(os.path.abspath(cfg.out)):016x}"
