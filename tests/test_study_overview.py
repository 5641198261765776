"""The page of all results, as Markdown and as HTML with plots."""

import dataclasses
import errno
import html
import json
import os
import re
from pathlib import Path

import pytest

from shared import checkpoints, presets
from studies import attentive_mask_clip
from studies.harness import drawings, overview, verdicts
from studies.harness.runner import study_of

ROOT = Path(__file__).parent.parent


def test_the_page_of_results_is_made_of_the_files():
    found, photographs = (overview.read(ROOT / folder) for folder in ("results", "results/photos"))
    log = (ROOT / "results/redesigns.md").read_text()
    page = (ROOT / "RESULTS.md").read_text()
    assert page == overview.markdown(found, photographs, log), "run `make readme`"
    assert len(page.splitlines()) < 250


@pytest.mark.parametrize("paper", sorted(presets.folders()))
def test_what_a_page_says_of_its_tables_names_rows_that_they_have(paper: str):
    """Names in italics, in the text below the tables of results/PAPER.md and below the claims in PAPER/README.md."""
    results, readme = ((ROOT / path).read_text("utf-8") for path in (f"results/{paper}.md", f"{paper}/README.md"))
    tables = "\n".join(line for line in f"{results}\n{readme}".splitlines() if line.startswith("|"))
    below = results.partition("<!-- /results -->")[2].partition("## Speed")[0]
    below += readme.partition("<!-- /claims -->")[2].partition("\n## ")[0]
    named = [" ".join(name.split()) for name in re.findall(r"(?<![*\w])\*([^*]+)\*(?!\*)", below)]
    assert named and not [name for name in named if name not in tables]


def test_the_readme_counts_verdicts_on_abstracts():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    found, photographs = (overview.read(ROOT / folder) for folder in ("results", "results/photos"))
    assert readme == overview.with_verdicts(readme, found, photographs), "run `make readme`"


def test_the_page_with_plots_needs_nothing_else():
    found = overview.read(ROOT / "results")
    page = overview.html_page("# Results", found, {}, ROOT / "results")
    plots = 2 + sum(len(list((ROOT / "results").glob(f"{folder}_*.png"))) for folder in found)  # and two of all papers
    assert plots and page.count('src="data:image/png;base64,') == page.count("<img") == plots
    page = re.sub(r"base64,[^\"]*", "", page)  # any four letters may stand there
    assert "http" not in page and "<script" not in page
    text = html.unescape(page)
    for folder, summary in found.items():
        assert f'<section id="{folder}">' in page
        assert all(row["claim"] in text for row in summary["claims"])


def row(claim: str, verdict: str = "reproduced", **more) -> dict:
    """A row of a primary claim."""
    numbers = {"floor": 30.0, "method": 42.0, "baseline": 40.5, "difference": 1.5, "resolves": 0.5, "seeds": 3}
    about = {"effect": 2.0, "sign": 1, "negligible": 1.0, "interval": [1.0, 2.0], "baseline_learned": False}
    return {"claim": claim, "primary": True, "paper": "+2", "metric": "m", "verdict": verdict} | numbers | about | more


def summary_of(*rows: dict) -> dict:
    floors = {"chance": {"bare_names_ood/top1": 1.0}, "nearest neighbour on raw pixels": {"bare_names_ood/top1": 30.0}}
    about = {"paper": "ProtoCLIP", "corpus": "Scenes of emoji", "seeds": [0], "arms": {}}
    return about | {"floors": floors, "claims": list(rows)}


def cells(table: str, claim: str) -> list[str]:
    (line,) = [line for line in table.splitlines() if f"| {claim} " in line]
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.fixture
def changed(monkeypatch: pytest.MonkeyPatch):
    """Studies say that their arms have changed since their results were made."""
    monkeypatch.setattr(overview, "study_of", lambda *of: dataclasses.replace(study_of(*of), changed="other towers"))


def test_the_main_table_has_both_corpora_in_a_row_and_does_not_call_old_results_verdicts(changed: None):
    untested = verdicts.not_testable("absolute", "70", "needs data", primary=True)
    found = {"protoclip": summary_of(row("zero-shot above CLIP"), untested, row("slope"), row("alone", primary=False))}
    below = row("zero-shot above CLIP", "open", difference=-1.0, interval=[-3.0, 1.0], negligible=0.5)
    there = {"protoclip": summary_of(below, row("alone"), row("there"))}
    table = overview.main_table(found, there)
    zero_shot = cells(table, "zero-shot above CLIP")
    for text in ("+1.50 (+1.00 to +2.00)", "1", "30.00", "40.50", "42.00"):
        assert text in zero_shot
    assert any(cell.startswith("**no**") for cell in zero_shot)  # the baseline has not learned
    assert "exploratory: reproduced †" in zero_shot
    assert any("-1.00 (-3.00 to +1.00), d 0.5, n 3; exploratory: open" in cell for cell in zero_shot)
    assert "30.00" not in cells(table, "slope")  # no claim of the study
    assert "exploratory: reproduced † (secondary)" in cells(table, "alone")
    assert "exploratory: not testable here" in cells(table, "absolute") and "needs data" in cells(table, "absolute")
    assert cells(table, "there")[3:5] == ["-", "-"]
    numbers = re.findall(r"\d+", overview.totals(found, there))
    assert numbers[:3] == ["3", "2", "1"]  # all, reproduced, not testable
    first = overview.first_table(found)
    assert "zero-shot above CLIP; slope" in first and "absolute (not testable here)" in first


def test_results_with_a_protocol_are_not_said_to_be_of_an_earlier_design(changed: None):
    found = {"protoclip": summary_of(row("zero-shot above CLIP"))}
    assert list(overview.all_changed(found, found, {})) == ["protoclip, on scenes"]
    found["protoclip"]["protocol"] = "12345678"
    assert overview.all_changed(found, found, {}) == {} and "†" not in overview.main_table(found, {})


def test_a_command_has_the_seeds_of_the_arms_though_fewer_rounds_were_timed():
    found = overview.read(ROOT / "results")["attentive_mask_clip"]
    assert len(found["arms"]["rounds of timed steps"]["aclip_to_slip"]["values"]) < len(found["seeds"])
    assert 'SEEDS="1000 1001 1002 1003 1004 1005 1006 1007 1008 1009"' in overview.command(
        attentive_mask_clip.STUDY, found
    )


def test_floors_of_both_arms_are_shown_if_they_differ():
    found = overview.read(ROOT / "results")
    rows = overview.findings("flame", "emoji", found)
    assert rows["long captions, text to image"]["floors"].count(" / ") == 1
    assert "/" not in overview.findings("protoclip", "emoji", found)["zero-shot above CLIP"]["floors"]


def test_differences_are_drawn_on_the_papers_scale_or_in_units_of_d(tmp_path: Path):
    assert drawings.scaled(row("a")) == (0.75, 0.5, 1.0)
    below = row("b", effect=None, sign=-1, negligible=0.5, difference=-1.0, interval=[-1.5, -0.5])
    assert drawings.scaled(below) == (2.0, 1.0, 3.0)  # the paper says lower: positive is its side
    assert drawings.scaled(row("c", interval=None)) is None
    assert drawings.scaled(row("d", effect=None, negligible=None)) is None
    drawings.forest({"protoclip": summary_of(row("a"), below)}, {}, tmp_path / "forest.png")
    assert (tmp_path / "forest.png").stat().st_size > 10_000


def test_the_first_claim_of_each_paper_is_drawn_by_seed(tmp_path: Path):
    found = overview.read(ROOT / "results")
    for paper, summary in found.items():
        claim, of, sides = drawings.first_claim(study_of(paper).as_in(summary), summary)
        assert of["primary"] and of["claim"] == claim.claim and [*map(len, sides)] == 2 * [of["seeds"]]
        baseline, method = (sum(side) / len(side) for side in sides)
        assert (baseline, method) == pytest.approx((of["baseline"], of["method"]))
    drawings.effects(found, tmp_path / "effects.png")
    assert (tmp_path / "effects.png").stat().st_size > 50_000
    drawings.effects({}, tmp_path / "nothing.png")
    assert drawings.first_claim(study_of("nmtune"), summary_of(row("of no study"))) is None


def test_photographs_stand_below_the_embedded_corpus(tmp_path, monkeypatch):
    emoji = checkpoints.read_json(ROOT / "results/nmtune.json")
    emoji["protocol"] = None  # exploratory results have findings, no verdicts
    photographs = emoji | {"corpus": "CIFAR-10 and PACS", "floors": {}}
    monkeypatch.chdir(tmp_path)  # without results/bench
    text = overview.with_results(
        "<!-- results -->\nBEFORE\n<!-- /results -->\n", "nmtune", {"nmtune": emoji}, {"nmtune": photographs}
    )
    assert text.index("Seeds") < text.index("### On photographs") < text.index("CIFAR-10") < text.rindex("Seeds")
    assert "BEFORE" not in text and text.startswith("<!-- results -->\n") and text.endswith("<!-- /results -->\n")
    assert "| finding" in text and "| verdict" not in text


def test_what_files_say_cannot_become_markup(tmp_path: Path):
    summary = checkpoints.read_json(ROOT / "results/nmtune.json")
    summary["claims"][0] |= {"claim": "<b>&", "paper": "[here](javascript:alert)"}
    drawings.forest({"nmtune": summary}, {}, tmp_path / "forest.png")
    drawings.effects({"nmtune": summary}, tmp_path / "effects.png")
    found = {"nmtune": summary | {"paper": "<script>"}}
    page = overview.html_page(overview.markdown(found, {}, ""), found, {}, tmp_path)
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
