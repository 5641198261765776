"""Duplicates and notes that a reduction reports, and its page: every section is shown, text of the data is escaped."""

from pathlib import Path

import numpy as np
import pandas
import pytest
from headless import look
from PIL import Image

from shared import data
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
    assert "60 of 300" in same and "no --caption-model" in unchanged
    assert notes(FOUND | {"captions": ORIGINAL}, select="all") == []
    missing, unscored = notes(FOUND | {"identical_images": 200, "captions": REFINED | {"without_generated": 3}})
    assert "3 of 75" in missing and "no --scorer" in unscored  # 75 of 100 distinct ones are kept
    assert notes(FOUND, scorer="c") == []


def test_notes_name_a_kept_share_above_keep():
    (more,) = notes(FOUND | {"kept": 82}, scorer="c")
    assert "27.3 %" in more and "--keep 0.25" in more and "10 clusters" in more
    assert notes(FOUND | {"kept": 81}, scorer="c") == []  # 27 %, two points above --keep: no note
    assert notes(FOUND | {"kept": 150}, scorer="c", select="random") == []


def test_notes_compare_coverage_with_random_selections():
    def check(coverage: float) -> dict:
        return {"coverage": coverage, "coverage_random": [0.49, 0.50, 0.51]}

    found = FOUND | {"checks": {"thumbnails": check(0.53), "captions": check(0.52), "towers": check(0.503)}}
    (note,) = notes(found, scorer="c")
    better, same = note.split("; ")
    assert "better" in better and "thumbnails and by captions" in better
    assert "as well" in same and "towers" in same
    (worse,) = notes(FOUND | {"checks": {"captions": check(0.4)}}, scorer="c")
    assert "worse" in worse and "captions" in worse


def test_self_scores_are_named(tmp_path):
    (note,) = notes(FOUND, scorer="a/b", caption_model="a/b")
    assert "self-scores" in note
    (tmp_path / "config.json").write_text('{"data": "pool"}')
    (note,) = notes(FOUND, scorer=str(tmp_path))
    assert "trained on these captions" in note
    (tmp_path / "config.json").write_text('{"data": "other"}')
    assert notes(FOUND, scorer=str(tmp_path)) == []


# ---------------------------------------------------------------------------------------------------------- the page


class Pairs:
    """Six pictures whose captions are HTML scripts; the last one is broken."""

    keys = np.array([f"k{i}" for i in range(6)])

    def read(self, row: int) -> data.Pair:
        if row == 5:
            raise data.BrokenSample("unreadable")
        return data.Pair(f"k{row}", Image.new("RGB", (300, 200), (40 * row, 0, 0)), f"<script>{row}</script>")


def write(path: Path) -> None:
    """Write a page with every section."""
    columns = {
        "key": Pairs.keys.tolist(),
        "kept": [1, 0, 1, 0, 0, 0],
        "reason": ["evenly", "passed over", "evenly", "same image as k0", "passed over", "broken: unreadable"],
        "duplicate_of": ["", "", "", "k0", "", ""],
        "cluster": [0, 0, 1, 0, 1, ""],
        "itm": [0.5, 0.2, 0.9, 0.5, 0.1, ""],
        "itm_after": [0.75, "", 0.95, "", "", ""],
        "caption": ["<b>", "", "two", "", "", ""],
        "generated": ["<b>red", "", "", "", "", ""],
    }
    summary = {"mean": 0.4, "cut": 0.5, "below_cut": 60.0, "span": [0, 1], "histogram": [1.0] * 10}
    found = {
        **dict(kept=2, samples=6, kept_share=0.4, broken=1, identical_images=1, codes_used=9, perplexity=4.0),
        **dict(clusters=2, cluster_sizes=[2, 2, 2, 3, 3], itm={"before": summary, "after": summary}),
        "captions": {"by": "a/b"},
        "notes": ["There is no --scorer <"],
        "checks": {"captions": {"coverage": 0.5, "coverage_random": [0.4, 0.45], "cohesion": 0.3,
                                "cohesion_shuffled": 0.1, "cohesion_kmeans": 0.4}},
    }  # fmt: skip
    cfg = ReduceConfig(data="<shards>", out="", keep=0.4, captions="refined", caption_model="a/b", scorer="c")
    report.write_page(path, cfg, Pairs(), found, pandas.DataFrame(columns))


def test_everything_is_shown_and_nothing_runs(tmp_path: Path):
    write(tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "<script" not in text and "<shards>" not in text and "<b>red" not in text
    for words in (
        "2 of 6", "random selection", "no --scorer &lt;",
        "cohesion 0.300", "Refined captions", "score 0.50 to 0.75",
        "passed over: 2", "broken: unreadable: 1", "Identical images: 1", "cluster 0: 1 of 3 kept", "&lt;script&gt;",
    ):  # fmt: skip
        assert words in text, words
    assert text.count("data:image/jpeg;base64,") > 8 and text.count('class="kept"') >= 2


@pytest.mark.parametrize("width", (390, 1280))
def test_it_reads_in_a_browser(tmp_path: Path, width: int):
    """At the widths of a phone and of a desktop, nothing is fetched, every thumbnail is shown and nothing overflows."""
    write(tmp_path / "report.html")
    seen = look(tmp_path / "report.html", tmp_path / "report.png", width)
    assert seen["requests"] == [(tmp_path / "report.html").as_uri()] and not seen["failed"] and not seen["messages"]
    assert len(seen["headings"]) == 6
    assert len(seen["images"]) > 8
    assert all(image["decoded"] == image["width"] == report.SIDE for image in seen["images"])
    assert "stride, 0.4" in seen["cells"] and seen["overflow"] == 0
