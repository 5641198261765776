"""ProtoCLIP's external teacher: sentence features of every caption, `python -m protoclip.teacher PRESET --data ...`.

Upstream, megvii-research/protoclip@fde1933:src/utils/RoBERTa.py, has RoBERTa-large, mean over all 77 positions,
L2-normalised, reduced to 64 dimensions by PCA. An offline stage: training never runs this encoder, but looks up a
sample's features in the written file by the sample's key.
"""

import contextlib
import json
import math
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import faiss
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from protoclip.config import TEACHER_PRESETS, TeacherConfig
from protoclip.teacher_file import Teacher, all_captions, captions_digest
from shared import checkpoints, cli, data, pretrained, run
from shared.errors import UserError
from shared.settings import check_limits, check_max_length

BLOCK = 2**17  # captions tokenised at a time


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


def main(cfg: TeacherConfig) -> Path:
    """Embed the captions of `data`, reduce them by PCA, write `out`. A finished file is kept."""
    process = run.setup(0, cfg.device)
    out = Path(cfg.out)
    if not cfg.data:
        raise UserError("--data is missing: it takes the shards (or .tsv) that the student will be trained on")
    if out.suffix != ".npz":
        raise UserError(f"--out {out} should end in .npz")
    check_limits(cfg)
    pairs = data.open_pairs(cfg.data, cfg.dataset_size)
    captions = all_captions(pairs)
    setting = {name: getattr(cfg, name) for name in ("model", "attend_padding", "dim")} | {"length": cfg.max_length}
    if cfg.precision != "auto":
        setting["precision"] = cfg.precision
    made = json.dumps(setting | {"captions": captions_digest(captions)}, sort_keys=True)
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
    check_max_length(cfg.max_length, model, tokenizer, cfg.model)
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
    cli.command_line(lambda: main(cli.preset_cli(TEACHER_PRESETS)))
