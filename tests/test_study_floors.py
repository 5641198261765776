"""Floors: chance in closed form against random orders, and nearest neighbours counted by hand."""

import io
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.feature_extraction.text import CountVectorizer

from shared.tars import write_split
from studies.harness import floors


def png(color: tuple[int, int, int], at: int = 0) -> bytes:
    pixels = np.full((40, 40, 3), 255, np.uint8)
    pixels[at : at + 12, 5:25] = color
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """Red and blue bars; one of the three test images has the colour of the other class."""
    folder = tmp_path / "bars"
    red, blue = (200, 0, 0), (0, 0, 200)
    write_split(folder / "train", [{"png": png(red), "cls": "0"}, {"png": png(blue), "cls": "1"}])
    test = [(png(red, 1), "0"), (png(blue, 1), "1"), (png(blue, 2), "0")]
    write_split(folder / "test", [{"png": image, "cls": label} for image, label in test])
    (folder / "classnames.txt").write_text("red\nblue\n")
    (folder / "zeroshot_classification_templates.txt").write_text("{c}\n")
    return folder


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    folder = tmp_path / "pairs"
    captions = ["a\nb\nc", "d", "e\nf"]
    write_split(folder / "test", [{"png": png((9, 9, 9)), "txt": text} for text in captions])
    (folder / "dataset_type.txt").write_text("retrieval\n")
    return folder


def test_chance_of_classes_and_of_a_random_order(classes: Path, pairs: Path):
    found = floors.chance([classes, pairs])
    assert found["bars/top1"] == 50.0
    owner, rng = np.array([0, 0, 0, 1, 2, 2]), np.random.default_rng(0)
    orders = [rng.permutation(6) for _ in range(4000)]
    for k in (1, 5):
        hits = [[(owner[order[:k]] == image).any() for image in range(3)] for order in orders]
        assert found[f"pairs/image_to_text_R@{k}"] == pytest.approx(100 * np.mean(hits), abs=1.5)
    # The images have 3, 1 and 2 of six captions. Five captions can only miss those of the second image.
    assert found["pairs/image_to_text_R@1"] == pytest.approx(100 * (3 / 6 + 1 / 6 + 2 / 6) / 3)
    assert found["pairs/image_to_text_R@5"] == pytest.approx(100 * (1 + 5 / 6 + 1) / 3)
    assert found["pairs/image_to_text_R@10"] == found["pairs/text_to_image_R@5"] == 100.0
    assert found["pairs/text_to_image_R@1"] == pytest.approx(100 / 3)
    recalls = [value for name, value in found.items() if "R@" in name]
    assert found["pairs/mean_recall"] == pytest.approx(np.mean(recalls))


def test_nearest_neighbour_on_raw_pixels(classes: Path):
    found = floors.nearest_neighbour([classes], metrics=("top1", "probe_final"))
    assert found == {"bars/top1": pytest.approx(200 / 3), "bars/probe_final": pytest.approx(200 / 3)}


def test_nearest_neighbour_on_features(classes: Path):
    """Features that encode the labels find the right neighbours."""
    known = iter([torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.1]])])

    def features(batches) -> torch.Tensor:
        assert sum(len(batch) for batch in batches) in (2, 3)
        return next(known)

    assert floors.nearest_neighbour([classes], features)["bars/top1"] == 100.0


def test_hard_linked_sets_are_read_once(classes: Path):
    """Sets for two styles share their training images, which are encoded once; a copy of a set is encoded again."""
    shutil.copytree(classes, linked := classes.parent / "linked", copy_function=os.link)
    shutil.copytree(classes, copied := classes.parent / "copied")
    seen = []

    def features(batches) -> torch.Tensor:
        seen.append(len(pixels := floors.join(batches)))
        return pixels

    assert len(set(floors.nearest_neighbour([classes, linked], features).values())) == 1 and seen == [2, 3]
    floors.nearest_neighbour([copied], features)
    assert seen == [2, 3, 2, 3]


def test_bags_of_words_of_what_neighbours_are_captioned_with():
    train, test = torch.eye(3), torch.tensor([[0.1, 0.9, 0.0], [0.0, 0.1, 0.9]])
    captions, bags = ["a red bar", "a blue bar", "nothing"], CountVectorizer().fit(["red bar", "blue bar"])
    said, asked = floors.captions_of_neighbours(test, train, captions, bags, ["red bar", "blue bar"])
    assert torch.allclose(said @ asked.T, torch.tensor([[0.5, 1.0], [0.0, 0.0]]))


def test_cosine_of_centred_pixels_knows_no_brightness():
    picture = Image.fromarray(np.arange(40 * 40 * 3, dtype=np.uint32).reshape(40, 40, 3).astype(np.uint8) // 4)
    brighter = Image.fromarray(np.array(picture) + 60)
    a, b = floors.raw_pixels(picture), floors.raw_pixels(brighter)
    assert a.mean().abs() < 1e-3 and torch.cosine_similarity(a, b, dim=0) > 0.999
