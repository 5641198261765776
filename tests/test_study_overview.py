"""The page of all results, as Markdown and as HTML with plots."""

import errno
import html
import json
import os
import re
from pathlib import Path

import pytest

from shared import checkpoints
from studies.harness import overview, report, verdicts

ROOT = Path(__file__).parent.parent


def test_the_page_of_results_is_made_of_the_files():
    found = overview.read(ROOT / "results")
    assert (ROOT / "RESULTS.md").read_text() == overview.markdown(found, overview.read(ROOT / "results/photos")), (
        "run `make readme`"
    )


def test_the_readme_counts_verdicts_on_abstracts():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    found, photographs = (overview.read(ROOT / folder) for folder in ("results", "results/photos"))
    assert readme == overview.with_verdicts(readme, found, photographs), "run `make readme`"
    rows = [{"primary": True, "verdict": verdict} for verdict in ("not resolved", "reproduced", "not resolved")]
    summaries = {"flame": {"claims": [*rows, {"primary": False, "verdict": "not reproduced"}]}}
    text = "| folder | minutes | verdicts |\n| [`flame/`](a.md) | - | old |\n| [`flames/`](b.md) | | |\n"
    minutes = f"{3 * overview.study_of('flame').minutes['core']:.0f}"
    expected = text.replace("- | old ", f"{minutes} | 1 reproduced, 2 not resolved ")
    assert overview.with_verdicts(text, summaries, {}) == expected


def test_the_page_with_plots_needs_nothing_else():
    found = overview.read(ROOT / "results")
    page = overview.html_page(found, {}, ROOT / "results")
    plots = sum(len(list((ROOT / "results").glob(f"{folder}_*.png"))) for folder in found)
    assert plots and page.count('src="data:image/png;base64,') == page.count("<img") == plots
    page = re.sub(r"base64,[^\"]*", "", page)  # any four letters may stand there
    assert "http" not in page and "<script" not in page
    for summary in found.values():
        assert all(html.escape(row["claim"]) in page for row in summary["claims"])


def test_claims_of_abstracts_come_first_and_are_counted():
    rows = [
        {"claim": "up", "primary": True, "paper": "+2", "metric": "m", "floor": 30.0, "method": 42.0, "baseline": 40.5}
        | {"difference": 1.5, "interval": [1.0, 2.0], "resolves": 0.5, "seeds": 3, "verdict": "reproduced"},
        verdicts.not_testable("absolute", "70", "needs data", primary=True),
        {"claim": "slope", "primary": True, "paper": "+2", "metric": "s", "floor": 30.0, "method": 0.2, "baseline": 0.0}
        | {"difference": 0.2, "interval": [0.1, 0.3], "resolves": 0.1, "verdict": "reproduced"},
        verdicts.not_testable("other", "70", "needs data"),
    ]
    floors = {"chance": {"m": 1.0, "s": 1.0}, "pixels": {"m": 30.0}}
    summary = {"corpus": "Scenes of emoji", "floors": floors, "claims": rows, "seeds": [0, 1, 2]}
    found = overview.primary_rows({"protoclip": summary})
    assert [row["claim"] for row in found] == ["up", "absolute", "slope"]
    assert [found[0][key] for key in ("floor", "baseline", "method")] == ["30.00", "40.50", "42.00"]
    assert found[0]["difference"] == "+1.50 ± 0.50" and found[0]["seeds"] == 3 and found[1]["floor"] == "-"
    assert found[2]["floor"] == "-" and found[2]["method"] == "0.20"  # its floor is in another metric
    first = (
        "Of 3 claims of abstracts, 2 have a resolved verdict on emoji or scenes (67%). Hold here: 2 reproduced; "
        "open: 1 not testable here."
    )
    assert overview.totals(found, []) == first
    expected = "- [protoclip](#protoclip). **Reproduced**: up; slope. **Not testable here**: absolute (needs data"
    assert overview.by_paper(found, []) == f"{expected})."
    beside = [{"paper": "protoclip", "claim": claim, "verdict": "same direction"} for claim in ("absolute", "up")]
    assert "1 of the open ones are resolved, so 3 (100%) have" in overview.totals(found, beside)
    assert overview.by_paper(found, beside) == f"{expected}; on photographs: same direction)."
    contrary = [{"paper": "protoclip", "claim": "up", "verdict": "not reproduced"}]
    assert "**Reproduced**: up (on photographs: not reproduced); slope." in overview.by_paper(found, contrary)
    said = overview.totals(found, contrary)
    assert "(67%) have a resolved verdict on pictures of at least one kind; " in said
    assert said.endswith("one kind; 1 of those that are resolved on both come out differently on photographs.")


def test_the_first_table_says_which_pictures_a_study_has():
    found = {name: overview.pictures_of(summary) for name, summary in overview.read(ROOT / "results").items()}
    assert set(found.values()) == {"emoji", "scenes", "emoji, scenes"} and found["tldr_reduction"] == "scenes"
    photographs = overview.read(ROOT / "results/photos").values()
    assert {overview.pictures_of(summary) for summary in photographs} == {"photographs"}


def test_photographs_stand_beside_the_embedded_corpus(tmp_path, monkeypatch):
    """A paper's section has the verdict on emoji beside claims of the same words; photographs without emoji results
    also work."""
    emoji = checkpoints.read_json(ROOT / "results/nmtune.json")
    claim = emoji["claims"][0]["claim"]
    photographs = emoji | {"corpus": "CIFAR-10 and PACS", "floors": {}, "claims": emoji["claims"][:2]}
    photographs["claims"][1] = photographs["claims"][1] | {"claim": "asked here alone"}
    photographs["claims"][0] = photographs["claims"][0] | {"primary": False}  # starred there, and not here
    page = overview.markdown({"nmtune": emoji}, {"nmtune": photographs, "protoclip": photographs})
    assert page.count(report.PHOTOGRAPHS) == 2 and page.count("CIFAR-10 and PACS.") == 2
    assert "CORPUS=photos PHOTOS=FOLDER RESULTS=results/photos/nmtune.json" in page
    section = page[page.index('id="nmtune"') :].split(report.PHOTOGRAPHS)[1]
    rows = [line for line in section.splitlines() if claim in line or "asked here alone" in line]
    verdict = emoji["claims"][0]["verdict"]
    assert rows[0].count(verdict) == 2 and rows[1].rstrip(" |").endswith("| -")
    page = overview.html_page({"nmtune": emoji}, {"nmtune": photographs}, tmp_path)
    assert page.count("<h3>") == 1 and "RESULTS=runs/photos/nmtune/results.json" in page  # no file of results/

    for name, summary in (("nmtune.json", emoji), ("photos/nmtune.json", photographs)):
        checkpoints.write_json(tmp_path / "results" / name, summary)
    (tmp_path / "nmtune").mkdir()
    marks = "<!-- results -->\nold\n<!-- /results -->\n"
    (tmp_path / "nmtune/README.md").write_text(marks)
    monkeypatch.chdir(tmp_path)
    assert not report.update_readme("nmtune") and report.update_readme("nmtune")
    text = (tmp_path / "nmtune/README.md").read_text()
    assert text.index("Seeds") < text.index(report.PHOTOGRAPHS) < text.index("CIFAR-10 and PACS") < text.rindex("Seeds")


def test_what_files_say_cannot_become_markup():
    row = {"claim": "<b>", "paper": "-", "here": "&", "verdict": "reproduced"}
    table = overview.html_table([row])
    assert "<b>" not in table and "&lt;b&gt;" in table and 'class="reproduced"' in table


def test_results_of_another_paper_and_a_full_disk_leave_the_pages(tmp_path, monkeypatch):

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    summaries = {name: checkpoints.read_json(f"results/{name}.json") for name in ("nmtune",)}
    monkeypatch.chdir(tmp_path)
    for name, summary in summaries.items():
        checkpoints.write_json(f"results/{name}.json", summary)
    pages = [Path("RESULTS.md"), Path("README.md"), Path("report.html")]
    for page in pages:
        page.write_text("before")
    monkeypatch.setattr("sys.argv", ["overview"])
    monkeypatch.setattr(overview, "judge_again", lambda *_: None)
    checkpoints.write_text("results/lexvla.json", Path("results/nmtune.json").read_text(encoding="utf-8"))
    with pytest.raises(ValueError, match=r"results/lexvla.json holds results of NMTune .*, not of LexVLA"):
        overview.main()
    Path("results/lexvla.json").unlink()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match="RESULTS.md could not be written and is left as it was"):
        overview.main()
    assert [page.read_text() for page in pages] == ["before"] * 3


def test_pages_of_runs_and_of_nothing(tmp_path, monkeypatch, capsys):
    summary = checkpoints.read_json(ROOT / "results/protoclip.json")
    (tmp_path / "runs/protoclip").mkdir(parents=True)
    (tmp_path / "runs/protoclip/results.json").write_text(json.dumps(summary))
    (tmp_path / "runs/protoclip/protoclip_curves.png").write_bytes(b"plot")
    (tmp_path / "runs/<img>.json").write_text(json.dumps(summary))  # no paper's
    monkeypatch.setattr("sys.argv", ["overview", str(tmp_path / "runs")])
    overview.main()
    page = (tmp_path / "runs/report.html").read_text()
    assert "cGxvdA==" in page and html.escape(summary["paper"]) in page and page.count("<h2 id") == 1
    assert str(tmp_path / "runs/report.html: 1 papers") in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["overview", str(tmp_path)])
    with pytest.raises(ValueError, match="holds no results"):
        overview.main()
