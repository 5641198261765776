"""Pairs that are remote or do not fit on the disk, read shard by shard with webdataset's pipeline.

In each epoch the shards are shuffled by (seed, epoch) and dealt to the processes, then to the loader workers of each. A
worker copies one shard at a time (`shared.fetch`), reads it from start to end, deletes the copy, and mixes its samples
in a buffer. So the samples are a function of (seed, epoch, rank, worker); they have no row numbers. Every rank has
`dataset_size // batch_size` batches an epoch: a worker that has read all of its shards reads them again, in another
order, until its share of the batches is full.

A resumed run does not find the place where it stopped: it goes on with shards in a fresh order, that of (seed, epoch,
number of its first batch), and may see some samples of this epoch twice and others in a later epoch only.
"""

import itertools
import os
import random
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from torch.utils.data import DataLoader, IterableDataset, default_collate, get_worker_info
from webdataset.tariterators import group_by_keys

from shared import data, run
from shared.errors import UserError
from shared.fetch import fetch, is_remote
from shared.run import stable_hash
from shared.tars import IMAGE_EXTENSIONS, Broken, key_of, read_tar

BUFFER = 1000  # samples, still encoded, among which a worker draws the next one


class Stream:
    """Pairs of shards in a shuffled order; `text(pair)` -> tensor(s) of a sample's text, computed in a loader worker.

    The counterpart of `corpus.Corpus`, without `batches` of chosen rows. `cut_padding`: texts are CLIP's tokens, whose
    padding is cut off. UserError for a table or for fewer shards than processes.
    """

    def __init__(self, cfg: Any, process: run.Process, text: Callable[[data.Pair], Any], cut_padding: bool = False):
        if cfg.dataset_size < cfg.batch_size:
            raise UserError(f"--dataset-size {cfg.dataset_size} is less than one batch of {cfg.batch_size}")
        if (ending := Path(cfg.data).suffix) in (".tsv", ".csv", ".json"):
            raise UserError(f"--stream needs tar shards; leave it out for a {ending} file")
        self.shards = data.expand_shards(cfg.data)
        if len(self.shards) < process.world_size:
            raise UserError(f"--stream: {len(self.shards)} shards are fewer than the {process.world_size} processes")
        self.cfg, self.process, self.text, self.cut_padding = cfg, process, text, cut_padding
        self.steps = cfg.dataset_size // cfg.batch_size
        self.fingerprint = data.fingerprint("\n".join(self.shards).encode())
        own = f"stream-{stable_hash(os.path.abspath(cfg.out)):016x}-{process.rank}"
        self.folder = Path(cfg.cache) / own  # copies of this process only
        self.broken: list[Broken] = []

    def __len__(self) -> int:
        """Samples of an epoch, as --dataset-size says; what the shards hold is not known before they are read."""
        return self.cfg.dataset_size

    def epoch(
        self, epoch: int, view: Callable, start: int = 0, drop_last: bool = True
    ) -> Iterator[tuple[None, Any, Any]]:
        """This rank's batches (None, images, texts) of an epoch on the device, from batch `start` on.

        An image is `view(image)` of a PIL image, which is a function of (seed, epoch, key); it is normalised on the
        device. UserError for `drop_last=False`, a pass that needs every sample once.
        """
        if not drop_last:
            raise UserError("this pass reads every sample once, which --stream cannot: leave it out")
        pixels, normalise = data.split_normalisation(view)
        samples = Samples(self, epoch, start, pixels)
        loader = DataLoader(
            samples,
            batch_size=None,  # samples come as batches
            num_workers=min(self.cfg.workers, len(samples.shards)),
            pin_memory=self.process.device.type == "cuda",
            generator=torch.Generator().manual_seed(0),  # so that the loader does not use the global generator
        )
        label = f"{Path(self.cfg.out).name} epoch {epoch + 1}"
        batches = run.progress(loader, self.steps - start, label, self.cfg.batch_size, self.process)
        shutil.rmtree(self.folder, ignore_errors=True)  # left by a killed run
        try:
            for images, texts, broken in batches:
                self.broken += broken
                yield data.on_device((None, images, texts), self.process.device, normalise, self.cut_padding)
        finally:
            del batches, loader  # stops the workers, which may be reading
            shutil.rmtree(self.folder, ignore_errors=True)

    def report_broken(self, label: str) -> None:
        """Print the samples and shards of all ranks that were left out since the last report, with reasons."""
        data.report_broken(self.broken, self.process, label)


class Samples(IterableDataset):
    """Batches (images, texts, samples left out before this batch) of a rank's share of an epoch, for a `DataLoader`."""

    def __init__(self, stream: Stream, epoch: int, start: int, pixels: Callable):
        (rank, world_size, _), cfg = stream.process, stream.cfg
        self.strict, self.folder, self.text, self.pixels = cfg.strict, stream.folder, stream.text, pixels
        self.seed, self.rank, self.views = (cfg.seed, epoch, start), rank, (cfg.seed, epoch)
        order = np.random.default_rng(self.seed).permutation(len(stream.shards))
        self.shards = [stream.shards[i] for i in order[rank::world_size]]
        self.batches, self.size = stream.steps - start, cfg.batch_size // world_size
        self.broken: list[Broken] = []

    def __iter__(self) -> Iterator[tuple[Any, Any, list[Broken]]]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        rng = random.Random(stable_hash(*self.seed, self.rank, number))
        samples = itertools.chain.from_iterable(self.a_pass(rng) for _ in itertools.count())
        for _ in range(number, self.batches, workers):  # the loader takes batches from its workers in turn
            images, texts = zip(*itertools.islice(samples, self.size), strict=True)
            broken, self.broken = self.broken, []
            yield default_collate(images), default_collate(texts), broken

    def a_pass(self, rng: random.Random) -> Iterator[tuple[Any, Any]]:
        """(image, text) of all samples in this worker's shards. UserError if there is none."""
        found = 0
        for sample in webdataset.DataPipeline(
            webdataset.SimpleShardList(self.shards),
            webdataset.split_by_worker,
            webdataset.shuffle(len(self.shards), initial=len(self.shards), rng=rng),
            self.files,
            lambda files: group_by_keys(files, keys=key_of, handler=self.occurs_twice),
            webdataset.shuffle(BUFFER, rng=rng),
            self.decoded,
        ):
            found += 1
            yield sample
        if not found:
            reason = f" ({self.broken[-1].reason})" if self.broken else ""
            raise UserError(f"no readable image-text pair in {', '.join(self.shards[:3])}{reason}")

    def files(self, shards: Iterable[dict]) -> Iterator[dict]:
        """Images and captions of shards, as webdataset's `tar_file_expander` yields files. Copies are deleted."""
        for shard in shards:
            url, broken = shard["url"], []
            try:
                path = fetch(url, self.folder)
            except UserError as error:
                self.leave_out(url, str(error))
                continue
            try:
                for name, content in read_tar(path, broken, (*IMAGE_EXTENSIONS, "txt")):
                    yield {"fname": name, "data": content, "__url__": url}
            finally:
                if is_remote(url):
                    Path(path).unlink(missing_ok=True)
                    Path(path).with_suffix(".lock").unlink(missing_ok=True)
            for key, reason in broken:
                self.leave_out(url if key == path else key, reason)
            yield {}  # webdataset's mark of the end of a shard

    def decoded(self, samples: Iterable[dict]) -> Iterator[tuple[Any, Any]]:
        """(image, text) of each sample that is whole and readable."""
        for sample in samples:
            key = sample["__key__"]
            image = next((sample[ending] for ending in IMAGE_EXTENSIONS if ending in sample), None)
            try:
                if image is None or "txt" not in sample:
                    raise data.BrokenSample("missing image" if image is None else "missing caption")
                pair = data.Pair(key, data.decode_image(image), data.decode_caption(sample["txt"]))
            except data.BrokenSample as error:
                self.leave_out(key, str(error))
                continue
            torch.default_generator.manual_seed(stable_hash(*self.views, key))
            yield self.pixels(pair.image), self.text(pair)

    def occurs_twice(self, error: Exception) -> bool:
        """webdataset's handler of a second file with one name in a shard, which is passed over."""
        self.leave_out(key_of(str(error.args[0]).partition(":")[0])[0], "key occurs twice in its shard")
        return True

    def leave_out(self, key: str, reason: str) -> None:
        """Record a sample or shard that cannot be used. UserError if it is to stop the run (--strict)."""
        if self.strict:
            raise UserError(f"--strict: sample {key}: {reason}")
        self.broken.append(Broken(key, reason))
