"""Reports of a reduction: report.csv, one line per sample with the reason why it was kept or not, and report.json."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from shared import checkpoints
from tldr_reduction.cluster import Clusters, in_cluster
from tldr_reduction.config import ReduceConfig, without_effect
from tldr_reduction.eval import itm_histogram

SAME = 0.005  # coverages (mean cosines) that differ by less are called equal


class Outcome(NamedTuple):
    """Result of a reduction of n samples."""

    good: np.ndarray  # indices of the readable samples, ascending
    selected: np.ndarray  # indices of the selected samples, a subset of `good`
    kept: np.ndarray  # indices of the samples that the ITM filter leaves, a subset of `selected`
    pixels: np.ndarray  # (n,) hashes of the images
    reasons: np.ndarray  # (n,) strings: why an image cannot be read; "" if it can
    codes: np.ndarray | None  # (len(good), L') code vectors
    clusters: Clusters | None  # of the samples `good`


# ----------------------------------------------------------------------------------------------------------- duplicates


def row_hashes(codes: np.ndarray, chunk: int = 2**16) -> np.ndarray:
    """Hash code vectors (N, L') to (N,) uint64. Equal vectors have equal hashes; the probability that any two different
    ones have equal hashes is at most N^2/2^64."""
    rng = np.random.default_rng(0)
    factors = rng.integers(0, 2**64, codes.shape[1], dtype=np.uint64) | np.uint64(1)

    def mixed(block: np.ndarray) -> np.ndarray:
        x = (block.astype(np.uint64) + np.uint64(1)) * factors
        x ^= x >> np.uint64(29)
        return (x * np.uint64(0xBF58476D1CE4E5B9)).sum(axis=1)

    return np.concatenate([mixed(codes[first : first + chunk]) for first in range(0, len(codes), chunk)])


def first_of_equal(hashes: np.ndarray) -> np.ndarray:
    """For each of the hashes (N,), the index of the first equal one: (N,)."""
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    return first[inverse.ravel()]


def distinct_images(hashes: np.ndarray) -> np.ndarray:
    """Indices of the images with hashes (N,) that repeat no earlier one, ascending."""
    return np.flatnonzero(first_of_equal(hashes) == np.arange(len(hashes)))


# ----------------------------------------------------------------------------------------------------------- report.csv


def reasons_of(cfg: ReduceConfig, kept: np.ndarray, selected: np.ndarray) -> list[str]:
    """Why each of n samples was kept or not; kept (n,) and selected (n,) bool."""
    rules = {
        "stride": (f"evenly spaced {cfg.keep:g} of its cluster", "passed over in its cluster"),
        "nearest": (f"nearest {cfg.keep:g} of its cluster", "far from its centroid"),
        "farthest": (f"farthest {cfg.keep:g} of its cluster", "near its centroid"),
        "random": ("drawn", "not drawn"),
        "first": ("first of the file", "behind the first of the file"),
        "itm": ("high ITM score", "low ITM score"),
        "all": ("all are kept", ""),
    }[cfg.select]
    if_kept, if_not_selected = rules
    reasons = np.where(selected, "low ITM score", if_not_selected)  # selected but not kept: dropped by the ITM filter
    return np.where(kept, if_kept, reasons).tolist()


def table_of(cfg: ReduceConfig, keys: np.ndarray, found: Outcome) -> dict[str, list]:
    """Columns of report.csv except scores and captions; `keys` (n,) of the samples."""
    rows, reasons = np.arange(len(keys)), found.reasons
    kept = np.isin(rows, found.kept)
    why = np.array(reasons_of(cfg, kept, np.isin(rows, found.selected)), dtype=object)
    why[reasons != ""] = [f"broken: {reason}" for reason in reasons[reasons != ""]]
    first = first_of_equal(found.pixels[found.good])
    copies = first != np.arange(len(first))
    duplicate_of = np.full(len(keys), "", dtype=object)
    duplicate_of[found.good[copies]] = keys[found.good[first[copies]]]
    if cfg.clustered and cfg.drop_duplicates:
        why[found.good[copies]] = [f"same image as {key}" for key in duplicate_of[found.good[copies]]]
    columns = {"key": keys.tolist(), "kept": kept.astype(int).tolist(), "reason": why.tolist()}
    columns["duplicate_of"] = duplicate_of.tolist()
    if found.clusters is not None:
        order, position, _ = in_cluster(found.clusters.assignment, cfg.clusters)
        distance = [round(d, 4) for d in found.clusters.dist2.clamp(min=0).sqrt().tolist()]
        columns["cluster"] = column(len(keys), found.good, found.clusters.assignment.tolist())
        columns["distance"] = column(len(keys), found.good, distance)
        columns["position"] = column(len(keys), found.good, position[torch.argsort(order)].tolist())
    return columns


def column(n: int, rows: np.ndarray, values: Sequence) -> list:
    """A column of n entries: `values` in `rows`, elsewhere ""."""
    entries: list = [""] * n
    for row, value in zip(rows.tolist(), values, strict=True):
        entries[row] = value
    return entries


def write_csv(path: Path, columns: dict[str, Sequence]) -> None:
    """Write columns {name: values} with one line per sample; the file is replaced atomically."""
    with checkpoints.replaced(path) as file:
        text = io.TextIOWrapper(file, "utf-8", newline="")
        writer = csv.writer(text)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
        text.detach()


# ---------------------------------------------------------------------------------------------------------- report.json


def itm_summary(scores: np.ndarray, cut: float = 0.5, span: tuple[float, float] = (0.0, 1.0)) -> dict:
    """Mean of matching scores (n,), percent below `cut`, and their histogram over `span`."""
    scores = torch.from_numpy(np.asarray(scores, dtype=np.float32))
    return {
        "mean": scores.mean().item(),
        "cut": cut,
        "below_cut": 100 * (scores < cut).float().mean().item(),
        "span": list(span),
        "histogram": itm_histogram((scores - span[0]) / max(span[1] - span[0], 1e-6)).tolist(),
    }


def itm_summaries(before: np.ndarray, after: np.ndarray, probabilities: bool) -> dict:
    """`itm_summary` of scores of all samples before and of the kept ones after, with the same cut and span.

    Probabilities of a match are cut at 0.5; cosines are cut at their median before.
    """
    if probabilities:
        return {"before": itm_summary(before), "after": itm_summary(after)}
    ends = np.concatenate([before, after])
    how = float(np.median(before)), (float(ends.min()), float(ends.max()))
    return {"before": itm_summary(before, *how), "after": itm_summary(after, *how)}


def code_summary(codes: np.ndarray) -> dict:
    """Number of code vectors (N, L') that repeat an earlier one, number of codes used, and perplexity of the codes."""
    num_codes = int(codes.max()) + 1 if len(codes) else 0
    counts = np.zeros(num_codes, dtype=np.int64)
    for first in range(0, len(codes), 2**16):
        counts += np.bincount(codes[first : first + 2**16].ravel(), minlength=num_codes)
    p = counts / counts.sum()
    return {
        "identical_code_vectors": len(codes) - len(np.unique(row_hashes(codes))),
        "codes_used": int((counts > 0).sum()),
        "perplexity": float(np.exp(-(p * np.log(p + 1e-10)).sum())),
    }


def cluster_summary(clusters: Clusters, k: int) -> dict:
    """Number of clusters and of empty ones, sizes (minimum, quartiles, maximum), axes, and k-means' objective."""
    sizes = torch.bincount(clusters.assignment, minlength=k)
    quantiles = torch.quantile(sizes.float(), torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]))
    return {
        "clusters": k,
        "empty_clusters": int((sizes == 0).sum()),
        "cluster_sizes": quantiles.tolist(),
        "whitened_axes": clusters.dim,
        "objective": clusters.objective.tolist(),
    }


def summary_of(cfg: ReduceConfig, found: Outcome, unread: int) -> dict:
    """Entries of report.json except captions, matching scores, checks, notes and seconds.

    `unread`: number of samples that were lost because their shard is damaged.
    """
    good, pixels = found.good, found.pixels[found.good]
    report = {
        "samples": len(found.reasons),
        "broken": int((found.reasons != "").sum()) + unread,
        "kept": len(found.kept),
        "kept_share": len(found.kept) / max(len(found.reasons), 1),
        "selected": len(found.selected),
        "identical_images": len(good) - len(np.unique(pixels)),
    }
    if found.codes is not None:
        report |= code_summary(found.codes)
    if found.clusters is not None:
        report |= cluster_summary(found.clusters, cfg.clusters)
    return report


def check_line(name: str, check: dict) -> str:
    """Format the result of `quality.measured` on the features `name` as a line of text."""
    drawn = check["coverage_random"]
    random = f"{np.mean(drawn):.3f} at random ({min(drawn):.3f} to {max(drawn):.3f})"
    words = f"coverage {check['coverage']:.3f}, {random}"
    if "cohesion" in check:
        others = f"{check['cohesion_shuffled']:.3f} shuffled, {check['cohesion_kmeans']:.3f} by k-means on them"
        words = f"cohesion {check['cohesion']:.3f}, {others}; {words}"
    return f"by {name}: {words}"


def coverage_notes(checks: dict[str, dict]) -> list[str]:
    """A sentence on whether kept samples cover the dropped ones better than random choices, or [] without checks."""
    kinds: dict[str, list[str]] = {}
    for name, check in checks.items():
        gain = check["coverage"] - np.mean(check["coverage_random"])
        word = "about as well as" if abs(gain) < SAME else "better than" if gain > 0 else "worse than"
        kinds.setdefault(word, []).append(name)
    if not kinds:
        return []
    words = "; ".join(
        f"{word} a random choice of as many, by {' and by '.join(names)}" for word, names in kinds.items()
    )
    return [f"The kept samples cover the dropped ones {words}."]


def self_score(cfg: ReduceConfig) -> str | None:
    """Why scores are self-scores: the model scores captions that it wrote or learned. None if this is not known."""
    if cfg.scorer is None:
        return None
    if cfg.scorer == cfg.caption_model:
        return "the captioner scores its own captions"
    settings = Path(cfg.scorer) / "config.json"
    if settings.is_file() and checkpoints.read_json(settings).get("data") == cfg.data:
        return "the scorer was trained on these captions"
    return None


def notes_of(cfg: ReduceConfig, report: dict, readable: int, unchecked: str = "") -> list[str]:
    """Sentences about missing captions, scores or comparisons, settings without effect, and coverage, for report.json,
    report.html and the terminal.

    `report` has the entries of `summary_of`, of the captions and of the checks; `readable` is the number of readable
    samples; `unchecked` says why features of an encoder are not among the checks.
    """
    captions, notes = report["captions"], coverage_notes(report.get("checks", {}))
    if unchecked:
        notes += [f"The selection was not compared on features of an independent encoder: {unchecked}."]
    if cfg.data.endswith(".json"):
        root = cfg.image_root or Path(cfg.data).parent
        notes += [f"Images were not copied: pass --image-root {root} beside the new annotation.json."]
    distinct = readable - report["identical_images"]
    if cfg.clustered and cfg.drop_duplicates and report["identical_images"] and distinct <= cfg.keep * readable:
        notes += [
            f"Only {distinct:,} of {readable:,} images are distinct, no more than --keep {cfg.keep:g} asks for: all "
            f"distinct ones are selected, and the clusters have no effect. They have one for --keep below "
            f"{distinct / readable:.2g}."
        ]
    share = report["kept"] / max(readable, 1)
    if cfg.clustered and share > cfg.keep + 0.02:
        notes += [
            f"{100 * share:.1f} % are kept, more than --keep {cfg.keep:g}: the number of samples of each of the "
            f"{cfg.clusters:,} clusters is rounded up.{' Fewer --clusters come closer.' * (cfg.clusters > 1)}"
        ]
    if flags := without_effect(cfg, report["samples"]):
        have = "has" if len(flags) == 1 else "have"
        notes += [f"{', '.join(flags)} {have} no effect with --select {cfg.select}."]
    if why := self_score(cfg):
        notes += [f"Scores are self-scores: {why}, so that errors that both share are not seen."]
    if captions["kind"] == "original" and cfg.select != "all":
        why = "" if captions["by"] else ", because there is no --caption-model and no --predictions"
        notes += [f"Captions are not changed{why}. In the paper's table, such a reduction is worse than the full data."]
    if captions["without_generated"]:
        notes += [
            f"{captions['without_generated']:,} of {report['kept']:,} kept samples have no generated caption: they "
            "keep their own."
        ]
    if captions["kind"] != "original" and not cfg.scorer:
        notes += ["Captions are not scored before and after, because there is no --scorer."]
    return notes


def print_report(report: dict) -> None:
    """Print the main numbers of report.json."""
    print(f"kept               {report['kept']:,} of {report['samples']:,} ({100 * report['kept_share']:.1f} %)")
    vectors = f", {report['identical_code_vectors']:,} code vectors" if "codes_used" in report else ""
    print(f"duplicates         {report['identical_images']:,} identical images{vectors} that occurred before")
    if "codes_used" in report:
        print(f"codebook           {report['codes_used']:,} codes used, perplexity {report['perplexity']:.1f}")
    if "clusters" in report:
        low, _, middle, _, high = report["cluster_sizes"]
        print(
            f"clusters           {report['clusters']:,} of {low:.0f} to {high:.0f} samples, median {middle:.0f}; "
            f"{report['empty_clusters']:,} empty; {report['whitened_axes']} axes"
        )
    for name, check in report.get("checks", {}).items():
        print(f"against random     {check_line(name, check)}")
    if "itm" in report:
        before, after = report["itm"]["before"], report["itm"]["after"]
        print(
            f"ITM score          mean {before['mean']:.3f} before, {after['mean']:.3f} after; "
            f"below {before['cut']:.2f}: {before['below_cut']:.1f} %, {after['below_cut']:.1f} %"
        )
    for note in report["notes"]:
        print(f"note               {note}")
    print("seconds            " + ", ".join(f"{name} {value:.1f}" for name, value in report["seconds"].items()))
