"""Index of a data set: the keys of its samples and the offsets of their bytes.

The index of a data set of LARGE bytes or more is cached in a folder, named by a hash of the paths, sizes and times of
the data set's files. One process per machine writes it while the others wait; then all memory-map it, and so do later
runs.
"""

import array
import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from shared.tars import Broken, index_shard

LARGE = 2**28  # bytes; the index of a data set of this size or more is cached; indexing a smaller one takes a second
VERSION = 1  # of the files
HOUR, WEEK = 3600, 7 * 24 * 3600  # seconds
CHUNK = 2**22  # bytes that are hashed at a time


class Strings(Sequence):
    """Read-only sequence of strings, stored as UTF-8 in one array of bytes, which processes can share."""

    def __init__(self, text: np.ndarray, ends: np.ndarray):
        self.text, self.ends = text, ends

    @classmethod
    def of(cls, strings: Iterable[str | bytes]) -> "Strings":
        text, ends = bytearray(), array.array("q")
        for string in strings:
            text += string.encode(errors="surrogateescape") if isinstance(string, str) else string
            ends.append(len(text))
        return cls(np.frombuffer(text, dtype=np.uint8), np.array(ends, dtype=np.int64))

    def head(self, limit: int | None) -> "Strings":
        """The first `limit` strings."""
        return Strings(self.text, self.ends[:limit])

    def bytes_of(self, i: int) -> bytes:
        return self.text[self.ends[i - 1] if i else 0 : self.ends[i]].tobytes()

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i):
        """A string; for a slice or an array of positions, an array of strings."""
        if isinstance(i, (int, np.integer)):
            position = int(i) + len(self) * (i < 0)
            if not 0 <= position < len(self):
                raise IndexError(f"{i} of {len(self)} strings")
            return self.bytes_of(position).decode(errors="surrogateescape")
        if not isinstance(i, slice):
            i = np.asarray(i)
        positions = i if isinstance(i, np.ndarray) and i.dtype != bool else np.arange(len(self))[i]
        return np.array([self[int(j)] for j in positions], dtype=np.str_)

    def __iter__(self) -> Iterator[str]:
        start = 0
        for end in self.ends.tolist():
            yield self.text[start:end].tobytes().decode(errors="surrogateescape")
            start = end

    def tolist(self) -> list[str]:
        return list(self)

    def equals(self, other: "Strings") -> bool:
        """Whether both hold the same strings in the same order."""
        last = int(self.ends[-1]) if len(self) else 0
        return np.array_equal(self.ends, other.ends) and np.array_equal(self.text[:last], other.text[:last])

    def utf32(self, rows: int = 2**14) -> Iterator[bytes]:
        """The bytes of `np.array(list(self))`, in blocks of `rows` strings, without building the whole array."""
        if not len(self):
            return
        starts = np.concatenate([[0], self.ends[:-1]])
        text = self.text[: self.ends[-1]]
        ascii_only = bool((text < 128).all())
        lengths = self.ends - starts if ascii_only else np.array([len(string) for string in self])
        places = np.arange(max(lengths.max(), 1))
        for first in range(0, len(self), rows):
            block = slice(first, first + rows)
            if ascii_only:
                inside = places < lengths[block, None]
                letters = text[np.where(inside, starts[block, None] + places, 0)] if len(text) else np.zeros(1)
                yield np.where(inside, letters, 0).astype(np.uint32).tobytes()
            else:
                yield self[block].astype(f"U{len(places)}").tobytes()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        raise TypeError(
            "NumPy would store every string at the length of the longest: use Lookup, or select some by [positions]"
        )


@functools.lru_cache(maxsize=4)
def factors(length: int) -> np.ndarray:
    """(2, length) random uint64; a shorter result is a prefix of a longer one."""
    pairs = np.random.default_rng(0).integers(0, 2**64 - 1, (length, 2), dtype=np.uint64, endpoint=True)
    return np.ascontiguousarray(pairs.T)


def hashes(strings: Strings) -> np.ndarray:
    """(2, N) uint64: two hashes of each string, each a sum of its bytes times random numbers by position."""
    ends = np.asarray(strings.ends, dtype=np.int64)
    starts = np.concatenate([np.zeros(1, dtype=np.int64), ends[:-1]])
    weights = factors(1 << int((ends - starts).max(initial=1)).bit_length())
    found, first = np.empty((2, len(strings)), dtype=np.uint64), 0
    while first < len(strings):
        last = max(first + 1, int(np.searchsorted(ends, starts[first] + CHUNK, side="right")))
        begin, end = starts[first:last] - starts[first], ends[first:last] - starts[first]
        text = strings.text[starts[first] : ends[last - 1]].astype(np.uint64) + np.uint64(1)  # + 1 for zero bytes
        place = np.arange(len(text)) - np.repeat(begin, end - begin)
        for sums, weight in zip(found, weights, strict=True):
            total = np.concatenate([np.zeros(1, dtype=np.uint64), np.cumsum(text * weight[place])])
            sums[first:last] = total[end] - total[begin]  # modulo 2^64
        first = last
    return found


class Lookup:
    """Finds the positions of strings by hash, with 24 bytes per string."""

    def __init__(self, strings: Strings):
        first, second = hashes(strings)
        self.order = np.argsort(first, kind="stable")
        self.first, self.second = first[self.order], second[self.order]

    def find(self, strings: Strings) -> np.ndarray:
        """(N,) int64: the first position of each string, or -1."""
        first, second = hashes(strings)
        place = np.searchsorted(self.first, first)
        while True:
            here = place.clip(max=len(self.first) - 1)
            same = (place < len(self.first)) & (self.first[here] == first)
            if not (other := same & (self.second[here] != second)).any():
                return np.where(same, self.order[here], -1)
            place = place + other

    def row(self, string: str) -> int:
        """Like `find` for one string, but faster."""
        text = np.frombuffer(string.encode(errors="surrogateescape"), dtype=np.uint8).astype(np.uint64)
        weights = factors(1 << max(len(text), 1).bit_length())[:, : len(text)]
        first, second = ((text + np.uint64(1)) * weights).sum(axis=1)
        for place in range(int(np.searchsorted(self.first, first)), len(self.first)):
            if self.first[place] != first:
                break
            if self.second[place] == second:
                return int(self.order[place])
        return -1

    def twice(self) -> int | None:
        """A position whose string occurs twice; None if there is none."""
        same = (self.first[1:] == self.first[:-1]) & (self.second[1:] == self.second[:-1])
        return int(self.order[same.argmax()]) if same.any() else None


class Index(NamedTuple):
    """Samples of shards, in the order of the shards and of the files in them."""

    keys: Strings  # (N,)
    spans: np.ndarray  # (N, 4) int64: image offset, image size, caption offset, caption size
    starts: np.ndarray  # (S + 1,) int64: index of the first sample of each shard, then N
    broken: list[Broken]
    digests: list[str]  # (S,) hash of each shard's keys and spans


def arrays_of(path: str) -> tuple[Strings, np.ndarray, list[Broken], str]:
    """(keys, spans, broken samples, digest) of one shard."""
    shard = index_shard(path)
    keys = Strings.of(shard.keys)
    digest = fingerprint(keys.text.tobytes(), keys.ends.tobytes(), shard.spans.tobytes())
    return keys, shard.spans, shard.broken, digest


def index_shards(paths: Sequence[str]) -> Index:
    """The index of shards, from the headers of their files."""
    if len(paths) < 64 or multiprocessing.current_process().daemon:  # loader workers cannot start processes
        shards = [arrays_of(path) for path in paths]
    else:
        with ProcessPoolExecutor(min(os.cpu_count() or 1, len(paths))) as pool:
            shards = list(pool.map(arrays_of, paths, chunksize=4))
    keys, spans, broken, digests = zip(*shards, strict=True)
    bytes_before = np.cumsum([0, *(len(of_shard.text) for of_shard in keys)])[:-1]
    ends = [of_shard.ends + before for of_shard, before in zip(keys, bytes_before, strict=True)]
    return Index(
        Strings(np.concatenate([of_shard.text for of_shard in keys]), np.concatenate(ends)),
        np.concatenate(spans),
        np.cumsum([0, *map(len, keys)]),
        [one for of_shard in broken for one in of_shard],
        list(digests),
    )


def read_index(paths: Sequence[str], cache: Path | None = None) -> Index:
    """Index of shards, read from the folder `cache` if it is cached there and no shard has changed since."""

    def make() -> tuple[dict[str, np.ndarray], dict]:
        index = index_shards(paths)
        arrays = {"text": index.keys.text, "ends": index.keys.ends, "spans": index.spans, "starts": index.starts}
        return arrays, {"broken": index.broken, "digests": index.digests}

    arrays, about = cached(paths, cache, make)
    broken = [Broken(*each) for each in about["broken"]]
    keys = Strings(arrays["text"], arrays["ends"])
    return Index(keys, arrays["spans"], arrays["starts"], broken, about["digests"])


# ------------------------------------------------------------------------------------ files written once per machine


def hashed(blocks: Iterable[bytes]) -> str:
    """Short hash of the bytes of all blocks, joined."""
    digest = hashlib.blake2b(digest_size=8)
    for block in blocks:
        digest.update(block)
    return digest.hexdigest()


def fingerprint(*parts: bytes) -> str:
    """`hashed` of bytes in memory."""
    return hashed(parts)


def file_fingerprint(path: Path) -> str:
    """`hashed` of a file, read in blocks."""
    with open(path, "rb") as file:
        return hashed(iter(lambda: file.read(CHUNK), b""))


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Context that one process per machine enters at a time; it locks nothing if the file system cannot lock `path`."""
    file = None
    try:
        file = open(path, "a")
        while True:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX)  # loader workers do not inherit this lock
                break
            except OSError as error:
                if error.errno != errno.EDEADLK:  # threads of two processes may look like a deadlock
                    raise
                time.sleep(0.2)
    except OSError:  # without a lock the work is correct, but may be done twice
        pass
    try:
        yield
    finally:
        if file is not None:
            file.close()


def cached(
    paths: Sequence[str],
    cache: Path | None,
    make: Callable[[], tuple[dict[str, np.ndarray], dict]],
    large: int | None = None,
) -> tuple[dict[str, np.ndarray], dict]:
    """The result of `make`, (arrays, a dict for JSON), for the files `paths`.

    If these have `large` bytes or more (default LARGE) in total, the result is cached and memory-mapped, unless `cache`
    is None or cannot be written.
    """
    stats = [os.stat(path) for path in paths]
    if cache is None or sum(stat.st_size for stat in stats) < (LARGE if large is None else large):
        return make()
    which = name_of(paths)
    state = [VERSION, *((stat.st_size, stat.st_mtime_ns) for stat in stats)]
    folder = cache / "index" / f"{which}-{fingerprint(repr(state).encode())}"
    with contextlib.suppress(OSError):
        folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.parent / f"{which}.lock"):
        with contextlib.suppress(OSError, ValueError):  # missing or incomplete
            return load(folder)
        arrays, about = make()
        with contextlib.suppress(OSError, ValueError):  # without locks, another process may have written it
            return load(folder)
        with contextlib.suppress(OSError, ValueError):  # read-only or full disk: go on without a cache
            write(folder, arrays, about)
        with contextlib.suppress(OSError, ValueError):
            return load(folder)
        return arrays, about


def load(folder: Path) -> tuple[dict[str, np.ndarray], dict]:
    about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
    return {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in about.pop("arrays")}, about


def name_of(paths: Sequence[str]) -> str:
    names = "\0".join(os.path.abspath(path) for path in paths)
    return fingerprint(names.encode(errors="surrogateescape"))


def forget(paths: Sequence[str], cache: Path) -> None:
    """Remove the cached indices of these files."""
    for old in (cache / "index").glob(f"{name_of(paths)}-*"):
        shutil.rmtree(old, ignore_errors=True)
    (cache / "index" / f"{name_of(paths)}.lock").unlink(missing_ok=True)


def write(folder: Path, arrays: dict[str, np.ndarray], about: dict) -> None:
    """Write the folder atomically; remove folders of the same files older than a week, and unfinished ones older than
    an hour. (Without locks, another process may be writing a younger one.)"""
    which = folder.name.partition("-")[0]
    shutil.rmtree(folder, ignore_errors=True)  # unreadable
    for pattern, age in ((f"{which}-*", WEEK), (f".{which}-*", HOUR)):
        for old in folder.parent.glob(pattern):
            with contextlib.suppress(OSError):
                if time.time() - old.stat().st_mtime > age:
                    shutil.rmtree(old, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{which}-", dir=folder.parent))
    try:
        for name, array_ in arrays.items():
            np.save(temporary / f"{name}.npy", array_)
        (temporary / "about.json").write_text(json.dumps(about | {"arrays": list(arrays)}), encoding="utf-8")
        temporary.chmod(0o755)  # others may use the cache, too
        os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
