"""`make site`: pages that open offline, at the widths of a phone and of a desktop."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from headless import look
from scripts import ROOT

from shared import presets

pytest.importorskip("material", reason="needs the extra `site`")
PAGES = ("index", "RESULTS", "protoclip/index", "companion/protoclip")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a strict build, which fails for a link without a target."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


@pytest.mark.slow
def test_pages_load_nothing_from_the_network(site: Path):
    pages = sorted(site.rglob("*.html"))
    names = {str(page.relative_to(site)) for page in pages}
    assert {"index.html", "RESULTS.html", "PARITY.html", "docs/scale.html", "report.html"} <= names
    assert {f"{folder}/index.html" for folder in presets.folders()} <= names
    assert {f"companion/{folder}.html" for folder in presets.folders()} <= names
    for page in pages:
        loaded = re.findall(
            r'<(?:script|img|link rel="stylesheet")[^>]*(?:src|href)="?(https?:[^" >]+)', page.read_text()
        )
        assert not loaded, page
    assert "<math" in (site / "protoclip/index.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
def test_pages_fit_the_window(site: Path, tmp_path: Path, width: int):
    for name in PAGES:
        seen = look(site / f"{name}.html", tmp_path / "page.png", width, "window")
        assert all(request.startswith(site.as_uri()) for request in seen["requests"]), name
        assert not seen["failed"] and not seen["messages"] and seen["overflow"] == 0, name
        assert all(image["decoded"] > 0 for image in seen["images"]), name
