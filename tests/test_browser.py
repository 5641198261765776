"""report.html and companion pages in a real browser: Chromium and Playwright from npm (`make browser`)."""

import os
from pathlib import Path

import numpy as np
import pytest
from headless import look
from PIL import Image
from scripts import ROOT

from shared import presets
from studies.harness import companion, overview
from studies.harness.verdicts import shown


def test_the_report_opens_offline(tmp_path: Path):
    found, page = overview.read(ROOT / "results"), tmp_path / "report.html"
    page.write_text(overview.html_page(overview.markdown(found, {}, ""), found, {}, ROOT / "results"))
    seen = look(page, tmp_path / "report.png", part="window")
    assert seen["requests"] == [page.as_uri()] and not seen["failed"] and not seen["messages"]
    assert seen["headings"][-len(found) :] == [summary["paper"] for summary in found.values()]
    assert seen["links"] == [True] * len(found)
    plots = [plot for folder in found for plot in (ROOT / "results").glob(f"{folder}_*.png")]
    assert len(seen["images"]) == 2 + len(plots) and all(image["decoded"] > 0 for image in seen["images"])
    assert all(100 < image["width"] <= 1280 for image in seen["images"]) and seen["overflow"] == 0
    cells = {cell.replace("\u00a0", " ") for cell in seen["cells"]}  # "a ± b" does not break
    for summary in found.values():
        rows = shown(summary["claims"])
        assert all({row["claim"], str(row["here"]), row["verdict"]} <= cells for row in rows)
    shot = Image.open(tmp_path / "report.png").convert("L")
    assert shot.width == 1280 and shot.height > 600 and len(np.unique(shot.resize((64, 256)))) > 30  # not a blank


def looked_at(readme: companion.Readme, clones: dict[str, Path], folder: Path, width: int, tests: list) -> dict:
    """Check a companion page in a browser: equations are rendered, links have targets, nothing overflows the window,
    and nothing is fetched."""
    path = folder / f"{readme.folder}.html"
    path.write_text(companion.page(readme, clones, tests), encoding="utf-8")
    seen = look(path, folder / "page.png", width, "page" if width > 1000 else "window")
    assert seen["requests"] == [path.as_uri()] and not seen["failed"] and not seen["messages"]
    assert seen["overflow"] == 0 and seen["title"] == readme.title
    assert len(seen["links"]) == len(readme.rows) and all(seen["links"])
    assert seen["equations"] and all(10 < each["height"] < 400 for each in seen["equations"])
    assert Image.open(folder / "page.png").width == width
    return seen


PAGES = [(folder, 390) for folder in presets.folders()] + [("protoclip", 1280)]


@pytest.mark.parametrize("folder, width", PAGES, ids=[f"{folder}-{width}" for folder, width in PAGES])
def test_a_companion_page_reads(tmp_path: Path, folder: str, width: int, monkeypatch: pytest.MonkeyPatch):
    """Every page at the width of a phone, and one at that of a desktop, without clones."""
    monkeypatch.chdir(ROOT)
    readme = companion.read(folder)
    first = readme.rows[0].functions[0]
    name = f"{first.file.removesuffix('.py').replace('/', '.')}.{first.name}"
    tests = [{"test": "first", "functions": [name], "values": 1e-7, "gradients": None,
              "against": "golden data", "date": "2026-01-01", "commit": "abc"}]  # fmt: skip
    seen = looked_at(readme, {}, tmp_path, width, tests)
    assert {"golden data", "1.0e-07", "2026-01-01, abc"} <= set(seen["cells"])


@pytest.mark.parametrize("folder", presets.folders())
def test_a_companion_page_reads_with_clones(tmp_path: Path, folder: str, request, monkeypatch: pytest.MonkeyPatch):
    """Pages with a clone or a folder of clones, from --upstream or $CLONES."""
    monkeypatch.chdir(ROOT)
    readme, where = companion.read(folder), os.environ.get("CLONES")
    clones = companion.clones_of(readme, request.config.getoption("upstream"), Path(where) if where else None)
    if not clones:
        pytest.skip(f"needs --upstream PATH or CLONES=PATH, with a clone that {folder}/README.md names")
    looked_at(readme, clones, tmp_path, 390, [])


def test_a_broken_page_would_be_noticed(tmp_path: Path):
    (tmp_path / "page.html").write_text('<img src="data:image/png;base64,AAAA"><img src="http://example.org/x.png">')
    seen = look(tmp_path / "page.html", tmp_path / "page.png")
    assert [image["decoded"] for image in seen["images"]] == [0, 0]
    assert "http://example.org/x.png" in seen["failed"]
