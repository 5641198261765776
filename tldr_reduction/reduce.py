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
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import Tensor

from shared import checkpoints, cli, data, run
from tldr_reduction.cluster import (  # noqa: F401
    cluster_codes,
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
    describe,
    print_report,
    refine_annotations,
    refined,
    write_csv,
    write_shards,
)
from tldr_reduction.recipes import RECIPES, Config, check, dry_run, kept_by  # noqa: F401
from tldr_reduction.rows import cached_rows, gathered_codes, read_rows
from tldr_reduction.text import WordPiece, build_vocab, pre_caption
from tldr_reduction.views import eval_transform, no_pixels, open_pairs, rows_loader

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
        self.precision = run.resolve_precision(cfg.precision, process.device)
        self.pairs = open_pairs(cfg.data, cfg.image_root, None, cfg.strict, cfg.cache)
        self.rows = np.arange(len(self.pairs))
        self.out, self.work = Path(cfg.out), Path(cfg.work or Path(cfg.out) / "work")
        self.seconds: dict[str, float] = {}
        self.loaded: dict[str, tuple] = {}
        self.merged: np.ndarray | None = None
        self.coded = False  # whether a captioner has seen the images
        self.codes_folder = self.folder("codes", cfg.captioner or str(self.out / "captioner"))

    def folder(self, what: str, model: str) -> Path:
        """Where results of one model on this data are kept: other models and other data have other folders."""
        path = Path(model) / "checkpoint.pt"
        stamp = path.stat() if path.exists() else None
        marks = (self.pairs.fingerprint, os.path.abspath(model), stamp and stamp.st_mtime_ns, self.precision)
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
            words = build_vocab(self.pairs.caption(row) for row in self.rows)
            with checkpoints.replaced(vocab) as file:
                file.write(("\n".join(words) + "\n").encode())
        run.gather_lists([], self.process)  # until it is written
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
        """Code vectors, pixel hashes and reasons of the broken, of all rows."""
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

        cached_rows(self.codes_folder, self.rows, self.cfg.chunk, self.process, "codes", compute)
        self.coded = True

    def look(self) -> Path:
        """Pixel hashes and reasons of the broken, of all rows, where no captioner is wanted; -> their folder."""

        def compute(rows: np.ndarray) -> dict:
            parts = [(hashes, why) for _, _, _, hashes, why in self.loader(rows, no_pixels)]
            pixels, reasons = ([value for part in each for value in part] for each in zip(*parts, strict=True))
            return {"pixels": np.array(pixels, np.uint64), "reasons": np.array(reasons, "U80")}

        folder = self.work / f"images-{self.pairs.fingerprint}"
        cached_rows(folder, self.rows, self.cfg.chunk, self.process, "images", compute)
        return folder

    def image_features(self, captioner: str | None) -> None:
        """Continuous features of all images, for the ablations: the captioner's, or the scorer's embedding."""
        blip = self.cfg.features == "blip"
        path = self.cfg.scorer if blip else captioner
        model, _, transform = self.model(path, "blip" if blip else "captioner")
        encode = model.encode_image if blip else lambda images: image_features(model, images)

        def compute(rows: np.ndarray) -> dict:
            parts = []
            for _, images, *_ in self.loader(rows, transform):
                images = images.to(self.process.device)
                with torch.no_grad(), run.autocast(self.precision, images.device):
                    parts.append(encode(images).float().cpu())
            return {"features": torch.cat(parts).numpy()}

        self.features_folder = self.folder(f"features-{self.cfg.features}", path)
        cached_rows(self.features_folder, self.rows, self.cfg.chunk, self.process, "features", compute)

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

        folder = self.folder(what + "-cls" * cfg.cls_scores, cfg.scorer)
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

    # -------------------------------------------------------------------------------------------------------- select

    def select(self, good: np.ndarray, scores: np.ndarray | None) -> tuple[Tensor, dict]:
        """Selected places among the readable rows `good`, in the order of the annotation file, and what to report."""
        cfg, n = self.cfg, len(good)
        keep = cfg.keep
        if cfg.match:
            keep = kept_by(cfg.match) / n
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
        elif cfg.features == "text":
            vectors = self.text_features()[good]
        else:
            vectors = read_rows(self.features_folder, good, cfg.chunk, "features")
        clusters = cluster_codes(vectors, cfg.clusters, cfg.whiten_dim, cfg.seed, cfg.niter, cfg.points_per_centroid)
        if cfg.select == "stride":
            chosen = select_fraction(clusters.assignment, cfg.clusters, keep)
        else:
            largest = cfg.select == "farthest"
            chosen = select_by_distance(clusters.assignment, clusters.dist2, cfg.clusters, keep, largest)
        self.seconds["clusters"] = time.perf_counter() - started
        return chosen, {"clusters": clusters}


def main(cfg: Config) -> None:
    process = run.setup(cfg.seed, cfg.device)
    if cfg.data.endswith((".tsv", ".csv")):
        raise ValueError(f"{cfg.data} is no set of shards: reduce takes .tar files, or an annotation .json")
    if cfg.dry_run:
        return dry_run(cfg) if process.main else None
    reduction = Reduction(cfg, process)
    cfg = reduction.cfg = check(cfg, len(reduction.pairs))
    weights = {}
    for path, stage in ((cfg.captioner, "captioner"), (cfg.caption_model, "finetune"), (cfg.scorer, "blip")):
        if path:
            reduction.model(path, stage)
            weights[path] = data.fingerprint(np.memmap(Path(path) / "checkpoint.pt", mode="r"))
    settings, out = json.loads(json.dumps(dataclasses.asdict(cfg))), reduction.out
    free = ("out", "workers", "device", "batch_size", "cache", "work", "weights")
    settings |= {"fingerprint": reduction.pairs.fingerprint, "weights": weights}
    if (out / "config.json").exists():
        then = checkpoints.read_json(out / "config.json")
        if then.setdefault("fingerprint", settings["fingerprint"]) != settings["fingerprint"]:  # older ones lack it
            raise ValueError(f"{out} reduces other data than {cfg.data} holds now: choose another --out")
        for path, made in then.get("weights", {}).items():
            if weights.get(path, made) != made:  # another path is another flag, below
                raise ValueError(f"{out} was made by other weights than {path} holds now: choose another --out")
        changed = [f"--{k.replace('_', '-')}" for k in settings if k not in free and settings[k] != then.get(k)]
        if changed:
            raise ValueError(f"{out} holds a reduction with another {', '.join(changed)}: choose another --out")
        if (out / "report.json").exists():
            if process.main:
                print(f"{out} is finished; nothing to do")
            return
    elif list((out / "shards").glob("*.tar")):
        raise ValueError(f"{out}/shards holds shards that no reduction into {out} has written: choose another --out")
    with run.lock(out, process):
        if process.main:
            checkpoints.write_json(out / "config.json", settings)
        reduce(reduction)


def reduce(reduction: Reduction) -> None:
    """All passes and what they write; the folder has its config.json."""
    cfg, process, out = reduction.cfg, reduction.process, reduction.out
    clustered = cfg.select in ("stride", "nearest", "farthest")

    # Costly passes: codes, ITM scores, captions
    started = time.perf_counter()
    wanted = clustered and cfg.features in ("codes", "image")
    captioner = cfg.captioner or (reduction.train_captioner() if wanted else None)
    pairs, rows = reduction.pairs, reduction.rows
    seconds = reduction.seconds
    seconds["captioner"] = time.perf_counter() - started
    started = time.perf_counter()
    if captioner:
        reduction.codes(captioner)
    folder = reduction.codes_folder if captioner else reduction.look()
    pixels, reasons = (read_rows(folder, rows, cfg.chunk, name) for name in ("pixels", "reasons"))
    seconds["codes"] = time.perf_counter() - started
    if clustered and cfg.features in ("image", "blip"):
        reduction.image_features(captioner)
    good = rows[reasons == ""]
    if not len(good):
        raise ValueError(f"none of the {len(rows):,} images of {cfg.data} can be read: {reasons[0]}")
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
    after = before[ascending] if cfg.scorer else None
    if cfg.scorer and cfg.captions != "original":
        after = reduction.scores(ascending, captions, f"itm-after-{data.stable_hash(*captions.items()):016x}")

    # Output
    started = time.perf_counter()
    if isinstance(pairs, data.Shards):
        write_shards(pairs, captions, out / "shards", process)
        run.gather_lists([], process)  # until all ranks have written theirs
    if not process.main:
        return
    checkpoints.write_json(
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
    checkpoints.write_json(out / "report.json", report)
    broken = [data.Broken(str(pairs.keys[row]), str(reasons[row])) for row in rows[reasons != ""]]
    if line := data.broken_report([*pairs.broken, *broken], "left out"):
        print(line)
    print_report(report)


if __name__ == "__main__":
    cli.command_line(lambda: main(tyro.cli(Config)))
