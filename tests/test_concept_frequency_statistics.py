"""Curves, null distributions, slopes and properties of counts."""

import math

import numpy as np
import pytest
from scipy import sparse

from concept_frequency import statistics
from concept_frequency.statistics import (
    correlation,
    log_linear_curve,
    misaligned,
    misalignment_degrees,
    permutation_null,
)


@pytest.mark.golden("concept_frequency", "published_curves")
def test_published_curves_correlate(case):
    """Correlations computed from the published bins."""
    for row in case.json:
        position, mean, std, size = (np.array(row[key]) for key in ("exp_bins", "bin_means", "bin_stds", "bin_counts"))
        curve = statistics.Curve(position, mean, std, size, np.zeros(0, dtype=np.int64))
        bins = slice(*row["slice"])
        assert correlation(curve, bins) == pytest.approx((row["rho"], row["p"]), abs=1e-6)
        assert correlation(curve)[0] == pytest.approx(row["rho_all_bins"], abs=1e-6)
        if row["figure_legend_rho"] is not None:
            assert round(correlation(curve, bins)[0], 2) == pytest.approx(row["figure_legend_rho"])


def test_misalignment_counts_documents_once():
    def of(pairs: list[tuple[int, int]]) -> sparse.csr_array:
        return sparse.csr_array((np.ones(len(pairs), dtype=bool), tuple(zip(*pairs, strict=True))), (4, 5))

    text, image = of([(0, 0), (0, 1), (1, 0), (2, 2)]), of([(0, 1), (1, 3), (1, 4), (3, 0)])
    assert misaligned(text, image) == 1 and misalignment_degrees(1, 3, 3, 10) == (1 / 3, 0.1)


def test_permutation_null():
    rng = np.random.default_rng(0)
    groups = np.repeat([0, 1], 400)
    counts = np.where(groups == 0, rng.integers(1, 100, 800), rng.integers(1000, 100_000, 800))
    scores = 40 * groups + rng.normal(20, 5, 800)  # nothing but a difference between datasets
    true = correlation(log_linear_curve(counts, scores, 8))[0]
    within = permutation_null(counts, scores, groups, 8)
    across = permutation_null(counts, scores, None, 8)
    assert len(within) == len(across) == 300
    assert true > 0.8 and within.mean() > 0.8  # the shuffle within datasets shows the confound,
    assert abs(across.mean()) < 0.1 < across.std()  # the one across everything does not
    assert np.array_equal(within, permutation_null(counts, scores, groups, 8))


def test_empty_bins_are_left_out():
    curve = log_linear_curve([1, 1, 10, 1000, 1000], [0.0, 0.2, 0.3, 0.5, 0.7], 7)
    assert (curve.size == 0).sum() == 4 and np.isnan(curve.mean).sum() == 4
    rho, p = correlation(curve)
    assert 0.9 < rho < 1 and 0 < p < 1
    assert all(math.isnan(value) for value in correlation(curve, slice(1, 3)))
    with pytest.raises(ValueError, match="0 and 0"):
        log_linear_curve([], [], 3)
    with pytest.raises(ValueError, match="two bins or more"):
        log_linear_curve([1, 10], [0.0, 1.0], 1)  # the edge would leave the largest count out


def test_slope_per_decade():
    counts = 10 ** np.linspace(0, 3, 200)
    noise = np.random.default_rng(0).normal(0, 3, 200)
    found = statistics.slope_per_decade(counts, 12 * np.log10(counts) + noise)
    assert found["low"] < 12 < found["high"] and found["high"] - found["low"] < 2


def test_frequency_buckets():
    counts = np.concatenate([np.repeat(7, 150), np.repeat(5, 60), np.repeat(3, 60), np.repeat(0, 500), [1] * 99])
    assert statistics.frequency_buckets(counts) == [(7.0, 7.0), (3.0, 5.0)]
    assert statistics.frequency_buckets(np.repeat(2, 2500)) == [(2.0, 2.0), (2.0, 2.0)]
    # zero ends a bucket
    assert statistics.frequency_buckets([5] * 120 + [2] * 110 + [0] * 9) == [
        (5.0, 5.0),
        (2.0, 2.0),
    ]
    assert statistics.frequency_buckets([5] * 120 + [2] * 110) == [(5.0, 5.0)]  # nothing does


def test_people_points():
    counts = [90] * 100 + [40] * 100 + [8] * 100 + [1] * 100 + [0] * 5
    x, y = statistics.people_points(counts, {0: [1.0], 1: [1.0, 0.5], 3: [0.0, 0.5]})
    assert x.tolist() == [1, 40] and y.tolist() == [0.25, 0.75]  # less the most frequent, and one nobody judged


def test_frequency_bands_and_negligible_concepts():
    counts, scores = [0, 0, 1, 9, 10, 500], [1.0, 3.0, 4.0, 6.0, 7.0, 8.0]
    found = statistics.frequency_bands(counts, scores)
    assert found == {"0": (2, 2.0), "1 to 9": (2, 5.0), "10 to 99": (1, 7.0), "100 to 999": (1, 8.0)}
    assert statistics.negligible(counts, 1_000_000) == pytest.approx(4 / 6)


def test_small_bins_by_the_rule_of_quartiles():
    assert statistics.small_bins([100, 110, 120, 130, 2]) == [4]
    assert statistics.small_bins([1, 10, 100, 1000]) == []


def test_diagnostics_are_those_of_the_functions():
    rng = np.random.default_rng(0)
    counts, groups = (10 ** rng.uniform(0, 4, 500)).astype(int), np.repeat(["a", "b"], 250)
    scores = np.log(counts + 1.0) + rng.normal(0, 1, 500)
    curve, about = statistics.diagnose(counts, scores, groups, 10, slice(1, -1), 50)
    assert (about.rho, about.p) == correlation(curve, slice(1, -1)) and about.inner == about.rho
    assert about.within == pytest.approx(permutation_null(counts, scores, groups, 10, slice(1, -1), 50).mean())
    assert about.bin0 == curve.size[0] / 500 and about.reached == 0
    saved = {"exp_bins": curve.position, "cum_means": curve.mean, "cum_stds": curve.std}
    assert correlation(statistics.from_saved(saved), slice(1, -1)) == (about.rho, about.p)
