"""Seeded augmentation, pairs of shards and of annotation files."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tldr_reduction_runs import folder  # noqa: F401

from shared import data, index
from tldr_reduction import datasets
from tldr_reduction.datasets import RandomAugment, open_pairs


def test_augmentation_is_seeded_and_keeps_size():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 30, 3)).astype(np.uint8))
    seen = set()
    for seed in range(40):
        torch.manual_seed(seed)
        first = RandomAugment()(image)
        torch.manual_seed(seed)
        assert first.size == (30, 24) and first.tobytes() == RandomAugment()(image).tobytes()
        seen.add(first.tobytes())
    assert len(seen) > 8


def test_rows_of_shards(folder):
    pairs = data.open_pairs(str(folder / "pool"))
    assert [pairs.rows_of(number) for number in range(3)] == [range(0, 64), range(64, 128), range(128, 160)]


def test_annotations_are_parsed_once_a_machine_and_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    Image.new("RGB", (4, 4), "red").save(tmp_path / "caf\u00e9.png")
    entries = [{"image": "caf\u00e9.png", "caption": f"caption \u00e9 {i}", "id": i} for i in range(50)]
    (path := tmp_path / "all.json").write_text(json.dumps([*entries, {"image": "no.png", "caption": "\ud800"}]))
    plain = open_pairs(str(path))
    monkeypatch.setattr(index, "LARGE", 0)
    first = open_pairs(str(path), cache=str(tmp_path / "cache"))
    monkeypatch.setattr(datasets, "read_annotations", None)  # from here on, the file must not be parsed again
    again, few = (open_pairs(str(path), limit=limit, cache=str(tmp_path / "cache")) for limit in (None, 7))
    assert isinstance(again.keys.text, np.memmap) and isinstance(again._captions.text, np.memmap)
    assert plain.fingerprint == first.fingerprint == again.fingerprint != few.fingerprint
    assert len(again) == again.total == few.total == 51 and len(few) == 7
    pair = again.read(49)
    assert (pair.key, pair.caption) == ("caf\u00e9.png", "caption \u00e9 49") and pair.image.size == (4, 4)
    assert again.caption(50) == "?"
    with pytest.raises(data.BrokenSample, match="missing image"):
        again.read(50)
