"""The page of all results, as Markdown and as HTML with plots."""

import errno
import html
import json
import os
import re
from pathlib import Path

import pandas
import pytest

from shared import checkpoints
from studies.harness import overview, runner, verdicts

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


def test_the_page_with_plots_needs_nothing_else():
    found = overview.read(ROOT / "results")
    page = overview.html_page(found, {}, ROOT / "results")
    plots = sum(len(list((ROOT / "results").glob(f"{folder}_*.png"))) for folder in found)
    assert plots and page.count('src="data:image/png;base64,') == page.count("<img") == plots
    page = re.sub(r"base64,[^\"]*", "", page)  # any four letters may stand there
    assert "http" not in page and "<script" not in page
    text = html.unescape(page)
    for folder, summary in found.items():
        assert f'<section id="{folder}">' in page
        assert all(row["claim"] in text for row in summary["claims"])


def row(claim: str, verdict: str = "reproduced", metric: str = "m", **more) -> dict:
    """A row of a primary claim."""
    numbers = {"floor": 30.0, "method": 42.0, "baseline": 40.5, "difference": 1.5, "resolves": 0.5, "seeds": 3}
    return {"claim": claim, "primary": True, "paper": "+2", "metric": metric, "verdict": verdict} | numbers | more


def summary_of(*rows: dict) -> dict:
    floors = {"chance": {"m": 1.0, "s": 1.0}, "pixels": {"m": 30.0}}
    return {"paper": "ProtoCLIP", "corpus": "Scenes of emoji", "floors": floors, "claims": list(rows), "seeds": [0]}


def claims(*rows: dict):
    return overview.abstracts(overview.claims_of({"protoclip": summary_of(*rows)}))


def test_claims_of_abstracts_are_counted():
    untested = verdicts.not_testable("absolute", "70", "needs data", primary=True)
    other = verdicts.not_testable("other", "70", "needs data")
    found = claims(row("up"), untested, row("slope", metric="s"), other)
    up, absolute, slope = found.to_dict("records")
    assert [up[key] for key in ("floor", "baseline", "method")] == ["30.00", "40.50", "42.00"]
    assert up["difference"] == "+1.50 ± 0.50" and up["seeds"] == 3 and absolute["floor"] == "-"
    assert slope["floor"] == "-" and slope["method"] == "42.00"  # its floor is in another metric

    def numbers(beside: pandas.DataFrame) -> list[str]:
        return re.findall(r"\d+%?", overview.totals(found, beside))

    nothing = claims()
    assert numbers(nothing) == ["3", "2", "67%", "2", "1"]  # all, resolved, reproduced, not testable
    assert "**Reproduced**: up; slope." in overview.by_paper(found, nothing)
    assert "absolute (needs data" in overview.by_paper(found, nothing)
    beside = claims(row("absolute", "same direction"), row("up", "same direction"))
    assert {"3", "100%"} <= set(numbers(beside)) and "same direction)" in overview.by_paper(found, beside)
    contrary = claims(row("up", "not reproduced"))
    assert "up (on photographs: not reproduced)" in overview.by_paper(found, contrary)
    assert "67%" in numbers(contrary) and "100%" not in numbers(contrary)


def test_claims_that_were_asked_twice():
    here, there = (overview.claims_of({"protoclip": summary_of(*rows)}) for rows in (
        (row("up"), row("down"), row("none", "no claim")), (row("down", "not resolved"), row("none"), row("new")),
    ))  # fmt: skip
    (both,) = overview.asked_twice(here, there).to_dict("records")
    assert list(both.values()) == ["protoclip", "down", "reproduced", "not resolved"]


def test_the_first_table_says_which_pictures_a_study_has():
    found = {name: overview.pictures_of(summary) for name, summary in overview.read(ROOT / "results").items()}
    assert set(found.values()) == {"emoji", "scenes", "emoji, scenes"} and found["tldr_reduction"] == "scenes"
    photographs = overview.read(ROOT / "results/photos").values()
    assert {overview.pictures_of(summary) for summary in photographs} == {"photographs"}


def test_commands_of_results_whose_arms_have_different_seeds():
    found = checkpoints.read_json(ROOT / "results/nmtune.json")
    assert overview.command(runner.study_of("nmtune"), found) == (
        'make reproduce-nmtune SEEDS="0 1 2 3 4 5" ARMS=all RESULTS=results/nmtune.json && '
        'make reproduce-nmtune SEEDS="0 1 2 3 4 5 6 7 8 9 10 11" ARMS="core sup-05 sup-20"'
    )


def test_photographs_stand_beside_the_embedded_corpus(tmp_path, monkeypatch):
    """A paper's section has the verdict on emoji beside claims of the same words; photographs without emoji results
    also work."""
    emoji = checkpoints.read_json(ROOT / "results/nmtune.json")
    claim, verdict = emoji["claims"][0]["claim"], emoji["claims"][0]["verdict"]
    photographs = emoji | {"corpus": "CIFAR-10 and PACS", "floors": {}, "claims": emoji["claims"][:2]}
    photographs["claims"][1] = photographs["claims"][1] | {"claim": "asked here alone"}
    photographs["claims"][0] = photographs["claims"][0] | {"primary": False}  # starred there, and not here
    page = overview.markdown({"nmtune": emoji}, {"nmtune": photographs, "protoclip": photographs})
    assert page.count("### On photographs") == 2 and page.count("CIFAR-10 and PACS.") == 2
    assert "CORPUS=photos PHOTOS=FOLDER RESULTS=results/photos/nmtune.json" in page
    section = page[page.index('id="nmtune"') :].split("### On photographs")[1]
    rows = [line for line in section.splitlines() if claim in line or "asked here alone" in line]
    assert rows[0].count(verdict) == 2 and rows[1].rstrip(" |").endswith("| -")
    page = overview.html_page({"nmtune": emoji}, {"nmtune": photographs}, tmp_path)
    assert page.count("<h3>") == 1 and "RESULTS=runs/photos/nmtune/results.json" in page  # no file of results/

    monkeypatch.chdir(tmp_path)  # without results/bench
    text = overview.with_results(
        "<!-- results -->\nBEFORE\n<!-- /results -->\n", "nmtune", {"nmtune": emoji}, {"nmtune": photographs}
    )
    assert text.index("Seeds") < text.index("### On photographs") < text.index("CIFAR-10") < text.rindex("Seeds")
    assert "BEFORE" not in text and text.startswith("<!-- results -->\n") and text.endswith("<!-- /results -->\n")


def test_what_files_say_cannot_become_markup(tmp_path: Path):
    summary = checkpoints.read_json(ROOT / "results/nmtune.json")
    summary["claims"][0] |= {"claim": "<b>&", "paper": "[here](javascript:alert)"}
    page = overview.html_page({"nmtune": summary | {"paper": "<script>"}}, {}, tmp_path)
    assert "<b>" not in page and "&lt;b&gt;&amp;" in page and "<script>" not in page and 'href="javascript' not in page
    assert '<td class="reproduced">' in page


def test_results_of_another_paper_and_a_full_disk_leave_the_pages(tmp_path, monkeypatch):

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    summary = checkpoints.read_json(ROOT / "results/nmtune.json")
    monkeypatch.chdir(tmp_path)
    checkpoints.write_json("results/nmtune.json", summary)
    pages = [Path("RESULTS.md"), Path("README.md"), Path("report.html")]
    for page in pages:
        page.write_text("before")
    monkeypatch.setattr("sys.argv", ["overview"])
    monkeypatch.setattr(overview, "judge_again", lambda *_: None)
    checkpoints.write_text("results/lexvla.json", Path("results/nmtune.json").read_text(encoding="utf-8"))
    with pytest.raises(ValueError, match="results/lexvla.json .*NMTune"):
        overview.main()
    Path("results/lexvla.json").unlink()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match="RESULTS.md could not be written"):
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
    assert "cGxvdA==" in page and html.escape(summary["paper"]) in page and page.count("<section id") == 1
    assert str(tmp_path / "runs/report.html") in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["overview", str(tmp_path)])
    with pytest.raises(ValueError, match="holds no results"):
        overview.main()
