"""Duplicates and notes that a reduction reports."""

import numpy as np

from tldr_reduction import report
from tldr_reduction.config import ReduceConfig


def test_duplicates():
    codes = np.random.default_rng(0).integers(0, 99, (500, 20)).astype(np.uint16)
    codes[7], codes[400] = codes[3], codes[3]
    first = report.first_of_equal(report.row_hashes(codes, 64))
    assert first[7] == first[400] == 3 and len(set(first)) == 498


def notes(found: dict, readable: int = 300, **settings) -> list[str]:
    cfg = dict(data="pool", out="", keep=0.25, clusters=10) | settings
    return report.notes_of(ReduceConfig(**cfg), found, readable)


ORIGINAL = {"kind": "original", "by": None, "without_generated": 0}
REFINED = {"kind": "refined", "by": "a/b", "without_generated": 0}
FOUND = {"samples": 300, "identical_images": 0, "kept": 75, "captions": REFINED}


def test_notes_are_about_what_is_missing():
    same, unchanged = notes(FOUND | {"identical_images": 240, "kept": 60, "captions": ORIGINAL})
    assert same.startswith("Only 60 of 300 images are distinct") and "no --caption-model" in unchanged
    assert notes(FOUND | {"captions": ORIGINAL}, select="all") == []
    missing, unscored = notes(FOUND | {"identical_images": 200, "captions": REFINED | {"without_generated": 3}})
    assert missing.startswith("3 of 75 kept samples") and "no --scorer" in unscored  # 75 of 100 distinct ones are kept
    assert notes(FOUND, scorer="c") == []


def test_notes_name_a_kept_share_above_keep():
    (more,) = notes(FOUND | {"kept": 82}, scorer="c")
    assert more.startswith("27.3 % are kept, more than --keep 0.25") and "10 clusters" in more
    assert notes(FOUND | {"kept": 81}, scorer="c") == []  # 27 %, two points above --keep: no note
    assert notes(FOUND | {"kept": 150}, scorer="c", select="random") == []


def test_notes_are_about_flags_without_effect():
    flags = dict(clusters=20, drop_duplicates=False, code_dim=8, check="a", scorer="c")
    (note,) = notes(FOUND, select="random", **flags)
    assert note == "--clusters, --no-drop-duplicates, --code-dim, --check have no effect with --select random."
    assert notes(FOUND, select="stride", **flags) == []
    assert notes(FOUND, select="random", scorer="c", check="none") == []  # 10 clusters are the default, 300 / 30
    assert notes(FOUND, select="all", scorer="c", keep=0.5) == ["--keep has no effect with --select all."]
    (note,) = notes(FOUND, select="itm", **flags)
    assert "--clusters" in note and "--check" not in note  # its coverage is compared with that of random selections


def test_notes_say_what_was_not_compared_and_where_images_are():
    cfg = ReduceConfig(data="pool", out="", keep=0.25, clusters=10, scorer="c")
    (note,) = report.notes_of(cfg, FOUND, 300, "no package x")
    assert note == "The selection was not compared on features of an independent encoder: no package x."
    (note,) = notes(FOUND, scorer="c", data="lists/train.json", image_root="/pictures")
    assert note == "Images were not copied: pass --image-root /pictures beside the new annotation.json."


def test_notes_compare_coverage_with_random_selections():
    def check(coverage: float) -> dict:
        return {"coverage": coverage, "coverage_random": [0.49, 0.50, 0.51]}

    found = FOUND | {"checks": {"thumbnails": check(0.53), "captions": check(0.52), "towers": check(0.503)}}
    (note,) = notes(found, scorer="c")
    better, same = note.split("; ")
    assert better.endswith("the dropped ones better than a random choice of as many, by thumbnails and by captions")
    assert same == "about as well as a random choice of as many, by towers."
    (worse,) = notes(FOUND | {"checks": {"captions": check(0.4)}}, scorer="c")
    assert worse == "The kept samples cover the dropped ones worse than a random choice of as many, by captions."


def test_self_scores_are_named(tmp_path):
    (note,) = notes(FOUND, scorer="a/b", caption_model="a/b")
    assert note.startswith("Scores are self-scores: the captioner scores its own captions")
    (tmp_path / "config.json").write_text('{"data": "pool"}')
    (note,) = notes(FOUND, scorer=str(tmp_path))
    assert "the scorer was trained on these captions" in note
    (tmp_path / "config.json").write_text('{"data": "other"}')
    assert notes(FOUND, scorer=str(tmp_path)) == []
