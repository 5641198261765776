"""`--encode-once`: the frozen backbone's tokens of all images, computed once and kept in a file."""

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor, nn

from lexvla.checkpoints import backbone_fingerprint
from lexvla.config import Config
from lexvla.model import ImageEncoder
from lexvla.towers import eval_transform
from shared import checkpoints, data, evaluation, run
from shared.corpus import Corpus


class Precomputed(nn.Module):
    """In the backbone's place if images are given as its tokens (B, n, D)."""

    def forward_features(self, tokens: Tensor) -> Tensor:
        return tokens


class Tokens:
    """Pairs whose images are tokens (n, D), kept in half precision; NaN where the image could not be read."""

    def __init__(self, pairs: Any, tokens: np.ndarray):
        self.pairs, self.tokens = pairs, tokens
        self.keys, self.broken, self.strict, self.fingerprint = (
            pairs.keys,
            pairs.broken,
            pairs.strict,
            pairs.fingerprint,
        )

    def __len__(self) -> int:
        return len(self.pairs)

    def caption(self, row: int) -> str:
        return self.pairs.caption(row)

    def read(self, row: int) -> data.Pair:
        if np.isnan(self.tokens[row, 0, 0]):
            self.pairs.read(row)  # fails again, with the reason
            raise data.BrokenSample("its image could not be read when all were encoded")
        return data.Pair(str(self.keys[row]), torch.from_numpy(self.tokens[row].astype(np.float32)), self.caption(row))


def frozen_tokens(cfg: Config, pairs: Any, image: ImageEncoder, process: run.Process) -> Tokens:
    """The tokens of all pairs' images, by their evaluation views, memory-mapped from a file in `cfg.cache`.

    The file's name has a digest of the images, the backbone and the settings that matter. It is made by all processes
    together, if no other run has made it.
    """
    precision = run.resolve_precision(cfg.precision, process.device)
    made = evaluation.images_of(pairs), backbone_fingerprint(image), cfg.backbone, str(cfg.image_size), precision
    file = Path(cfg.cache) / f"tokens-{data.fingerprint(*(each.encode() for each in made))}.npy"
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{file}.lock") if process.main else contextlib.nullcontext():
        if not run.broadcast(file.exists(), process):
            tokens = encoded(cfg, pairs, image, process)
            if process.main:
                checkpoints.save_array(file, tokens)
            run.wait()
    return Tokens(pairs, np.load(file, mmap_mode="r"))


@torch.no_grad()
def encoded(cfg: Config, pairs: Any, image: ImageEncoder, process: run.Process) -> np.ndarray:
    """(N, n, D) float16 tokens of all pairs' images; each process encodes a share of them."""
    corpus, done = Corpus(cfg, process, lambda pair: run.stable_hash(str(pair.key)), pairs), []
    for rows, images, keys in corpus.batches(
        np.arange(len(pairs)), eval_transform(cfg.backbone, cfg.image_size), (0, 0)
    ):
        with run.autocast(cfg.precision, process.device):
            tokens = image.frozen(images).half().cpu().numpy()
        wanted = [run.stable_hash(str(pairs.keys[row])) for row in rows.tolist()]
        tokens[keys.cpu().numpy() != wanted] = np.nan  # the next image took the place of a broken one
        done.append((rows.cpu().numpy(), tokens))
    parts = run.gather_lists(done, process)
    whole = np.empty((len(pairs), *parts[0][1].shape[1:]), np.float16)
    for rows, tokens in parts:
        whole[rows] = tokens
    return whole
