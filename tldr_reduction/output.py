"""What a reduction writes: refined captions, annotation JSON, webdataset shards, a CSV that says why.

Authors' code: showlab/datacentric.vlp@a488102, cited as `U:`.
"""

import csv
import io
import tarfile
from collections.abc import Container, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from shared import checkpoints, run, tars
from tldr_reduction.cluster import in_cluster
from tldr_reduction.rows import gathered_codes


def refined(original: str, generated: str) -> str:
    """T = T_o "; " T_g. U:generate_train_json_w_caption.py:45."""
    return f"{original}; {generated}"


def refine_annotations(
    rows: Sequence[Sequence[str]], generated: Iterable[dict], annotations: Iterable[dict]
) -> list[dict]:
    """Annotations with the captions of `rows`, generated ones behind them. U:generate_train_json_w_caption.py:33-82.

    rows: [caption, key] of the source; generated: {"image_id": row number, "caption"}; annotations: {"image",
    "caption"}. A row's key counts from its last "_" on, an annotation's is its file name up to the first dot. Without a
    row of its key an annotation keeps its caption; a row without a generated caption keeps its own; a second one is
    appended, too.
    """
    captions = [row[0] for row in rows]
    for entry in generated:
        row = int(entry["image_id"])
        if 0 <= row < len(captions):
            captions[row] = refined(captions[row], entry["caption"])
    by_key = {row[1].split("_")[-1]: caption for row, caption in zip(rows, captions, strict=True)}
    return [
        {"image": entry["image"], "caption": by_key.get(image_key(entry["image"]), entry["caption"])}
        for entry in annotations
    ]


def image_key(path: str) -> str:
    """train/0/0001.jpg -> 0001"""
    return path.split("/")[-1].split(".")[0]


def write_shards(pairs, kept: dict[int, str], folder: Path, process: run.Process) -> None:
    """Copies of the samples `kept` (row -> caption), all of their files, in one new shard for each that has some.

    Only the .txt changes. Ranks share out the shards; one that is there already is left alone.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(process.rank, len(pairs.paths), process.world_size):
        captions = {str(pairs.keys[row]): kept[row] for row in pairs.rows_of(number) if row in kept}
        path = folder / f"{number:05}.tar"
        if not captions or path.exists():
            continue
        with checkpoints.replaced(path) as file, tarfile.open(fileobj=file, mode="w") as target:
            for name, key, content in members(pairs.paths[number], captions.keys()):
                if tars.key_of(name)[1] == "txt":
                    content = captions[key].encode()
                info = tarfile.TarInfo(name)
                info.size = len(content)
                target.addfile(info, io.BytesIO(content))


def members(path: str, keys: Container[str]) -> Iterator[tuple[str, str, bytes]]:
    """Name, key and content of the files that belong to the samples `keys`; up to the damage, if the tar has some."""
    for name, content in tars.read_tar(path, []):
        key, _ = tars.key_of(name)
        if key in keys:
            yield name, key, content


def write_csv(path: Path, columns: dict[str, Sequence]) -> None:
    """One line a sample, replaced atomically."""
    with checkpoints.replaced(path) as file:
        text = io.TextIOWrapper(file, "utf-8", newline="")
        writer = csv.writer(text)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
        text.detach()


def row_hashes(codes: np.ndarray, chunk: int = 2**16) -> np.ndarray:
    """(N,) uint64, equal for equal code vectors and, but for a chance of N^2/2^64, for those only."""
    rng = np.random.default_rng(0)
    factors = rng.integers(0, 2**64, codes.shape[1], dtype=np.uint64) | np.uint64(1)

    def mixed(rows: np.ndarray) -> np.ndarray:
        x = (rows.astype(np.uint64) + np.uint64(1)) * factors
        x ^= x >> np.uint64(29)
        return (x * np.uint64(0xBF58476D1CE4E5B9)).sum(axis=1)

    return np.concatenate([mixed(codes[first : first + chunk]) for first in range(0, len(codes), chunk)])


def first_of_equal(hashes: np.ndarray) -> np.ndarray:
    """(N,) for each entry the lowest row that holds the same."""
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    return first[inverse.ravel()]


# ------------------------------------------------------------------------------------------------------------ report


def reasons_of(cfg, kept: np.ndarray, selected: np.ndarray) -> list[str]:
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
    first = first_of_equal(pixels[good])
    copies = first != np.arange(len(good))
    duplicate_of = np.full(n, "", dtype=object)
    duplicate_of[good[copies]] = pairs.keys[good[first[copies]]]
    columns["duplicate_of"] = duplicate_of.tolist()
    report["identical_images"] = int(copies.sum())
    if reduction.coded:
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
    if "itm" in report:
        before, after = report["itm"]["before"], report["itm"]["after"]
        print(
            f"ITM score          mean {before['mean']:.3f} before, {after['mean']:.3f} after; "
            f"below 0.5: {before['below_half']:.1f} %, {after['below_half']:.1f} %"
        )
    print("seconds            " + ", ".join(f"{name} {value:.1f}" for name, value in report["seconds"].items()))
