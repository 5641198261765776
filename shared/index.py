"""Which samples a data set holds and where their bytes lie: made once a machine, memory-mapped by all processes.

The index of a data set of LARGE bytes or more is kept in a cache folder, as arrays under a name that follows from the
paths, sizes and times of its files. One process of a machine makes it, its peers wait; later starts only open it.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from shared.tars import Broken, ShardIndex, index_shard

LARGE = 2**28  # bytes of a data set whose index is kept; that of a smaller one takes a second
VERSION = 1  # of what is written


class Strings(Sequence):
    """Read-only strings, UTF-8 in one array of bytes: each takes its own length, and processes share them."""

    def __init__(self, text: np.ndarray, ends: np.ndarray):
        self.text, self.ends = text, ends

    @classmethod
    def of(cls, strings: Iterable[str | bytes]) -> "Strings":
        text, ends = bytearray(), []
        for string in strings:
            text += string.encode(errors="surrogateescape") if isinstance(string, str) else string
            ends.append(len(text))
        return cls(np.frombuffer(bytes(text), dtype=np.uint8), np.array(ends, dtype=np.int64))

    def head(self, limit: int | None) -> "Strings":
        """The first `limit` of them."""
        return Strings(self.text, self.ends[:limit])

    def bytes_of(self, i: int) -> bytes:
        return self.text[self.ends[i - 1] if i else 0 : self.ends[i]].tobytes()

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i):
        """A string, or for a slice or an array of positions an array of strings."""
        if isinstance(i, (int, np.integer)):
            position = int(i) + len(self) * (i < 0)
            if not 0 <= position < len(self):
                raise IndexError(f"{i} of {len(self)} strings")
            return self.bytes_of(position).decode(errors="surrogateescape")
        return np.array([self[j] for j in np.arange(len(self))[i]], dtype=np.str_)

    def __iter__(self) -> Iterator[str]:
        start = 0
        for end in self.ends.tolist():
            yield self.text[start:end].tobytes().decode(errors="surrogateescape")
            start = end

    def tolist(self) -> list[str]:
        return list(self)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(list(self), dtype=dtype or np.str_)


class Index(NamedTuple):
    """Samples of shards, in the order of the shards and of the files in them."""

    keys: Strings  # N
    spans: np.ndarray  # (N, 4) int64: image offset, image size, caption offset, caption size
    starts: np.ndarray  # (S + 1,) int64: first row of each shard, and N
    broken: list[Broken]
    digests: list[str]  # S, of each shard's keys and spans


def index_shards(paths: Sequence[str]) -> Index:
    """Reads the headers of all shards."""
    if len(paths) < 64:
        shards = [index_shard(path) for path in paths]
    else:
        with ProcessPoolExecutor(min(os.cpu_count() or 1, len(paths))) as pool:
            shards = list(pool.map(index_shard, paths, chunksize=4))

    def digest(shard: ShardIndex) -> str:
        return hashlib.blake2b(
            "\0".join(shard.keys).encode(errors="surrogateescape") + shard.spans.tobytes(), digest_size=8
        ).hexdigest()

    return Index(
        Strings.of(key for shard in shards for key in shard.keys),
        np.concatenate([shard.spans for shard in shards]),
        np.cumsum([0, *(len(shard.keys) for shard in shards)]),
        [broken for shard in shards for broken in shard.broken],
        [digest(shard) for shard in shards],
    )


def read_index(paths: Sequence[str], cache: Path | None = None) -> Index:
    """The index of shards, from the folder `cache` where it has been made; made anew when one of them has changed."""

    def make() -> tuple[dict[str, np.ndarray], dict]:
        index = index_shards(paths)
        arrays = {"text": index.keys.text, "ends": index.keys.ends, "spans": index.spans, "starts": index.starts}
        return arrays, {"broken": index.broken, "digests": index.digests}

    arrays, about = kept(paths, cache, make)
    broken = [Broken(*each) for each in about["broken"]]
    keys = Strings(arrays["text"], arrays["ends"])
    return Index(keys, arrays["spans"], arrays["starts"], broken, about["digests"])


# -------------------------------------------------------------------------------------------------- once a machine


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Only one process of a machine at a time; no wait where there are no locks, or the folder cannot be written."""
    file = None
    try:
        file = open(path, "a")
        fcntl.lockf(file, fcntl.LOCK_EX)  # of this process alone: loader workers do not inherit it
    except OSError:  # what follows is right without a lock, too, but done more than once
        pass
    try:
        yield
    finally:
        if file is not None:
            file.close()


def kept(
    paths: Sequence[str], cache: Path | None, make: Callable[[], tuple[dict[str, np.ndarray], dict]]
) -> tuple[dict[str, np.ndarray], dict]:
    """What `make` computes of files, arrays and something for JSON: memory-mapped from `cache` if they are large.

    Nothing is kept without `cache`, or in a folder that cannot be written.
    """
    stats = [os.stat(path) for path in paths]
    if cache is None or sum(stat.st_size for stat in stats) < LARGE:
        return make()
    which = name_of(paths)
    state = [VERSION, *((stat.st_size, stat.st_mtime_ns) for stat in stats)]
    folder = cache / "index" / f"{which}-{hashlib.blake2b(repr(state).encode(), digest_size=8).hexdigest()}"
    with contextlib.suppress(OSError):
        folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.parent / f"{which}.lock"):
        if not folder.exists():
            arrays, about = make()
            try:
                write(folder, arrays, about)
            except OSError:  # a read-only or full disk is no reason to stop
                return arrays, about
            for old in folder.parent.glob(f"{which}-*"):
                if old != folder:
                    shutil.rmtree(old, ignore_errors=True)
    about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
    return {path.stem: np.load(path, mmap_mode="r") for path in folder.glob("*.npy")}, about


def name_of(paths: Sequence[str]) -> str:
    names = "\0".join(os.path.abspath(path) for path in paths)
    return hashlib.blake2b(names.encode(errors="surrogateescape"), digest_size=8).hexdigest()


def forget(paths: Sequence[str], cache: Path) -> None:
    """Removes what is kept of these files; who has it open reads on."""
    for old in (cache / "index").glob(f"{name_of(paths)}-*"):
        shutil.rmtree(old, ignore_errors=True)
    (cache / "index" / f"{name_of(paths)}.lock").unlink(missing_ok=True)


def write(folder: Path, arrays: dict[str, np.ndarray], about: dict) -> None:
    """The folder appears when it is whole; where a peer was faster, its folder stays."""
    temporary = Path(tempfile.mkdtemp(prefix=".index-", dir=folder.parent))
    try:
        for name, array in arrays.items():
            np.save(temporary / f"{name}.npy", array)
        (temporary / "about.json").write_text(json.dumps(about), encoding="utf-8")
        with contextlib.suppress(OSError):
            os.rename(temporary, folder)
        if not folder.exists():
            raise OSError(f"{folder} could not be written")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
