"""The bank: embeddings of every image's captions, computed once by embed.py, so that training does not need the LLM.

FLAME (arXiv 2411.11927); authors' code MIV-XJTU/FLAME@4d2b9a9, cited as `U:` with paths under src/. The authors write
one .pth file per image, U:training/data.py:393-435. Here a folder holds `index.json` (the settings), `keys.npy` and
`ends.npy` (the bytes of all sample keys, and the end of each), `rows.npy` (for each key, the index of its embeddings;
samples with the same captions share one), `centres.npy`, `captions.json` (a hash of each caption file), and
memory-mapped shards `00000.npy`, ... of (n, T, D) float16. An image has T = 11 unit facet embeddings: 1 of the raw
caption, 3 of the short and 7 of the long one (with MiniLM, 1 of each). `index.json` calls T "rows".
"""

import functools
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from shared import checkpoints
from shared.errors import UserError
from shared.index import Lookup, Strings, file_fingerprint, fingerprint


class Bank:
    """`bank[key]` -> (T, D) float32; `bank.check(keys)` raises UserError if one is missing."""

    def __init__(self, root: str | Path):
        self.root = Path(root)
        if not (self.root / "index.json").is_file():
            if (self.root / ".lock").is_file():
                raise UserError(f"{root} has no embeddings yet: 'python -m flame.embed' was stopped; run it again")
            raise UserError(f"no bank of caption embeddings at {root}; make it with 'python -m flame.embed'")
        self.index = checkpoints.read_json(self.root / "index.json")
        if missing := {"shards", "shard_size", "dim", "rows"} - set(self.index):
            raise UserError(f"{root}/index.json is no bank of flame.embed: it lacks {min(missing)}")
        for shard in range(self.index["shards"]):
            if not self.shard_path(self.root, shard).is_file():
                raise UserError(f"{root} is not finished: shard {shard} is missing; run 'python -m flame.embed' again")
        if not (self.root / "centres.npy").is_file():
            raise UserError(f"{root} is not finished; run 'python -m flame.embed' again")
        self.dim, self.facets = self.index["dim"], self.index["rows"]
        self.keys, self.embedding_ids = read_keys(self.root), mapped(self.root / "rows.npy")
        held = sum(len(self.checked(shard)) for shard in range(self.index["shards"]))
        if len(self.embedding_ids) != len(self.keys):
            raise UserError(
                f"{root} is damaged: rows.npy is of {len(self.embedding_ids):,} samples, keys.npy of {len(self.keys):,}"
            )
        if (needed := int(self.embedding_ids.max(initial=-1)) + 1) > held:
            raise UserError(f"{root} is damaged: it has {held:,} embeddings, and rows.npy needs {needed:,}")

    def checked(self, shard: int) -> np.ndarray:
        """A shard of the bank; UserError if it is damaged."""
        found = self.shard(shard)
        if found.shape[1:] != (self.facets, self.dim):
            raise UserError(f"{self.shard_path(self.root, shard)} is damaged: its shape is {found.shape}")
        return found

    @functools.cached_property
    def digest(self) -> str:
        """Digest of the settings and of the centres: it tells banks apart."""
        return fingerprint((self.root / "index.json").read_bytes(), (self.root / "centres.npy").read_bytes())

    @staticmethod
    def shard_path(root: Path, shard: int) -> Path:
        return root / f"{shard:05d}.npy"

    @functools.cached_property
    def lookup(self) -> Lookup:
        """Finds the position of a key in `keys`."""
        return Lookup(self.keys)

    def check_captions(self) -> None:
        """UserError if a caption file has changed since the bank was made. Reads whole files: one process does it.

        A file that is gone passes; so do older banks, which have no hashes.
        """
        record = self.root / "captions.json"
        for path, then in checkpoints.read_json(record).items() if record.is_file() else ():
            if Path(path).is_file() and file_fingerprint(Path(path)) != then:
                raise UserError(f"{path} has changed since the bank {self.root} was made from it: embed it again")

    def check(self, keys: Strings) -> None:
        """UserError if a sample is not in the bank, or if two samples have one key."""
        for lookup, strings, where in ((Lookup(keys), keys, "--data"), (self.lookup, self.keys, self.root)):
            if (row := lookup.twice()) is not None:
                raise UserError(
                    f"sample key {strings[row]} occurs twice in {where}: a bank finds captions by key, so give each "
                    "sample a key of its own"
                )
        missing = np.flatnonzero(self.lookup.find(keys) < 0)
        if missing.size:
            self.lacks(keys[int(missing[0])])

    def lacks(self, key: str) -> NoReturn:
        """ValueError about a sample that is not in the bank."""
        raise UserError(f"{self.root} has no embeddings of sample {key}: embed the captions of this --data")

    @functools.lru_cache(maxsize=64)  # noqa: B019 a bank lives as long as its process
    def shard(self, number: int) -> np.ndarray:
        """A file's (n, T, D) float16 array, memory-mapped."""
        return mapped(self.shard_path(self.root, number))

    def __getitem__(self, key: str) -> Tensor:
        if (row := self.lookup.row(key)) < 0:
            self.lacks(key)
        shard, offset = divmod(int(self.embedding_ids[row]), self.index["shard_size"])
        return torch.from_numpy(self.shard(shard)[offset].astype(np.float32))

    @functools.cached_property
    def centres(self) -> Tensor:
        """(T + 1, D) float32: the mean of each facet over the bank's embeddings, then the mean of the long captions'
        evaluation embeddings (each the normalised mean of the long facets). Images with equal captions count once."""
        return torch.from_numpy(np.array(mapped(self.root / "centres.npy")))


def read_keys(root: Path) -> Strings:
    """The keys of a bank; older banks hold an array of strings."""
    keys = mapped(root / "keys.npy")
    return Strings(keys, mapped(root / "ends.npy")) if keys.dtype == np.uint8 else Strings.of(keys)


def mapped(path: Path) -> np.ndarray:
    """An array in a file, memory-mapped. UserError if the file is damaged."""
    try:
        return np.load(path, mmap_mode="r")
    except (ValueError, EOFError) as error:
        raise UserError(f"{path} is damaged: make the bank again with 'python -m flame.embed'") from error


def sums(embeddings: np.ndarray, multi: slice) -> np.ndarray:
    """(n, T, D) embeddings of images -> (T + 1, D) float64: their sums, for `centres`; `multi`: the long caption's
    facets."""
    mean = embeddings[:, multi].astype(np.float32).mean(1)
    mean /= np.linalg.norm(mean, axis=-1, keepdims=True)
    return np.concatenate([embeddings.sum(0, dtype=np.float64), mean.sum(0, dtype=np.float64)[None]])


def centred(embeddings: Tensor, centre: Tensor) -> Tensor:
    """Unit embeddings (..., D) minus their centre (..., D), normalised again."""
    return F.normalize(embeddings - centre.to(embeddings.device), dim=-1)


class AuthorsBank:
    """The authors' layout: <root>/<folder>/<key>.pth, where folder is the key up to `_` (YFCC) or its first 5
    characters."""

    def __init__(self, root: str | Path):
        self.root = Path(root)
        first = next(self.root.glob("*/*.pth"))
        self.facets, self.dim = read_tensor(first).shape

    def path(self, key: str) -> Path:
        return self.root / (key.split("_")[0] if "_" in key else key[:5]) / f"{key}.pth"

    def check(self, keys: Strings) -> None:
        """UserError if one of a thousand evenly spaced keys has no file; checking millions would take minutes."""
        for row in np.linspace(0, len(keys) - 1, min(len(keys), 1000), dtype=int).tolist():
            self.existing(keys[row])

    def existing(self, key: str) -> Path:
        """The file of a sample. UserError if there is none."""
        if not self.path(key).is_file():
            raise UserError(f"{self.path(key)} is missing: embed the captions of this --data")
        return self.path(key)

    def __getitem__(self, key: str) -> Tensor:
        return read_tensor(self.existing(key)).float()


def read_tensor(path: Path) -> Tensor:
    """The (T, D) tensor in a .pth file."""
    value = checkpoints.load_checkpoint(path)
    if not isinstance(value, Tensor) or value.ndim != 2:
        raise UserError(f"{path} does not hold embeddings (facets, dimensions)")
    return value.detach()


def open_bank(root: str | Path) -> Bank | AuthorsBank:
    """Open one of our banks, or a folder of the authors' files."""
    if not (Path(root) / "index.json").exists() and next(Path(root).glob("*/*.pth"), None) is not None:
        return AuthorsBank(root)
    return Bank(root)
