"""Plots: word clouds, masks of words, maps of predicted classes."""

from pathlib import Path

import numpy as np
import pytest
import torch

from lexvla import plots


def test_word_clouds_show_each_word_once_and_larger_words_larger(tmp_path: Path):
    alone, both = plots.word_cloud({"cat": 1.0}), plots.word_cloud({"cat": 1.0, " cat": 0.5, "dog": 0.1})
    assert alone.shape == both.shape == (180, 360, 3) and (alone < 255).any()
    assert not np.array_equal(alone, both)  # the dog is there, the cat with its space is the same cat
    assert np.array_equal(plots.word_cloud({"cat": 1.0, " cat": 0.5}), alone)
    assert (plots.word_cloud({}) < 255).any()  # "(none)"
    pair = plots.PairWords(torch.randn(3, 8, 8), "a cat on a mat", {"cat": 1.0}, {})
    plots.plot_words([pair] * 3, tmp_path / "words.png")
    assert (tmp_path / "words.png").stat().st_size > 5_000


def test_mask_of_a_word():
    s_patch = torch.tensor([[1.0, 0.0, 0.2], [0.5, 0.1, 0.9], [0.0, 0.7, 0.0], [0.2, 0.2, 0.2]])
    mask = plots.word_mask(s_patch, torch.tensor([0.0, 0.0, 1.0]), (2, 2))
    assert mask.shape == (2, 2) and mask.argmax() == 1 and mask.min() == 0 and mask.max() == 1
    assert plots.word_mask(torch.ones(4, 3), torch.ones(3), (2, 2)).tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_normalised_pixels_become_a_picture():
    picture = plots.picture_of(torch.randn(3, 5, 4))
    assert picture.shape == (5, 4, 3) and picture.min() == 0 and picture.max() == pytest.approx(1.0)


def test_map_of_predicted_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A class has one colour in both maps; pixels without a class are white, classes that the image lacks are grey."""
    truth = torch.tensor([[3, 3, -1, -1], [3, 3, -1, -1], [1, 1, 3, 3], [1, 1, 3, 3]])
    shown = []
    monkeypatch.setattr(plots.plt.Axes, "imshow", lambda axis, picture, **_: shown.append(np.asarray(picture)))
    one = plots.ClassMap(torch.randn(3, 8, 8), truth, torch.tensor([[3, 0], [1, 3]]))
    plots.plot_class_maps([one, one], ["a", "b", "c", "d"], tmp_path / "classes.png")
    picture, classes, predicted = shown[:3]
    assert picture.shape == (8, 8, 3) and classes.shape == (4, 4, 3) and predicted.shape == (2, 2, 3)
    assert (classes[0, 2] == 1).all() and (predicted[0, 1] == 0.75).all()
    assert (classes[0, 0] == predicted[0, 0]).all() and (classes[2, 0] == predicted[1, 0]).all()
    assert not (classes[0, 0] == classes[2, 0]).all() and (tmp_path / "classes.png").is_file()
