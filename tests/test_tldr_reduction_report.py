"""Duplicates and notes that a reduction reports."""

import numpy as np

from tldr_reduction import report
from tldr_reduction.config import ReduceConfig


def test_duplicates():
    codes = np.random.default_rng(0).integers(0, 99, (500, 20)).astype(np.uint16)
    codes[7], codes[400] = codes[3], codes[3]
    first = report.first_of_equal(report.row_hashes(codes, 64))
    assert first[7] == first[400] == 3 and len(set(first)) == 498


def test_notes_are_about_what_is_missing():
    captions = {"kind": "original", "by": None, "without_generated": 0}
    cfg = ReduceConfig(data="", out="", keep=0.25)
    found = {"identical_images": 240, "kept": 60, "captions": captions}
    same, unchanged = report.notes_of(cfg, found, 300)
    assert same.startswith("Only 60 of 300 images are distinct") and "no --caption-model" in unchanged
    cfg.select = "all"
    assert report.notes_of(cfg, {**found, "identical_images": 0}, 300) == []
    cfg.select = "stride"
    refined = {**found, "identical_images": 200, "captions": {"kind": "refined", "by": "a/b", "without_generated": 3}}
    missing, unscored = report.notes_of(cfg, refined, 300)  # 100 distinct ones, of which 75 are asked for
    assert missing.startswith("3 of 60 kept samples") and "no --scorer" in unscored
    refined["captions"]["without_generated"], cfg.scorer = 0, "c"
    assert report.notes_of(cfg, refined, 300) == []
