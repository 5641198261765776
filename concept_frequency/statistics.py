"""The paper's statistics on counts and scores: log-linear curve, its nulls, misalignment, agreement, long tail, slopes.

Authors' code: bethgelab/frequency_determines_performance@11ef009, `U:`. All in float64; logarithms are natural.
Letters: P pairs (count, score), B bins, R shuffles, K concepts.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse, stats

from shared.errors import UserError

Array = NDArray[np.float64]


class Curve(NamedTuple):
    """Scores of pairs, averaged in bins of log frequency."""

    position: Array  # (B,) exp of the bins' right edges: where upstream draws them
    mean: Array  # (B,) mean score; NaN in an empty bin
    std: Array  # (B,) population standard deviation
    size: NDArray[np.int64]  # (B,) pairs of the bin
    index: NDArray[np.int64]  # (P,) bin of each pair


def log_linear_curve(counts: ArrayLike, scores: ArrayLike, num_bins: int) -> Curve:
    """Mean score against log frequency. Source: U:notebooks/zero_shot_integrated_search_results.ipynb cell 6.

    x = ln max(count, 1); edges = linspace(min x, max x, B); bin k holds edges[k-1] < x <= edges[k], so bin 0 holds only
    the smallest x (all zeros and ones). Pairs are pooled over datasets: a concept of two datasets is counted twice.
    """
    x = np.log(np.maximum(np.asarray(counts, dtype=np.float64), 1))
    y = np.asarray(scores, dtype=np.float64)
    if len(x) != len(y) or not len(x):
        raise UserError(f"a curve needs as many counts as scores, not {len(x)} and {len(y)}")
    if num_bins < 2:
        raise UserError(f"a curve has two bins or more, not {num_bins}")
    edges = np.linspace(x.min(), x.max(), num_bins)
    index = np.digitize(x, edges, right=True)
    size = np.bincount(index, minlength=num_bins)
    with np.errstate(invalid="ignore"):
        mean = np.bincount(index, y, minlength=num_bins) / size
        std = np.sqrt(np.bincount(index, (y - mean[index]) ** 2, minlength=num_bins) / size)
    return Curve(np.exp(edges), mean, std, size, index)


def from_saved(saved: dict[str, ArrayLike]) -> Curve:
    """A curve from the authors' saved exp_bins, cum_means and cum_stds; sizes were not saved and are 0."""
    position, mean, std = (np.asarray(saved[key], dtype=np.float64) for key in ("exp_bins", "cum_means", "cum_stds"))
    nothing = np.zeros(0, dtype=np.int64)
    return Curve(position, mean, std, np.zeros(len(position), dtype=np.int64), nothing)


def correlation(curve: Curve, bins: slice = slice(None)) -> tuple[float, float]:
    """Pearson's rho of ln position and mean score over a slice of n bins, and its two-sided p (t test with n - 2
    degrees of freedom).

    The paper's slices: 1:-1 for classification, 2:-1 for LAION-400M, 0:-4 for SynthCI, 3: for retrieval. Empty bins are
    left out; NaN for fewer than two bins or constant means.
    """
    x, y = np.log(curve.position[bins]), curve.mean[bins]
    x, y = x[~np.isnan(y)], y[~np.isnan(y)]
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan"), float("nan")
    result = stats.pearsonr(x, y)
    return float(result.statistic), float(result.pvalue)


def permutation_null(
    counts: ArrayLike,
    scores: ArrayLike,
    groups: ArrayLike | None,
    num_bins: int,
    bins: slice = slice(None),
    repetitions: int = 300,
    seed: int = 0,
) -> Array:
    """rho of the curve (R,) when scores are shuffled: across everything (`groups` None), or within each group (P,).

    Pooling datasets confounds: datasets differ in mean frequency and mean accuracy, which alone gives a correlation;
    shuffling within datasets measures it. Not in the paper.
    """
    curve, y = log_linear_curve(counts, scores, num_bins), np.asarray(scores, dtype=np.float64)
    groups = np.zeros(len(y), dtype=np.int64) if groups is None else np.unique(groups, return_inverse=True)[1]
    rng = np.random.default_rng(seed)
    order = np.argsort(groups, kind="stable")
    # sorting by group plus a random number below 1 permutes within groups
    shuffled = np.argsort(groups + rng.random((repetitions, len(y))), axis=1)
    drawn = np.empty((repetitions, len(y)))
    drawn[:, order] = y[shuffled]
    member = np.eye(num_bins)[curve.index]  # (P, B)
    with np.errstate(invalid="ignore"):
        means = (drawn @ member / curve.size)[:, bins]  # (R, B)
    x = np.log(curve.position[bins])
    filled = ~np.isnan(means[0])
    x, means = x[filled] - x[filled].mean(), means[:, filled] - means[:, filled].mean(axis=1, keepdims=True)
    with np.errstate(invalid="ignore"):  # constant means have no correlation: NaN
        return means @ x / np.sqrt((means**2).sum(axis=1) * (x @ x))


def unbinned(counts: ArrayLike, scores: ArrayLike) -> dict[str, float]:
    """Without bins: Pearson of all pairs with x = ln max(count, 1), and Spearman with the counts as they are."""
    f, y = np.asarray(counts, dtype=np.float64), np.asarray(scores, dtype=np.float64)
    return {
        "pearson": float(stats.pearsonr(np.log(np.maximum(f, 1)), y).statistic),
        "spearman": float(stats.spearmanr(f, y).statistic),
    }


def slope_per_decade(counts: ArrayLike, scores: ArrayLike, repetitions: int = 1000, seed: int = 0) -> dict[str, float]:
    """Least-squares slope of score on log10 max(count, 1) over concepts, 95 % bootstrap interval over concepts."""
    x, y = np.log10(np.maximum(np.asarray(counts, dtype=np.float64), 1)), np.asarray(scores, dtype=np.float64)
    rows = np.random.default_rng(seed).integers(len(x), size=(repetitions, len(x)))
    centred = x[rows] - x[rows].mean(axis=1, keepdims=True)
    with np.errstate(invalid="ignore"):  # draws of equally frequent concepts have no slope: NaN
        slopes = (centred * y[rows]).sum(axis=1) / (centred**2).sum(axis=1)
    low, high = np.nanquantile(slopes, (0.025, 0.975))
    return {"slope": float(stats.linregress(x, y).slope), "low": float(low), "high": float(high)}


def small_bins(sizes: ArrayLike) -> list[int]:
    """Bins whose size is more than 1.5 interquartile ranges below the first quartile, the usual rule for outliers.

    The paper (section 3.2) says that an IQR rule left out bins with few concepts; the slices of its figures do not
    follow from this one.
    """
    x = np.asarray(sizes, dtype=np.float64)
    first, third = np.quantile(x, (0.25, 0.75))
    return np.flatnonzero(x < first - 1.5 * (third - first)).tolist()


class Diagnostics(NamedTuple):
    """The paper's correlation, and its value under other choices."""

    rho: float  # on the slice of bins
    p: float
    all_bins: float
    inner: float  # bins 1:-1
    pearson: float  # without bins
    spearman: float
    bin0: float  # share of pairs in bin 0, which most of the paper's panels leave out
    across: float  # mean rho of scores shuffled across everything
    within: float  # ... within each group
    reached: float  # share of the shuffles within groups that reach rho


def diagnose(
    counts: ArrayLike, scores: ArrayLike, groups: ArrayLike, num_bins: int, bins: slice, repetitions: int = 300
) -> tuple[Curve, Diagnostics]:
    """(curve of pairs (P,), correlation on a slice of its bins with diagnostics); groups (P,): data set of each."""
    curve = log_linear_curve(counts, scores, num_bins)
    rho, p = correlation(curve, bins)
    across = permutation_null(counts, scores, None, num_bins, bins, repetitions)
    within = permutation_null(counts, scores, groups, num_bins, bins, repetitions)
    flat = unbinned(counts, scores)
    return curve, Diagnostics(
        rho, p, correlation(curve)[0], correlation(curve, slice(1, -1))[0], flat["pearson"], flat["spearman"],
        float(curve.size[0] / len(curve.index)), float(across.mean()), float(within.mean()),
        float((within >= rho).mean()),
    )  # fmt: skip


# --------------------------------------------------------------------------------------------- what the counts are like


def misaligned(text: sparse.sparray, image: sparse.sparray) -> int:
    """Number of samples with concepts in both caption and image, but none in common; from bool (N, K) of both.

    Source: U:src/misalignment_degree_quantification.py:152. Section 5 of the paper also counts samples without any
    concept.
    """
    with_text, with_image, agree = (of.sum(axis=1) > 0 for of in (text, image, text.multiply(image)))
    return int((with_text & with_image & ~agree).sum())


def misalignment_degrees(number: int, with_text: int, with_image: int, dataset_size: int) -> tuple[float, float]:
    """`misaligned` samples as a share of the samples with concepts, on the side that has more of them, and of the
    corpus, the paper's degree."""
    return number / max(with_text, with_image, 1), number / dataset_size


def frequency_agreement(a: dict[str, int], b: dict[str, int]) -> tuple[float, int]:
    """(Spearman's rank correlation, n) of two corpora's counts over the n concepts in both.

    Upstream's notebook cuts two lists to equal length instead of aligning names, and mixes modalities.
    """
    names = sorted(a.keys() & b.keys())
    return float(stats.spearmanr([a[n] for n in names], [b[n] for n in names]).statistic), len(names)


def long_tail(counts: ArrayLike) -> dict[str, float]:
    """Measures of how few concepts hold most of the occurrences. Source of the plot:
    U:notebooks/long-tailed-nature.ipynb."""
    x = np.sort(np.asarray(counts, dtype=np.int64))
    n, total, largest = len(x), x.sum(), x.max()
    rank = np.arange(1, n + 1)
    return {
        "n": n,
        "max": int(largest),
        "n_zero": int((x == 0).sum()),
        "n_plotted": int((x > 0).sum()),
        "frac_norm_below_1e-3": float((x / largest < 1e-3).mean()),
        "frac_norm_below_1e-2": float((x / largest < 1e-2).mean()),
        "gini": float(((2 * rank - n - 1) * x).sum() / (n * total)),
        "top1pct_share": float(x[n - max(n // 100, 1) :].sum() / total),
        "median": float(np.median(x)),
    }


def negligible(counts: ArrayLike, corpus_size: int, share: float = 1e-5) -> float:
    """Fraction of concepts that occur in less than `share` of the corpus' samples.

    The paper (section 5) speaks of "almost negligible frequencies relative to the size of the datasets" and names no
    share; this one is ours.
    """
    return float((np.asarray(counts, dtype=np.float64) < share * corpus_size).mean())


DECADES = ((0, 0), *((10**k, 10 ** (k + 1) - 1) for k in range(9)))  # of counts: 0, 1 to 9, 10 to 99, ...
TABLE6_BANDS = ((0, 1), (2, 9), (10, 99), (100, 1000), (1001, 10_000))  # these give table 6


def frequency_bands(
    counts: ArrayLike, scores: ArrayLike, bands: Sequence[tuple[int, int]] = DECADES
) -> dict[str, tuple[int, float]]:
    """{band: (concepts, mean score)} for counts from a lowest to a highest one, both included; empty bands left out."""
    f, y = np.asarray(counts, dtype=np.int64), np.asarray(scores, dtype=np.float64)
    found = {f"{low:,} to {high:,}" if low < high else f"{low:,}": (f >= low) & (f <= high) for low, high in bands}
    return {band: (int(rows.sum()), float(y[rows].mean())) for band, rows in found.items() if rows.any()}


def two_slopes(imagenet: ArrayLike, tail: ArrayLike, split: float = 50.0) -> dict[str, float]:
    """Slopes of tail accuracy on ImageNet accuracy (percent) for models below and above `split`, one line each.

    Source: U:notebooks/let_it_wag_eval.ipynb cell 8.
    """
    x, y = np.asarray(imagenet, dtype=np.float64), np.asarray(tail, dtype=np.float64)
    found: dict[str, float] = {}
    for name, rows in (("below", x < split), ("above", x > split)):
        found[f"n_{name}"] = int(rows.sum())
        found[f"slope_{name}"] = float(stats.linregress(x[rows], y[rows]).slope) if rows.sum() > 1 else float("nan")
    return found


def frequency_buckets(counts: ArrayLike, smallest: int = 100, largest: int = 1000) -> list[tuple[float, float]]:
    """(min, max) count of the people study's buckets, most frequent first; `counts` of names of several words.

    Source: U:src/text_to_image_experiments/human_experiment_evaluation/human_plot.py:38. A bucket ends where the count
    changes (also to zero) if it has at least `smallest` names, or when it has `largest`. Names with a count of zero are
    in no bucket. Names with positive counts that are left at the end are in none, either, if there are fewer than
    `smallest`; upstream fills their bucket with zeros.
    """
    buckets: list[tuple[float, float]] = []
    current: list[float] = []
    for count in np.sort(np.asarray(counts))[::-1]:
        if current and count < current[-1] and len(current) >= smallest:
            buckets.append((float(current[-1]), float(current[0])))
            current = []
        if count <= 0:
            break
        current.append(count)
        if len(current) == largest:
            buckets.append((float(current[-1]), float(current[0])))
            current = []
    return buckets


def people_points(counts: ArrayLike, judged: dict[int, Sequence[float]], buckets: int = 46) -> tuple[Array, Array]:
    """(frequency (n,), accuracy (n,)) of the people study: middle of a bucket, mean judgement of its names' images.

    Source: U:src/text_to_image_experiments/human_experiment_evaluation/human_plot.py:95-141. `counts` of names of
    several words, `judged`: scores by bucket. Of the first `buckets`, those with judgements are used, except the
    most frequent one.
    """
    ends = frequency_buckets(counts)[:buckets]
    middles = {i: (low + high) / 2 for i, (low, high) in enumerate(ends) if judged.get(i)}
    points = sorted((middle, float(np.mean(judged[i]))) for i, middle in middles.items())
    x, y = np.array(points[:-1], dtype=np.float64).reshape(-1, 2).T
    return x, y


def pooled(
    counts: Sequence[dict[str, int]], scores: Sequence[dict[str, float]]
) -> tuple[NDArray[np.int64], Array, NDArray[np.int64]]:
    """(counts (P,), scores (P,), dataset (P,)) of several datasets' concepts; UserError names one without a score."""
    rows = []
    for dataset, (frequency, score) in enumerate(zip(counts, scores, strict=True)):
        missing = sorted(frequency.keys() - score.keys())
        if missing:
            raise UserError(f"dataset number {dataset} has a count but no score for {missing[0]!r}")
        rows += [(frequency[name], score[name], dataset) for name in sorted(frequency)]
    count, score, dataset = (np.array(column) for column in zip(*rows, strict=True))
    return count.astype(np.int64), score.astype(np.float64), dataset.astype(np.int64)
