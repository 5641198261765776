"""Index of a data set: the keys of its samples and the offsets of their bytes.

The index of a data set of LARGE bytes or more is cached in a folder, named by a hash of the paths, sizes and times of
the data set's files. One process per machine writes it while the others wait; then all memory-map it, and so do later
runs.
"""

import array
import contextlib
import hashlib
import json
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from filelock import FileLock

from shared.tars import Broken, index_shard

LARGE = 2**28  # bytes; the index of a data set of this size or more is cached; indexing a smaller one takes a second
CHUNK = 2**22  # bytes of a file that are hashed at a time


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


def digests(strings: Strings) -> np.ndarray:
    """(N,) of 16-byte hashes of strings."""
    text, start, found = memoryview(strings.text), 0, bytearray()
    for end in strings.ends.tolist():
        found += hashlib.blake2b(text[start:end], digest_size=16).digest()
        start = end
    return np.frombuffer(found, dtype="S16")


class Lookup:
    """Finds the positions of strings by their hashes, with 24 bytes per string."""

    def __init__(self, strings: Strings):
        unsorted = digests(strings)
        self.order = np.argsort(unsorted, kind="stable")
        self.digests = unsorted[self.order]

    def find(self, strings: Strings) -> np.ndarray:
        """(N,) int64: the first position of each string, or -1."""
        wanted = digests(strings)
        if not len(self.order):
            return np.full(len(wanted), -1)
        place = np.searchsorted(self.digests, wanted).clip(max=len(self.order) - 1)
        return np.where(self.digests[place] == wanted, self.order[place], -1)

    def row(self, string: str) -> int:
        """`find` for one string."""
        return int(self.find(Strings.of([string]))[0])

    def twice(self) -> int | None:
        """A position whose string occurs twice; None if there is none."""
        same = self.digests[1:] == self.digests[:-1]
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
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, NotImplementedError):  # without it, the work is correct but may be done twice
            stack.enter_context(FileLock(path))
        yield


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
    state = fingerprint(repr([(stat.st_size, stat.st_mtime_ns) for stat in stats]).encode())
    folder = cache / "index" / f"{which}-{state}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError:  # a read-only disk, or a file in the way
        return make()
    with locked(folder.parent / f"{which}.lock"):
        with contextlib.suppress(OSError, ValueError):  # missing or damaged
            return load(folder)
        arrays, about = make()
        with contextlib.suppress(OSError):  # a full disk
            write(folder, arrays, about)
            return load(folder)
        return arrays, about


def load(folder: Path) -> tuple[dict[str, np.ndarray], dict]:
    about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
    return {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in about.pop("arrays")}, about


def write(folder: Path, arrays: dict[str, np.ndarray], about: dict) -> None:
    """Write the folder atomically, in place of all others for the same files. Processes keep what they have mapped."""
    which = folder.name.partition("-")[0]
    for old in (*folder.parent.glob(f"{which}-*"), *folder.parent.glob(f".{which}-*")):
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


def name_of(paths: Sequence[str]) -> str:
    names = "\0".join(os.path.abspath(path) for path in paths)
    return fingerprint(names.encode(errors="surrogateescape"))


def forget(paths: Sequence[str], cache: Path) -> None:
    """Remove the cached indices of these files."""
    for old in (cache / "index").glob(f"{name_of(paths)}-*"):
        shutil.rmtree(old, ignore_errors=True)
    (cache / "index" / f"{name_of(paths)}.lock").unlink(missing_ok=True)
