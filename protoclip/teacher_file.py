"""The file of the external teacher's features: rows by sample key, read on demand by training.

teacher.py writes it. The .npy of upstream, megvii-research/protoclip@fde1933, is read, too; its rows are in the order
of the data.
"""

import functools
import json
import os
import zipfile

import numpy as np
import torch
from torch import Tensor

from shared import data, run
from shared.errors import UserError
from shared.index import Lookup, Strings, hashed


def mapped(path: str, name: str) -> np.ndarray:
    """Array `name` of an .npz that `numpy.savez` wrote, memory-mapped. LookupError if the file has no such array,
    ValueError if it is compressed or pickled."""
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        member = archive.getinfo(f"{name}.npy")
        with archive.open(member) as content:  # the array starts after the .npy header, whose length varies
            np.lib.format.read_magic(content)
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(content)
            offset = content.tell()
        if member.compress_type != zipfile.ZIP_STORED or dtype.hasobject:
            raise ValueError(f"{name} of {path} is compressed or pickled")
        file.seek(member.header_offset + 26)
        names = np.frombuffer(file.read(4), "<u2")  # lengths of the file name and of the extra field after it
        offset += member.header_offset + 30 + int(names.sum())
        return np.memmap(file, dtype, "r", offset, shape, "F" if fortran else "C")


class Teacher:
    """The external teacher's features of given samples: from an .npz by sample key, or from upstream's .npy in the
    order of the data.

    The file is memory-mapped: rows are read on demand, and processes share them.
    """

    def __init__(self, path: str):
        if not os.path.isfile(path):
            raise UserError(f"teacher file {path} does not exist; make it with 'python -m protoclip.teacher'")
        self.path, self.about = path, {}
        try:
            if path.endswith(".npy"):
                self.features, self.keys = np.load(path, mmap_mode="r", allow_pickle=False), None
            else:
                self.features = mapped(path, "features")
                self.keys = Strings(mapped(path, "keys"), mapped(path, "ends"))
                with np.load(path, allow_pickle=False) as kept:
                    self.about = {name: str(kept[name]) for name in ("made", "data") if name in kept.files}
        except (ValueError, TypeError, LookupError, OSError, EOFError, zipfile.BadZipFile) as error:
            made = "it should be .npz of 'python -m protoclip.teacher', or upstream's .npy"
            raise UserError(f"{path} is no teacher file: {made}") from error
        if self.features.ndim != 2 or (self.keys is not None and len(self.keys) != len(self.features)):
            raise UserError(f"{path} is no teacher file: it should hold a row of features for each sample")
        self.pairs = self.rows = None  # the pairs looked up last, and the row of `features` of each of their samples

    def find(self, pairs: data.Shards | data.TSV, samples: np.ndarray) -> np.ndarray:
        """Indices of samples in `pairs` (N,) -> rows of `features` (N,). UserError if a sample has none, or two."""
        if not np.isfinite(self.some).all():
            raise UserError(f"{self.path} holds features that are not finite: make it again, with --precision fp32")
        if self.keys is None:
            if pairs.broken:  # later samples would get the features of others
                raise UserError(
                    f"{self.path} has features in the order of the data, but {len(pairs.broken):,} samples were left "
                    "out: make a .npz, which has the samples' keys, with 'python -m protoclip.teacher'"
                )
            if len(self.features) < len(pairs):  # upstream's file covers its whole CSV; --dataset-size keeps the first
                raise UserError(
                    f"{self.path} has {len(self.features)} rows, the data {len(pairs)}: make it from the same data"
                )
            return samples
        if self.keys.equals(pairs.keys):  # the same samples in the same order; here keys may repeat
            if (made_from := self.about.get("data")) and made_from != pairs.fingerprint:
                if json.loads(self.about["made"])["captions"] != captions_digest(all_captions(pairs)):
                    raise UserError(f"{self.path} was made from other captions: make it again from this --data")
            return samples
        if self.pairs is not pairs:
            self.pairs, self.rows = pairs, self.lookup.find(pairs.keys)
        rows = self.rows[samples]
        if (missing := np.flatnonzero(rows < 0)).size:
            key = pairs.keys[int(samples[missing[0]])]
            raise UserError(f"{self.path} has no features of sample {key}: make it again from this --data")
        return rows

    @functools.cached_property
    def some(self) -> np.ndarray:
        """A thousand evenly spaced rows of the features, or all."""
        rows = np.linspace(0, len(self.features) - 1, min(len(self.features), 1000), dtype=int)
        return np.ascontiguousarray(self.features[rows])

    def digest(self) -> str:
        """Digest of the shape and of some rows."""
        return data.fingerprint(repr(self.features.shape).encode(), self.some)

    @functools.cached_property
    def lookup(self) -> Lookup:
        """Row of each key; UserError if a key has two rows."""
        lookup = Lookup(self.keys)
        if (row := lookup.twice()) is not None:
            raise UserError(
                f"{self.path} has features of sample {self.keys[row]} twice; make it again from this --data"
            )
        return lookup

    def features_of(self, pairs: data.Shards | data.TSV, samples: np.ndarray) -> Tensor:
        """Indices (N,) of samples in `pairs` -> their features (N, X) float32."""
        rows = self.find(pairs, samples)
        order, found = np.argsort(rows), np.empty((len(rows), *self.features.shape[1:]), dtype=np.float32)
        found[order] = self.features[rows[order]]  # read in file order, which is fastest
        return torch.from_numpy(found)


def open_teacher(path: str, pairs: data.Shards | data.TSV, process: run.Process) -> Teacher:
    """The external teacher's features of these pairs. UserError before training starts if a sample has none."""
    teacher = Teacher(path)
    if process.main:  # only rank 0 reads the features
        teacher.find(pairs, np.arange(len(pairs)))
        if teacher.keys is None and not isinstance(pairs, data.TSV):
            print(f"{path} has no sample keys: its rows must be in the order of the samples")
    return teacher


def all_captions(pairs: data.Shards | data.TSV) -> Strings:
    """The captions of all samples, with non-ASCII characters."""
    return Strings.of(pairs.caption(row) for row in range(len(pairs)))


def captions_digest(captions: Strings) -> str:
    """`data.fingerprint` of the captions, one per line, computed without joining them."""
    return hashed(b"\n" * (row > 0) + captions.bytes_of(row) for row in range(len(captions)))
