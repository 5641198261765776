"""The bank: embeddings of every image's captions, computed once by embed.py, so that training needs no language model.

FLAME (arXiv 2411.11927). The authors write one .pth file per image, U:training/data.py:393-435 of
MIV-XJTU/FLAME@4d2b9a9. Here a folder holds one array of all embeddings, and the samples' keys:

    embeddings.npy      (U, T, D) float16: of T = 11 unit facets, 1 of the raw, 3 of the short, 7 of the long caption
    keys.npy, ends.npy  bytes of the N sample keys, and the end of each
    rows.npy            (N,) row of each sample in `embeddings`; samples with the same captions share one
    done.npy            (blocks,) whether a block of BLOCK rows is written; embed.py resumes at the others
    index.json          what the embeddings depend on: language model and its digest, prompts, mask, precision, captions
"""

import functools
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from shared import checkpoints
from shared.errors import UserError
from shared.index import Lookup, Strings, fingerprint

BLOCK = 1024  # rows that are written at a time


class Bank:
    """`bank[key]` -> (T, D) float32; `bank.check(keys, where)` raises UserError if one is missing."""

    def __init__(self, root: str | Path):
        self.root = Path(root)
        again = "run 'python -m flame.embed' again"
        if not (self.root / "index.json").is_file():
            begun = (self.root / ".lock").is_file()
            what = f"has no embeddings yet: {again}" if begun else "is no bank: make it with 'python -m flame.embed'"
            raise UserError(f"{root} {what}")
        self.index = checkpoints.read_json(self.root / "index.json")
        keys, ends, self.rows, self.embeddings, done = (
            mapped(self.root / f"{name}.npy") for name in ("keys", "ends", "rows", "embeddings", "done")
        )
        if not done.all():
            raise UserError(f"{root} is not finished: {again}")
        if self.embeddings.ndim != 3 or len(ends) != len(self.rows) or self.rows.max() >= len(self.embeddings):
            raise UserError(f"{root} is damaged: its files do not fit each other; remove it and {again}")
        self.keys = Strings(keys, ends)
        _, self.facets, self.dim = self.embeddings.shape

    @functools.cached_property
    def digest(self) -> str:
        """Tells banks apart."""
        return fingerprint((self.root / "index.json").read_bytes())

    @functools.cached_property
    def lookup(self) -> Lookup:
        """Finds the position of a key in `keys`."""
        return Lookup(self.keys)

    def check(self, keys: Strings, where: str) -> None:
        """UserError if a sample of `where` is not in the bank, or if two samples have one key."""
        for lookup, strings, folder in ((Lookup(keys), keys, where), (self.lookup, self.keys, self.root)):
            if (row := lookup.twice()) is not None:
                raise UserError(
                    f"sample key {strings[row]} occurs twice in {folder}: a bank finds captions by key, so give each "
                    "sample a key of its own"
                )
        missing = np.flatnonzero(self.lookup.find(keys) < 0)
        if missing.size:
            raise self.lacks(keys[int(missing[0])])

    def lacks(self, key: str) -> UserError:
        return UserError(f"{self.root} has no embeddings of sample {key}: embed the captions of this --data")

    def __getitem__(self, key: str) -> Tensor:
        if (position := self.lookup.row(key)) < 0:
            raise self.lacks(key)
        return torch.from_numpy(self.embeddings[self.rows[position]].astype(np.float32))


def mapped(path: Path, mode: str = "r") -> np.ndarray:
    """An array in a file, memory-mapped. UserError if the file is missing or damaged."""
    try:
        return np.load(path, mmap_mode=mode)
    except (OSError, ValueError, EOFError) as error:
        again = "remove its folder and run 'python -m flame.embed' again"
        raise UserError(f"{path} is missing or damaged: {again}") from error
