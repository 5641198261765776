"""Codes in the order of samples, and saved outputs of a reduction, of which only missing rows are computed."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from test_faults import room
from test_tldr_reduction_model import tiny_captioner

from shared import data, run
from tldr_reduction import inference
from tldr_reduction.config import ReduceConfig
from tldr_reduction.datasets import eval_transform, open_pairs
from tldr_reduction.encoders import Encoder
from tldr_reduction.inference import (
    Inference,
    cached_rows,
    extract_codes,
    gathered_codes,
    read_reasons,
    read_rows,
    short,
)
from tldr_reduction.model import CodebookCaptioner, VectorQuantizer


def test_extract_codes_is_by_index():
    model = tiny_captioner()
    images = torch.randn(5, 3, 16, 16)
    codes = extract_codes(model, [(torch.tensor([3, 1]), images[[3, 1]]), (torch.tensor([0, 4, 2]), images[[0, 4, 2]])])
    assert codes.dtype == np.uint16 and codes.shape == (5, 5 * 2)
    assert np.array_equal(codes, model.encode(images).numpy())
    many = CodebookCaptioner(model.visual_encoder, model.text_decoder, VectorQuantizer(70_000, 8))
    assert extract_codes(many, [(torch.arange(5), images)]).dtype == np.int32


def test_saved_outputs_are_completed_and_repaired(tmp_path):
    """Only missing rows are computed; a damaged file is computed again."""
    rows, asked = np.array([0, 1, 5, 9, 10, 11]), []

    def compute(missing: np.ndarray) -> dict:
        asked.append(missing.tolist())
        return {"squares": missing**2}

    def squares(wanted: np.ndarray) -> list[int]:
        cached_rows(tmp_path, wanted, 5, run.Process(0, 1, torch.device("cpu")), compute)
        return read_rows(tmp_path, wanted, 5, "squares").tolist()

    assert squares(rows[1::2]) == [1, 81, 121] and asked == [[1], [9], [11]]
    assert squares(rows) == [0, 1, 25, 81, 100, 121] and asked[3:] == [[0], [5], [10]]
    path = tmp_path / "000001.npz"
    for whole in (path.read_bytes()[:100], b""):
        path.write_bytes(whole)
        assert squares(rows) == [0, 1, 25, 81, 100, 121] and asked[-1] == [5, 9]


def test_reductions_that_share_a_folder_keep_each_others_rows(tmp_path):
    alone, evens, odds = run.Process(0, 1, torch.device("cpu")), np.array([0, 2, 4]), np.array([1, 3])

    def slow(missing: np.ndarray) -> dict:  # another reduction writes while this one computes
        if not (tmp_path / "000000.npz").exists():
            cached_rows(tmp_path, odds, 10, alone, lambda rows: {"squares": rows**2})
        return {"squares": missing**2}

    cached_rows(tmp_path, evens, 10, alone, slow)
    assert read_rows(tmp_path, np.arange(5), 10, "squares").tolist() == [0, 1, 4, 9, 16]
    with pytest.raises(ValueError, match="lacks samples that were written"):
        read_rows(tmp_path, np.array([4, 5]), 10, "squares")


def test_merged_codes_are_memory_mapped(tmp_path):
    """A full disk is an error in a sentence; without room for the file, a write to the map would kill the process."""
    codes = np.arange(60, dtype=np.uint16).reshape(20, 3)
    alone, rows = run.Process(0, 1, torch.device("cpu")), np.delete(np.arange(20), 7)
    cached_rows(tmp_path, np.arange(20), 6, alone, lambda missing: {"codes": codes[missing]})
    with room(200), pytest.raises(ValueError, match="codes.npy could not be written"):
        gathered_codes(tmp_path, rows, 6)
    merged = gathered_codes(tmp_path, rows, 6)
    assert isinstance(merged, np.memmap) and merged.dtype == np.uint16 and np.array_equal(merged, codes[rows])
    assert not list(tmp_path.glob("*.tmp*"))


def test_reasons_take_little_memory(tmp_path):
    rows, long = np.arange(6), "unreadable image: " + "x" * 100
    reasons = ["", "", "", long, "", long]

    def compute(missing: np.ndarray) -> dict:
        return {"reasons": short([reasons[row] for row in missing])}

    cached_rows(tmp_path, rows, 3, run.Process(0, 1, torch.device("cpu")), compute)
    assert read_rows(tmp_path, rows[:3], 3, "reasons").dtype == "U1"
    read = read_reasons(tmp_path, rows, 3)
    assert read.tolist() == [reason[:80] for reason in reasons] and read[3] is read[5]


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


def test_each_image_is_encoded_once(tmp_path, monkeypatch):
    """This holds for images that the codebook is fitted to, too; a run that finds the codebook gives the same codes."""
    monkeypatch.setattr(inference, "FITTED", 7)
    seen: list[int] = []

    def feature_map(images: torch.Tensor) -> torch.Tensor:
        seen.append(len(images))
        return images

    encoder = Encoder(eval_transform(12), feature_map, feature_map)
    cfg = ReduceConfig(data="", out=str(tmp_path), num_codes=8, code_dim=2, chunk=5, batch_size=4)
    rows = np.arange(12)

    def codes() -> list[np.ndarray]:
        passes = Inference(cfg, Noise(), run.Process(0, 1, torch.device("cpu")))
        passes.loaded[cfg.encoder] = encoder
        folder = passes.codes(None)
        found = [read_rows(folder, rows, cfg.chunk, name) for name in ("codes", "pixels", "reasons")]
        for path in folder.glob("0*.npz"):
            path.unlink()  # the codebook is in another folder and is kept
        return found

    first = codes()
    assert sum(seen) == 12
    again = codes()
    assert sum(seen) == 24
    for one, other in zip(first, again, strict=True):
        assert np.array_equal(one, other)
    assert len(np.unique(first[0])) == 8 and first[2].tolist() == ["unreadable" if row == 4 else "" for row in rows]


def test_the_same_annotations_of_other_images_have_their_own_outputs(tmp_path):
    """Reductions that share a work folder may read an annotation file with different --image-root."""
    (tmp_path / "all.json").write_text(json.dumps([{"image": "a.png", "caption": "a"}]))
    hashes = []
    for colour in ("red", "blue"):
        (tmp_path / colour).mkdir()
        Image.new("RGB", (4, 4), colour).save(tmp_path / colour / "a.png")
        pairs = open_pairs(str(tmp_path / "all.json"), str(tmp_path / colour))
        cfg = ReduceConfig(data="", out=str(tmp_path / "out"))
        passes = Inference(cfg, pairs, run.Process(0, 1, torch.device("cpu")))
        hashes += read_rows(passes.readable(), np.arange(1), cfg.chunk, "pixels").tolist()
    assert len(set(hashes)) == 2
