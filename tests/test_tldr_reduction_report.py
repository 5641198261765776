"""Duplicates that a reduction reports."""

import numpy as np

from tldr_reduction import report


def test_duplicates():
    codes = np.random.default_rng(0).integers(0, 99, (500, 20)).astype(np.uint16)
    codes[7], codes[400] = codes[3], codes[3]
    first = report.first_of_equal(report.row_hashes(codes, 64))
    assert first[7] == first[400] == 3 and len(set(first)) == 498
