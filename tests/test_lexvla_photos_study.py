"""The study on photographs: its arms and claims, and PatchDis of random patches on made masks."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from shared import layout
from studies import lexvla as study
from studies import lexvla_dense
from studies.corpora.masks import write_masks
from studies.harness import verdicts


def test_arms_read_the_same_captions():
    for arm in study.PHOTOS_ARMS:
        (words,) = study.PHOTOS.words(arm, 0)
        assert words[words.index("--data") + 1] == study.FLICKR8K and study.LENGTH in " ".join(words)
        assert words[words.index("--states") + 1] == study.STATES
    assert study.STATES in study.PHOTOS.before[-1].command


def test_arms_and_their_floor_see_photographs_at_one_size(monkeypatch: pytest.MonkeyPatch):
    sides = []
    monkeypatch.setattr(study.photos, "by_correlation", lambda *_, side=None, **__: sides.append(side) or {})
    monkeypatch.setattr(study, "load_lm", lambda *_: (None, None))
    monkeypatch.setattr(study, "States", lambda *_: None)
    found = study.PHOTOS.floors[1:5]
    for floor in found:
        floor.measure()
    assert sides == [study.SIDE, study.SIDE, None, study.SIDE]
    assert [floor.ceiling for floor in found] == [False, False, True, True]
    for arm in study.PHOTOS_ARMS:
        _, preset, *words = study.PHOTOS.words(arm, 0)[0]
        assert (study.PRESETS | lexvla_dense.PRESETS)[preset][1].image_size == study.SIDE
        assert "--image-size" not in words


def test_claims_about_shared_words_need_arms_that_retrieve():
    runs = {"overuse": (20.0, 30.0), "flops": (19.0, 60.0), "none": (18.0, 90.0)}
    arms = {
        arm: [
            {study.PHOTOS_RECALL: recall + 0.1 * seed, study.PHOTOS_SHARED: share + seed * share / 100}
            for seed in range(3)
        ]
        for arm, (recall, share) in runs.items()
    }
    low, high = ([((), {study.PHOTOS_RECALL: floor})] for floor in (10.0, 30.0))
    judged = [{row["claim"]: row for row in verdicts.judged(study.PHOTOS_CLAIMS, arms, bar)} for bar in (low, high)]
    claim = "overuse: most used word rarer than with FLOPs"
    assert judged[0][claim]["verdict"] == "direction only" and judged[1][claim]["verdict"] == "has not learned"


def test_patches_of_photographs_have_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A mask whose right half is a cat; its sides are no multiples of the eight patches of a side."""
    labels = np.full((41, 61), -1)
    labels[:, 31:] = 1
    write_masks(tmp_path, ["dog", "cat"], [("0.png", layout.png(np.zeros((41, 61, 3), np.uint8)), labels)])
    monkeypatch.setattr(study, "tokens", lambda pixels: torch.arange(-1.0, 64.0)[None, :, None])
    ((patches, classes),) = study.labelled_patches(str(tmp_path))
    assert sorted(patches[:, 0].tolist()) == [8 * y + x for y in range(8) for x in range(4, 8)]
    assert classes.tolist() == [1] * 32


def test_random_patches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rng = np.random.default_rng(0)
    samples = (
        (f"{i}.png", layout.png(rng.integers(0, 255, (40, 60, 3), dtype=np.uint8)), rng.integers(-1, 4, (40, 60)))
        for i in range(6)
    )
    write_masks(tmp_path / "masks", ["dog", "cat", "ball", "tree"], samples)
    monkeypatch.setattr(study, "COCO", str(tmp_path / "masks"))
    (measure,) = (floor.measure for floor in study.PHOTOS.floors if floor.name == "random patches")
    found = measure()
    assert 5 < found["patchdis/miou"] < 25 and found == measure()


def test_patches_by_labels_against_scikit_learns_ridge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The classifier of patches is ridge regression, whose bias is penalised like the other weights."""
    rng, seen = np.random.default_rng(0), {}
    for name in ("train", "test"):
        labels = rng.integers(-1, 3, (4, 8, 8)).repeat(4, 1).repeat(4, 2)
        shown = [layout.png(np.full((32, 32, 3), 9 * i, np.uint8)) for i in range(4)]
        samples = ((f"{i}.png", shown[i], labels[i]) for i in range(4))
        write_masks(tmp_path / name, ["dog", "cat", "ball"], samples)

    def tokens(pixels: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(int(1000 * (pixels.mean() + 9)))
        return torch.randn(len(pixels), 65, 5, generator=generator)

    def measure(patches, classes, images) -> tuple[dict, list]:
        seen.update(patches=patches, classes=classes, images=list(images))
        return {"miou": 1.0, "miou_present": 2.0}, []

    monkeypatch.setattr(study, "tokens", tokens)
    monkeypatch.setattr(study.patchdis, "measure", measure)
    found = study.patches_by_labels(str(tmp_path / "train"), str(tmp_path / "test"))
    assert found == {"patchdis/miou": 1.0, "patchdis/miou_present": 2.0} and len(seen["images"]) == 4

    x, y = (torch.cat(each).numpy() for each in zip(*study.labelled_patches(str(tmp_path / "train")), strict=True))
    ridge = Ridge(alpha=10, fit_intercept=False).fit(np.pad(x, ((0, 0), (0, 1)), constant_values=1), np.eye(3)[y])
    asked = torch.zeros(1, 3, 128, 128)
    expected = ridge.predict(np.pad(tokens(asked)[0, 1:].numpy(), ((0, 0), (0, 1)), constant_values=1))
    np.testing.assert_allclose(seen["patches"](asked)[0], expected, atol=1e-5)
    assert seen["classes"].tolist() == np.eye(3).tolist()


def test_an_image_is_asked_for_by_the_caption_of_its_neighbour():
    """The captions of the nearest training scenes share two, one and no words with the right captions."""
    images = torch.tensor([[0.9, 0.1, 0.0], [0.0, 1.0, 0.0], [0.0, 0.2, 0.9]])
    asked = [["the red dog"], ["a blue bird on grass"], ["nothing"]]
    corpus = study.Corpus(
        torch.eye(3), ["a red dog on grass", "the blue car", "a green tree"], {"set": (images, asked)}
    )
    assert study.nearest_caption(corpus)["set/image_to_text_R@1"] == pytest.approx(200 / 3)
