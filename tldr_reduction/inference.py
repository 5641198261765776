"""What the models say of every image, kept by row of the data: codes, features, matching scores, captions.

A reduction that was killed goes on from what is kept, and reductions may share it. Ranks share out the rows.
Authors' code: showlab/datacentric.vlp@a488102, cited as `U:`.
"""

import os
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared import checkpoints, data, export, run
from shared.evaluation import named
from tldr_reduction.checkpoints import load_run
from tldr_reduction.config import ReduceConfig
from tldr_reduction.datasets import eval_transform, no_pixels, ordered_loader
from tldr_reduction.model import BLIP, CodebookCaptioner
from tldr_reduction.tokenizer import SCORED_LENGTH, WordPiece, pre_caption

# ------------------------------------------------------------------------------------------------------- forward passes


@torch.no_grad()
def extract_codes(captioner: CodebookCaptioner, loader: Iterable, precision: str = "fp32") -> np.ndarray:
    """Code vectors (N, L') in the order of the sample index: uint16, or int32 with more than 65536 codes.

    U:codebook_extractor.py:24-63. `loader` yields (index (b,), images, ...), images in the evaluation transform, so
    that the same image always has the same codes (upstream takes random training views).
    """
    captioner.eval()
    device = next(captioner.parameters()).device
    dtype = np.uint16 if captioner.quantize.embedding.num_embeddings <= 2**16 else np.int32
    indices, codes = [], []
    for index, images, *_ in loader:
        with run.autocast(precision, device):
            codes.append(captioner.encode(images.to(device)).cpu().numpy().astype(dtype))
        indices.append(np.asarray(index))
    return np.concatenate(codes)[np.argsort(np.concatenate(indices), kind="stable")]


@torch.no_grad()
def image_features(captioner: CodebookCaptioner, images: Tensor) -> Tensor:
    """Continuous image tokens, averaged: (B, D). Ablation: clustering without the codebook."""
    return captioner.visual_encoder(images).float().mean(dim=1)


def scored_tokens(scorer: BLIP, tokenizer: WordPiece, captions: list[str]) -> tuple[Tensor, Tensor]:
    """ids (B, T), mask (B, T) of captions to match or embed: as in training, but cut at `SCORED_LENGTH` tokens."""
    length = min(SCORED_LENGTH, scorer.text_encoder.max_positions)
    return tokenizer([pre_caption(caption) for caption in captions], length)


class DualScorer(nn.Module):
    """A dual encoder in the place of BLIP's ITM head: a pair's score is its cosine, moved into 0..1."""

    def __init__(self, model: nn.Module, tokenizer: Callable):
        super().__init__()
        self.model, self.tokenizer = model, tokenizer

    def encode_image(self, images: Tensor) -> Tensor:
        """Unit features (B, E)."""
        return F.normalize(self.model.encode_image(images).float(), dim=-1)

    def encode_captions(self, captions: list[str], device: torch.device) -> Tensor:
        """Unit features (B, E)."""
        return F.normalize(self.model.encode_text(self.tokenizer(captions).to(device)).float(), dim=-1)


@torch.no_grad()
def itm_scores(
    scorer: BLIP | DualScorer, tokenizer: WordPiece, images: Tensor, captions: list[str], cls: bool = False
) -> Tensor:
    """Probability of a match (B,), captions as `scored_tokens` prepares them; [ENC], or [CLS], at position 0."""
    if isinstance(scorer, DualScorer):
        return (1 + (scorer.encode_image(images) * scorer.encode_captions(captions, images.device)).sum(dim=1)) / 2
    ids, mask = scored_tokens(scorer, tokenizer, captions)
    ids[:, 0] = tokenizer.cls if cls else tokenizer.enc
    return scorer.itm(images, ids.to(images.device), mask.to(images.device)).softmax(dim=1)[:, 1]


# ---------------------------------------------------------------------------------------------------------- kept by row


def cached_rows(
    folder: Path, rows: np.ndarray, size: int, process: run.Process, label: str, compute: Callable[[np.ndarray], dict]
) -> None:
    """Work out `compute(rows)`, a dict of arrays by row, for those of `rows` (ascending) that `folder` lacks.

    One file for each `size` rows of the data, replaced atomically; ranks share out the files, whatever their number was
    when the folder was begun.
    """
    folder.mkdir(parents=True, exist_ok=True)
    chunks = np.unique(rows // size)[process.rank :: process.world_size]
    for number in run.progress(chunks, len(chunks), label, size, process):
        path, wanted = folder / f"{number:06}.npz", rows_in(rows, number, size)
        kept = load_file(path)
        missing = wanted if kept is None else np.setdiff1d(wanted, kept["rows"])
        if not len(missing):
            continue
        fresh = {"rows": missing, **compute(missing)}
        if kept is not None:
            fresh = {name: np.concatenate([kept[name], fresh[name]]) for name in fresh}
        order = np.argsort(fresh["rows"])
        with checkpoints.replaced(path, f".{os.getpid()}.tmp") as file:  # reductions may share the folder
            np.savez(file, **{name: values[order] for name, values in fresh.items()})
    run.gather_lists([], process)  # until all ranks have written their chunks


def rows_in(rows: np.ndarray, number: int, size: int) -> np.ndarray:
    """Those of `rows` (ascending) that are in the file of that number."""
    return rows[slice(*np.searchsorted(rows, (number * size, (number + 1) * size)))]


def load_file(path: Path) -> dict[str, np.ndarray] | None:
    """All arrays of a file, or None if it does not exist or cannot be read: it is then made again."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return None


def read_rows(folder: Path, rows: np.ndarray, size: int, name: str) -> np.ndarray:
    """Array `name` of those rows (ascending)."""
    parts = []
    for number in np.unique(rows // size):
        with np.load(folder / f"{number:06}.npz", allow_pickle=False) as file:
            places = np.searchsorted(file["rows"], rows_in(rows, number, size))
            parts.append(file[name][places])
    return np.concatenate(parts)


def gathered_codes(folder: Path, rows: np.ndarray, size: int) -> np.ndarray:
    """Code vectors (N, L') of those rows as one memory-mapped array."""
    path = folder / "codes.npy"
    first = read_rows(folder, rows[:1], size, "codes")
    shape = (len(rows), first.shape[1])
    temporary = folder / f"codes.{os.getpid()}.tmp.npy"
    merged = np.lib.format.open_memmap(temporary, "w+", first.dtype, shape)
    done = 0
    for number in np.unique(rows // size):
        part = read_rows(folder, rows_in(rows, number, size), size, "codes")
        merged[done : done + len(part)] = part
        done += len(part)
    merged.flush()
    os.replace(temporary, path)
    return np.load(path, mmap_mode="r")


# --------------------------------------------------------------------------------------------------- all of a reduction


def dual(path: str) -> bool:
    """Whether a scorer is a dual encoder: a run of stage clip or another paper's, an export, MODEL@TAG of open_clip."""
    if export.trained_by(path) == "tldr_reduction":
        return checkpoints.load_checkpoint(Path(path) / "checkpoint.pt")["config"].get("stage") == "clip"
    return export.trained_by(path) is not None or export.local_folder(path) is not None or named(path)


def weights_of(path: str) -> bytes:
    """What tells one model from another of the same name: its weights, or its name where open_clip has them."""
    folder = export.local_folder(path)
    file = folder / "open_clip_model.safetensors" if folder else Path(path) / "checkpoint.pt"
    return np.memmap(file, mode="r") if file.is_file() else path.encode()


class Inference:
    """The forward passes of a reduction over its data, kept in the work folder; each method is called by all ranks."""

    def __init__(self, cfg: ReduceConfig, pairs, process: run.Process):
        self.cfg, self.pairs, self.process = cfg, pairs, process
        self.rows = np.arange(len(pairs))
        self.work = Path(cfg.work or Path(cfg.out) / "work")
        self.precision = run.resolve_precision(cfg.precision, process.device)
        self.loaded: dict[str, tuple] = {}

    def folder(self, what: str, model: str) -> Path:
        """Where results of one model on this data are kept: other models and other data have other folders."""
        folder = export.local_folder(model)
        path = folder / "open_clip_model.safetensors" if folder else Path(model) / "checkpoint.pt"
        stamp = path.stat() if path.exists() else None
        marks = (self.pairs.fingerprint, os.path.abspath(model), stamp and stamp.st_mtime_ns, self.precision)
        return self.work / f"{what}-{data.stable_hash(*map(str, marks)):016x}"

    def model(self, path: str, stage: str) -> tuple[nn.Module, WordPiece, Callable]:
        """Model and tokenizer of a run folder, and the transform of its images. A scorer may be any dual encoder."""
        if path not in self.loaded and stage == "blip" and dual(path):
            encoder, transform, tokenizer = export.load_model(path, self.process.device)
            self.loaded[path] = DualScorer(encoder, tokenizer), tokenizer, transform
        if path not in self.loaded:
            model, settings, tokenizer = load_run(path)
            if settings.stage != stage:
                raise ValueError(f"{path} is a run of stage {settings.stage}, where one of stage {stage} is needed")
            self.loaded[path] = model.to(self.process.device), tokenizer, eval_transform(settings.image_size)
        return self.loaded[path]

    def loader(self, rows: np.ndarray, transform: Callable) -> Iterator[tuple]:
        """Batches (rows (b,), images on the device, captions, hashes, reasons)."""
        (pixels, normalise), device = data.in_two(transform), self.process.device
        pin = device.type == "cuda"
        loader = ordered_loader(self.pairs, rows, pixels, self.cfg.batch_size, self.cfg.workers, pin)
        for index, images, *rest in loader:
            yield index, normalise(images.to(device, non_blocking=True)), *rest

    def keep(self, folder: Path, rows: np.ndarray, label: str, compute: Callable[[np.ndarray], dict]) -> Path:
        """`cached_rows` with the reduction's settings; returns the folder."""
        cached_rows(folder, rows, self.cfg.chunk, self.process, label, compute)
        return folder

    def codes(self, path: str) -> Path:
        """Folder of code vectors, pixel hashes and reasons of the broken ("" else), of all rows."""
        captioner, _, transform = self.model(path, "captioner")

        def compute(rows: np.ndarray) -> dict:
            pixels, reasons = [], []

            def watched():
                for index, images, _, hashes, why in self.loader(rows, transform):
                    pixels.extend(hashes)
                    reasons.extend(why)
                    yield index, images

            codes = extract_codes(captioner, watched(), self.precision)
            return {"codes": codes, "pixels": np.array(pixels, np.uint64), "reasons": np.array(reasons, "U80")}

        return self.keep(self.folder("codes", path), self.rows, "codes", compute)

    def readable(self) -> Path:
        """Folder of pixel hashes and reasons of the broken, of all rows, where no captioner is wanted."""

        def compute(rows: np.ndarray) -> dict:
            batches = [(hashes, why) for _, _, _, hashes, why in self.loader(rows, no_pixels)]
            pixels, reasons = ([value for part in each for value in part] for each in zip(*batches, strict=True))
            return {"pixels": np.array(pixels, np.uint64), "reasons": np.array(reasons, "U80")}

        return self.keep(self.work / f"images-{self.pairs.fingerprint}", self.rows, "images", compute)

    def features(self, captioner: str | None) -> Path:
        """Folder of continuous features of all images, for ablations: the captioner's, or the scorer's embedding."""
        blip = self.cfg.features == "blip"
        path = self.cfg.scorer if blip else captioner
        model, _, transform = self.model(path, "blip" if blip else "captioner")
        encode = model.encode_image if blip else lambda images: image_features(model, images)

        def compute(rows: np.ndarray) -> dict:
            batches = []
            for _, images, *_ in self.loader(rows, transform):
                with torch.no_grad(), run.autocast(self.precision, images.device):
                    batches.append(encode(images).float().cpu())
            return {"features": torch.cat(batches).numpy()}

        return self.keep(self.folder(f"features-{self.cfg.features}", path), self.rows, "features", compute)

    def text_features(self) -> np.ndarray:
        """The scorer's embeddings of all captions, (N, E); not kept."""
        scorer, tokenizer, _ = self.model(self.cfg.scorer, "blip")
        batches = []
        for first in range(0, len(self.rows), self.cfg.batch_size):
            captions = [self.pairs.caption(row) for row in self.rows[first : first + self.cfg.batch_size]]
            if isinstance(scorer, DualScorer):
                with torch.no_grad():
                    batches.append(scorer.encode_captions(captions, self.process.device).cpu())
                continue
            ids, mask = scored_tokens(scorer, tokenizer, captions)
            with torch.no_grad():
                batches.append(scorer.encode_text(ids.to(self.process.device), mask.to(self.process.device)).cpu())
        return torch.cat(batches).numpy()

    def scores(self, rows: np.ndarray, captions: dict[int, str] | None, what: str) -> np.ndarray:
        """ITM scores of rows with their own or other captions."""
        cfg = self.cfg
        scorer, tokenizer, transform = self.model(cfg.scorer, "blip")

        def compute(rows: np.ndarray) -> dict:
            batches = []
            for index, images, own, *_ in self.loader(rows, transform):
                texts = own if captions is None else [captions[int(row)] for row in index]
                with run.autocast(self.precision, images.device):
                    batches.append(itm_scores(scorer, tokenizer, images, texts, cfg.cls_scores).float().cpu())
            return {"scores": torch.cat(batches).numpy()}

        name = f"{what}-{SCORED_LENGTH}" + "-cls" * cfg.cls_scores
        folder = self.keep(self.folder(name, cfg.scorer), rows, what, compute)
        return read_rows(folder, rows, cfg.chunk, "scores")

    def generated(self, rows: np.ndarray) -> np.ndarray:
        """T_g of those rows."""
        cfg = self.cfg
        captioner, tokenizer, transform = self.model(cfg.caption_model, "finetune")
        prompt = tokenizer.prompt_ids().to(self.process.device)

        def compute(rows: np.ndarray) -> dict:
            texts = []
            for _, images, *_ in self.loader(rows, transform):
                with run.autocast(self.precision, images.device):
                    ids = captioner.generate(images, prompt, cfg.num_beams, cfg.max_length, cfg.min_length)
                texts += tokenizer.decode(ids.cpu())
            return {"captions": np.array(texts, dtype=np.str_)}

        what = f"captions-{cfg.num_beams}-{cfg.max_length}-{cfg.min_length}"
        folder = self.keep(self.folder(what, cfg.caption_model), rows, "captions", compute)
        return read_rows(folder, rows, cfg.chunk, "captions")
