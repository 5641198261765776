"""Whitening, k-means and selections compared with the authors' numbers, with faiss and with hand-made examples."""

import faiss
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tldr_reduction import cluster
from tldr_reduction.cluster import (
    keep_top,
    kmeans,
    random_subset,
    select_by_distance,
    select_every_nth,
    select_fraction,
    whiten,
)


@pytest.mark.golden("tldr_reduction", "kmeans_codes")
def test_kmeans_codes(case):
    ours, theirs = whiten(case["codes"], case["pca_dim"]), case["features"]
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours @ ours.T, theirs @ theirs.T, rtol=0, atol=3e-4)
    assert np.random.RandomState(case["np_random_seed"]).randint(1234) == case["faiss_seed"]
    for start in ({"init_index": case["init_index"]}, {"seed": case["faiss_seed"]}):
        assignment, centroids, objective = kmeans(theirs, case["k"], niter=case["niter"], **start)
        case.close("assignment", assignment)
        case.close("centroids", centroids, atol=1e-4)
        case.close("objective", objective, rtol=1e-4)
        case.close("final_objective", objective[-1], rtol=1e-4)
    case.close("dist2_to_centroid", cluster.nearest(theirs, centroids)[1], atol=1e-4)
    case.close("cluster_sizes", torch.bincount(assignment, minlength=case["k"]))


@pytest.mark.golden("tldr_reduction", "selection")
def test_selection(case):
    selected = select_every_nth(case["assignment"], case["num_clusters"], case["every_n"])
    case.close("selected", selected)
    case.close("selected_and_itm", selected[torch.isin(selected, case["itm_keep_index"])])
    assert torch.equal(select_fraction(case["assignment"], case["num_clusters"], 1 / case["every_n"]), selected)


def test_whitening_of_constant_positions():
    codes = torch.randint(0, 50, (200, 12), generator=torch.Generator().manual_seed(0))
    codes[:, 3], codes[:, 7] = 9, codes[:, 2]  # one constant position, and one equal to another
    features = whiten(codes, 256)
    assert features.shape == (200, 10) and features.isfinite().all()
    torch.testing.assert_close(features.norm(dim=1), torch.ones(200))
    constant = whiten(torch.full((20, 4), 7), 256)
    assert constant.isfinite().all() and constant.shape == (20, 1)
    assignment, _, _ = kmeans(constant, 3)
    assert assignment.max() < 3


def test_whitening_is_trained_on_the_rows_that_faiss_takes():
    codes = torch.randint(0, 50, (2600, 2), generator=torch.Generator().manual_seed(0))  # over 1000 rows per dimension
    pca = faiss.PCAMatrix(2, 2, -0.5)
    pca.train(codes.float().numpy())
    theirs = F.normalize(torch.from_numpy(pca.apply(codes.float().numpy())), dim=1)
    ours = whiten(codes, 2)
    torch.testing.assert_close(ours @ ours[:50].T, theirs @ theirs[:50].T, rtol=0, atol=3e-4)


def test_an_objective_of_zero_does_not_end_k_means():
    two = torch.tensor([[1.0], [-1.0]]).repeat(20, 1)
    assert kmeans(two, 2, init_index=torch.tensor([0, 1]))[2].tolist() == [0] * 20


def test_clusters_in_chunks(monkeypatch):
    codes = torch.randint(0, 9, (900, 10), generator=torch.Generator().manual_seed(0)).numpy().astype(np.uint16)
    whole = cluster.cluster_codes(codes, 12)
    monkeypatch.setattr(cluster, "CHUNK", 64)
    parts = cluster.cluster_codes(codes, 12)
    assert (whole.assignment == parts.assignment).float().mean() > 0.99
    assert cluster.cluster_codes(codes, 12, points_per_centroid=20).assignment.shape == (900,)
    with pytest.raises(ValueError, match="cannot make 901 clusters"):
        kmeans(torch.randn(900, 2), 901)


def test_selections():
    generator = torch.Generator().manual_seed(0)
    assignment = torch.randint(0, 7, (300,), generator=generator)
    assignment[assignment == 4] = 5  # an empty cluster
    sizes = torch.bincount(assignment, minlength=7)
    for n in (1, 2, 4, 1000):
        kept = select_every_nth(assignment, 7, n)
        assert torch.equal(torch.bincount(assignment[kept], minlength=7), -(-sizes // n))
    for fraction in (0.0002, 0.22, 0.167, 0.5, 1.0):
        kept = select_fraction(assignment, 7, fraction)
        assert torch.equal(torch.bincount(assignment[kept], minlength=7), (sizes * fraction - 1e-5).ceil().long())
    dist2 = torch.rand(300, generator=generator)
    far, near = (select_by_distance(assignment, dist2, 7, 0.25, largest) for largest in (True, False))
    assert torch.equal(torch.bincount(assignment[far], minlength=7), -(-sizes // 4))
    for c in range(7):
        members = dist2[assignment == c].sort().values
        assert torch.equal(dist2[near[assignment[near] == c]].sort().values, members[: -(-len(members) // 4)])
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
