"""Plots: word clouds, masks of words, maps of predicted classes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from lexvla_runs import ARMS, arms, backbone, lm, states, tiny  # noqa: F401
from scripts import SHARDS, one_sentence

from lexvla import plots
from shared import data

SCRIPT = "lexvla.train"


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


@pytest.mark.parametrize("arm", ["overuse", "bow"])
def test_explanation_of_a_pair(arms: dict[str, Path], in_process, tmp_path: Path, arm: str):
    image, picture = tmp_path / "image.png", tmp_path / "explain.png"
    data.open_pairs(f"{SHARDS}/00000.tar", 1).read(0).image.save(image)
    caption = data.open_pairs(f"{SHARDS}/00000.tar", 1).caption(0)
    result = in_process(arms[arm], image, caption, "--out", picture, module="lexvla.plots")
    assert result.code == 0 and picture.stat().st_size > 5_000, result.err
    first, *reasons, _ = result.out.splitlines()
    values = [float(line.split()[0]) for line in reasons]
    assert values == sorted(values, reverse=True) and sum(values) <= float(first.split()[1].rstrip(":")) + 0.01
    nothing = in_process(arms[arm], image, "", "--out", tmp_path / "empty.png", module="lexvla.plots")
    assert nothing.code == 0 and (arm != "bow" or nothing.out.startswith("score 0.000")), nothing.err
    for options in (["--out", tmp_path / "nowhere/x.png"], ["--out", tmp_path / "x.gif"], ["--k", "-1"]):
        result = in_process(arms[arm], image, caption, *options, module="lexvla.plots")
        assert result.code == 2 and options[0] in result.err and one_sentence(result.err), result.err
    (tmp_path / "text.png").write_text("no image")
    for file, words in ((tmp_path / "nothing.png", "does not exist"), (tmp_path / "text.png", "cannot be read")):
        result = in_process(arms[arm], file, "a cat", module="lexvla.plots")
        assert result.code == 2 and words in result.err and one_sentence(result.err), result.err
