"""Reduce image-text shards: `python -m tldr_reduction.reduce SHARDS --keep 0.25 --out DIR`.

TL;DR (arXiv 2305.20087); authors' code showlab/datacentric.vlp@a488102, cited as `U:`. The paper's contribution:
code vectors of all images (`Inference.codes` in inference.py), clusters of these vectors and the selection of a fixed
share of each cluster (cluster.py), refined captions (`refined`).

DIR then holds
  shards/            the kept samples, with their new captions; train.py, or any trainer, reads them
  annotation.json    [{"image", "caption"}] of the kept samples, cluster by cluster as the authors' code orders them;
                     image is a path: below DIR (images/SHARD/NAME, written with --extract-images), or the input's own
  report.csv         one line per sample: kept or not and why, cluster, place in it, distance, duplicates, ITM, captions
  report.json        counts, duplicates, cluster sizes, codes used, cohesion and coverage beside those of random
                     selections, ITM scores of all samples before and of the kept ones after, seconds
  report.html        the same as a page: kept and dropped examples with reasons, clusters, duplicates, captions
  config.json        settings, and fingerprints of data and models
  work/              code vectors, scores and generated captions by sample; an interrupted run resumes from them
Under torchrun, the ranks divide the samples of the costly passes among themselves.
"""

import contextlib
import dataclasses
import io
import json
import tarfile
import time
from collections.abc import Callable, Container, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import Tensor

from shared import checkpoints, cli, data, run, tars
from shared.errors import UserError
from tldr_reduction.checkpoints import weights_of
from tldr_reduction.cluster import (
    POINTS,
    Clusters,
    cluster_codes,
    keep_top,
    random_subset,
    select_by_distance,
    select_fraction,
)
from tldr_reduction.config import SETS, ReduceConfig, complete, kept_by
from tldr_reduction.datasets import local_pairs, open_pairs
from tldr_reduction.encoders import GRID, load_scorer
from tldr_reduction.inference import Inference, Rows
from tldr_reduction.quality import caption_features, measured, sampled
from tldr_reduction.report import (
    Outcome,
    distinct_images,
    itm_summaries,
    notes_of,
    print_report,
    put,
    summary_of,
    table_of,
    write_page,
)

# ----------------------------------------------------------------------------------------------------- refined captions


def refined(original: str, generated: str) -> str:
    """T = T_o "; " T_g. U:generate_train_json_w_caption.py:45."""
    return f"{original}; {generated}"


# ------------------------------------------------------------------------------------------------------------ selection


def select(cfg: ReduceConfig, n: int, scores: np.ndarray | None, clusters: Clusters | None) -> Tensor:
    """Indices of the samples selected among n readable ones, in the order of the annotation file.

    `scores`: matching scores (n,), for --select itm. `clusters`: for selections by clusters.
    """
    keep = kept_by(cfg.match) / n if cfg.match else cfg.keep
    if cfg.select == "all":
        return torch.arange(n)
    if cfg.select == "random":
        return random_subset(n, keep, cfg.seed)
    if cfg.select == "first":
        return torch.arange(round(n * keep))
    if cfg.select == "itm":
        return keep_top(torch.from_numpy(scores), keep).nonzero().flatten()
    if cfg.select == "stride":
        seed = cfg.seed if cfg.start == "seed" else None
        return select_fraction(clusters.assignment, cfg.clusters, keep, seed)
    return select_by_distance(clusters.assignment, clusters.dist2, cfg.clusters, keep)


def select_distinct(cfg: ReduceConfig, pixels: np.ndarray, scores: np.ndarray | None, clusters: Clusters | None):
    """`select` for n samples with image hashes `pixels` (n,). Of identical images, a selection by clusters keeps at
    most the first; the share refers to all n samples, so that other images take the place of the copies."""
    distinct = distinct_images(pixels)
    if not (cfg.clustered and cfg.drop_duplicates) or len(distinct) == len(pixels):
        return select(cfg, len(pixels), scores, clusters)
    keep = min(1.0, cfg.keep * len(pixels) / len(distinct))
    without = clusters._replace(assignment=clusters.assignment[distinct], dist2=clusters.dist2[distinct])
    return torch.from_numpy(distinct)[select(dataclasses.replace(cfg, keep=keep), len(distinct), None, without)]


# --------------------------------------------------------------------------------------------------------------- output


def write_shards(pairs, kept: dict[int, str], folder: Path, process: run.Process) -> None:
    """Write all files of the samples `kept` (row -> caption) to one new shard per input shard that has such samples.

    Only the content of the .txt changes. The shards are distributed over ranks. Shards of an interrupted run are
    replaced, since it may have selected other samples (with another version of faiss, for example).
    """
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(process.rank, len(pairs.paths), process.world_size):
        captions = {str(pairs.keys[row]): kept[row] for row in pairs.rows_of(number) if row in kept}
        path = folder / f"{number:05}.tar"
        if not captions:
            path.unlink(missing_ok=True)
            continue
        with checkpoints.replaced(path) as file, tarfile.open(fileobj=file, mode="w") as target:
            for name, key, content in members(pairs.paths[number], captions.keys()):
                if tars.key_of(name)[1] == "txt":
                    content = captions[key].encode()
                info = tarfile.TarInfo(name)
                info.size = len(content)
                target.addfile(info, io.BytesIO(content))


def write_images(pairs, kept: Container[int], out: Path, extract: bool, process: run.Process) -> dict[int, str]:
    """Return {row: image path below `out`}, images/SHARD/NAME, of the samples in the written shards.

    `extract`: also write these image files; the shards are distributed over ranks. Without it,
    `tar -xf DIR/shards/SHARD.tar -C DIR/images/SHARD` gives the same files, except for names with a folder.
    """
    paths: dict[int, str] = {}
    for number in range(len(pairs.paths)):
        shard, folder = out / f"shards/{number:05}.tar", f"images/{number:05}"
        if not shard.exists():
            continue
        rows = {str(pairs.keys[row]): row for row in pairs.rows_of(number) if row in kept}
        with tarfile.open(shard) as tar:
            for member in tar:
                key, extension = tars.key_of(member.name)
                if extension not in tars.IMAGE_EXTENSIONS or key not in rows:
                    continue
                path = f"{folder}/{member.name.replace('/', '_')}"  # a tar's names are not trusted with folders
                paths[rows[key]] = path
                if extract and number % process.world_size == process.rank and not (out / path).exists():
                    (out / folder).mkdir(parents=True, exist_ok=True)
                    with checkpoints.replaced(out / path) as file:
                        file.write(tar.extractfile(member).read())
    return paths


def write_samples(cfg: ReduceConfig, pairs, kept: dict[int, str], process: run.Process) -> dict[int, str]:
    """Write the `kept` samples (row -> caption) of shards as new shards; return {row: path of its image}.

    All ranks call this. For an annotation file nothing is written, and the paths are those in the file.
    """
    if not isinstance(pairs, data.Shards):
        return {row: str(pairs.keys[row]) for row in kept}
    write_shards(pairs, kept, Path(cfg.out) / "shards", process)
    run.wait()  # until all ranks have written theirs
    return write_images(pairs, kept, Path(cfg.out), cfg.extract_images, process)


def members(path: str, keys: Container[str]) -> Iterator[tuple[str, str, bytes]]:
    """Yield name, key and content of the files of the samples `keys`; a damaged tar is read up to the damage."""
    for name, content in tars.read_tar(path, []):
        key, _ = tars.key_of(name)
        if key in keys:
            yield name, key, content


# ----------------------------------------------------------------------------------------------------------- the script


def dry_run(cfg: ReduceConfig) -> None:
    """Print how many samples would be kept and the resources needed, for the recipe's data set if `cfg.data` does not
    exist."""
    name = cfg.recipe if cfg.recipe in SETS else "cc3m"
    n, what = SETS[name][0], f"{name}, as {cfg.data} is not here"
    if (pairs := local_pairs(cfg.data, cfg.image_root, cache=cfg.cache)) is not None:
        n, what = len(pairs), cfg.data
    cfg = complete(cfg, n)
    kept = n if cfg.select == "all" else kept_by(cfg.match) if cfg.match else round(n * cfg.keep)
    more = f", and up to one more in each of {cfg.clusters:,} clusters" if cfg.clustered else ""
    rows = [("samples", f"{n:,} ({what})"), ("kept", f"{kept:,}{more}")]
    if cfg.itm_keep is not None:
        rows += [("ITM filter", f"of those only the ones in the upper {100 * cfg.itm_keep:g} % by score")]
    if cfg.clustered and cfg.features == "codes":
        trained = min(n, cfg.clusters * POINTS)
        length, whose = (197, "ViT-B/16 at 224 px") if cfg.captioner else (GRID**2, cfg.encoder)
        codes, axes = n * length * 2 / 2**30, trained * min(length, 256) * 4 / 2**30
        rows += [
            ("code vectors", f"{codes:.2f} GiB in work/ ({length} codes of {whose}), memory-mapped"),
            ("k-means", f"{trained:,} vectors of at most {min(length, 256)} axes, {axes:.2f} GiB"),
        ]
    more = f", {kept:,} to generate" if cfg.captions != "original" and cfg.caption_model else ""
    cli.show_plan([*rows, ("captions", f"{cfg.captions}{more}")])


def filtered(cfg: ReduceConfig, selected: np.ndarray, good: np.ndarray, scores: np.ndarray | None) -> np.ndarray:
    """The `selected` samples that the ITM filter leaves; scores (N,) of all samples. UserError if none is left."""
    kept = selected
    if cfg.itm_keep is not None:
        top = good[keep_top(torch.from_numpy(scores[good]), cfg.itm_keep).numpy()]
        kept = selected[np.isin(selected, top)]
    if not len(kept):
        by_score = f" with --itm-keep {cfg.itm_keep:g}" if cfg.itm_keep is not None else ""
        raise UserError(f"--keep {cfg.keep:g}{by_score} leaves none of {len(good):,} samples: choose a larger share")
    return kept


def is_finished(out: Path, settings: dict) -> bool:
    """Whether `out` holds this reduction already, finished.

    `settings["weights"]`: by path, fingerprints of the files of weights and of predictions, and the number of samples
    that the reduction of --match kept. UserError if `out` holds a reduction with other settings, data or files, or
    shards that no reduction has written.
    """
    if not (out / "config.json").exists():
        if list((out / "shards").glob("*.tar")):
            raise UserError(f"{out}/shards holds shards that no reduction into {out} has written: choose another --out")
        return False
    then, weights = checkpoints.read_json(out / "config.json"), settings["weights"]
    if then.get("fingerprint") != settings["fingerprint"]:
        raise UserError(f"{out} reduces other data than {settings['data']} holds now: choose another --out")
    for path, made in then.get("weights", {}).items():
        if weights.get(path, made) != made:  # a changed path is reported below, as a changed flag
            raise UserError(f"{out} was made when {path} had other content: choose another --out")
    free = ("out", "workers", "device", "batch_size", "cache", "work", "weights", "fingerprint")
    changed = [f"--{k.replace('_', '-')}" for k in settings if k not in free and settings[k] != then.get(k)]
    if changed:
        raise UserError(f"{out} holds a reduction with another {', '.join(changed)}: choose another --out")
    return (out / "report.json").exists()


@contextlib.contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Measure the seconds that the `with` block takes, and store them under `name`."""
    started = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - started


def find_clusters(cfg: ReduceConfig, inference: Inference, good: np.ndarray, vectors: np.ndarray | None) -> Clusters:
    """Cluster the readable samples `good` by code vectors or features (N, ...) of all samples, or by the scorer's text
    features; only rank 0 calls this."""
    if cfg.features == "text":
        vectors = inference.text_features()
    return cluster_codes(Rows(vectors, good), cfg.clusters, cfg.seed)


def check_selection(
    cfg: ReduceConfig,
    inference: Inference,
    good: np.ndarray,
    pixels: np.ndarray,
    kept: np.ndarray,
    clusters: Clusters | None,
) -> dict[str, dict]:
    """Compare clusters and selection with random ones, on at most CHECKED samples: {features: `quality.measured`}.

    good: readable samples; pixels: their image hashes. If copies of images are dropped, only distinct images are
    compared: a dropped copy is covered by its kept original, which would favour the selection. Empty with --no-check,
    and for selections that are random or keep all samples.
    """
    compared = good[distinct_images(pixels)] if cfg.clustered and cfg.drop_duplicates else good
    if not cfg.check or cfg.select in ("all", "random") or len(kept) == len(compared):
        return {}

    def labels_of(rows: np.ndarray) -> np.ndarray | None:
        return None if clusters is None else clusters.assignment[np.searchsorted(good, rows)].numpy()

    rows = sampled(compared, labels_of(compared), cfg.seed)
    chosen = torch.from_numpy(np.isin(rows, kept))
    if not chosen.any() or chosen.all():
        return {}
    features = inference.checks(rows)
    if (words := caption_features([inference.pairs.caption(row) for row in rows])) is not None:
        features["captions"] = words
    labels = None if clusters is None else torch.from_numpy(labels_of(rows))
    return {name: {"samples": len(rows), **measured(x, labels, chosen, cfg.seed)} for name, x in features.items()}


def new_captions(cfg: ReduceConfig, inference: Inference, rows: np.ndarray) -> tuple[dict[int, str], dict[int, str]]:
    """Captions of the kept samples `rows` (ascending) as they will be written, and their generated captions T_g."""
    captions, generated = {int(row): inference.pairs.caption(row) for row in rows}, {}
    if cfg.captions != "original":
        if cfg.predictions:  # read only now, so that millions of captions are not in memory during the passes
            keys = inference.pairs.keys
            known = read_predictions(cfg.predictions, keys)
            generated = {row: known.get(str(keys[row]), known.get(row, "")) for row in rows.tolist()}
        else:
            generated = dict(zip(rows.tolist(), inference.generated(rows), strict=True))
        join = refined if cfg.captions == "refined" else lambda original, text: text
        captions = {row: join(captions[row], text) if text else captions[row] for row, text in generated.items()}
    return captions, generated


def read_predictions(path: str, keys: Sequence[str]) -> dict[str | int, str]:
    """Read a file of predictions: {key or row number: caption}; of several captions of a sample, the last one is used.

    keys: (N,) of all samples. UserError if the file is no list of {"image_id": key or row number, "caption": text}, or
    has captions for none of the samples.
    """
    try:
        entries = json.loads(Path(path).read_text(encoding="utf-8"))
        known = {entry["image_id"]: entry["caption"] for entry in entries}
    except OSError as error:
        raise UserError(f"--predictions {path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f'--predictions {path} is no JSON list of {{"image_id": key or row number, "caption": text}}'
        ) from error
    if other := [name for name, text in known.items() if not isinstance(text, str)]:
        raise UserError(f"--predictions {path}: the caption of {other[0]!r} is no text")
    if not any(str(key) in known or row in known for row, key in enumerate(keys)):
        raise UserError(
            f"--predictions {path} has captions for none of the {len(keys):,} samples: its image_id must be a sample's "
            f"key, like {str(keys[0])!r}, or its row number"
        )
    return known


def original_scores(cfg: ReduceConfig, inference: Inference, good: np.ndarray) -> np.ndarray | None:
    """Scores (N,) of all samples with their own captions, or None without a scorer.

    UserError if one of the readable samples `good` has no finite score.
    """
    if not cfg.scorer:
        return None
    scores = inference.scores(inference.rows, None)
    if (wrong := ~np.isfinite(scores[good])).any():
        raise UserError(
            f"--scorer {cfg.scorer} gives no finite score for {wrong.sum():,} of {len(good):,} samples, the first is "
            f"{inference.pairs.keys[good[wrong.argmax()]]}: choose another scorer or --precision"
        )
    return scores


def reason_of(pairs, row: int) -> str:
    """Why the image of a sample cannot be read."""
    try:
        pairs.read(row)
    except data.BrokenSample as error:
        return str(error)
    return "it could not be read before"


def reduce(cfg: ReduceConfig, inference: Inference) -> None:
    """Run all passes and write the results into the output folder, in which `main` has written config.json."""
    pairs, process, out = inference.pairs, inference.process, Path(cfg.out)
    seconds: dict[str, float] = {}

    # Costly passes over all images: codes, features, ITM scores
    coded = cfg.captioner is not None or (cfg.clustered and cfg.features == "codes")
    with timed(seconds, "codes"):
        images = inference.codes() if coded else inference.readable()
        vectors = images["codes"] if coded else None
    if cfg.clustered and cfg.features in ("image", "blip"):
        vectors = inference.features()
    good, pixels = np.flatnonzero(images["readable"]), np.array(images["pixels"])
    reasons = np.full(len(pairs), "", dtype=object)
    for row in np.flatnonzero(~images["readable"]) if process.main else ():
        reasons[row] = reason_of(pairs, row)
    if not len(good):
        raise UserError(f"none of the {len(pairs):,} images of {cfg.data} can be read: {reason_of(pairs, 0)}")
    with timed(seconds, "itm"):
        before = original_scores(cfg, inference, good)

    # Clusters and selection, on rank 0, and its comparison with random ones
    selected = clusters = None
    if process.main:
        with timed(seconds, "clusters"):
            clusters = find_clusters(cfg, inference, good, vectors) if cfg.clustered else None
        scores = None if before is None else before[good]
        selected = good[select_distinct(cfg, pixels[good], scores, clusters).numpy()]
    selected = run.broadcast(selected, process)
    kept, checks = filtered(cfg, selected, good, before), {}
    if process.main:
        with timed(seconds, "check"):
            checks = check_selection(cfg, inference, good, pixels[good], kept, clusters)

    # Captions of the kept samples, and their scores
    with timed(seconds, "captions"):
        ascending = np.sort(kept)
        captions, generated = new_captions(cfg, inference, ascending)
    if cfg.scorer:
        after = before[ascending] if cfg.captions == "original" else inference.scores(ascending, captions)

    # Output
    with timed(seconds, "output"):
        files = write_samples(cfg, pairs, captions, process)
        if not process.main:
            return
        annotation = [{"image": files[row], "caption": captions[row]} for row in kept.tolist()]
        checkpoints.write_json(out / "annotation.json", annotation)
        codes = Rows(images["codes"], good) if coded else None
        found = Outcome(good, selected, kept, pixels, reasons, codes, clusters)
        table, report = table_of(cfg, pairs.keys, found, captions, generated), summary_of(cfg, found, len(pairs.broken))
        report["captions"] = {
            "kind": cfg.captions,
            "by": cfg.caption_model or cfg.predictions,
            "without_generated": sum(not text for text in generated.values()),
        }
        if cfg.scorer:
            report["itm"] = itm_summaries(before[good], after, inference.scorer().matches)
            put(table, "itm", good, [round(score, 4) for score in before[good].tolist()])
            put(table, "itm_after", ascending, [round(score, 4) for score in after.tolist()])
        report["checks"] = checks
        report["notes"] = notes_of(cfg, report, len(good))
        with checkpoints.replaced(out / "report.csv") as file:
            table.to_csv(file, index=False, mode="wb")
        write_page(out / "report.html", cfg, pairs, report, table)
    report["seconds"] = {name: round(value, 2) for name, value in seconds.items()}
    checkpoints.write_json(out / "report.json", report)
    unreadable = [data.Broken(str(pairs.keys[row]), str(reasons[row])) for row in np.flatnonzero(reasons != "")]
    data.say_left_out(pairs, unreadable)
    print_report(report)


def main(cfg: ReduceConfig, load_scorer: Callable = load_scorer) -> None:
    """Check the settings and the output folder, then `reduce`; or --dry-run. A study may bring its own scorers."""
    process = run.setup(cfg.seed, cfg.device)
    if cfg.data.endswith((".tsv", ".csv")):
        raise UserError(f"{cfg.data} is no set of shards: reduce takes .tar files, or an annotation .json")
    if cfg.dry_run:
        return dry_run(cfg) if process.main else None
    pairs = open_pairs(cfg.data, cfg.image_root, None, cfg.strict, cfg.cache)
    cfg = complete(cfg, len(pairs))
    inference, weights, out = Inference(cfg, pairs, process, load_scorer), {}, Path(cfg.out)
    for path, load in (  # all models, so that a missing one is reported before work starts
        (cfg.coded_by, lambda: inference.encoder(cfg.coded_by)),
        (cfg.captioner, lambda: inference.model(cfg.captioner, "captioner")),
        (cfg.caption_model, lambda: inference.model(cfg.caption_model, "finetune")),
        (cfg.scorer, inference.scorer),
    ):
        if path:
            load()
            if (file := weights_of(path)) is not None:
                weights[path] = data.fingerprint(np.memmap(file, mode="r"))
    if cfg.predictions:
        read_predictions(cfg.predictions, pairs.keys)  # an unusable file is reported before work starts
        weights[cfg.predictions] = data.fingerprint(Path(cfg.predictions).read_bytes())
    if cfg.match:
        weights[cfg.match] = kept_by(cfg.match)
    settings = json.loads(json.dumps(dataclasses.asdict(cfg)))
    settings |= {"fingerprint": pairs.fingerprint, "weights": weights}
    if is_finished(out, settings):
        if process.main:
            print(f"{out} is finished; nothing to do")
        return
    with run.lock(out, process):
        if process.main:
            checkpoints.write_json(out / "config.json", settings)
        reduce(cfg, inference)


if __name__ == "__main__":
    cli.command_line(lambda: main(tyro.cli(ReduceConfig)))
