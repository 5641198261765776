"""Whitening, k-means and selections with faiss and with hand-made examples."""

import numpy as np
import pytest
import torch

from tldr_reduction import cluster
from tldr_reduction.cluster import (
    fit_whitening,
    keep_top,
    nearest,
    random_subset,
    select_by_distance,
    select_fraction,
    train_kmeans,
    whitened,
)


def whiten(codes: torch.Tensor, dim: int) -> torch.Tensor:
    return whitened(fit_whitening(codes, dim), codes)


def test_whitening_of_constant_positions():
    codes = torch.randint(0, 50, (200, 12), generator=torch.Generator().manual_seed(0))
    codes[:, 3], codes[:, 7] = 9, codes[:, 2]  # one constant position, and one equal to another
    features = whiten(codes, 256)
    assert features.shape == (200, 10) and features.isfinite().all()
    torch.testing.assert_close(features.norm(dim=1), torch.ones(200))
    constant = whiten(torch.full((20, 4), 7), 256)
    assert constant.isfinite().all() and constant.shape == (20, 1)
    assert nearest(constant, train_kmeans(constant, 3, 0)[0])[0].max() < 3


def test_clusters_in_chunks(monkeypatch):
    codes = torch.randint(0, 9, (900, 10), generator=torch.Generator().manual_seed(0)).numpy().astype(np.uint16)
    whole = cluster.cluster_codes(codes, 12)
    monkeypatch.setattr(cluster, "CHUNK", 64)
    parts = cluster.cluster_codes(codes, 12)
    assert (whole.assignment == parts.assignment).float().mean() > 0.99
    monkeypatch.setattr(cluster, "POINTS", 20)
    assert cluster.cluster_codes(codes, 12).assignment.shape == (900,)
    with pytest.raises(ValueError, match="cannot make 901 clusters"):
        train_kmeans(torch.randn(900, 2), 901, 0)


def test_selections():
    generator = torch.Generator().manual_seed(0)
    assignment = torch.randint(0, 7, (300,), generator=generator)
    assignment[assignment == 4] = 5  # an empty cluster
    sizes = torch.bincount(assignment, minlength=7)
    for n in (1, 2, 4, 1000):
        kept = select_fraction(assignment, 7, 1 / n)
        assert torch.equal(torch.bincount(assignment[kept], minlength=7), -(-sizes // n))
    for fraction in (0.0002, 0.22, 0.167, 0.5, 1.0):
        kept = select_fraction(assignment, 7, fraction)
        assert torch.equal(torch.bincount(assignment[kept], minlength=7), (sizes * fraction - 1e-5).ceil().long())
    dist2 = torch.rand(300, generator=generator)
    far = select_by_distance(assignment, dist2, 7, 0.25)
    assert torch.equal(torch.bincount(assignment[far], minlength=7), -(-sizes // 4))
    for c in range(7):
        members = dist2[assignment == c].sort().values
        assert torch.equal(
            dist2[far[assignment[far] == c]].sort().values, members[len(members) - -(-len(members) // 4) :]
        )
    assert torch.equal(random_subset(100, 0.25, 3), random_subset(100, 0.25, 3))
    assert not torch.equal(random_subset(100, 0.25, 3), random_subset(100, 0.25, 4))
    assert len(random_subset(100, 0.25, 3).unique()) == 25
    assert keep_top(torch.tensor([1.0, 3, 2, 3]), 0.5).tolist() == [False, True, False, True]


def test_a_drawn_start_favours_no_member():
    """As many members of each cluster are kept as when counting from the first, cyclically at equal distances; over
    many seeds, all members are kept equally often."""
    assignment = torch.arange(70) % 7
    assignment[assignment == 4] = 5  # an empty cluster, and one of 20
    counts = torch.zeros(70)
    for seed in range(400):
        kept = select_fraction(assignment, 7, 0.25, seed)
        assert torch.equal(
            torch.bincount(assignment[kept]), torch.bincount(assignment[select_fraction(assignment, 7, 0.25)])
        )
        assert torch.equal(kept, select_fraction(assignment, 7, 0.25, seed))
        counts[kept] += 1
    sizes = torch.bincount(assignment, minlength=7)
    expected = 400 * (-(-sizes // 4) / sizes)[assignment]
    assert ((counts - expected).abs() < 4 * (400 * 0.3 * 0.7) ** 0.5).all()
    ring = select_fraction(torch.zeros(12, dtype=torch.long), 1, 0.25, 3)
    assert (ring.diff() == 4).all()
