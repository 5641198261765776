"""Writes corpora: training shards, evaluation sets and masks, in folders that appear only when complete."""

import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from PIL import Image

from shared import checkpoints
from shared.errors import FULL, UserError
from shared.tars import write_split, write_tar

SHARD = 1000  # samples per training shard


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def link(source: str, target: str) -> None:
    """A second name for a file, so that it takes its space once; a copy where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def png(pixels: np.ndarray) -> bytes:
    """PNG bytes of an array: (H, W, 3) uint8, or (H, W) uint8 or uint16."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def write_pairs(folder: Path, samples: Iterable[dict], prefix: str = "") -> int:
    """Writes training shards in img2dataset layout, `folder/{prefix}{00000..}.tar`; returns the number of samples.

    A sample maps file endings to contents: an image ending, `txt` (caption), `json` (dict), and others as bytes.
    """
    samples, count = iter(samples), 0
    for shard in itertools.count():
        some = list(itertools.islice(samples, SHARD))
        if not some:
            return count
        keyed = []
        for index, sample in enumerate(some):
            key = f"{shard:05d}{index:04d}"
            about = {"key": key, "caption": sample["txt"]} | sample["json"]
            described = json.dumps(about, sort_keys=True, ensure_ascii=False)
            keyed.append({"__key__": key} | sample | {"json": described})
        write_tar(folder / f"{prefix}{shard:05d}.tar", keyed)
        count += len(some)


def write_retrieval(folder: Path, samples: Iterable[dict], shard_size: int | None = None) -> int:
    """Writes a retrieval set with the split `test`, in one shard or in several; returns the number of images."""
    count = write_split(folder / "test", samples, shard_size)
    (folder / "dataset_type.txt").write_text("retrieval\n")
    return count


def write_classes(folder: Path, classes: Sequence[str], templates: Sequence[str]) -> None:
    """Writes class names and prompt templates of a classification set."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "classnames.txt").write_text("".join(f"{name}\n" for name in classes), encoding="utf-8")
    prompts = "".join(f"{line}\n" for line in templates)
    (folder / "zeroshot_classification_templates.txt").write_text(prompts, encoding="utf-8")


def setting_of(options: Any, recipe: int) -> dict:
    """The setting of a corpus for `build`: class and fields of a dataclass of options, without paths and `strict`."""
    fields = {name: value for name, value in dataclasses.asdict(options).items() if not isinstance(value, Path)}
    del fields["strict"]
    return {"data": type(options).__name__.lower(), "recipe": recipe} | fields


@contextlib.contextmanager
def one_process(path: Path) -> Iterator[None]:
    """Let one process at a time work on `path`; the others print a line and wait.

    The lock is the file .NAME.lock beside `path`. It ends with its process, so what is left of a killed one locks
    nothing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f".{path.name.lstrip('.')}.lock"))
    try:
        held = lock.acquire(timeout=0)
    except Timeout:
        print(f"another process is making {path}: waiting until it has ended", flush=True)
        held = lock.acquire()
    with held:
        yield


def build(out: Path, setting: dict, write: Callable[[Path], dict]) -> None:
    """Makes the folder `out` with `write(folder) -> facts`; it appears only when it is complete.

    manifest.json holds `setting`, the facts, and sha256 of every shard. A folder made with the same setting is left
    unchanged, also if another process is making it: this one then waits. What a killed process left is removed.
    UserError if `out` was made with another setting or is no corpus, and if the disk is full.
    """
    setting = json.loads(json.dumps(setting))  # as JSON reads it back, for example lists for tuples
    if is_complete(out, setting):
        return print(f"{out} is complete")
    folder = out.with_name(f".{out.name}-unfinished")
    with one_process(out):
        if is_complete(out, setting):  # another process has made it in the meantime
            return print(f"{out} is complete")
        try:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            facts = write(folder)
            shards = {path.relative_to(folder).as_posix(): sha256(path) for path in sorted(folder.rglob("*.tar"))}
            checkpoints.write_json(folder / "manifest.json", {"setting": setting, **facts, "sha256": shards})
            folder.rename(out)
        except (OSError, UserError) as error:
            cause = error if isinstance(error, OSError) else error.__cause__  # `replaced` turns one into a UserError
            if not isinstance(cause, OSError) or cause.errno not in FULL:
                raise
            raise UserError(
                f"{out} could not be built ({cause.strerror}): free some space, and build it again"
            ) from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    print(f"{out} built: " + ", ".join(f"{name} {count:,}" for name, count in facts["counts"].items()))


def is_complete(out: Path, setting: dict) -> bool:
    """Whether the folder `out` holds a corpus of this setting. UserError if it holds something else."""
    advice = f"remove {out} to build it again, or choose another --out if no study reads it"
    if (out / "manifest.json").is_file():
        then = checkpoints.read_json(out / "manifest.json", advice).get("setting")
        if what := checkpoints.changes(then if isinstance(then, dict) else {}, setting):
            raise UserError(f"{out} was made with other settings: {what}; {advice}")
        return True
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists but is not a corpus (it has no manifest.json): {advice}")
    return False
