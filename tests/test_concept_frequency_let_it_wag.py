"""The tail benchmark: least frequent concepts, near-duplicates, balanced classes."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from PIL import Image
from scripts import one_sentence

from concept_frequency import assigned, let_it_wag
from concept_frequency.concepts import read_concepts
from concept_frequency.let_it_wag import phash, select_tail


def test_select_tail():
    assert select_tail([{"a": 0, "b": 5, "c": 1, "d": 9}, {"a": 7, "b": 0, "c": 2}], 2) == ["c", "b"]
    assert select_tail([{"a": 0, "b": 5, "c": 1}], 2) == ["a", "c"]
    assert select_tail([{"a": 0, "b": 5, "c": 1}], 2, zeros=False) == ["c", "b"]


def test_outliers_and_duplicates_by_features():
    """Appendix H.2: the 5 % of images with the lowest similarity are removed, and the later one of two similar
    images."""
    generator = np.random.default_rng(0)
    crowd = np.array([1.0, 0, 0]) + generator.normal(0, 0.05, (39, 3))
    features = np.concatenate([crowd, [[0, 0, 1.0]]])
    assert let_it_wag.outliers(features, 0.05)[-1] == 39 and len(let_it_wag.outliers(features, 0.05)) == 2
    assert let_it_wag.nearest(features, batch_size=7) == pytest.approx(let_it_wag.nearest(features))
    line = np.array([[1, 0], [1, 0.1], [1, 0.2], [0, 1.0]])
    assert let_it_wag.feature_duplicates(line, 0.99) == [1]  # the third is close to one that went
    assert let_it_wag.feature_duplicates(line, 0.9) == [1, 2]


def test_cleaning_with_a_network(monkeypatch):
    images = {"a": [Image.new("RGB", (2, 2), (i, 0, 0)) for i in range(20)], "b": []}
    angle = {i: np.array([np.cos(i / 10), np.sin(i / 10)]) for i in range(20)}
    angle[1] = angle[0]  # twice
    angle[7] = -angle[7]  # unlike any other
    features = lambda pool, network: np.array([angle[image.getpixel((0, 0))[0]] for image in pool])  # noqa: E731
    monkeypatch.setattr(let_it_wag, "embed", features)
    found = let_it_wag.clean(images, "inception_v3", 0.999)
    assert [image.getpixel((0, 0))[0] for image in found["a"]] == [0, *range(2, 7), *range(8, 20)] and not found["b"]


def test_phash_takes_images():
    array = np.random.default_rng(0).integers(0, 256, (50, 70, 3)).astype(np.float32)
    assert np.array_equal(phash(array), phash(Image.fromarray(array.astype(np.uint8))))


def test_tail_benchmark_from_folders(tmp_path):
    rng = np.random.default_rng(0)
    for name, n in (("rare_bird", 5), ("rare cat", 2), ("common", 9)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(n):
            pixels = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((80, 80)).save(tmp_path / "images" / name / f"{i}.jpg")
    shutil.copy(tmp_path / "images/rare_bird/0.jpg", tmp_path / "images/rare_bird/9.jpg")  # a duplicate
    (tmp_path / "a.json").write_text(json.dumps({"rare bird": 1, "rare cat": 0, "common": 50}))
    cfg = let_it_wag.Config((str(tmp_path / "a.json"),), (str(tmp_path / "images"),), str(tmp_path / "out"), 2, 3)
    assert let_it_wag.build(cfg) == {"rare cat": 2, "rare bird": 5}
    assert read_concepts(tmp_path / "out") == ["rare bird"]
    test = assigned.read_test_set(str(tmp_path / "out"), ["rare bird"])
    assert len(test.labels) == 3
    with pytest.raises(ValueError, match="1 concepts"):
        assigned.read_test_set(str(tmp_path / "out"), ["common"])
    with pytest.raises(ValueError, match="--per-class 450"):
        let_it_wag.build(dataclasses.replace(cfg, per_class=450))


def test_numbers_out_of_range_are_refused(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"rare": 1, "common": 50}))
    (tmp_path / "words.json").write_text(json.dumps({"rare": "one"}))
    cfg = let_it_wag.Config((str(tmp_path / "a.json"),), (str(tmp_path),), str(tmp_path / "out"), n=2, per_class=1)
    for change, message in (
        ({"n": 0}, "--n must be at least 1"),
        ({"n": 3}, "--n 3 is more than the 2 concepts"),
        ({"per_class": -1}, "--per-class must be at least 1"),
        ({"similarity": float("nan")}, "--similarity nan"),
        ({"max_distance": 65}, "--max-distance 65"),
        ({"max_distance": -1}, "--max-distance -1"),
        ({"counts": (str(tmp_path / "words.json"),)}, "words.json holds no counts"),
    ):
        with pytest.raises(ValueError, match=message):
            let_it_wag.build(dataclasses.replace(cfg, **change))
    assert not (tmp_path / "out").exists()


def test_command_lines_end_in_one_sentence(in_process):
    result = in_process("--counts", "none.json", "--images", "none", module="concept_frequency.let_it_wag")
    assert result.code == 2 and "none.json" in result.err and one_sentence(result.err), result.err
