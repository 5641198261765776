"""Data loading: `python -m studies.bench.data` (`make bench-data`) builds shards and measures reading them.

A million samples of a few bytes show start-up time and memory; 20,480 samples of 20 KB show throughput. Each
measurement runs in a new process. The readers take turns on the same shards and do the same work in the same
processes: a worker decodes, crops and returns uint8, and the measuring process normalises, although webdataset and
open_clip would normalise in their workers. The last column is our target; many rows have none.
"""

import argparse
import functools
import io
import itertools
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from importlib.metadata import version
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import torch
import webdataset
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms

from shared import data, index, run
from shared.corpus import Corpus
from shared.streams import Stream
from shared.tars import write_tar
from studies.bench import CPU, at_least, resident

SIDE, VIEW, BATCH = 256, 224, 64
VIEW_OF = transforms.Compose([transforms.RandomCrop(VIEW), data.ToNormalizedTensor((0.5,) * 3, (0.5,) * 3)])
PIXELS_OF, NORMALISE = data.split_normalisation(VIEW_OF)  # for the worker, and for the measuring process


# ----------------------------------------------------------------------------------------------------------- the shards


def photograph(rng: np.random.Generator) -> bytes:
    """A JPEG of about 20 KB: smooth colours and some noise."""
    coarse = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)).resize((SIDE, SIDE), Image.BICUBIC)
    pixels = np.array(coarse, dtype=np.int16) + rng.integers(-12, 13, (SIDE, SIDE, 3))
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "jpeg", quality=88)
    return file.getvalue()


def build(folder: Path, shards: int, size: int, image: Callable[[int], bytes]) -> str:
    """Write `shards` numbered shards with the same `size` samples; returns their brace expression."""
    samples = ({"__key__": f"{i:06d}", "jpg": image(i), "txt": f"caption number {i}"} for i in range(size))
    write_tar(folder / f"{0:05d}.tar", samples)
    for i in range(1, shards):
        shutil.copyfile(folder / f"{0:05d}.tar", folder / f"{i:05d}.tar")
    return f"{folder}/{{00000..{shards - 1:05d}}}.tar"


# ---------------------------------------------------------------------------------------------------------- the readers


def tokens(texts: list[str]) -> torch.Tensor:
    return torch.tensor([[len(text)] for text in texts])


def ours(way: type, urls: str, cache: str, samples: int, workers: int, start: int = 0) -> Iterator[torch.Tensor]:
    """Normalised images (B, 3, H, W) of an epoch of our corpus by row or by stream, from batch `start` on."""
    cfg = SimpleNamespace(
        data=urls, dataset_size=samples, cache=cache, strict=False, batch_size=BATCH, workers=workers, out="bench",
        seed=0, keep_in_memory=False, distinct_captions=False, stream=way is Stream,
    )  # fmt: skip
    corpus = way(cfg, CPU, lambda pair: tokens([pair.caption])[0])
    return (images for _, images, _ in corpus.epoch(0, VIEW_OF, start))


def of_webdataset(urls: str, cache: str, samples: int, workers: int) -> Iterator[torch.Tensor]:
    """webdataset's pipeline from its documentation, up to uint8."""
    pairs = webdataset.WebDataset(urls, shardshuffle=100, seed=0).shuffle(1000).decode("pilrgb").to_tuple("jpg", "txt")
    views = pairs.map_tuple(PIXELS_OF, lambda text: tokens([text])[0]).batched(BATCH)
    return (NORMALISE(pixels) for pixels, _ in DataLoader(views, batch_size=None, num_workers=workers))


def of_open_clip(urls: str, cache: str, samples: int, workers: int) -> Iterator[torch.Tensor]:
    sys.modules.setdefault("pandas", ModuleType("pandas"))  # open_clip needs it for tables, not for shards
    from open_clip_train import data as theirs

    # webdataset 1.0 marks the end of a shard, which open_clip's grouping of files does not know
    theirs.tar_file_expander = functools.partial(webdataset.tariterators.tar_file_expander, eof_value=None)
    args = SimpleNamespace(
        train_data=urls, train_num_samples=samples, train_data_upsampling_factors=None, dataset_resampled=False, seed=0,
        batch_size=BATCH, workers=workers, world_size=1,
    )  # fmt: skip
    loader = theirs.get_wds_dataset(args, PIXELS_OF, True, tokenizer=tokens).dataloader
    return (NORMALISE(pixels) for pixels, _ in loader)


READERS = {
    "ours, by row": functools.partial(ours, Corpus),
    "ours, by stream": functools.partial(ours, Stream),
    "webdataset": of_webdataset,
    "open_clip": of_open_clip,
}


# -------------------------------------------------------------------------------------------------------- measurements


def alone(function: Callable[..., dict], *arguments) -> dict:
    """Result of a function in a new process, with the growth of the process's private memory, "MiB"."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=in_process, args=(theirs, function, arguments))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    finally:
        process.join()


def in_process(pipe, function: Callable[..., dict], arguments: tuple) -> None:
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # loader workers start as in a script
    os.environ[run.QUIET] = "1"
    index.LARGE = 0  # the index is cached for any number of samples
    before = resident("RssAnon")
    found = function(*arguments)
    pipe.send(found | {"MiB": (resident("RssAnon") - before) / 1024})


def bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])


def opened(urls: str, cache: str) -> dict:
    """Seconds to open all pairs by row, and their number; also reads the last key."""
    start = time.perf_counter()
    pairs = data.open_pairs(urls, cache=Path(cache))
    seconds = time.perf_counter() - start
    assert pairs.keys[len(pairs) - 1]
    return {"seconds": seconds, "samples": len(pairs)}


def amplification(reader: str, arguments: tuple) -> dict:
    """Bytes that a pass without workers reads from the system, with those for an index, divided by the bytes of its
    samples; and the mean bytes of a sample."""
    before, count = bytes_read(), sum(map(len, READERS[reader](*arguments)))
    asked, pairs = bytes_read() - before, data.open_pairs(arguments[0])
    size = pairs._spans[:, (1, 3)].sum() / len(pairs)
    return {"ratio": asked / (size * count), "size": size}


def throughput(reader: str, arguments: tuple, seconds: float) -> dict:
    """Samples/s of one worker after the first batch, while this process normalises; and the worker's private memory at
    the end, less that of this process at the start, in MiB."""
    before, held, count = resident("RssAnon"), 0, 0
    batches = READERS[reader](*arguments)
    next(batches)
    start = time.perf_counter()
    for images in itertools.takewhile(lambda _: time.perf_counter() - start < seconds, batches):
        count += len(images)
        held = sum(resident("RssAnon", worker.pid) for worker in multiprocessing.active_children())
    return {"samples/s": count / (time.perf_counter() - start), "worker": (held - before) / 1024}


def first_batch(reader: str, arguments: tuple) -> dict:
    """Seconds until the first batch."""
    start = time.perf_counter()
    batches = READERS[reader](*arguments)
    next(batches)
    return {"seconds": time.perf_counter() - start}


# ------------------------------------------------------------------------------------------------------------ the table


def measured(options: argparse.Namespace, folder: Path) -> Iterator[tuple[str, str, str]]:
    """(what, value, aim) of each row."""
    cache = str(folder / "cache")
    (folder / "sparse").mkdir()
    shards = max(options.sparse // 10_000, 1)
    sparse = build(folder / "sparse", shards, options.sparse // shards, lambda i: b"x" * 16)
    cold, cached = alone(opened, sparse, cache), alone(opened, sparse, cache)
    yield f"start-up, {cold['samples']:,} sparse samples, cold", f"{cold['seconds']:.1f} s, {cold['MiB']:.0f} MiB", ""
    yield "the same, index cached", f"{cached['seconds']:.2f} s, {cached['MiB']:.0f} MiB a process", "< 5 s"

    (folder / "real").mkdir()
    rng, samples = np.random.default_rng(0), options.real
    shards = max(samples // 1024, 1)  # whole batches in each
    real = build(folder / "real", shards, samples // shards, lambda i: photograph(rng))
    first, block = f"{folder}/real/00000.tar", os.stat(folder).st_blksize
    for name in READERS:
        found = alone(amplification, name, (first, f"{cache}-{name}", samples // shards, 0))
        what = f"bytes read / bytes used, {found['size'] / 1024:.0f} KiB a sample, blocks of {block:,} bytes, {name}"
        yield what, f"{found['ratio']:.3f}", "<= 1.1" * name.startswith("ours")

    found: dict[str, list[dict]] = {name: [] for name in READERS}
    for _ in range(options.repetitions):
        for name in READERS:
            found[name].append(alone(throughput, name, (real, cache, samples, 1), options.seconds))
    for name, each in found.items():
        rates, held = ([one[key] for one in each] for key in ("samples/s", "worker"))
        spread = f"{np.median(rates):,.0f} ({min(rates):,.0f} .. {max(rates):,.0f})"
        aim = ">= webdataset" * name.startswith("ours")
        yield f"samples/s of one worker and a process that normalises, {name}", spread, aim
        yield f"memory of this worker, {name}", f"{np.median(held):.0f} MiB", ""
    late = int(0.9 * samples // BATCH)
    for name in READERS:
        resumes = name.startswith("ours")  # the others cannot resume within an epoch
        places = ((), (late,)) if resumes else ((),)
        times = [alone(first_batch, name, (real, cache, samples, 1, *at))["seconds"] for at in places]
        what = "seconds to the first batch" + ", at the beginning and resumed after 90 %" * resumes
        yield f"{what}, {name}", ", ".join(f"{value:.2f}" for value in times), "equal" * resumes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparse", type=at_least(2), default=1_000_000, help="samples of a few bytes")
    parser.add_argument("--real", type=at_least(2 * BATCH), default=20_480, help="samples of 20 KB")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each throughput")
    parser.add_argument("--repetitions", type=at_least(1), default=3, help="of each throughput, in turns")
    parser.add_argument("--folder", type=Path, help="where the shards are built, about 600 MB; removed afterwards")
    parser.add_argument("--results", type=Path, help="also write the table into this file")
    options = parser.parse_args()
    lines = ["| what | value | aim |", "| --- | --- | --- |"]
    about = f"{run.machine()}, open_clip {version('open_clip_torch')}, webdataset {webdataset.__version__}"
    print("\n".join([about, "", *lines]), flush=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for row in measured(options, Path(folder)):
            lines.append("| " + " | ".join(row) + " |")
            print(lines[-1], flush=True)
    if options.results is not None:
        text = f"Measured {date.today()} at commit `{run.commit()}` on {about}; `make bench-data`.\n\n"
        options.results.parent.mkdir(parents=True, exist_ok=True)
        options.results.write_text(text + "\n".join([*lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
