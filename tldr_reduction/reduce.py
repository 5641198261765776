"""Reduce image-text shards: `python -m tldr_reduction.reduce SHARDS --keep 0.25 --out DIR`.

TL;DR (arXiv 2305.20087); authors' code showlab/datacentric.vlp@a488102. The paper's contribution, stage 2: code vectors
of all images (`extract_codes`), clusters of them and a fixed share of each (cluster.py), refined captions (output.py).

DIR will hold
  shards/            the kept samples, with their new captions; train.py, or any trainer, reads them
  annotation.json    [{"image", "caption"}] of the kept samples, cluster by cluster as the authors' code orders them
  report.csv         one line a sample: kept or not and why, cluster, place in it, distance, duplicates, ITM, captions
  report.json        counts, duplicates, cluster sizes, codes used, ITM before and after, seconds
  work/              code vectors, scores and generated captions by row; a run that was killed goes on from them
Under torchrun, ranks share out the rows of the costly passes.
"""

import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.distributed as dist
import tyro
from torch import Tensor

from shared import data, run
from tldr_reduction.cluster import (  # noqa: F401
    cluster_codes,
    in_cluster,
    keep_top,
    kmeans,
    random_subset,
    select_by_distance,
    select_every_nth,
    select_fraction,
    whiten,
)
from tldr_reduction.config import EMOJI
from tldr_reduction.model import CodebookCaptioner
from tldr_reduction.output import (  # noqa: F401
    first_of_equal,
    refine_annotations,
    refined,
    row_hashes,
    write_csv,
    write_shards,
)
from tldr_reduction.text import WordPiece, build_vocab, pre_caption
from tldr_reduction.views import eval_transform, open_pairs, rows_loader

RECIPES = {  # what the paper or the release says of each data set; flags override
    "paper": dict(keep=0.25, clusters=3000),
    "release_comment": dict(keep=0.5, clusters=1000, itm_keep=0.5),  # "select_5_10_half_itm_1K_clusters"
    "release_script": dict(keep=0.2, clusters=1000, itm_keep=0.5),  # the values as the script has them
    "cc12m": dict(keep=0.22, clusters=3000),
    "yfcc15m": dict(keep=0.167, clusters=3000),
    "laion40m": dict(keep=0.2, clusters=3000),
    **{f"ratio-{percent}": dict(keep=percent / 100, clusters=3000) for percent in (10, 25, 50, 100)},
    **{f"clusters-{k}": dict(keep=0.25, clusters=k) for k in (100, 1000, 3000, 5000, 10000)},
}


@dataclasses.dataclass
class Config:
    data: Annotated[str, tyro.conf.Positional]
    """Shards 'cc3m/{00000..00331}.tar', a folder of them, or an annotation .json."""
    out: str
    """Folder for the result; run again, the tool goes on where it stopped."""
    recipe: str = "paper"
    """Values for keep, clusters and itm_keep where those are not given: paper (CC3M), release_comment, release_script,
    cc12m, yfcc15m, laion40m, ratio-{10,25,50,100}, clusters-{100,1000,3000,5000,10000}."""
    keep: float | None = None
    """Share of each cluster that is kept."""
    clusters: int | None = None
    """Clusters k; at most one for 30 samples, unless given here."""
    itm_keep: float | None = None
    """Of the selected samples only those stay that are in this top share of all by ITM score."""
    select: Literal["stride", "nearest", "farthest", "random", "first", "itm", "all"] = "stride"
    """stride: every n-th of a cluster (paper). nearest, farthest: by distance to centroids. Without clusters: random;
    first, of the file; itm, the highest scores; all."""
    features: Literal["codes", "image", "text"] = "codes"
    """What is clustered: codes; the captioner's continuous image tokens, averaged; the scorer's text embedding."""
    captions: Literal["original", "refined", "generated"] | None = None
    """T_o, "T_o; T_g", or T_g; None: refined where --caption-model is given, else original."""
    captioner: str | None = None
    """Run folder of stage captioner. None: a small one is trained on the shards first, in DIR/captioner."""
    caption_model: str | None = None
    """Run folder of stage finetune, which writes T_g."""
    scorer: str | None = None
    """Run folder of stage blip, which scores image-text matching."""
    cls_scores: bool = False
    """Score with [CLS] at position 0, as upstream does, instead of [ENC], with which BLIP trains."""
    match: str | None = None
    """For random, first, itm: keep as many samples as the reduction in this folder did."""
    image_root: str | None = None
    """Folder that the image paths of an annotation .json start from."""
    work: str | None = None
    """Folder for code vectors, scores and generated captions, which reductions of the same data may share; None:
    DIR/work."""
    cache: str = "data/cache"
    """Folder for copies of remote shards."""
    whiten_dim: int = 256
    """Axes of the whitened code vectors."""
    niter: int = 20
    """K-means iterations."""
    points_per_centroid: int = 256
    """K-means is trained on at most so many rows a cluster; 10000000 is all, as upstream."""
    num_beams: int = 3
    """Beams of caption generation."""
    max_length: int = 20
    """Tokens of a generated caption, prompt included."""
    min_length: int = 5
    """Least tokens of a generated caption, prompt included."""
    captioner_epochs: int = 12
    """Epochs of the captioner that is trained where --captioner is not given."""
    seed: int = 0
    """Seed of k-means and random selection."""
    batch_size: int = 256
    """Images per forward pass."""
    chunk: int = 4096
    """Rows that are worked on and saved together."""
    workers: int = 0
    """Loader processes."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "fp32"
    """Of the forward passes; codes are comparable only within one precision."""
    strict: bool = False
    """Stop at the first broken sample instead of leaving it out."""


# ----------------------------------------------------------------------------------------------- results, row by row


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
        path, wanted = folder / f"{number:06}.npz", rows[rows // size == number]
        kept = dict(np.load(path, allow_pickle=False)) if path.exists() else None
        missing = wanted if kept is None else np.setdiff1d(wanted, kept["rows"])
        if not len(missing):
            continue
        fresh = {"rows": missing, **compute(missing)}
        if kept is not None:
            fresh = {name: np.concatenate([kept[name], fresh[name]]) for name in fresh}
        order = np.argsort(fresh["rows"])
        temporary = path.with_name(path.name + ".tmp")
        with open(temporary, "wb") as file:
            np.savez(file, **{name: values[order] for name, values in fresh.items()})
        os.replace(temporary, path)
    if process.world_size > 1:
        dist.barrier()


def read_rows(folder: Path, rows: np.ndarray, size: int, name: str) -> np.ndarray:
    """Array `name` of those rows (ascending)."""
    parts = []
    for number in np.unique(rows // size):
        with np.load(folder / f"{number:06}.npz", allow_pickle=False) as file:
            places = np.searchsorted(file["rows"], rows[rows // size == number])
            parts.append(file[name][places])
    return np.concatenate(parts)


def gathered_codes(folder: Path, rows: np.ndarray, size: int) -> np.ndarray:
    """Code vectors (N, L') of those rows as one memory-mapped array."""
    path = folder / "codes.npy"
    first = read_rows(folder, rows[:1], size, "codes")
    shape = (len(rows), first.shape[1])
    temporary = folder / "codes.tmp.npy"
    merged = np.lib.format.open_memmap(temporary, "w+", first.dtype, shape)
    done = 0
    for number in np.unique(rows // size):
        part = read_rows(folder, rows[rows // size == number], size, "codes")
        merged[done : done + len(part)] = part
        done += len(part)
    merged.flush()
    os.replace(temporary, path)
    return np.load(path, mmap_mode="r")


# --------------------------------------------------------------------------------------------------- forward passes


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


@torch.no_grad()
def itm_scores(scorer, tokenizer: WordPiece, images: Tensor, captions: list[str], cls: bool = False) -> Tensor:
    """Probability of a match (B,), captions as in training; [ENC], or [CLS], at position 0."""
    ids, mask = tokenizer([pre_caption(caption) for caption in captions])
    ids[:, 0] = tokenizer.cls if cls else tokenizer.enc
    return scorer.itm(images, ids.to(images.device), mask.to(images.device)).softmax(dim=1)[:, 1]


def itm_histogram(scores: Tensor, bins: int = 10) -> Tensor:
    """(bins,) density on [0, 1]: its mean is 1."""
    return torch.histc(scores.float(), bins, 0.0, 1.0) * bins / max(len(scores), 1)


def itm_summary(scores: np.ndarray) -> dict:
    scores = torch.from_numpy(np.asarray(scores, dtype=np.float32))
    return {
        "mean": scores.mean().item(),
        "below_half": 100 * (scores < 0.5).float().mean().item(),
        "above_0.9": 100 * (scores > 0.9).float().mean().item(),
        "histogram": itm_histogram(scores).tolist(),
    }


# -------------------------------------------------------------------------------------------------------- the script


class Reduction:
    """One reduction, pass by pass; `main` is its command line."""

    def __init__(self, cfg: Config, process: run.Process):
        self.cfg, self.process = cfg, process
        self.pairs = open_pairs(cfg.data, cfg.image_root, None, cfg.strict, cfg.cache)
        self.rows = np.arange(len(self.pairs))
        self.out, self.work = Path(cfg.out), Path(cfg.work or Path(cfg.out) / "work")
        self.seconds: dict[str, float] = {}
        self.loaded: dict[str, tuple] = {}
        self.merged: np.ndarray | None = None
        self.codes_folder = self.folder("codes", cfg.captioner or str(self.out / "captioner"))

    def folder(self, what: str, model: str) -> Path:
        """Where results of one model on this data are kept: other models and other data have other folders."""
        path = Path(model) / "checkpoint.pt"
        stamp = path.stat() if path.exists() else None
        marks = (self.pairs.fingerprint, os.path.abspath(model), stamp and stamp.st_mtime_ns, self.cfg.precision)
        return self.work / f"{what}-{data.stable_hash(*map(str, marks)):016x}"

    def model(self, path: str, stage: str):
        """Model and tokenizer of a run folder, and the transform of its images."""
        from tldr_reduction.train import load_run

        if path not in self.loaded:
            model, settings, tokenizer = load_run(path)
            if settings.stage != stage:
                raise ValueError(f"{path} is a run of stage {settings.stage}, where one of stage {stage} is needed")
            self.loaded[path] = model.to(self.process.device), tokenizer, eval_transform(settings.image_size)
        return self.loaded[path]

    def loader(self, rows: np.ndarray, transform):
        return rows_loader(self.pairs, rows, transform, self.cfg.batch_size, self.cfg.workers)

    def train_captioner(self) -> str:
        """Stage 1 on the shards themselves, with a small captioner."""
        from tldr_reduction.train import train

        folder, vocab = self.out / "captioner", self.out / "vocab.txt"
        self.out.mkdir(parents=True, exist_ok=True)
        if self.process.main and not vocab.exists():
            vocab.write_text("\n".join(build_vocab(self.pairs.caption(row) for row in self.rows)) + "\n")
        if self.process.world_size > 1:
            dist.barrier()
        settings = dataclasses.replace(
            EMOJI, data=self.cfg.data, image_root=self.cfg.image_root, vocab=str(vocab), out=str(folder),
            epochs=self.cfg.captioner_epochs, seed=self.cfg.seed, device=self.cfg.device, workers=self.cfg.workers,
            cache=self.cfg.cache,
        )  # fmt: skip
        train(settings, self.process)
        self.codes_folder = self.folder("codes", str(folder))
        return str(folder)

    # ------------------------------------------------------------------------------------------------ costly passes

    def codes(self, path: str) -> None:
        """Code vectors (or continuous features), pixel hashes and reasons of the broken, of all rows."""
        captioner, _, transform = self.model(path, "captioner")

        def compute(rows: np.ndarray) -> dict:
            pixels, reasons, features = [], [], []

            def watched():
                for index, images, _, hashes, why in self.loader(rows, transform):
                    pixels.extend(hashes)
                    reasons.extend(why)
                    if self.cfg.features == "image":
                        features.append(image_features(captioner, images.to(self.process.device)).cpu().numpy())
                    yield index, images

            codes = extract_codes(captioner, watched(), self.precision)
            result = {"codes": codes, "pixels": np.array(pixels, np.uint64), "reasons": np.array(reasons, "U80")}
            return result | ({"features": np.concatenate(features)} if features else {})

        if self.cfg.features == "image":
            self.codes_folder = self.codes_folder.with_name(self.codes_folder.name + "-image")
        cached_rows(self.codes_folder, self.rows, self.cfg.chunk, self.process, "codes", compute)

    def scores(self, rows: np.ndarray, captions: dict[int, str] | None, what: str) -> np.ndarray:
        """ITM scores of rows with their own or other captions."""
        cfg = self.cfg
        scorer, tokenizer, transform = self.model(cfg.scorer, "blip")

        def compute(rows: np.ndarray) -> dict:
            parts = []
            for index, images, own, *_ in self.loader(rows, transform):
                texts = own if captions is None else [captions[int(row)] for row in index]
                images = images.to(self.process.device)
                with run.autocast(self.precision, images.device):
                    parts.append(itm_scores(scorer, tokenizer, images, texts, cfg.cls_scores).float().cpu())
            return {"scores": torch.cat(parts).numpy()}

        folder = self.folder(what, cfg.scorer)
        cached_rows(folder, rows, cfg.chunk, self.process, what, compute)
        return read_rows(folder, rows, cfg.chunk, "scores")

    def text_features(self) -> np.ndarray:
        scorer, tokenizer, _ = self.model(self.cfg.scorer, "blip")
        parts = []
        for first in range(0, len(self.rows), self.cfg.batch_size):
            captions = [self.pairs.caption(row) for row in self.rows[first : first + self.cfg.batch_size]]
            ids, mask = tokenizer([pre_caption(caption) for caption in captions])
            with torch.no_grad():
                parts.append(scorer.encode_text(ids.to(self.process.device), mask.to(self.process.device)).cpu())
        return torch.cat(parts).numpy()

    def generated(self, rows: np.ndarray) -> np.ndarray:
        """T_g of those rows."""
        cfg = self.cfg
        captioner, tokenizer, transform = self.model(cfg.caption_model, "finetune")
        prompt = tokenizer.prompt_ids().to(self.process.device)

        def compute(rows: np.ndarray) -> dict:
            texts = []
            for _, images, *_ in self.loader(rows, transform):
                images = images.to(self.process.device)
                with run.autocast(self.precision, images.device):
                    ids = captioner.generate(images, prompt, cfg.num_beams, cfg.max_length, cfg.min_length)
                texts += tokenizer.decode(ids.cpu())
            return {"captions": np.array(texts, dtype=np.str_)}

        folder = self.folder(f"captions-{cfg.num_beams}-{cfg.max_length}-{cfg.min_length}", cfg.caption_model)
        cached_rows(folder, rows, cfg.chunk, self.process, "captions", compute)
        return read_rows(folder, rows, cfg.chunk, "captions")

    @property
    def precision(self) -> str:
        return run.resolve_precision(self.cfg.precision, self.process.device)

    # -------------------------------------------------------------------------------------------------------- select

    def select(self, good: np.ndarray, scores: np.ndarray | None) -> tuple[Tensor, dict]:
        """Selected places among the readable rows `good`, in the order of the annotation file, and what to report."""
        cfg, n = self.cfg, len(good)
        keep = cfg.keep
        if cfg.match:
            keep = json.loads((Path(cfg.match) / "report.json").read_text())["kept"] / n
        if cfg.select == "all":
            return torch.arange(n), {}
        if cfg.select == "random":
            return random_subset(n, keep, cfg.seed), {}
        if cfg.select == "first":
            return torch.arange(round(n * keep)), {}
        if cfg.select == "itm":
            return keep_top(torch.from_numpy(scores[good]), keep).nonzero().flatten(), {}
        started = time.perf_counter()
        if cfg.features == "codes":
            vectors = self.merged = gathered_codes(self.codes_folder, good, cfg.chunk)
        elif cfg.features == "image":
            vectors = read_rows(self.codes_folder, good, cfg.chunk, "features")
        else:
            vectors = self.text_features()[good]
        clusters = cluster_codes(vectors, cfg.clusters, cfg.whiten_dim, cfg.seed, cfg.niter, cfg.points_per_centroid)
        if cfg.select == "stride":
            chosen = select_fraction(clusters.assignment, cfg.clusters, keep)
        else:
            largest = cfg.select == "farthest"
            chosen = select_by_distance(clusters.assignment, clusters.dist2, cfg.clusters, keep, largest)
        self.seconds["clusters"] = time.perf_counter() - started
        return chosen, {"clusters": clusters}


def reasons_of(cfg: Config, kept: np.ndarray, selected: np.ndarray) -> list[str]:
    """Why each readable sample was kept or not."""
    rules = {
        "stride": (f"evenly spaced {cfg.keep:g} of its cluster", "passed over in its cluster"),
        "nearest": (f"nearest {cfg.keep:g} of its cluster", "far from its centroid"),
        "farthest": (f"farthest {cfg.keep:g} of its cluster", "near its centroid"),
        "random": ("drawn", "not drawn"),
        "first": ("first of the file", "behind the first of the file"),
        "itm": ("high ITM score", "low ITM score"),
        "all": ("all are kept", ""),
    }[cfg.select]
    return [rules[0] if k else (rules[1] if not s else "low ITM score") for k, s in zip(kept, selected, strict=True)]


def check(cfg: Config, n: int) -> Config:
    """The recipe's values filled in; what cannot work is refused in a sentence."""
    if cfg.recipe not in RECIPES:
        raise ValueError(f"--recipe {cfg.recipe} is none of {', '.join(RECIPES)}")
    recipe = RECIPES[cfg.recipe]
    clusters = cfg.clusters if cfg.clusters is not None else max(1, min(recipe["clusters"], n // 30))
    keep = recipe["keep"] if cfg.keep is None else cfg.keep
    itm_keep = recipe.get("itm_keep") if cfg.itm_keep is None else cfg.itm_keep
    captions = cfg.captions or ("refined" if cfg.caption_model else "original")
    for name, value in (("keep", keep), ("itm-keep", itm_keep)):
        if value is not None and not 0 < value <= 1:
            raise ValueError(f"--{name} {value} is not in (0, 1]")
    if not 1 <= clusters <= n:
        raise ValueError(f"--clusters {clusters} is not in 1..{n}, the number of samples")
    for name in ("chunk", "batch_size", "niter", "whiten_dim", "num_beams"):
        if getattr(cfg, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(cfg, name)}")
    if captions != "original" and not cfg.caption_model:
        raise ValueError(f"--captions {captions} needs --caption-model, a run folder of stage finetune")
    if (itm_keep is not None or cfg.select == "itm" or cfg.features == "text") and not cfg.scorer:
        raise ValueError("ITM scores and text features need --scorer, a run folder of stage blip")
    if cfg.match and not (Path(cfg.match) / "report.json").is_file():
        raise FileNotFoundError(f"--match {cfg.match} holds no report.json of a finished reduction")
    return dataclasses.replace(cfg, clusters=clusters, keep=keep, itm_keep=itm_keep, captions=captions)


def main(cfg: Config) -> None:
    process = run.setup(cfg.seed, cfg.device)
    if cfg.data.endswith((".tsv", ".csv")):
        raise ValueError(f"{cfg.data} is no set of shards: reduce takes .tar files, or an annotation .json")
    reduction = Reduction(cfg, process)
    cfg = reduction.cfg = check(cfg, len(reduction.pairs))
    settings, out = json.loads(json.dumps(dataclasses.asdict(cfg))), reduction.out
    free = ("workers", "device", "batch_size", "cache", "work")
    if (out / "config.json").exists():
        then = json.loads((out / "config.json").read_text())
        changed = [f"--{k.replace('_', '-')}" for k in settings if k not in free and settings[k] != then.get(k)]
        if changed:
            raise ValueError(f"{out} holds a reduction with another {', '.join(changed)}: choose another --out")
        if (out / "report.json").exists():
            if process.main:
                print(f"{out} is finished; nothing to do")
            return
    if process.main:
        out.mkdir(parents=True, exist_ok=True)
        run.write_json(out / "config.json", settings)
    clustered = cfg.select in ("stride", "nearest", "farthest")

    # Costly passes: codes, ITM scores, captions
    started = time.perf_counter()
    captioner = cfg.captioner or (reduction.train_captioner() if clustered and cfg.features != "text" else None)
    pairs, rows = reduction.pairs, reduction.rows
    seconds = reduction.seconds
    seconds["captioner"] = time.perf_counter() - started
    reasons, pixels = np.full(len(rows), "", dtype="U80"), None
    if captioner:
        started = time.perf_counter()
        reduction.codes(captioner)
        pixels, reasons = (read_rows(reduction.codes_folder, rows, cfg.chunk, n) for n in ("pixels", "reasons"))
        seconds["codes"] = time.perf_counter() - started
    good = rows[reasons == ""]
    started = time.perf_counter()
    before = reduction.scores(rows, None, "itm") if cfg.scorer else None
    seconds["itm"] = time.perf_counter() - started

    # Selection, on rank 0
    selected = extra = None
    if process.main:
        selected, extra = reduction.select(good, before)
        selected = good[selected.numpy()]
    selected = run.broadcast(selected, process)
    kept = selected
    if cfg.itm_keep is not None:
        top = np.zeros(len(rows), dtype=bool)
        top[good] = keep_top(torch.from_numpy(before[good]), cfg.itm_keep).numpy()
        kept = selected[top[selected]]

    # Captions
    started = time.perf_counter()
    ascending = np.sort(kept)
    captions = {int(row): pairs.caption(row) for row in ascending}
    generated: dict[int, str] = {}
    if cfg.captions != "original":
        generated = dict(zip(ascending.tolist(), reduction.generated(ascending).tolist(), strict=True))
        join = refined if cfg.captions == "refined" else lambda original, text: text
        captions = {row: join(captions[row], text) if text else captions[row] for row, text in generated.items()}
    seconds["captions"] = time.perf_counter() - started
    mark = data.stable_hash(*captions.items()) if cfg.scorer else 0
    after = reduction.scores(ascending, captions, f"itm-after-{mark:016x}") if cfg.scorer else None

    # Output
    started = time.perf_counter()
    if isinstance(pairs, data.Shards):
        write_shards(pairs, captions, out / "shards", process)
        if process.world_size > 1:
            dist.barrier()
    if not process.main:
        return
    run.write_json(
        out / "annotation.json", [{"image": str(pairs.keys[row]), "caption": captions[row]} for row in kept.tolist()]
    )
    columns, report = describe(cfg, reduction, good, selected, kept, extra, pixels, reasons)
    if before is not None:
        columns["itm"] = [round(score, 4) for score in before.tolist()]
        report["itm"] = {"before": itm_summary(before[good]), "after": itm_summary(after)}
    columns["caption"] = [captions.get(row, "") for row in rows.tolist()]
    columns["generated"] = [generated.get(row, "") for row in rows.tolist()]
    write_csv(out / "report.csv", columns)
    seconds["output"] = time.perf_counter() - started
    report["seconds"] = {name: round(value, 2) for name, value in seconds.items()}
    run.write_json(out / "report.json", report)
    broken = [data.Broken(str(pairs.keys[row]), str(reasons[row])) for row in rows[reasons != ""]]
    if line := data.broken_report([*pairs.broken, *broken]):
        print(line.replace("replaced by their neighbours", "left out"))
    print_report(report)


def describe(cfg, reduction, good, selected, kept, extra, pixels, reasons) -> tuple[dict, dict]:
    """Columns of report.csv, and report.json."""
    pairs, rows = reduction.pairs, reduction.rows
    n = len(rows)
    is_kept, is_selected = np.isin(rows, kept), np.isin(rows, selected)
    why = np.array(reasons_of(cfg, is_kept, is_selected), dtype=object)
    why[reasons != ""] = [f"broken: {reason}" for reason in reasons[reasons != ""]]
    columns = {"key": pairs.keys.tolist(), "kept": is_kept.astype(int).tolist(), "reason": why.tolist()}
    report = {"samples": n, "broken": int((reasons != "").sum()) + len(pairs.broken), "kept": len(kept)}
    report |= {"kept_share": len(kept) / max(len(good), 1), "selected": len(selected)}
    if pixels is not None:
        first = first_of_equal(pixels[good])
        copies = first != np.arange(len(good))
        duplicate_of = np.full(n, "", dtype=object)
        duplicate_of[good[copies]] = pairs.keys[good[first[copies]]]
        columns["duplicate_of"] = duplicate_of.tolist()
        codes = (
            gathered_codes(reduction.codes_folder, good, cfg.chunk) if reduction.merged is None else reduction.merged
        )
        distinct = len(np.unique(row_hashes(codes)))
        num_codes = int(codes.max()) + 1 if len(codes) else 0
        counts = np.zeros(num_codes, dtype=np.int64)
        for first_row in range(0, len(codes), 2**16):
            counts += np.bincount(codes[first_row : first_row + 2**16].ravel(), minlength=num_codes)
        p = counts / counts.sum()
        report |= {
            "identical_images": int(copies.sum()),
            "identical_code_vectors": len(good) - distinct,
            "codes_used": int((counts > 0).sum()),
            "perplexity": float(np.exp(-(p * np.log(p + 1e-10)).sum())),
        }
    if "clusters" in extra:
        clusters = extra["clusters"]
        order, position, sizes = in_cluster(clusters.assignment, cfg.clusters)
        for name, values, blank in (
            ("cluster", clusters.assignment.tolist(), ""),
            ("distance", [round(d, 4) for d in clusters.dist2.clamp(min=0).sqrt().tolist()], ""),
            ("position", position[torch.argsort(order)].tolist(), ""),
        ):
            column = [blank] * n
            for row, value in zip(good.tolist(), values, strict=True):
                column[row] = value
            columns[name] = column
        quantiles = torch.quantile(sizes.float(), torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]))
        report |= {
            "clusters": cfg.clusters,
            "empty_clusters": int((sizes == 0).sum()),
            "cluster_sizes": quantiles.tolist(),
            "whitened_axes": clusters.dim,
            "objective": clusters.objective.tolist(),
        }
    return columns, report


def print_report(report: dict) -> None:
    """What one wants to know at once."""
    print(f"kept               {report['kept']:,} of {report['samples']:,} ({100 * report['kept_share']:.1f} %)")
    if "identical_images" in report:
        print(
            f"duplicates         {report['identical_images']:,} identical images, "
            f"{report['identical_code_vectors']:,} code vectors that occurred before"
        )
        print(f"codebook           {report['codes_used']:,} codes used, perplexity {report['perplexity']:.1f}")
    if "clusters" in report:
        low, _, middle, _, high = report["cluster_sizes"]
        print(
            f"clusters           {report['clusters']:,} of {low:.0f} to {high:.0f} samples, median {middle:.0f}; "
            f"{report['empty_clusters']:,} empty; {report['whitened_axes']} axes"
        )
    if "itm" in report:
        before, after = report["itm"]["before"], report["itm"]["after"]
        print(
            f"ITM score          mean {before['mean']:.3f} before, {after['mean']:.3f} after; "
            f"below 0.5: {before['below_half']:.1f} %, {after['below_half']:.1f} %"
        )
    print("seconds            " + ", ".join(f"{name} {value:.1f}" for name, value in report["seconds"].items()))


if __name__ == "__main__":
    run.command_line(lambda: main(tyro.cli(Config)))
