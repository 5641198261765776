"""report.html: every section is shown, and text of the data is escaped."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_browser import look

from shared import data
from tldr_reduction import html_report
from tldr_reduction.config import ReduceConfig


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
    report = {
        **dict(kept=2, samples=6, kept_share=0.4, broken=1, identical_images=1, codes_used=9, perplexity=4.0),
        **dict(clusters=2, cluster_sizes=[2, 2, 2, 3, 3], itm={"before": summary, "after": summary}),
        "notes": ["There is no --scorer <"],
        "checks": {"captions": {"coverage": 0.5, "coverage_random": [0.4, 0.45], "cohesion": 0.3,
                                "cohesion_shuffled": 0.1, "cohesion_kmeans": 0.4}},
    }  # fmt: skip
    cfg = ReduceConfig(data="<shards>", out="", keep=0.4, captions="refined", caption_model="a/b", scorer="c")
    html_report.write_page(path, cfg, Pairs(), report, columns)


def test_everything_is_shown_and_nothing_runs(tmp_path: Path):
    write(tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "<script" not in text and "<shards>" not in text and "<b>red" not in text
    for words in (
        "2 of 6 samples kept", "better than a random selection", "no --scorer &lt;",
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
    assert seen["title"] == "Reduction" and seen["headings"] == [
        "Is it better than a random selection?", "Scores of captions, before and after", "Refined captions",
        "Why samples were kept or dropped", "Identical images: 1", "Clusters",
    ]  # fmt: skip
    assert len(seen["images"]) > 8
    assert all(image["decoded"] == image["width"] == html_report.SIDE for image in seen["images"])
    assert "stride, 0.4" in seen["cells"] and seen["overflow"] == 0
