"""Write features of any frozen model to a file for `nmtune.train --features`: `python -m nmtune.extract KIND ...`.

    images     from images, by an encoder of timm or open_clip, a run of nmtune.pretrain, or EfficientNet-Lite0
    texts      from texts in GLUE's layout or JSON lines, by any encoder of Hugging Face

NMTune (arXiv 2309.17002) also tunes black boxes such as language models, for which the authors have released no code.
For others, such as an embedding API, write the file with NumPy (README). A finished file is not overwritten.
"""

import csv
import dataclasses
import inspect
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from torch import Tensor

from nmtune.config import named_tests
from nmtune.datasets import LabelledImages, open_labelled, open_test
from nmtune.encoders import load_encoder
from nmtune.features import encode_set, split_encoder
from shared import checkpoints, cli, run
from shared.errors import UserError
from shared.index import file_fingerprint
from shared.settings import Count, Whole, check_limits, check_max_length

# ------------------------------------------------------------------------------------------------------------ settings


@dataclasses.dataclass
class Images:
    """Features of labelled images."""

    encoder: str
    """Frozen encoder: timm:NAME, open_clip:NAME, lite0:SIDE, or the run folder of `python -m nmtune.pretrain`."""
    data: str
    """Training images: a folder DIR/CLASS/*.jpg, DIR:train of a webdataset, or a list FILE.txt."""
    out: str
    """Features file to write, .npz."""
    tests: tuple[str, ...] = ()
    """Test sets as NAME=PATH, paths as in `data`."""
    checkpoint: str = ""
    """Weights: a file in timm's or open_clip's layout, an open_clip tag, or `pretrained` for timm's own."""
    views: Whole = 0
    """Training views of each training image; 0: one view of each, by the evaluation transform."""
    batch_size: Count = 256
    """Images per forward pass."""
    workers: Whole = 0
    """Loader processes."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Autocast of the encoder."""
    seed: Whole = 0
    """Seed of training views."""


@dataclasses.dataclass
class Texts:
    """Features of labelled texts."""

    encoder: str
    """Encoder that transformers' AutoModel loads, by name or folder: roberta-large, gpt2."""
    data: str
    """Training texts: a .tsv, as GLUE's, or a .jsonl."""
    out: str
    """Features file to write, .npz."""
    tests: tuple[str, ...] = ()
    """Test sets as NAME=PATH, files as in `data`."""
    columns: tuple[str, ...] = ("sentence",)
    """Columns or keys of the text; two give a text pair, such as premise and hypothesis."""
    label: str = "label"
    """Column or key of the label."""
    header: tuple[str, ...] = ()
    """Names of the columns of .tsv files without a header line, such as CoLA's: source label mark sentence."""
    pooling: Literal["first", "mean", "last"] = "first"
    """Which hidden states of the last layer are the feature: that of the first token (BERT), the mean over tokens
    (sentence encoders), or that of the last token (GPT)."""
    max_length: Count = 128
    """Longest text in tokens."""
    batch_size: Count = 32
    """Texts per forward pass."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "fp32"
    """Autocast of the encoder."""


# --------------------------------------------------------------------------------------------------------------- kinds

Sets = Iterator[tuple[str, Tensor, list[str]]]  # name ("" of the training set), features (V, N, D) or (M, D), labels


def image_sets(cfg: Images, tests: dict[str, str], train: LabelledImages) -> Sets:
    """Features and labels of `train` and of the test sets; all labels are class names of `train`."""
    process = run.setup(cfg.seed, cfg.device)
    encoder, _, train_view, eval_view = load_encoder(*split_encoder(cfg.encoder, cfg.checkpoint))
    encoder.to(process.device, memory_format=torch.channels_last)
    options = {"process": process, "precision": cfg.precision, "seed": cfg.seed}
    options |= {"workers": cfg.workers, "batch_size": cfg.batch_size}
    opened = {name: open_test(path, train.classnames) for name, path in tests.items()}
    views = {"transform": train_view if cfg.views else eval_view, "views": max(cfg.views, 1)}
    features, labels = encode_set(encoder, train, **views, **options, label="training set")
    yield "", features, [train.classnames[label] for label in labels]
    for name, (images, groups) in opened.items():
        groups = groups or [[label] for label in range(len(train.classnames))]
        if any(len(group) > 1 for group in groups):
            raise UserError(
                f"{tests[name]} has a class that stands for several of {cfg.data}: measure it with nmtune.train"
            )
        features, labels = encode_set(encoder, images, eval_view, **options, label=name)
        yield name, features[0], [train.classnames[groups[label][0]] for label in labels]


def entries(path: str, header: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Lines of a .jsonl or .tsv as dicts. UserError names a bad line, or a file without lines.

    header: column names of a .tsv; if empty, they are read from its first line.
    """
    if not Path(path).is_file():
        raise UserError(f"{path} does not exist")
    found = []
    with open(path, encoding="utf-8", newline="") as file:
        if path.endswith(".tsv"):
            found += csv.DictReader(file, header or None, delimiter="\t", quoting=csv.QUOTE_NONE)
        else:
            for number, line in enumerate(file, 1):
                try:
                    found.append(json.loads(line))
                except ValueError as error:
                    raise UserError(
                        f"{path}, line {number} is not JSON ({error}); files other than .tsv are read as JSON lines"
                    ) from error
    if not found:
        raise UserError(f"{path} has no entries")
    return found


def value(path: str, number: int, entry: dict[str, Any], key: str) -> Any:
    """entry[key]. UserError names file, line and key."""
    if not isinstance(entry, dict) or entry.get(key) is None:
        raise UserError(f"{path}, entry {number} has no {key!r}")
    return entry[key]


@torch.no_grad()
def text_features(cfg: Texts, texts: list[list[str]], tokenizer: Any, model: Any, process: run.Process) -> Tensor:
    """Texts, or pairs of texts -> the hidden states (N, D) of `cfg.pooling`, fp32."""
    features = []
    wanted = inspect.signature(model.forward).parameters  # not every model takes token_type_ids
    starts = range(0, len(texts), cfg.batch_size)
    for start in run.progress(starts, len(starts), "texts", cfg.batch_size, process):
        columns = [list(column) for column in zip(*texts[start : start + cfg.batch_size], strict=True)]
        tokens = tokenizer(*columns, padding=True, truncation=True, max_length=cfg.max_length, return_tensors="pt")
        tokens = {name: each.to(process.device) for name, each in tokens.items() if name in wanted}
        with run.autocast(cfg.precision, process.device):
            hidden = model(**tokens).last_hidden_state.float()  # (B, L, D)
        mask = tokens["attention_mask"]
        if cfg.pooling == "mean":
            pooled = (hidden * mask[:, :, None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
        else:
            column = mask.argmax(dim=1) if cfg.pooling == "first" else mask.shape[1] - 1 - mask.flip(1).argmax(dim=1)
            pooled = hidden[torch.arange(len(hidden)), column]  # padding may be on either side
        features.append(pooled.cpu())
    return torch.cat(features)


def text_sets(cfg: Texts, tests: dict[str, str]) -> Sets:
    """Features of the texts of all files."""
    try:
        import transformers
    except ImportError as error:
        raise UserError("texts need transformers: pip install 'transformers>=5.6'") from error
    process = run.setup(0, cfg.device)
    paths = {"": cfg.data, **tests}
    read = {name: entries(path, cfg.header) for name, path in paths.items()}  # before the encoder, to fail early
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(cfg.encoder)
        model = transformers.AutoModel.from_pretrained(cfg.encoder).eval().to(process.device)
    except (OSError, ValueError) as error:
        raise UserError(f"--encoder {cfg.encoder} cannot be loaded: {str(error).splitlines()[0]}") from error
    check_max_length(cfg.max_length, model, tokenizer, cfg.encoder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    for name, lines in read.items():
        path = tests.get(name, cfg.data)
        texts = [[str(value(path, i, entry, key)) for key in cfg.columns] for i, entry in enumerate(lines, 1)]
        labels = [str(value(path, i, entry, cfg.label)) for i, entry in enumerate(lines, 1)]
        yield name, text_features(cfg, texts, tokenizer, model, process), labels


# ---------------------------------------------------------------------------------------------------------- the script


def main(cfg: Images | Texts) -> Path:
    """Write the features file, unless it exists with the same settings and data. Returns its path."""
    check_limits(cfg)
    out, tests = Path(cfg.out), named_tests(cfg.tests)
    if out.suffix != ".npz":
        raise UserError(f"--out {out} should end in .npz")
    unimportant = ("out", "workers", "device", "batch_size")
    about = {name: setting for name, setting in vars(cfg).items() if name not in unimportant}
    if isinstance(cfg, Images):
        train = open_labelled(cfg.data)
        about["fingerprints"] = [train.fingerprint, *(open_labelled(path).fingerprint for path in tests.values())]
        found = image_sets(cfg, tests, train)
    else:
        about["fingerprints"] = [fingerprint(path) for path in (cfg.data, *tests.values())]
        found = text_sets(cfg, tests)
    made_with = json.dumps(about, sort_keys=True)
    if out.is_file():
        with np.load(out, allow_pickle=False) as file:
            if "about" not in file.files or str(file["about"]) != made_with:
                raise UserError(f"{out} holds features of other data or settings: choose another --out")
        print(f"{out} exists for these data and settings; nothing to do")
        return out
    arrays: dict[str, np.ndarray] = {"about": np.array(made_with)}
    for name, features, labels in found:
        prefix = f"{name}_" if name else ""
        arrays |= {f"{prefix}features": features.numpy(), f"{prefix}labels": np.array(labels, dtype=str)}
        print(f"{name or 'training set'}: {' x '.join(map(str, features.shape))} features", flush=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    with checkpoints.replaced(out) as file:
        np.savez(file, **arrays)
    return out


def fingerprint(path: str) -> str:
    """Hash of a file's content. UserError if the file does not exist."""
    if not Path(path).is_file():
        raise UserError(f"{path} does not exist")
    return file_fingerprint(Path(path))


if __name__ == "__main__":
    cli.command_line(lambda: main(tyro.cli(Images | Texts)))
