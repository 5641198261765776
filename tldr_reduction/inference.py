"""Outputs of the models for every sample of a reduction: codes, features, matching scores, generated captions.

Each pass over the data fills one memory-mapped table in the work folder, with an entry for every sample. Ranks divide
the samples among themselves; an interrupted reduction computes only what is missing, and reductions of the same data
may share the folder. Authors' code: showlab/datacentric.vlp@a488102, cited as `U:`.
"""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared import checkpoints, data, run
from shared.errors import UserError
from shared.run import stable_hash
from tldr_reduction.checkpoints import load_model, weights_of
from tldr_reduction.config import ReduceConfig
from tldr_reduction.datasets import Batch, eval_transform, in_order, no_pixels
from tldr_reduction.encoders import LITE0, Codebook, Encoder, Scorer, fit_codebook, load_encoder, load_scorer
from tldr_reduction.model import MAX_LENGTH, CodebookCaptioner
from tldr_reduction.quality import thumbnails
from tldr_reduction.tokenizer import WordPiece

FITTED = 4096  # images to fit an encoder's codebook on

# -------------------------------------------------------------------------------------------------------------- tables


def open_table(path: Path, size: int, values: dict[str, np.ndarray]) -> np.memmap:
    """The table of a pass, opened for writing: `size` entries of the fields of `values`, arrays (b, ...), and `done`.

    It is made if it does not exist; all its bytes are reserved, since writing to a map on a full disk would kill the
    process. UserError if there is no room.
    """
    fields = [("done", "?"), *((name, array.dtype, array.shape[1:]) for name, array in values.items())]
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(f".{os.getpid()}.tmp")
        try:
            table = np.lib.format.open_memmap(fresh, "w+", dtype=np.dtype(fields), shape=(size,))
            with open(fresh, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, table.offset + table.nbytes)
            os.link(fresh, path)  # fails if another rank or reduction was faster
        except FileExistsError:
            pass
        except OSError as error:
            raise UserError(f"{path} could not be written: {error.strerror}") from error
        finally:
            fresh.unlink(missing_ok=True)
    table = np.lib.format.open_memmap(path, "r+")
    if table.dtype != np.dtype(fields) or len(table) != size:
        raise UserError(f"{path} holds other outputs than those of this pass: remove it")
    return table


class Rows:
    """Some rows of a memory-mapped array (N, ...), read when they are indexed."""

    def __init__(self, array: np.ndarray, rows: np.ndarray):
        self.array, self.rows = array, rows
        self.shape = len(rows), *array.shape[1:]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key) -> np.ndarray:
        return self.array[self.rows[key]]


# ------------------------------------------------------------------------------------------------ all of a reduction


class Inference:
    """A reduction's passes over its data; all ranks call each method, except `checks` and `text_features`."""

    def __init__(self, cfg: ReduceConfig, pairs, process: run.Process, load_scorer: Callable = load_scorer):
        self.cfg, self.pairs, self.process, self.load_scorer = cfg, pairs, process, load_scorer
        self.rows = np.arange(len(pairs))
        self.work = Path(cfg.work or Path(cfg.out) / "work")
        self.fingerprint = pairs.fingerprint  # part of the names of the tables
        if root := getattr(pairs, "root", None):  # in another root, an annotation file names other images
            self.fingerprint = data.fingerprint(f"{pairs.fingerprint} {os.path.abspath(root)}".encode())
        self.precision = run.resolve_precision(cfg.precision, process.device)
        self.loaded: dict[str, tuple] = {}

    # ---------------------------------------------------------------------------------------------------------- models

    def model(self, path: str, stage: str) -> tuple[nn.Module, WordPiece, Callable]:
        """Model and tokenizer of a run folder or of transformers' BLIP, and the transform of its images."""
        if path not in self.loaded:
            model, settings, tokenizer = load_model(path, stage)
            self.loaded[path] = model.to(self.process.device), tokenizer, eval_transform(settings.image_size)
        return self.loaded[path]

    def scorer(self) -> Scorer:
        """The model that scores image-text matching."""
        if "scorer" not in self.loaded:
            self.loaded["scorer"] = self.load_scorer(self.cfg.scorer, self.process.device)
        return self.loaded["scorer"]

    def encoder(self, name: str) -> Encoder:
        """The pretrained image encoder of that name."""
        if name not in self.loaded:
            self.loaded[name] = load_encoder(name, self.process.device)
        return self.loaded[name]

    def table(self, what: str, model: str, *settings) -> Path:
        """File for the outputs `what` of a model; other data, weights, precision and settings have other files."""
        file = weights_of(model)
        stamp = file and file.stat().st_mtime_ns
        marks = (self.fingerprint, os.path.abspath(model) if file else model, stamp, self.precision, *settings)
        return self.work / f"{what}-{stable_hash(*map(str, marks)):016x}.npy"

    # ---------------------------------------------------------------------------------------------------------- a pass

    @torch.no_grad()
    def filled(
        self, path: Path, rows: np.ndarray, label: str, transform: Callable, compute: Callable[[Batch], dict]
    ) -> np.memmap:
        """The table `path`, in which the `rows` (ascending) are filled with `compute(batch)`, arrays by name."""
        left = rows
        if path.exists():
            left = rows[~np.load(path, mmap_mode="r")["done"][rows]]
        left = run.broadcast(left, self.process)  # a faster rank may have written already
        own = np.array_split(left, self.process.world_size)[self.process.rank]
        cfg = self.cfg
        with run.counting(len(left), label, "sample", self.process) as tick:
            for batch in in_order(self.pairs, own, transform, cfg.batch_size, cfg.workers, self.process.device):
                with run.autocast(self.precision, self.process.device):
                    values = compute(batch)
                self.put(path, batch.rows, values)
                tick(len(batch.rows) * self.process.world_size)
        run.wait()  # until all ranks have written their rows
        return np.load(path, mmap_mode="r")

    def put(self, path: Path, rows: np.ndarray, values: dict[str, np.ndarray]) -> None:
        """Write `values` (b, ...) of some rows to the table `path`, and note that they are done."""
        table = open_table(path, len(self.pairs), values)
        for name, value in values.items():
            table[name][rows] = value
        table["done"][rows] = True

    def codes(self) -> np.memmap:
        """Table of all samples: `codes` (L',), hashes of the pixels, and whether an image is readable.

        Codes are those of --captioner, or of the codebook of --encoder. They are computed on the evaluation transform
        and stored by sample (U:codebook_extractor.py:24-63 has random training views, and files that its ranks share).
        """
        cfg = self.cfg
        if cfg.captioner:
            captioner, _, transform = self.model(cfg.captioner, "captioner")
            path, encode = self.table("codes", cfg.captioner), lambda images: codes_of(captioner, images)
        else:
            transform, path = self.encoder(cfg.encoder).transform, self.table("codes", cfg.encoder, cfg.seed)
            codebook, encoder = self.codebook(path), self.encoder(cfg.encoder)
            encode = lambda images: codebook(encoder.tokens(images))  # noqa: E731

        def compute(batch: Batch) -> dict:
            codes = data.encode_distinct(encode, batch.images, batch.pixels.tolist())
            return {"codes": codes, "pixels": batch.pixels, "readable": batch.readable}

        return self.filled(path, self.rows, "codes", transform, compute)

    def codebook(self, codes: Path) -> Codebook:
        """The codebook of --encoder, which rank 0 fits to at most FITTED samples of the data and saves; the codes of
        these samples go to the table `codes`."""
        cfg, encoder = self.cfg, self.encoder(self.cfg.encoder)
        path = self.table("codebook", cfg.encoder, cfg.seed).with_suffix(".npz")
        if self.process.main and not path.exists():
            sample = np.sort(np.random.default_rng(cfg.seed).permutation(len(self.rows))[:FITTED])
            rows, pixels, readable, tokens = [], [], [], []
            for batch in in_order(
                self.pairs, sample, encoder.transform, cfg.batch_size, cfg.workers, self.process.device
            ):
                with run.autocast(self.precision, self.process.device):
                    tokens.append(encoder.tokens(batch.images).cpu())
                rows.append(batch.rows)
                pixels.append(batch.pixels)
                readable.append(batch.readable)
            tokens = torch.cat(tokens)
            codebook = fit_codebook(tokens, cfg.seed)
            path.parent.mkdir(parents=True, exist_ok=True)
            with checkpoints.replaced(path, f".{os.getpid()}.tmp") as file:
                np.savez(file, **codebook.arrays())
            values = {"pixels": np.concatenate(pixels), "readable": np.concatenate(readable)}
            self.put(codes, np.concatenate(rows), {"codes": codebook(tokens), **values})
        run.wait()  # until it is written
        with np.load(path, allow_pickle=False) as kept:
            return Codebook(*(torch.from_numpy(kept[name]) for name in Codebook._fields))

    def readable(self) -> np.memmap:
        """Table of all samples as of `codes`, without codes."""

        def compute(batch: Batch) -> dict:
            return {"pixels": batch.pixels, "readable": batch.readable}

        path = self.work / f"images-{self.fingerprint}.npy"
        return self.filled(path, self.rows, "images", no_pixels, compute)

    def features(self) -> np.ndarray:
        """Continuous features (N, D) of all images, for ablations: those of the captioner (the mean of its tokens) or
        encoder, or the scorer's embeddings."""
        cfg = self.cfg
        if cfg.features == "blip":
            transform, encode = self.scorer().transform, self.scorer().encode_image
            path = self.table("features-blip", cfg.scorer)
        elif cfg.captioner:
            captioner, _, transform = self.model(cfg.captioner, "captioner")
            path = self.table("features-image", cfg.captioner)
            encode = lambda images: captioner.visual_encoder(images).float().mean(dim=1)  # noqa: E731
        else:
            transform, _, encode = self.encoder(cfg.encoder)
            path = self.table("features-image", cfg.encoder)

        def compute(batch: Batch) -> dict:
            encoded = data.encode_distinct(
                lambda images: encode(images).float().cpu(), batch.images, batch.pixels.tolist()
            )
            return {"features": encoded.numpy()}

        return self.filled(path, self.rows, "features", transform, compute)["features"]

    def scores(self, rows: np.ndarray, captions: dict[int, str] | None) -> np.ndarray:
        """ITM scores (n,) of the images `rows` (n,) with `captions`, by row, or with their own captions (None)."""
        scorer = self.scorer()

        def compute(batch: Batch) -> dict:
            texts = batch.captions if captions is None else [captions[int(row)] for row in batch.rows]
            return {"scores": scorer.score(batch.images, texts).float().cpu().numpy()}

        which = () if captions is None else (stable_hash(*captions.items()),)
        path = self.table("itm" if captions is None else "itm-after", self.cfg.scorer, *which)
        return self.filled(path, rows, "itm", scorer.transform, compute)["scores"][rows]

    def generated(self, rows: np.ndarray) -> list[str]:
        """Generated captions T_g of `rows`."""
        captioner, tokenizer, transform = self.model(self.cfg.caption_model, "finetune")
        prompt = tokenizer.prompt_ids().to(self.process.device)

        def compute(batch: Batch) -> dict:
            ids = captioner.generate(batch.images, prompt)
            return {"ids": F.pad(ids, (0, MAX_LENGTH - ids.shape[1])).int().cpu().numpy()}

        path = self.table("captions", self.cfg.caption_model)
        ids = self.filled(path, rows, "captions", transform, compute)["ids"][rows]
        return tokenizer.decode(torch.from_numpy(ids))

    # ------------------------------------------------------------------------------------------------- on rank 0 alone

    @torch.no_grad()
    def text_features(self) -> np.ndarray:
        """The scorer's embeddings of all captions, (N, E); not saved."""
        size = self.cfg.batch_size
        batches = [self.rows[first : first + size] for first in range(0, len(self.rows), size)]
        texts = ([self.pairs.caption(row) for row in batch] for batch in batches)
        return torch.cat([self.scorer().encode_text(captions).cpu() for captions in texts]).numpy()

    @torch.no_grad()
    def checks(self, rows: np.ndarray) -> dict[str, Tensor]:
        """Features (n, D), by name, of readable samples `rows` (n,): thumbnails and, unless it made the clusters,
        EfficientNet-Lite0's; not saved."""
        encoder = None if self.cfg.coded_by == LITE0 else self.encoder(LITE0)
        transform = encoder.transform if encoder else eval_transform(32)
        found: dict[str, list[Tensor]] = {"images at 8 x 8 pixels": []} | ({LITE0: []} if encoder else {})
        for batch in in_order(self.pairs, rows, transform, self.cfg.batch_size, self.cfg.workers, self.process.device):
            found["images at 8 x 8 pixels"].append(thumbnails(batch.images))
            if encoder:
                with run.autocast(self.precision, self.process.device):
                    found[LITE0].append(encoder.features(batch.images).float().cpu())
        return {name: torch.cat(parts) for name, parts in found.items()}


def codes_of(captioner: CodebookCaptioner, images: Tensor) -> np.ndarray:
    """Code vectors (B, L') of images, uint16, or int32 with more than 65536 codes. U:codebook_extractor.py:36-42."""
    small = captioner.quantize.embedding.num_embeddings <= 2**16
    return captioner.encode(images).cpu().numpy().astype(np.uint16 if small else np.int32)
