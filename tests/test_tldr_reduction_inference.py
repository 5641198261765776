"""Outputs of a reduction in tables, of which only missing entries are computed."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from scripts import room
from tldr_reduction_runs import tiny_captioner

from shared import data, run
from tldr_reduction import encoders, inference
from tldr_reduction.config import ReduceConfig
from tldr_reduction.datasets import Batch, eval_transform, open_pairs
from tldr_reduction.encoders import Encoder
from tldr_reduction.inference import Inference, Rows, codes_of, open_table
from tldr_reduction.model import CodebookCaptioner, VectorQuantizer

ALONE = run.Process(0, 1, torch.device("cpu"))


def test_codes_are_small_numbers():
    model = tiny_captioner()
    images = torch.randn(5, 3, 16, 16)
    codes = codes_of(model, images)
    assert codes.dtype == np.uint16 and codes.shape == (5, 5 * 2)
    assert np.array_equal(codes, model.encode(images).numpy())
    many = CodebookCaptioner(model.visual_encoder, model.text_decoder, VectorQuantizer(70_000, 8))
    assert codes_of(many, images).dtype == np.int32


def test_a_table_has_room_for_all_samples(tmp_path):
    """A full disk is an error in a sentence; without room for the file, a write to the map would kill the process."""
    values = {"codes": np.arange(6, dtype=np.uint16).reshape(2, 3)}
    with room(200), pytest.raises(ValueError, match="codes.npy could not be written"):
        open_table(tmp_path / "codes.npy", 200, values)
    assert not list(tmp_path.iterdir())
    table = open_table(tmp_path / "codes.npy", 200, values)
    table["codes"][[7, 3]] = values["codes"]
    again = open_table(tmp_path / "codes.npy", 200, values)  # another reduction finds it
    assert again["codes"][7].tolist() == [0, 1, 2] and not again["done"].any()
    some = Rows(again["codes"], np.array([3, 7]))
    assert (
        len(some) == 2 and some.shape == (2, 3) and some[:1].tolist() == [[3, 4, 5]] and some[1].tolist() == [0, 1, 2]
    )
    with pytest.raises(ValueError, match="holds other outputs"):
        open_table(tmp_path / "codes.npy", 100, values)
    assert [path.name for path in tmp_path.iterdir()] == ["codes.npy"]


class Noise:
    """Twelve random pictures, the fifth of which cannot be read."""

    fingerprint, strict, keys = "noise", False, np.arange(12).astype(str)

    def __len__(self) -> int:
        return 12

    def read(self, row: int) -> data.Pair:
        if row == 4:
            raise data.BrokenSample("unreadable")
        pixels = np.random.default_rng(row).integers(0, 256, (12, 12, 3), dtype=np.uint8)
        return data.Pair(str(row), Image.fromarray(pixels), "a caption")


def test_only_missing_rows_are_computed(tmp_path):
    passes = Inference(ReduceConfig(data="", out=str(tmp_path), batch_size=4), Noise(), ALONE)
    asked: list[list[int]] = []

    def squares(rows: np.ndarray) -> list[int]:
        def compute(batch: Batch) -> dict:
            asked.append(batch.rows.tolist())
            return {"squares": batch.rows**2}

        table = passes.filled(tmp_path / "squares.npy", rows, "squares", eval_transform(8), compute)
        return table["squares"][rows].tolist()

    rows = np.array([0, 1, 5, 9, 10, 11])
    assert squares(rows[1::2]) == [1, 81, 121] and asked == [[1, 9, 11]]
    assert squares(rows) == [0, 1, 25, 81, 100, 121] and asked[1:] == [[0, 5, 10]]
    assert squares(rows) == [0, 1, 25, 81, 100, 121] and len(asked) == 2


def test_codes_of_an_encoder(tmp_path, monkeypatch):
    """A run that finds the codebook gives the same codes; a broken image is marked."""
    monkeypatch.setattr(inference, "FITTED", 7)
    monkeypatch.setattr(encoders, "CODES", 8)
    monkeypatch.setattr(encoders, "CODE_DIM", 2)
    seen: list[int] = []
    encoder = Encoder(eval_transform(12), lambda images: seen.append(len(images)) or images, lambda images: images)
    cfg = ReduceConfig(data="", out=str(tmp_path), batch_size=4)

    def codes() -> np.ndarray:
        passes = Inference(cfg, Noise(), ALONE)
        passes.loaded[cfg.encoder] = encoder
        found = np.array(passes.codes())
        next(tmp_path.glob("work/codes-*.npy")).unlink()  # the codebook is in another file and is kept
        return found

    first = codes()
    assert sum(seen) == 12  # those to which the codebook was fitted are not encoded again
    assert np.array_equal(codes(), first) and len(np.unique(first["codes"])) == 8
    assert np.flatnonzero(~first["readable"]).tolist() == [4]


def test_the_same_annotations_of_other_images_have_their_own_outputs(tmp_path):
    """Reductions that share a work folder may read an annotation file with different --image-root."""
    (tmp_path / "all.json").write_text(json.dumps([{"image": "a.png", "caption": "a"}]))
    hashes = []
    for colour in ("red", "blue"):
        (tmp_path / colour).mkdir()
        Image.new("RGB", (4, 4), colour).save(tmp_path / colour / "a.png")
        pairs = open_pairs(str(tmp_path / "all.json"), str(tmp_path / colour))
        cfg = ReduceConfig(data="", out=str(tmp_path / "out"))
        hashes += Inference(cfg, pairs, ALONE).readable()["pixels"].tolist()
    assert len(set(hashes)) == 2
