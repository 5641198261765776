"""Pictures of words: sizes follow weights, and a mask shows where a word is."""

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
    plots.plot_words([("image", {"cat": 1.0}), ("caption", {})], tmp_path / "words.png")
    assert (tmp_path / "words.png").stat().st_size > 5_000


def test_words_of_patches_and_where_a_word_is():
    s_patch = torch.tensor([[1.0, 0.0, 0.2], [0.5, 0.1, 0.9], [0.0, 0.7, 0.0], [0.2, 0.2, 0.2]])
    chosen = torch.tensor([True, False, True, False])
    assert plots.patch_set_words(s_patch, chosen).tolist() == pytest.approx([1.0, 0.7, 0.2])
    mask = plots.word_mask(s_patch, torch.tensor([0.0, 0.0, 1.0]), (2, 2))
    assert mask.shape == (2, 2) and mask.argmax() == 1 and mask.min() == 0 and mask.max() == 1
    assert plots.word_mask(torch.ones(4, 3), torch.ones(3), (2, 2)).tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_pixels_become_an_image_that_can_be_looked_at():
    picture = plots.picture_of(torch.randn(3, 5, 4))
    assert picture.shape == (5, 4, 3) and picture.min() == 0 and picture.max() == pytest.approx(1.0)
