"""Cached features of photographs, and the floor of canonical correlation on made-up data."""

from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from photographs import WORDS, corpus  # noqa: F401
from PIL import Image

from shared import layout, zeroshot
from studies.harness import photos


def test_correlation_finds_what_words_mean(corpus: Path):
    found = photos.by_correlation([str(corpus / "retrieval"), str(corpus / "names")], True, str(corpus / "train"))
    assert found["names/top1"] > 90 and found["retrieval/image_to_text_R@5"] > 90
    assert {"retrieval/text_to_image_R@1", "retrieval/mean_recall"} <= set(found)


def test_a_sample_has_all_captions_of_its_photograph_or_its_own(corpus: Path):
    (_, every), (_, own) = (photos.training_set(corpus / "train", pixels=True, own=own) for own in (False, True))
    assert every[1] == ["a ball .", "the ball again"] and own[1] == ["a ball ."]
    found = photos.by_correlation([str(corpus / "names")], True, str(corpus / "train"), own=True)
    assert found["names/top1"] > 90


def test_correlation_equals_the_generalised_eigenvalues_of_scipy():
    """Directions of images solve Sxy Syy^-1 Syx u = c^2 Sxx u; a map is u with u Sxx u = 1, weighted by c^2."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, (200, 3)).astype(float)
    x = y @ rng.standard_normal((3, 4)) + 0.5 * rng.standard_normal((200, 4))
    texts = [" ".join(word for word, has in zip(WORDS, row, strict=False) if has) for row in y]
    found = photos.correlate(
        torch.from_numpy(x).float(), texts, lambda given: photos.bags(given, {"dog": 0, "ball": 1, "snow": 2})
    )
    covariances = [np.cov(each.T, bias=True) for each in (x, y)]
    sxx, syy = (each + 0.1 * np.trace(each) / len(each) * np.eye(len(each)) for each in covariances)
    sxy = (x - x.mean(0)).T @ (y - y.mean(0)) / 200
    squares, u = scipy.linalg.eigh(sxy @ np.linalg.inv(syy) @ sxy.T, sxx)
    squares, u = squares[:0:-1], u[:, :0:-1]  # the three of words, highest first
    expected = (x - x.mean(0)) @ u * squares
    image = found.image(torch.from_numpy(x)).double().numpy()
    np.testing.assert_allclose(image * np.sign((image * expected).sum(0)), expected, atol=1e-4)
    v = np.linalg.inv(syy) @ sxy.T @ u / np.sqrt(squares)
    said = found.text(["a dog", "snow and ball"]).double().numpy()
    by_hand = (np.array([[1, 0, 0], [0, 1, 1]]) - y.mean(0)) @ v * squares
    np.testing.assert_allclose(said * np.sign((image * expected).sum(0)), by_hand, atol=1e-4)


def test_correlation_of_noise_is_chance():
    generator = torch.Generator().manual_seed(0)
    x, texts = torch.randn(400, 20, generator=generator), [WORDS[i % 6] for i in range(400)]
    found = photos.correlate(x, texts)
    image, text = found.image(torch.randn(300, 20, generator=generator)), found.text(WORDS)
    hits = (torch.nn.functional.normalize(image, dim=-1) @ text.T).argmax(1) == torch.arange(300) % 6
    assert zeroshot.percent(hits) < 30


def test_words_that_are_not_known_are_left_out():
    assert photos.bags(["A dog, a DOG", "cat"], {"dog": 1, "a": 0}).tolist() == [[1, 1], [0, 0]]


def test_damaged_shards_are_named(corpus: Path):
    path = corpus / "train/00000.tar"
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match="damaged"):
        photos.pictures([path])


def test_features_are_computed_before_runs_need_them(corpus: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    seen = []
    monkeypatch.setattr(
        photos, "lite0_features_of_files", lambda files, side: seen.append(side) or torch.zeros(len(files), 8)
    )
    photos.main((corpus / "train", corpus / "retrieval/test"))
    assert photos.test_set(corpus / "retrieval", side=128)[0].shape == (12, 8) and seen.pop() == 128
    assert seen == [photos.SIDE] * 2 and "60 images" in capsys.readouterr().out
    with pytest.raises(ValueError, match="holds no shards"):
        photos.main((corpus,))


def test_views_are_squares():
    assert photos.view(Image.new("RGB", (40, 30))).shape == (3, photos.SIDE, photos.SIDE)


def test_files_that_are_known_are_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 40, 40, 3), np.uint8)
    decoded, files = [], [layout.png(pixels[seed]) for seed in range(6)]
    decode = photos.data.decode_image
    monkeypatch.setattr(photos.data, "decode_image", lambda content: decoded.append(content) or decode(content))
    monkeypatch.setattr(photos, "lite0_features", lambda batches, **_: torch.cat([*batches]).float().mean(3)[:, 0])
    found = photos.lite0_features_of_files([files[0], files[1], files[0]], 32, tmp_path)
    square = photos.square_pixels(decode(files[1]), 32)
    assert torch.equal(found[0], found[2]) and len(decoded) == 2
    assert torch.equal(found[1], square.float().mean(2)[0])
    more = photos.lite0_features_of_files(files[1:4], 32, tmp_path)
    assert torch.equal(more[0], found[1]) and decoded[2:] == files[2:4]
    photos.lite0_features_of_files(files[:1], 64, tmp_path)  # of another size
    assert decoded[4:] == files[:1]
