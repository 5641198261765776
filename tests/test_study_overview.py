"""The page of all results, as Markdown and as HTML with plots."""

import html
import json
from pathlib import Path

import pytest

from shared import checkpoints
from shared.study import overview

ROOT = Path(__file__).parent.parent


def test_the_page_of_results_is_made_of_the_files():
    found = overview.read(ROOT / "results")
    assert (ROOT / "RESULTS.md").read_text() == overview.markdown(found), "run `make readme`"


def test_the_page_with_plots_needs_nothing_else():
    found = overview.read(ROOT / "results")
    page = overview.html_page(found, ROOT / "results")
    plots = sum(len(list((ROOT / "results").glob(f"{folder}_*.png"))) for folder in found)
    assert plots and page.count('src="data:image/png;base64,') == page.count("<img") == plots
    assert "http" not in page and "<script" not in page
    for summary in found.values():
        assert all(html.escape(row["claim"]) in page for row in summary["claims"])


def test_what_files_say_cannot_become_markup():
    row = {"claim": "<b>", "paper": "-", "here": "&", "verdict": "reproduced"}
    table = overview.html_table([row])
    assert "<b>" not in table and "&lt;b&gt;" in table and 'class="reproduced"' in table


def test_pages_of_runs_and_of_nothing(tmp_path, monkeypatch, capsys):
    summary = checkpoints.read_json(ROOT / "results/protoclip.json")
    (tmp_path / "runs/protoclip").mkdir(parents=True)
    (tmp_path / "runs/protoclip/results.json").write_text(json.dumps(summary))
    (tmp_path / "runs/protoclip/protoclip_curves.png").write_bytes(b"plot")
    (tmp_path / "runs/<img>.json").write_text(json.dumps(summary))  # no paper's
    monkeypatch.setattr("sys.argv", ["overview", str(tmp_path / "runs")])
    overview.main()
    page = (tmp_path / "runs/report.html").read_text()
    assert "cGxvdA==" in page and html.escape(summary["paper"]) in page and page.count("<h2") == 1
    assert str(tmp_path / "runs/report.html: 1 papers") in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["overview", str(tmp_path)])
    with pytest.raises(ValueError, match="holds no results"):
        overview.main()
