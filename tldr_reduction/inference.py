"""Outputs of the models for every sample, saved to files: codes, features, matching scores, generated captions.

`rows` are indices of samples in the data; ranks divide them among themselves. An interrupted reduction resumes from the
saved files, and reductions may share them. Authors' code: showlab/datacentric.vlp@a488102, cited as `U:`.
"""

import itertools
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from shared import checkpoints, data, run
from shared.errors import UserError
from shared.index import locked
from tldr_reduction.checkpoints import load_model, weights_of
from tldr_reduction.config import ReduceConfig
from tldr_reduction.datasets import eval_transform, no_pixels, ordered_loader
from tldr_reduction.encoders import LITE0, Codebook, Encoder, fit_codebook, load_encoder
from tldr_reduction.model import CodebookCaptioner
from tldr_reduction.quality import thumbnails
from tldr_reduction.scorers import Scorer, load_scorer
from tldr_reduction.tokenizer import SCORED_LENGTH, WordPiece

FITTED = 4096  # images to fit an encoder's codebook on

# ------------------------------------------------------------------------------------------------------- forward passes


@torch.no_grad()
def extract_codes(captioner: CodebookCaptioner, loader: Iterable, precision: str = "fp32") -> np.ndarray:
    """Code vectors (N, L') in the order of the sample index: uint16, or int32 with more than 65536 codes.

    U:codebook_extractor.py:24-63. `loader` yields (index (b,), images, ...), images in the evaluation transform, so an
    image always has the same codes (upstream takes random training views).
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
    """Means (B, D) of the continuous image tokens, for the ablation that clusters without the codebook."""
    return captioner.visual_encoder(images).float().mean(dim=1)


def short(reasons: list[str]) -> np.ndarray:
    """Reasons cut to 80 characters, as an array that is no wider than the longest."""
    return np.array([reason[:80] for reason in reasons], dtype=np.str_)


# ------------------------------------------------------------------------------------------- outputs saved by sample


def cached_rows(
    folder: Path, rows: np.ndarray, size: int, process: run.Process, compute: Callable[[np.ndarray], dict]
) -> None:
    """Run `compute(rows)`, which returns arrays with an entry per sample, for those of `rows` (ascending) that `folder`
    lacks.

    There is one file for each `size` samples of the data, replaced atomically. Ranks divide the files among themselves;
    an earlier run may have had another number of ranks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for number in np.unique(rows // size)[process.rank :: process.world_size]:
        path, wanted = folder / f"{number:06}.npz", rows_in(rows, number, size)
        kept = load_file(path)
        missing = wanted if kept is None else np.setdiff1d(wanted, kept["rows"])
        if not len(missing):
            continue
        fresh = {"rows": missing, **compute(missing)}
        with locked(path.with_suffix(".lock")):  # reductions may share the folder
            merged = merge(load_file(path), fresh)
            with checkpoints.replaced(path, f".{os.getpid()}.tmp") as file:
                np.savez(file, **merged)
    run.wait()  # until all ranks have written their files


def merge(kept: dict[str, np.ndarray] | None, fresh: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays of both, ascending by row; of a row that both have, those of `kept`."""
    if kept is not None:
        new = ~np.isin(fresh["rows"], kept["rows"])
        fresh = {name: np.concatenate([kept[name], values[new]]) for name, values in fresh.items()}
    order = np.argsort(fresh["rows"])
    return {name: values[order] for name, values in fresh.items()}


def rows_in(rows: np.ndarray, number: int, size: int) -> np.ndarray:
    """Those `rows` (ascending) that belong to file `number`."""
    return rows[slice(*np.searchsorted(rows, (number * size, (number + 1) * size)))]


def load_file(path: Path) -> dict[str, np.ndarray] | None:
    """All arrays of a file, or None if it does not exist or cannot be read, so that it is computed again."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return None


def read_rows(folder: Path, rows: np.ndarray, size: int, name: str) -> np.ndarray:
    """Array `name` of the samples `rows` (ascending)."""
    found = []
    for number in np.unique(rows // size):
        with np.load(folder / f"{number:06}.npz", allow_pickle=False) as file:
            kept, wanted = file["rows"], rows_in(rows, number, size)
            places = np.searchsorted(kept, wanted).clip(max=len(kept) - 1)
            if not np.array_equal(kept[places], wanted):  # another reduction replaced the file meanwhile
                raise UserError(f"{folder}/{number:06}.npz lacks samples that were written: run the reduction again")
            found.append(file[name][places])
    return np.concatenate(found)


def read_reasons(folder: Path, rows: np.ndarray, size: int) -> np.ndarray:
    """(N,) why the images of the samples `rows` (ascending) are unreadable, "" if they are readable.

    In the object array equal strings are one object; a string array would store each at the width of the longest.
    """
    found, known = [np.empty(0, dtype=object)], {}
    for number in np.unique(rows // size):
        reasons = read_rows(folder, rows_in(rows, number, size), size, "reasons").astype(object)
        found.append(np.array([known.setdefault(reason, reason) for reason in reasons], dtype=object))
    return np.concatenate(found)


def gathered_codes(folder: Path, rows: np.ndarray, size: int) -> np.ndarray:
    """Code vectors (N, L') of the samples `rows` as one memory-mapped array."""
    path, first = folder / "codes.npy", read_rows(folder, rows[:1], size, "codes")
    header = np.lib.format.header_data_from_array_1_0(first) | {"shape": (len(rows), first.shape[1])}
    # On a full disk, writing to a file is an error, but writing to a memory map kills the process
    with checkpoints.replaced(path, f".{os.getpid()}.tmp") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for number in np.unique(rows // size):
            file.write(read_rows(folder, rows_in(rows, number, size), size, "codes").tobytes())
    return np.load(path, mmap_mode="r")


# --------------------------------------------------------------------------------------------------- all of a reduction


class Inference:
    """A reduction's forward passes over its data, saved in the work folder; all ranks call each method."""

    def __init__(self, cfg: ReduceConfig, pairs, process: run.Process):
        self.cfg, self.pairs, self.process = cfg, pairs, process
        self.rows = np.arange(len(pairs))
        self.work = Path(cfg.work or Path(cfg.out) / "work")
        self.fingerprint = pairs.fingerprint  # part of the names of the folders in the work folder
        if root := getattr(pairs, "root", None):  # in another root, an annotation file names other images
            self.fingerprint = data.fingerprint(f"{pairs.fingerprint} {os.path.abspath(root)}".encode())
        self.precision = run.resolve_precision(cfg.precision, process.device)
        self.loaded: dict[str, tuple] = {}
        self.fitted: dict[str, np.ndarray] = {"rows": np.empty(0, np.int64)}  # codes that `encoder_codes` made
        self.tick: Callable[[int], None] = lambda _: None  # counts the samples of a pass

    def folder(self, what: str, model: str) -> Path:
        """Folder for the outputs `what` of a model on the reduction's data; each pair of model and data has its own."""
        file = weights_of(model)
        stamp = file and file.stat().st_mtime_ns
        marks = (self.fingerprint, os.path.abspath(model) if file else model, stamp, self.precision)
        return self.work / f"{what}-{data.stable_hash(*map(str, marks)):016x}"

    def model(self, path: str, stage: str) -> tuple[nn.Module, WordPiece, Callable]:
        """Model and tokenizer of a run folder or of transformers' BLIP, and the transform of its images."""
        if path not in self.loaded:
            model, settings, tokenizer = load_model(path, stage)
            self.loaded[path] = model.to(self.process.device), tokenizer, eval_transform(settings.image_size)
        return self.loaded[path]

    def scorer(self) -> Scorer:
        """The model that scores image-text matching."""
        if "scorer" not in self.loaded:
            self.loaded["scorer"] = load_scorer(self.cfg.scorer, self.process.device, self.cfg.cls_scores)
        return self.loaded["scorer"]

    def loader(self, rows: np.ndarray, transform: Callable) -> Iterator[tuple]:
        """Batches (rows (b,), images on the device, captions, hashes, reasons)."""
        (pixels, normalise), device = data.split_normalisation(transform), self.process.device
        pin = device.type == "cuda"
        for index, images, *rest in ordered_loader(
            self.pairs, rows, pixels, self.cfg.batch_size, self.cfg.workers, pin
        ):
            yield index, normalise(images.to(device, non_blocking=True)), *rest
            self.tick(len(index) * self.process.world_size)

    def keep(
        self,
        folder: Path,
        rows: np.ndarray,
        label: str,
        compute: Callable[[np.ndarray], dict],
        size: int | None = None,
    ) -> Path:
        """`cached_rows` with the reduction's settings and a progress report; return the folder."""
        size = size or self.cfg.chunk
        files = {number for number in np.unique(rows // size).tolist() if (folder / f"{number:06}.npz").exists()}
        left = len(rows) - sum(len(rows_in(rows, number, size)) for number in files)
        with run.counting(left, label, "sample", self.process) as self.tick:
            cached_rows(folder, rows, size, self.process, compute)
        self.tick = lambda _: None
        return folder

    def encoder(self, name: str) -> Encoder:
        """The pretrained image encoder of that name, loaded once."""
        if name not in self.loaded:
            self.loaded[name] = load_encoder(name, self.process.device)
        return self.loaded[name]

    def codes(self, path: str | None) -> Path:
        """Folder with code vectors, pixel hashes and reasons (why an image is broken, else "") of all samples.

        Codes are those of the captioner in `path`, or of the encoder's k-means codebook.
        """
        if path:
            captioner, _, transform = self.model(path, "captioner")
            encode, kept_in = None, self.folder("codes", path)
        else:
            transform, encode = self.encoder(self.cfg.encoder).transform, self.encoder_codes()
            kept_in = self.encoder_folder("codes")

        def compute(rows: np.ndarray) -> dict:
            old = np.isin(rows, self.fitted["rows"])
            if not old.any():
                return encoded(rows)
            known = {name: values[np.isin(self.fitted["rows"], rows)] for name, values in self.fitted.items()}
            self.tick(int(old.sum()) * self.process.world_size)
            if not old.all():
                known = merge(known, {"rows": rows[~old], **encoded(rows[~old])})
            return {name: known[name] for name in ("codes", "pixels", "reasons")}

        def encoded(rows: np.ndarray) -> dict:
            pixels, reasons = [], []

            def watched():
                for index, images, _, hashes, why in self.loader(rows, transform):
                    pixels.extend(hashes)
                    reasons.extend(why)
                    yield index, images, hashes

            if encode is None:
                codes = extract_codes(captioner, watched(), self.precision)
            else:
                codes = np.concatenate(
                    [data.encode_distinct(encode, images, hashes) for _, images, hashes in watched()]
                )
            return {"codes": codes, "pixels": np.array(pixels, np.uint64), "reasons": short(reasons)}

        return self.keep(kept_in, self.rows, "codes", compute)

    def encoder_folder(self, what: str) -> Path:
        """Folder for the outputs `what` of --encoder with its codebook's settings, as `folder`."""
        cfg = self.cfg
        marks = (self.fingerprint, cfg.encoder, cfg.num_codes, cfg.code_dim, cfg.seed, self.precision)
        if (file := weights_of(cfg.encoder)) is not None:  # a file that may change
            marks += (file.stat().st_mtime_ns,)
        return self.work / f"{what}-{data.stable_hash(*map(str, marks)):016x}"

    def encoder_codes(self) -> Callable[[Tensor], np.ndarray]:
        """Return a function images (B, 3, S, S) -> codes (B, 9), by a codebook that rank 0 fits to at most FITTED
        samples of the data and saves.

        Codes of these samples are kept in `fitted`, so that their images are not encoded again.
        """
        cfg, encoder, path = self.cfg, self.encoder(self.cfg.encoder), self.encoder_folder("codebook") / "codebook.npz"
        if self.process.main and load_file(path) is None:
            sample = np.sort(np.random.default_rng(cfg.seed).permutation(len(self.rows))[:FITTED])
            batches, pixels, reasons = [], [], []
            for _, images, _, hashes, why in self.loader(sample, encoder.transform):
                with run.autocast(self.precision, images.device):
                    batches.append(encoder.tokens(images).cpu())
                pixels += hashes
                reasons += why
            tokens = torch.cat(batches)
            codebook = fit_codebook(tokens, cfg.num_codes, cfg.code_dim, cfg.seed)
            self.fitted = {"rows": sample, "codes": codebook(tokens)}
            self.fitted |= {"pixels": np.array(pixels, np.uint64), "reasons": short(reasons)}
            path.parent.mkdir(parents=True, exist_ok=True)
            with checkpoints.replaced(path) as file:
                np.savez(file, **codebook.arrays())
        run.wait()  # until it is written
        kept = load_file(path)
        codebook = Codebook(*(torch.from_numpy(kept[name]) for name in Codebook._fields))

        def encode(images: Tensor) -> np.ndarray:
            with run.autocast(self.precision, images.device):
                return codebook(encoder.tokens(images))

        return encode

    def checks(self, rows: np.ndarray) -> tuple[dict[str, Tensor], list[str], str]:
        """For readable samples `rows` (n,): features (n, D) by name, captions, and why an encoder's are missing, or "".

        Features are thumbnails, and those of the encoder that --check names.
        """
        cfg, missing = self.cfg, ""
        name, encoder = LITE0 if cfg.check == "auto" else cfg.check, None
        if not (cfg.check == "auto" and cfg.coded_by == LITE0):
            try:
                encoder = self.encoder(name)
            except UserError as error:
                if cfg.check != "auto":
                    raise
                missing = str(error)
        transform = encoder.transform if encoder else eval_transform(32)

        def compute(rows: np.ndarray) -> dict:
            small, features = [], []
            for _, images, *_ in self.loader(rows, transform):
                small.append(thumbnails(images))
                with torch.no_grad(), run.autocast(self.precision, images.device):
                    features.append(encoder.features(images).float().cpu() if encoder else small[-1][:, :0])
            return {"small": torch.cat(small).numpy(), "features": torch.cat(features).numpy()}

        marks = self.fingerprint, str(encoder and name), self.precision, data.fingerprint(rows.tobytes())
        folder = self.work / f"check-{data.stable_hash(*marks):016x}"
        size = max(cfg.chunk, len(self.pairs) // 16)  # few files, since there are few samples
        self.keep(folder, rows, "check", compute, size)
        found = {"images at 8 x 8 pixels": torch.from_numpy(read_rows(folder, rows, size, "small"))}
        if encoder:
            found[name] = torch.from_numpy(read_rows(folder, rows, size, "features"))
        return found, [self.pairs.caption(row) for row in rows], missing

    def readable(self) -> Path:
        """Folder with pixel hashes and reasons (as in `codes`) of all samples, for reductions that need no codes."""

        def compute(rows: np.ndarray) -> dict:
            batches = [(hashes, why) for _, _, _, hashes, why in self.loader(rows, no_pixels)]
            pixels, reasons = (list(itertools.chain.from_iterable(each)) for each in zip(*batches, strict=True))
            return {"pixels": np.array(pixels, np.uint64), "reasons": short(reasons)}

        return self.keep(self.work / f"images-{self.fingerprint}", self.rows, "images", compute)

    def features(self, captioner: str | None) -> Path:
        """Folder with continuous features of all images, for ablations: those of the captioner or encoder, or the
        scorer's embeddings."""
        if self.cfg.features == "blip":
            transform, encode = self.scorer().transform, self.scorer().encode_image
            kept_in = self.folder("features-blip", self.cfg.scorer)
        elif captioner:
            model, _, transform = self.model(captioner, "captioner")
            encode, kept_in = lambda images: image_features(model, images), self.folder("features-image", captioner)
        else:
            transform, _, encode = self.encoder(self.cfg.encoder)
            kept_in = self.encoder_folder("features")

        def compute(rows: np.ndarray) -> dict:
            batches = []
            for _, images, _, hashes, _ in self.loader(rows, transform):
                with torch.no_grad(), run.autocast(self.precision, images.device):
                    batches.append(data.encode_distinct(lambda x: encode(x).float().cpu(), images, hashes))
            return {"features": torch.cat(batches).numpy()}

        return self.keep(kept_in, self.rows, "features", compute)

    def text_features(self) -> np.ndarray:
        """The scorer's embeddings of all captions, (N, E); not saved."""
        batches = []
        for first in range(0, len(self.rows), self.cfg.batch_size):
            captions = [self.pairs.caption(row) for row in self.rows[first : first + self.cfg.batch_size]]
            with torch.no_grad():
                batches.append(self.scorer().encode_text(captions).cpu())
        return torch.cat(batches).numpy()

    def scores(self, rows: np.ndarray, captions: dict[int, str] | None, what: str) -> np.ndarray:
        """ITM scores (n,) of the images `rows` (n,) with `captions`, by row, or with their own captions (None)."""
        cfg, scorer = self.cfg, self.scorer()

        def compute(rows: np.ndarray) -> dict:
            batches = []
            for index, images, own, *_ in self.loader(rows, scorer.transform):
                texts = own if captions is None else [captions[int(row)] for row in index]
                with run.autocast(self.precision, images.device):
                    batches.append(scorer.score(images, texts).float().cpu())
            return {"scores": torch.cat(batches).numpy()}

        name = f"{what}-{SCORED_LENGTH}" + "-cls" * cfg.cls_scores
        folder = self.keep(self.folder(name, cfg.scorer), rows, what.partition("-after")[0], compute)
        return read_rows(folder, rows, cfg.chunk, "scores")

    def scores_after(self, rows: np.ndarray, captions: dict[int, str]) -> np.ndarray:
        """ITM scores of the kept samples `rows` with their new captions."""
        return self.scores(rows, captions, f"itm-after-{data.stable_hash(*captions.items()):016x}")

    def generated(self, rows: np.ndarray) -> np.ndarray:
        """Generated captions T_g of `rows`."""
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
