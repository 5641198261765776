"""Verdicts, tables and the README's numbers."""

import html
import json
from pathlib import Path

import pytest

from shared import checkpoints, evaluation
from shared.study import overview, remaining, report, statistics

ROOT = Path(__file__).parent.parent
CLAIM = statistics.Claim("higher", "+2", "m", "ours", "base", sign=1, effect=2.0)
SAME = statistics.Claim("lower", "-", "m", "ours", "base", sign=-1)


@pytest.mark.parametrize(
    ("claim", "method", "verdict"),
    [
        (CLAIM, [12.0, 12.1, 11.9], "reproduced"),
        (CLAIM, [10.5, 10.6, 10.4], "same direction"),  # surely above 0, surely below the paper's 2
        (CLAIM, [8.0, 8.1, 7.9], "not reproduced"),
        (CLAIM, [12.0, 8.0, 11.0], "not resolved at this scale"),
        (CLAIM, [10.0, 10.0, 10.0], "not resolved at this scale"),
        (SAME, [8.0, 8.1, 7.9], "reproduced"),
        (SAME, [12.0, 12.1, 11.9], "not reproduced"),
    ],
)
def test_verdicts(claim: statistics.Claim, method: list[float], verdict: str):
    assert statistics.judge(claim, method, [10.0, 10.0, 10.0])["verdict"] == verdict


def test_where_the_paper_claims_nothing():
    assert statistics.judge(CLAIM._replace(paper=None), [12.0, 12.1, 11.9], [10.0] * 3)["verdict"] == "no claim"


def test_one_seed_proves_nothing():
    row = statistics.judge(CLAIM, [50.0], [10.0])
    assert row["verdict"] == "not resolved at this scale" and row["here"] == "+40.00"


def test_interval_is_students():
    # scipy.stats.t.interval(0.95, 2, loc=2, scale=1 / sqrt(3)): 2 ± 2.4841
    assert statistics.interval([1.0, 2.0, 3.0]) == pytest.approx(2.48414, abs=1e-4)
    assert statistics.interval([1.0]) is None


def test_pairing_by_seed_removes_what_seeds_share():
    row = statistics.judge(CLAIM, [12.0, 22.0, 32.0], [10.0, 20.0, 30.0])
    assert row["verdict"] == "reproduced" and row["here"] == "+2.00 ± 0.00"


def test_tables_are_markdown():
    lines = evaluation.table([{"a": 1, "b": "x"}, {"a": 22, "b": "y"}]).splitlines()
    assert lines == ["| a  | b |", "| -- | - |", "| 1  | x |", "| 22 | y |"]


@pytest.mark.parametrize("file", sorted(ROOT.glob("results/*.json")), ids=lambda file: file.stem)
def test_committed_results(file: Path, monkeypatch: pytest.MonkeyPatch):
    """One schema, three seeds (NMTune: two, of five of tuning each), and the README's numbers are the file's."""
    monkeypatch.chdir(ROOT)
    summary = checkpoints.read_json(file)
    assert set(summary) == {"paper", "seeds", "machine", "date", "commit", "arms", "claims"}
    assert len(summary["seeds"]) >= (2 if file.stem == "nmtune" else 3)
    for metrics in summary["arms"].values():
        for value in metrics.values():
            assert set(value) == {"mean", "std", "values"} and len(value["values"]) == len(summary["seeds"])
    verdicts = {
        "reproduced",
        "same direction",
        "not reproduced",
        "not testable at this scale",
        "not resolved at this scale",
        "no claim",
    }
    assert all(set(row) == {"claim", "paper", "here", "verdict"} for row in summary["claims"])
    assert {row["verdict"] for row in summary["claims"]} <= verdicts
    assert report.update_readme(file.stem, write=False), "run `make readme`"


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


def test_remaining_papers_are_those_without_all_seeds_and_arms(tmp_path):
    papers = ["protoclip:clip,protoclip:12", "flame:flame:", "tinyclip:auto:20"]
    assert list(remaining.remaining({0, 1}, papers, tmp_path)) == ["protoclip", "flame", "tinyclip"]
    for folder, seeds, arms in (("protoclip", [0, 1, 2], ("clip", "protoclip")), ("tinyclip", [0], ("auto",))):
        (tmp_path / folder).mkdir()
        summary = {"paper": folder, "seeds": seeds, "arms": dict.fromkeys(arms, {}), "claims": []}
        (tmp_path / folder / "results.json").write_text(json.dumps(summary))
    left = remaining.remaining({0, 1}, papers, tmp_path)
    assert left == {"flame": None, "tinyclip": 40.0}  # tinyclip lacks seed 1
    text = remaining.sentence(left, 3)
    assert text.startswith("2 of 3 papers left: flame (? min), tinyclip (40 min); about 0 h 40 min")
    assert remaining.sentence({}, 3) == "all 3 papers are done"
    (tmp_path / "tinyclip/results.json").write_text('{"seeds": [0, 1], "arms"')  # damaged
    assert list(remaining.remaining({0, 1}, papers, tmp_path)) == ["flame", "tinyclip"]


def test_results_of_other_code_are_named(tmp_path):
    (tmp_path / "flame").mkdir()
    (tmp_path / "flame/results.json").write_text(json.dumps({"commit": "0000000"}))
    (sentence,) = remaining.older(["flame:a:1", "protoclip:b:2"], {"protoclip": 2.0}, tmp_path)
    assert sentence.startswith("flame was measured at commit 0000000, the code is at ")


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
