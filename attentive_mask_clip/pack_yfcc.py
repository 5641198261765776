"""Pack YFCC15M into shards: `python -m attentive_mask_clip.pack_yfcc yfcc15m.pkl --root yfcc100m --out DIR`.

SLIP's make_dataset.py (facebookresearch/SLIP@c6faf5d, cited as `S:`; A-CLIP's repository has the same file) writes
yfcc15m.pkl, a list of (number, title, description). Image 12345678 is 678.jpg in images/12/345.zip (S:datasets.py:29).
From these two this script writes what train.py reads with --caption-lines:

    DIR/00000.tar            NUMBER.jpg, NUMBER.txt (title and description, a line each), NUMBER.json (both uncleaned)
        00000_stats.json     number of pairs in the shard, and of skipped images with reasons; it is written last
        config.json          the settings of the shards

A restarted run skips the shards that have a _stats.json; remove this file to write its shard again.
"""

import dataclasses
import errno
import itertools
import json
import lzma
import math
import multiprocessing
import pickle
import re
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from operator import itemgetter
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from tqdm import tqdm

from shared import checkpoints, cli, data, run, tars
from shared.errors import UserError
from shared.settings import Count, Whole, check_limits

TAGS = re.compile(r"<a.*?>|</a>|</?[bi]>")  # S:make_dataset.py:15
URLS = re.compile(r"(?:http|www)\S+")  # S:make_dataset.py:16
MISSING, DAMAGED = "missing zip", "damaged zip"
DAMAGE = (None, errno.EINVAL, errno.ENOENT, errno.EISDIR)  # errno of an OSError for damage; other faults may pass
ZIP_ERRORS = (  # what zipfile raises for damaged, encrypted and unsupported archives
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError, OSError, OverflowError, RuntimeError,
    ValueError,
)  # fmt: skip


@dataclasses.dataclass
class Config:
    metadata: Annotated[str, tyro.conf.Positional]
    """SLIP's yfcc15m.pkl."""
    root: str
    """Folder that holds images/00/000.zip to images/99/999.zip."""
    out: str
    """Folder for the shards."""
    dataset_size: Count | None = None
    """Number of images to use, those with the lowest numbers; None uses all."""
    shard_size: Count = 10_000
    """Images of the metadata per shard; the shard has fewer pairs if some are skipped."""
    workers: Whole = 0
    """Processes; 0: one per core."""


# ---------------------------------------------------------------------------------------------------------- metadata


class PlainUnpickler(pickle.Unpickler):
    """Reads lists, tuples, dicts, strings and numbers; imports nothing. UserError for any other type."""

    def find_class(self, module: str, name: str):
        raise UserError(f"it holds {module}.{name}, but only plain lists, tuples, strings and numbers are read")


def read_metadata(path: str | Path) -> list[tuple[int, str, str]]:
    """(number, title, description) of all images, sorted by number. UserError if the pickle contains anything else."""
    if not Path(path).is_file():
        raise UserError(f"{path} does not exist: SLIP's make_dataset.py writes yfcc15m.pkl")
    try:
        with open(path, "rb") as file:
            rows = PlainUnpickler(file).load()
    except (OSError, MemoryError):
        raise
    except Exception as error:  # a damaged pickle can raise almost any exception
        reason = str(error) if isinstance(error, UserError) else f"it cannot be unpickled ({type(error).__name__})"
        raise UserError(f"{path} is no yfcc15m.pkl of SLIP's: {reason}") from error
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{path} is no yfcc15m.pkl of SLIP's: it holds no list of images")
    for i, row in enumerate(rows):
        if not (
            isinstance(row, (tuple, list))
            and [type(value) for value in row] == [int, str, str]
            and 0 <= row[0] < 10**8  # two digits of the folder, three of the zip, three of the file
        ):
            raise UserError(f"{path}, entry {i} is no (number of up to eight digits, title, description)")
    return sorted(rows, key=itemgetter(0))


# ---------------------------------------------------------------------------------------------------------- captions


def clean(text: str) -> str:
    """A title or description on one line, without URLs and tags of links, bold and italics. S:make_dataset.py:38-44.

    make_dataset.py did the same and also undid URL quoting, but kept line breaks; repeating it changes nothing else.
    """
    return " ".join(URLS.sub("", TAGS.sub("", text)).split())


def caption_file(title: str, description: str) -> bytes:
    """Title and description on one line each, without blank ones; `crops.title_and_description` splits them again."""
    return "\n".join(filter(None, (clean(title), clean(description)))).encode("utf-8", "replace")


# ------------------------------------------------------------------------------------------------------------ images


def zipped(path: Path, names: Sequence[str]) -> Iterator[tuple[bytes, str]]:
    """For each file of a zip: (content, ""), or (b"", reason) if it is missing or damaged. OSError for other faults,
    which may pass: too many open files, a network drive that is gone."""
    try:
        archive = zipfile.ZipFile(path)
    except ZIP_ERRORS as error:
        data.check_absent(error, path, DAMAGE)
        reason = MISSING if isinstance(error, FileNotFoundError) else DAMAGED
        yield from [(b"", reason)] * len(names)
        return
    with archive:
        for name in names:
            content, reason = b"", ""
            try:
                if archive.getinfo(name).file_size <= tars.MAX_BYTES:
                    content = archive.read(name)
                else:
                    reason = f"file of more than {tars.MAX_BYTES} bytes"
            except KeyError:
                reason = "missing image"
            except ZIP_ERRORS as error:
                data.check_absent(error, path, DAMAGE)
                reason = "damaged in its zip"
            yield content, reason


def fault(image: bytes) -> str:
    """Reason why an image cannot be decoded; empty if it can."""
    try:
        data.decode_image(image)
    except data.BrokenSample as error:
        return str(error)
    return ""


# ------------------------------------------------------------------------------------------------------------ shards


def stats_file(out: str, shard: int) -> Path:
    return Path(out) / f"{shard:05}_stats.json"


def shard_file(out: str, shard: int) -> Path:
    return Path(out) / f"{shard:05}.tar"


def shard_stats(out: str, shard: int) -> dict | None:
    """The content of a shard's _stats.json; None without the file. UserError if this script did not write it."""
    path = stats_file(out, shard)
    if not path.exists():
        return None
    stats = checkpoints.read_json(path)
    if not {"rows", "pairs", "left_out", "zips"} <= set(stats):
        raise UserError(f"{path} holds no statistics of this script: choose another --out")
    return stats


def pack_shard(cfg: Config, shard: int, rows: Sequence[tuple[int, str, str]]) -> None:
    """Write a shard, and then its statistics."""
    left_out: Counter[str] = Counter()
    zips: dict[str, str] = {}

    def samples() -> Iterator[dict]:
        for thousand, group in itertools.groupby(rows, key=lambda row: row[0] // 1000):
            in_zip, name = list(group), f"images/{thousand // 1000:02}/{thousand % 1000:03}.zip"
            contents = zipped(Path(cfg.root) / name, [f"{number % 1000:03}.jpg" for number, _, _ in in_zip])
            for (number, title, description), (image, reason) in zip(in_zip, contents, strict=True):
                caption = caption_file(title, description)
                if reason in (MISSING, DAMAGED):
                    zips[name] = reason
                if reason := reason or ("" if caption else "empty caption") or fault(image):
                    left_out[reason] += 1
                    continue
                key = f"{number:08}"
                about = json.dumps({"key": key, "title": title, "description": description})
                yield {"__key__": key, "jpg": image, "txt": caption, "json": about.encode()}

    tars.write_tar(shard_file(cfg.out, shard), samples())
    pairs = len(rows) - left_out.total()
    checkpoints.write_json(
        stats_file(cfg.out, shard), {"rows": len(rows), "pairs": pairs, "left_out": left_out, "zips": zips}
    )


def pack(cfg: Config, rows: list[tuple[int, str, str]]) -> None:
    """Write the missing shards, several in parallel."""
    starts = range(0, len(rows), cfg.shard_size)
    done = [shard_stats(cfg.out, shard) and shard_file(cfg.out, shard).exists() for shard in range(len(starts))]
    todo = [shard for shard, is_done in enumerate(done) if not is_done]
    jobs = ([cfg] * len(todo), todo, (rows[starts[shard] : starts[shard] + cfg.shard_size] for shard in todo))
    bar = dict(total=len(starts), initial=len(starts) - len(todo), unit="shard", disable=None)
    workers = min(cfg.workers or run.cores(), len(todo))
    if workers < 2:
        for _ in tqdm(map(pack_shard, *jobs), **bar):
            pass
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        try:
            for _ in tqdm(pool.map(pack_shard, *jobs), **bar):
                pass
        finally:
            pool.shutdown(cancel_futures=True)


def report(cfg: Config, shards: int) -> None:
    """Print the number of pairs, what was skipped and why, and how to train on them. UserError if there are none."""
    found = [shard_stats(cfg.out, shard) for shard in range(shards)]
    rows, pairs = (sum(stats[name] for stats in found) for name in ("rows", "pairs"))
    left_out = sum((Counter(stats["left_out"]) for stats in found), Counter())
    zips = {name: reason for stats in found for name, reason in stats["zips"].items()}
    print(f"{pairs:,} pairs of {rows:,} images in {shards:,} shards")
    if left_out:
        print("left out: " + ", ".join(f"{count:,} {reason}" for reason, count in left_out.most_common()))
    for reason, count in Counter(zips.values()).most_common():
        names = [name for name in zips if zips[name] == reason]
        print(f"{reason}: {count:,} ({', '.join(names[:3])}{', ...' * (count > 3)})")
    if not pairs:
        raise UserError(f"none of the images of {cfg.metadata} could be read below {cfg.root}")
    print(f"train on them with --data '{cfg.out}/{{00000..{shards - 1:05}}}.tar' --dataset-size {pairs}")


def main(cfg: Config) -> None:
    """Check the settings and the output folder, then pack."""
    check_limits(cfg)
    if not (Path(cfg.root) / "images").is_dir():
        raise UserError(f"--root {cfg.root} has no folder images with images/00/000.zip and so on")
    out = Path(cfg.out)
    with run.lock(out):
        rows = read_metadata(cfg.metadata)[: cfg.dataset_size]
        made_from = {
            "metadata": data.fingerprint(np.memmap(cfg.metadata, mode="r")),
            "root": str(Path(cfg.root).resolve()),
            "rows": len(rows),
            "shard_size": cfg.shard_size,
        }
        if (out / "config.json").exists():
            if what := checkpoints.changes(checkpoints.read_json(out / "config.json"), made_from):
                raise UserError(f"{out} holds shards that were made with other settings: {what}; choose another --out")
        elif list(out.glob("*.tar")):
            raise UserError(f"{out} holds shards that this script did not write: choose another --out")
        checkpoints.write_json(out / "config.json", made_from)
        pack(cfg, rows)
        report(cfg, math.ceil(len(rows) / cfg.shard_size))


if __name__ == "__main__":
    cli.command_line(lambda: main(tyro.cli(Config)))
