"""Scores of single pictures: as text, of captions, of several heads, of several sets, and of the evaluations."""

import numpy as np
import pytest
import torch
from evaluation_sets import features_and_labels

from flame import eval as flame
from lexvla import eval as lexvla
from shared import pictures, probes, zeroshot
from shared.pictures import by_picture, unpacked


def test_scores_survive_as_text():
    rng = np.random.default_rng(0)
    for scores in (100.0 * rng.integers(0, 2, 990), 100 / 3 * rng.integers(0, 4, 500), rng.random(999), np.zeros(3)):
        text = pictures.packed(scores)
        assert np.abs(unpacked(text) - scores).max() < 1e-9
    assert len(pictures.packed(100 * rng.integers(0, 2, 990))) < 400
    assert by_picture("m", torch.zeros(1000)) == {} and set(by_picture("m", torch.zeros(999))) == {"m by picture"}


def test_means_of_heads_and_of_sets():
    first, second = np.array([0.0, 100, 100, 0]), np.array([100.0, 100, 0, 0])
    assert unpacked(pictures.mean([pictures.packed(first), pictures.packed(second)])).tolist() == [50, 100, 50, 0]
    assert pictures.mean([1.0, 2.0]) == 1.5
    with pytest.raises(ValueError):
        pictures.mean([pictures.packed(first), pictures.packed(second[:3])])
    joined = unpacked(pictures.joined([pictures.packed(first), pictures.packed(np.array([100.0]))]))
    assert len(joined) == 5 and joined.mean() == pytest.approx((50 + 100) / 2)
    found = {"id/top1": 50.0, "id/top1 by picture": "x", "ood/top1": 1.0}
    assert pictures.renamed(found, "id/top1", "lp/id") == {"lp/id": 50.0, "lp/id by picture": "x"}
    assert pictures.renamed(found, "ood/top1", "lp/ood") == {"lp/ood": 1.0}


@pytest.mark.parametrize("captions", [[1] * 40, [1, 3, 2, 5] * 10])
def test_recalls_are_means_over_pictures(captions: list[int]):
    torch.manual_seed(0)
    owner = zeroshot.owners(torch.tensor(captions))
    image, text = torch.randn(40, 8), torch.randn(len(owner), 8)
    text = text + image[owner]
    found = lexvla.retrieval(image, text, owner)
    assert unpacked(found["mean_recall by picture"]).mean() == pytest.approx(found["mean_recall"], abs=1e-8)
    lines = [[f"{i} {j}" for j in range(n)] for i, n in enumerate(captions)]
    found = flame.retrieval(image, lines, lambda texts, multi: text, True)
    for way in flame.BOTH_WAYS:
        assert unpacked(found[f"{way} by picture"]).mean() == pytest.approx(found[way], abs=1e-8)
        assert 5 < found[way] < 95


def test_hits_of_a_probe_are_those_of_its_best_epoch():
    train, test = features_and_labels(0, 90, noise=2.5), features_and_labels(1, 150, noise=2.5)
    for epochs in (1, 20, 60):
        probe = probes.sgd_probe(*train, *test, epochs=epochs, lr=1.0)
        assert zeroshot.percent(probe.hits) == probe.best >= probe.final
    assert probe.best > probe.final  # the best epoch is not the last one
