"""Reads webdataset shards (headers, contents, indices) as untrusted input, and writes them.

Damaged, malformed or too large files are skipped and recorded as `Broken`. Links are not followed, and damaged headers
cannot cause an endless loop.
"""

import contextlib
import functools
import itertools
import json
import os
import resource
import tarfile
from collections.abc import Collection, Container, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from webdataset import TarWriter

from shared.checkpoints import replaced
from shared.errors import UserError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
MAX_BYTES = 2**28  # of one file
MAX_KEY = 2**10  # characters of a key
MOST_FILES = 2**16  # most files of a data set that a process keeps open, if the system allows it


class Broken(NamedTuple):
    key: str
    reason: str


class ShardIndex(NamedTuple):
    keys: list[str]
    spans: np.ndarray  # (n, 4) int64: image offset, image size, caption offset, caption size
    broken: list[Broken]


@functools.cache
def open_files() -> int:
    """Number of a data set's files that a process may keep open: a quarter of the system's limit on open files.

    The soft limit, 1,024 on most systems, is first raised to the hard limit.
    """
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 4 * MOST_FILES if most == resource.RLIM_INFINITY else min(most, 4 * MOST_FILES)
    if now != resource.RLIM_INFINITY and now < wanted:
        with contextlib.suppress(OSError, ValueError):  # macOS's real limit is below the reported one
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))
            now = wanted
    return MOST_FILES if now == resource.RLIM_INFINITY else max(now // 4, 1)


class OpenFiles:
    """Files for random access; at most `open_files()` stay open.

    A forked process can use the open descriptors, since `pread` has no shared file position.
    """

    def __init__(self, paths: Sequence[str]):
        self.paths, self._descriptors = paths, {}

    def read(self, file: int, offset: int, size: int) -> bytes:
        """`size` bytes of a file from `offset` on, without the read-ahead of Python's files."""
        return os.pread(self._open(file), size, offset)

    def _open(self, file: int) -> int:
        """The file's descriptor."""
        if file not in self._descriptors:
            if len(self._descriptors) >= open_files():
                os.close(self._descriptors.pop(next(iter(self._descriptors))))
            self._descriptors[file] = os.open(self.paths[file], os.O_RDONLY | os.O_CLOEXEC)
        return self._descriptors[file]

    def __getstate__(self) -> dict:
        return {"paths": self.paths, "_descriptors": {}}

    def __del__(self, close=os.close) -> None:  # a default, since `os` may be gone when the interpreter exits
        for descriptor in getattr(self, "_descriptors", {}).values():
            close(descriptor)


def key_of(name: str) -> tuple[str, str]:
    """File name in a shard -> (key of its sample, extension in lower case), split at the first dot."""
    folder, file = os.path.split(name)
    stem, _, extension = file.partition(".")
    return os.path.join(folder, stem), extension.lower()


def tar_files(path: str | Path, broken: list[Broken]) -> Iterator[tarfile.TarInfo]:
    """Headers of a tar's regular files, in order; the last file may be truncated.

    Reading ends at a damaged header. `broken` gets a record of it, of each sparse file, and of each name of more than
    MAX_KEY characters.
    """
    try:
        with open(path, "rb", buffering=0) as file, tarfile.open(fileobj=file, mode="r:") as tar:  # no read-ahead
            # an empty tar has offset 0, at which Python 3.10's `next` fails
            while (end := tar.offset) and (member := tar.next()) is not None:
                tar.members.clear()  # tarfile keeps every header
                if member.size < 0 or tar.offset <= member.offset:  # points backwards: an endless loop
                    raise tarfile.ReadError("damaged")
                if len(member.name) > MAX_KEY:
                    broken.append(Broken(member.name[:64] + "...", f"name of more than {MAX_KEY} characters"))
                elif member.issparse():
                    broken.append(Broken(key_of(member.name)[0], "sparse file"))
                elif member.isfile():
                    yield member
            tar.fileobj.seek(end)  # tarfile stops silently at a damaged header
            if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("damaged")
    except (tarfile.TarError, EOFError, ValueError, OverflowError, TypeError):  # malformed headers raise all of these
        broken.append(Broken(str(path), "truncated or damaged tar"))


def read_tar(path: str | Path, broken: list[Broken], extensions: Container[str] | None = None) -> Iterator:
    """(name, content) of a tar's files, or of those with one of `extensions`; see `tar_files`."""
    with open(path, "rb", buffering=0) as file:  # no read-ahead
        for member in tar_files(path, broken):
            if extensions is not None and key_of(member.name)[1] not in extensions:
                continue
            file.seek(member.offset_data)
            content = file.read(min(member.size, MAX_BYTES + 1))
            if len(content) > MAX_BYTES:
                broken.append(Broken(key_of(member.name)[0], f"file of more than {MAX_BYTES} bytes"))
            elif len(content) == member.size:
                yield member.name, content


def samples(shards: Iterable[str], extensions: Collection[str]) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, {extension: content}) of all samples, in order; other files are skipped. UserError for a damaged shard, or
    for a sample without one of the files."""
    for shard in shards:
        found: dict[str, dict[str, bytes]] = {}
        broken: list[Broken] = []
        for name, content in read_tar(shard, broken, extensions):
            key, extension = key_of(name)
            found.setdefault(key, {})[extension] = content
        broken += [Broken(key, "a file is missing") for key, files in found.items() if len(files) < len(extensions)]
        if broken:
            raise UserError(
                f"{shard} is damaged, {broken[0].reason} ({broken[0].key}): remove its folder and build it again"
            )
        yield from found.items()


def descriptions(shards: Iterable[str]) -> Iterator[tuple[str, dict]]:
    """(key, content of its .json) of all samples that have one. UserError names an unreadable shard or sample."""
    for shard in shards:
        broken: list[Broken] = []
        for name, content in read_tar(shard, broken, {"json"}):
            try:
                about = json.loads(content)
            except ValueError:
                about = None
            if not isinstance(about, dict):
                raise UserError(f"{shard}, {name} is no JSON object")
            yield key_of(name)[0], about
        if broken:
            raise UserError(f"{shard}: {broken[0].reason} ({broken[0].key})")


def index_shard(path: str) -> ShardIndex:
    """Index one tar from its headers. Broken: incomplete, truncated or too large samples, and those of `tar_files`."""
    members: dict[str, dict[str, tuple[int, int]]] = {}
    broken: list[Broken] = []
    size = os.path.getsize(path)
    for member in tar_files(path, broken):
        key, extension = key_of(member.name)
        span = (member.offset_data, member.size)
        files = members.setdefault(key, {})
        if extension in files:
            broken.append(Broken(key, "key occurs twice in its shard"))
        files[extension if sum(span) <= size else "truncated"] = span
    keys, spans = [], []
    for key, files in members.items():
        image = next((files[e] for e in (*IMAGE_EXTENSIONS, "npy") if e in files), None)  # .npy: features in its place
        if "truncated" in files:
            broken.append(Broken(key, "truncated or damaged tar"))
        elif image is None or "txt" not in files:
            broken.append(Broken(key, "missing image" if image is None else "missing caption"))
        elif image[1] > MAX_BYTES:
            broken.append(Broken(key, f"file of more than {MAX_BYTES} bytes"))
        else:
            keys.append(key)
            spans.append((*image, *files["txt"]))
    return ShardIndex(keys, np.array(spans, dtype=np.int64).reshape(-1, 4), broken)


def write_tar(path: Path, samples: Iterable[dict[str, str | bytes]]) -> None:
    """Write a webdataset shard, atomically; its bytes depend only on the samples."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(path) as file, TarWriter(file, user="root", group="root", mtime=0, encoder=False) as tar:
        for sample in samples:
            tar.write({k: v.encode() if isinstance(v, str) and k != "__key__" else v for k, v in sample.items()})


def write_split(folder: Path, samples: Iterable[dict[str, str | bytes]], shard_size: int | None = None) -> int:
    """Write a split of an evaluation set in the CLIP-benchmark layout; returns the number of samples.

    A sample maps file endings to contents: an image ending, `cls` (label) or `txt` (captions, one a line), and others.
    shard_size: samples per shard; None writes one shard.
    """
    count = itertools.count()
    keyed = ({"__key__": f"s{next(count):07d}"} | sample for sample in samples)
    write_tar(folder / "0.tar", itertools.islice(keyed, shard_size))
    shards = 1
    for first in keyed if shard_size else ():  # there is another shard
        write_tar(folder / f"{shards}.tar", itertools.chain([first], itertools.islice(keyed, shard_size - 1)))
        shards += 1
    (folder / "nshards.txt").write_text(f"{shards}\n")
    return next(count)
