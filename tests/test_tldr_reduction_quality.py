"""Cohesion of clusters and coverage of selections, on features for which both are known."""

import numpy as np
import pytest
import torch

from tldr_reduction import quality


def test_cohesion_and_coverage_by_hand():
    a, b = torch.tensor([1.0, 0]), torch.tensor([0, 2.0])
    features, labels = torch.stack([a, a, b, a]), torch.tensor([0, 0, 0, 1])
    assert quality.cohesion(features, labels) == pytest.approx(1 / 3)  # one of three pairs has equal features
    assert quality.cohesion(features, torch.arange(4)) == 0
    assert quality.coverage(features, torch.tensor([True, False, False, False])) == pytest.approx(2 / 3)


def test_true_clusters_differ_from_random_ones():
    generator = torch.Generator().manual_seed(0)
    centres, labels = torch.randn(8, 16, generator=generator), torch.arange(160) % 8
    features = centres[labels] + 0.2 * torch.randn(160, 16, generator=generator)
    kept = torch.zeros(160, dtype=torch.bool)
    kept[:8] = True  # one of each cluster
    good = quality.measured(features, labels, kept, 0)
    assert good["cohesion"] > 0.9 > 0.3 > good["cohesion_shuffled"] and good["cohesion_kmeans"] > 0.6
    assert good["coverage"] > max(good["coverage_random"]) and len(good["coverage_random"]) == quality.DRAWS
    none = quality.measured(features, labels[torch.randperm(160, generator=generator)], kept, 0)
    assert abs(none["cohesion"] - none["cohesion_shuffled"]) < 0.1
    assert set(quality.measured(features, None, kept, 0)) == {"coverage", "coverage_random"}


def test_features_of_captions_and_small_pictures():
    words = quality.caption_features(["a red cat", "a red cat", "two dogs"])
    assert quality.cohesion(words, torch.tensor([0, 0, 1])) == pytest.approx(1)
    assert quality.caption_features(["", "."]) is None
    images = torch.rand(2, 3, 32, 32)
    small = quality.thumbnails(images)
    assert small.shape == (2, 192) and small.mean().abs() < 1e-6
    torch.testing.assert_close(quality.thumbnails(images + 1), small, rtol=1e-4, atol=1e-5)


def test_of_large_data_whole_clusters_are_compared(monkeypatch: pytest.MonkeyPatch):
    rows, labels = np.arange(100) * 3, np.arange(100) % 20  # twenty clusters of five
    assert (quality.sampled(rows, labels, 0) == rows).all() and (quality.sampled(rows, None, 0) == rows).all()
    monkeypatch.setattr(quality, "CHECKED", 23)
    some = quality.sampled(rows, labels, 0)
    assert len(some) == 23 and (np.diff(some) > 0).all() and set(some) <= set(rows)
    assert sorted(np.unique(some // 3 % 20, return_counts=True)[1]) == [3, 5, 5, 5, 5]
    assert (some != quality.sampled(rows, labels, 1)).any()
    single = quality.sampled(rows, None, 0)
    assert len(np.unique(single // 3 % 20)) > 5
