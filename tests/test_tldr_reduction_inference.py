"""Codes by row, and what is kept of a reduction: only missing rows are worked out."""

import numpy as np
import torch
from test_tldr_reduction_model import tiny_captioner

from shared import run
from tldr_reduction.inference import cached_rows, extract_codes, of_distinct, read_reasons, read_rows, short
from tldr_reduction.model import CodebookCaptioner, VectorQuantizer


def test_extract_codes_is_by_index():
    model = tiny_captioner()
    images = torch.randn(5, 3, 16, 16)
    codes = extract_codes(model, [(torch.tensor([3, 1]), images[[3, 1]]), (torch.tensor([0, 4, 2]), images[[0, 4, 2]])])
    assert codes.dtype == np.uint16 and codes.shape == (5, 5 * 2)
    assert np.array_equal(codes, model.encode(images).numpy())
    many = CodebookCaptioner(model.visual_encoder, model.text_decoder, VectorQuantizer(70_000, 8))
    assert extract_codes(many, [(torch.arange(5), images)]).dtype == np.int32


def test_identical_images_are_encoded_once():
    images, hashes, seen = torch.tensor([[5.0], [7.0], [5.0], [6.0]]), [2**63 + 1, 3, 2**63 + 1, 4], []

    def encode(batch: torch.Tensor) -> torch.Tensor:
        seen.append(len(batch))
        return 2 * batch

    assert torch.equal(of_distinct(encode, images, hashes), 2 * images) and seen == [3]
    codes = of_distinct(lambda batch: encode(batch).numpy().astype(np.uint16), images, hashes)
    assert codes.dtype == np.uint16 and codes.tolist() == [[10], [14], [10], [12]]


def test_rows_are_kept_and_mended(tmp_path):
    """Only what is missing is worked out; a file that is no longer whole is made again."""
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


def test_reasons_take_little_memory(tmp_path):
    rows, long = np.arange(6), "unreadable image: " + "x" * 100
    reasons = ["", "", "", long, "", long]

    def compute(missing: np.ndarray) -> dict:
        return {"reasons": short([reasons[row] for row in missing])}

    cached_rows(tmp_path, rows, 3, run.Process(0, 1, torch.device("cpu")), compute)
    assert read_rows(tmp_path, rows[:3], 3, "reasons").dtype == "U1"
    read = read_reasons(tmp_path, rows, 3)
    assert read.tolist() == [reason[:80] for reason in reasons] and read[3] is read[5]
