"""What a reduction did: report.csv (one line per sample, with the reason why it was kept or not), report.json, and the
same as a page, report.html, with examples that are drawn by the seed. The page is one file without scripts."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jinja2
import numpy as np
import pandas
import torch

from shared import checkpoints, data
from tldr_reduction.cluster import Clusters, in_cluster
from tldr_reduction.config import ReduceConfig
from tldr_reduction.eval import itm_histogram

SAME = 0.005  # coverages (mean cosines) that differ by less are called equal
SIDE = 96  # pixels of an example's longer side
CLUSTERS, EXAMPLES = 8, 10  # clusters on the page, and samples of each of them, of each reason, of refined captions


class Outcome(NamedTuple):
    """Result of a reduction of n samples."""

    good: np.ndarray  # indices of the readable samples, ascending
    selected: np.ndarray  # indices of the selected samples, a subset of `good`
    kept: np.ndarray  # indices of the samples that the ITM filter leaves, a subset of `selected`
    pixels: np.ndarray  # (n,) hashes of the images
    reasons: np.ndarray  # (n,) strings: why an image cannot be read; "" if it can
    codes: Sequence | None  # (len(good), L') code vectors
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

REASONS = {  # of a selection: why a sample was kept, and why not
    "stride": ("evenly spaced {} of its cluster", "passed over in its cluster"),
    "farthest": ("farthest {} of its cluster", "near its centroid"),
    "random": ("drawn", "not drawn"),
    "first": ("first of the file", "behind the first of the file"),
    "itm": ("high ITM score", "low ITM score"),
    "all": ("all are kept", ""),
}


def table_of(
    cfg: ReduceConfig, keys: np.ndarray, found: Outcome, captions: dict[int, str], generated: dict[int, str]
) -> pandas.DataFrame:
    """The columns of report.csv except scores; `keys` (n,) of the samples, `captions` of the kept ones by row."""
    rows, reasons = np.arange(len(keys)), found.reasons
    kept, selected = np.isin(rows, found.kept), np.isin(rows, found.selected)
    if_kept, if_not = REASONS[cfg.select]
    why = np.where(selected, "low ITM score", if_not)  # selected but not kept: dropped by the ITM filter
    why = np.where(kept, if_kept.format(f"{cfg.keep:g}"), why).astype(object)
    why[reasons != ""] = [f"broken: {reason}" for reason in reasons[reasons != ""]]
    first = first_of_equal(found.pixels[found.good])
    copies = first != np.arange(len(first))
    duplicate_of = np.full(len(keys), "", dtype=object)
    duplicate_of[found.good[copies]] = keys[found.good[first[copies]]]
    if cfg.clustered and cfg.drop_duplicates:
        why[found.good[copies]] = [f"same image as {key}" for key in duplicate_of[found.good[copies]]]
    table = pandas.DataFrame({"key": keys.tolist(), "kept": kept.astype(int), "reason": why})
    table["duplicate_of"] = duplicate_of
    if found.clusters is not None:
        order, position, _ = in_cluster(found.clusters.assignment, cfg.clusters)
        distance = [round(d, 4) for d in found.clusters.dist2.clamp(min=0).sqrt().tolist()]
        put(table, "cluster", found.good, found.clusters.assignment.tolist())
        put(table, "distance", found.good, distance)
        put(table, "position", found.good, position[torch.argsort(order)].tolist())
    put(table, "caption", captions.keys(), captions.values())
    put(table, "generated", generated.keys(), generated.values())
    return table


def put(table: pandas.DataFrame, name: str, rows, values) -> None:
    """Add a column with `values` in `rows`, elsewhere ""."""
    column = np.full(len(table), "", dtype=object)
    column[np.fromiter(rows, np.int64, len(rows))] = list(values)
    table[name] = column


# ---------------------------------------------------------------------------------------------------------- report.json


def itm_summaries(before: np.ndarray, after: np.ndarray, probabilities: bool) -> dict[str, dict]:
    """Mean of the scores of all samples before and of the kept ones after, percent below a cut, histogram over a span.

    Probabilities of a match are cut at 0.5; cosines are cut at their median before.
    """
    ends = np.concatenate([before, after])
    cut, low, high = (0.5, 0.0, 1.0) if probabilities else (float(np.median(before)), ends.min(), ends.max())
    found = {}
    for when, scores in (("before", before), ("after", after)):
        scores = torch.from_numpy(np.asarray(scores, dtype=np.float32))
        found[when] = {
            "mean": scores.mean().item(),
            "cut": cut,
            "below_cut": 100 * (scores < cut).float().mean().item(),
            "span": [float(low), float(high)],
            "histogram": itm_histogram((scores - float(low)) / max(float(high - low), 1e-6)).tolist(),
        }
    return found


def code_summary(codes: np.ndarray) -> dict:
    """Number of code vectors (N, L') that repeat an earlier one, number of codes used, and perplexity of the codes."""
    counts = np.zeros(2**16, dtype=np.int64)
    for first in range(0, len(codes), 2**16):
        found = np.bincount(codes[first : first + 2**16].ravel())
        counts = np.pad(counts, (0, max(len(found) - len(counts), 0)))
        counts[: len(found)] += found
    p = counts / counts.sum()
    return {
        "identical_code_vectors": len(codes) - len(np.unique(row_hashes(codes))),
        "codes_used": int((counts > 0).sum()),
        "perplexity": float(np.exp(-(p * np.log(p + 1e-10)).sum())),
    }


def summary_of(cfg: ReduceConfig, found: Outcome, unread: int) -> dict:
    """Entries of report.json except captions, matching scores, checks, notes and seconds.

    `unread`: number of samples that were lost because their shard is damaged. The sizes of clusters are their minimum,
    quartiles and maximum.
    """
    good, n = found.good, len(found.reasons)
    report = {"samples": n, "broken": int((found.reasons != "").sum()) + unread, "kept": len(found.kept)}
    report |= {"kept_share": len(found.kept) / max(n, 1), "selected": len(found.selected)}
    report["identical_images"] = len(good) - len(np.unique(found.pixels[good]))
    if found.codes is not None:
        report |= code_summary(found.codes)
    if found.clusters is not None:
        sizes = torch.bincount(found.clusters.assignment, minlength=cfg.clusters)
        quantiles = torch.quantile(sizes.float(), torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]))
        report |= {"clusters": cfg.clusters, "empty_clusters": int((sizes == 0).sum())}
        report |= {"cluster_sizes": quantiles.tolist(), "whitened_axes": found.clusters.dim}
        report["objective"] = found.clusters.objective.tolist()
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
    words = "; ".join(
        f"{word} a random choice of as many, by {' and by '.join(names)}" for word, names in kinds.items()
    )
    return [f"The kept samples cover the dropped ones {words}."] if kinds else []


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


def notes_of(cfg: ReduceConfig, report: dict, readable: int) -> list[str]:
    """Sentences about coverage, the kept share, scores and missing captions, for all reports.

    `report` has the entries of `summary_of`, of the captions and of the checks; `readable` is the number of readable
    samples.
    """
    captions, notes = report["captions"], coverage_notes(report.get("checks", {}))
    distinct, share = readable - report["identical_images"], report["kept"] / max(readable, 1)
    if cfg.clustered and cfg.drop_duplicates and report["identical_images"] and distinct <= cfg.keep * readable:
        notes += [
            f"Only {distinct:,} of {readable:,} images are distinct, no more than --keep {cfg.keep:g} asks for: all "
            f"distinct ones are selected, and the clusters have no effect. They have one for --keep below "
            f"{distinct / readable:.2g}."
        ]
    if cfg.clustered and share > cfg.keep + 0.02:
        notes += [
            f"{100 * share:.1f} % are kept, more than --keep {cfg.keep:g}: the number of samples of each of the "
            f"{cfg.clusters:,} clusters is rounded up.{' Fewer --clusters come closer.' * (cfg.clusters > 1)}"
        ]
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
    print(f"duplicates         {report['identical_images']:,} identical images that occurred before")
    if "codes_used" in report:
        print(f"codebook           {report['codes_used']:,} codes used, perplexity {report['perplexity']:.1f}")
    if "clusters" in report:
        low, _, middle, _, high = report["cluster_sizes"]
        print(f"clusters           {report['clusters']:,} of {low:.0f} to {high:.0f} samples, median {middle:.0f}")
    for name, check in report.get("checks", {}).items():
        print(f"against random     {check_line(name, check)}")
    for when, itm in report.get("itm", {}).items():
        print(f"ITM score {when:8} mean {itm['mean']:.3f}; below {itm['cut']:.2f}: {itm['below_cut']:.1f} %")
    for note in report["notes"]:
        print(f"note               {note}")
    print("seconds            " + ", ".join(f"{name} {value:.1f}" for name, value in report["seconds"].items()))


# ---------------------------------------------------------------------------------------------------------- report.html


def write_page(path: Path, cfg: ReduceConfig, pairs, report: dict, table: pandas.DataFrame) -> None:
    """Write the page from the entries of report.json and the table of report.csv; `pairs` has the images."""
    rng = np.random.default_rng(cfg.seed)

    def example(row: int) -> dict:
        """A sample as the page shows it, with a thumbnail as a data URL, and its own caption."""
        line = table.iloc[row].to_dict() | {"picture": "", "shown": ""}
        try:
            pair = pairs.read(row)
        except data.BrokenSample:
            return line
        return line | {"picture": thumbnail(pair.image), "shown": pair.caption}

    def drawn(rows: np.ndarray, count: int = EXAMPLES) -> list[int]:
        """At most `count` of the rows, drawn at random, ascending."""
        return np.sort(rng.permutation(rows)[:count]).tolist()

    where = lambda mask: np.flatnonzero(np.asarray(mask))  # noqa: E731
    refined, copies = drawn(where(table["generated"] != "")), drawn(where(table["duplicate_of"] != ""), EXAMPLES // 2)
    row_of = {key: row for row, key in enumerate(table["key"])} if copies else {}
    others = table["reason"][~table["reason"].str.startswith("same image")]
    reasons = [
        (reason, count, drawn(where(table["reason"] == reason))) for reason, count in others.value_counts().items()
    ]
    clusters = []
    if "cluster" in table:
        sizes = table["cluster"][table["cluster"] != ""].value_counts().sort_index().sort_values(kind="stable")
        for place in np.unique(np.linspace(0, len(sizes) - 1, min(CLUSTERS, len(sizes))).astype(int)):
            rows = where(table["cluster"] == sizes.index[place])
            clusters.append((sizes.index[place], int(table["kept"].to_numpy()[rows].sum()), len(rows), drawn(rows)))
    page = jinja2.Environment(autoescape=True, trim_blocks=True, loader=jinja2.FileSystemLoader(Path(__file__).parent))
    page.filters["example"] = example
    highest = max([1e-6, *(value for itm in report.get("itm", {}).values() for value in itm["histogram"])])
    text = page.get_template("report.html.jinja2").render(
        cfg=cfg, report=report, highest=highest, refined=refined, reasons=reasons, clusters=clusters,
        pairs=[(row_of[table["duplicate_of"][row]], row) for row in copies],
        check_lines=[check_line(name, check) for name, check in report.get("checks", {}).items()],
    )  # fmt: skip
    with checkpoints.replaced(path) as file:
        file.write(text.encode())


def thumbnail(image) -> str:
    """A PIL image as a data URL of a small JPEG."""
    small, buffer = image.copy(), io.BytesIO()
    small.thumbnail((SIDE, SIDE))
    small.save(buffer, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
