"""Results files, and the tables of pages that are generated from them."""

import json
import re
from importlib.metadata import version
from pathlib import Path

import pytest

from shared import checkpoints
from shared.run import machine
from studies.harness import overview, report, runner
from studies.harness.verdicts import VERDICTS

ROOT = Path(__file__).parent.parent
HOMES = "results", "results/photos"


@pytest.mark.parametrize("file", sorted(ROOT.glob("results/*.json")), ids=lambda file: file.stem)
def test_committed_results(file: Path, monkeypatch: pytest.MonkeyPatch):
    """Files have one schema and at least five seeds, and the READMEs have their numbers."""
    monkeypatch.chdir(ROOT)
    summary = report.read_results(file)
    assert summary.pop("core_minutes", 1) > 0
    about = {"paper", "corpus", "seeds", "machine", "date", "commit", "settings", "floors", "arms", "claims"}
    assert set(summary) == about and len(summary["seeds"]) >= 5
    for metrics in summary["arms"].values():
        for value in metrics.values():
            assert set(value) == {"mean", "std", "values"} and 5 <= len(value["values"]) <= len(summary["seeds"])
        assert len({len(value["values"]) for value in metrics.values()}) == 1
    row_of = {"claim", "primary", "paper", "metric", "difference", "interval", "resolves", "verdict"}
    for row in summary["claims"]:
        assert set(row) - {"why", "seeds_needed", "floor", "method", "baseline", "seeds", "negligible"} == row_of
    assert {row["verdict"] for row in summary["claims"]} <= set(VERDICTS)
    study = runner.study_of(file.stem)
    assert set(summary["floors"]) <= {floor.name for floor in study.floors}
    again = runner.judged_again(study, summary)["claims"]
    assert [(row["claim"], row["verdict"]) for row in again] == [
        (row["claim"], row["verdict"]) for row in summary["claims"]
    ], "run `make readme`"
    assert all(summary["floors"].values())
    both = [overview.read(Path(of)) for of in HOMES]
    for path, filled in (
        (Path(file.stem, "README.md"), overview.with_claims),
        (Path(f"results/{file.stem}.md"), overview.with_results),
    ):
        page = path.read_text()
        assert page == filled(page, file.stem, *both), "run `make readme`"


@pytest.mark.parametrize("file", sorted(ROOT.glob("results/photos/*.json")), ids=lambda file: file.stem)
def test_committed_results_on_photographs(file: Path):
    """At least three seeds, judged by the study's claims and floors."""
    summary, study = report.read_results(file), runner.study_of(file.stem, "photos")
    assert min(map(len, report.by_seed(summary).values())) >= 3
    assert set(summary["floors"]) <= {floor.name for floor in study.floors}
    again = runner.judged_again(study, summary)["claims"]
    assert [row["verdict"] for row in again] == [row["verdict"] for row in summary["claims"]], "run `make readme`"


def sentences(page: str, mark: str) -> str:
    """Text of a page below a generated table, up to the next section, without code, pictures and commands."""
    text = page.split(f"<!-- /{mark} -->\n", 1)[1].split("\n## ", 1)[0]
    return re.sub(r"`[^`]*`|!\[[^\]]*\]\([^)]*\)|\]\([^)]*\)|^    .*$", "", text, flags=re.MULTILINE)


@pytest.mark.parametrize("file", sorted(ROOT.glob("results/*.json")), ids=lambda file: file.stem)
def test_sentences_about_results_name_rows_and_hold_no_numbers(file: Path):
    """*Emphasis* names a row or column of the tables above; only the tables have numbers."""
    summary = checkpoints.read_json(file)
    said = sentences((ROOT / file.stem / "README.md").read_text(), "claims")
    said += sentences(file.with_suffix(".md").read_text(), "results")
    plain = re.sub(r"\*([^*]+)\*", "", said)
    assert not re.search(r"\d", plain), re.findall(r".*\d.*", plain)
    tables = [(runner.study_of(file.stem), summary)]
    if (photographs := ROOT / f"results/photos/{file.name}").is_file():
        tables.append((runner.study_of(file.stem, "photos"), checkpoints.read_json(photographs)))
    known: set[str] = set()
    for study, found in tables:
        known |= {row["claim"] for row in found["claims"]} | {study.headings[arm] for arm in found["arms"]}
        known |= set(found["floors"]) | set(study.metrics.values())
    named = {" ".join(name.split()) for name in re.findall(r"\*([^*]+)\*", said)}
    assert named and named <= known, sorted(named - known)


def test_damaged_results_are_refused(tmp_path: Path):
    whole = checkpoints.read_json(ROOT / "results/nmtune.json")
    arm, metrics = next(iter(whole["arms"].items()))
    metric, value = next(iter(metrics.items()))
    row = whole["claims"][0]
    about = ("paper", "seeds", "commit", "floors", "settings", "arms", "claims")
    damaged = [{name: None} for name in about] + [
        {"arms": {}},
        {"floors": {"chance": 1.0}},
        {"floors": {"a": {"b": "1"}}},
    ]
    damaged += [{"arms": each} for each in (
        {arm: None}, {arm: metrics | {metric: 3.0}}, {arm: metrics | {metric: value | {"mean": "1"}}},
        {arm: metrics | {metric: value | {"values": value["values"][1:]}}},
    )]  # fmt: skip
    damaged += [
        {"claims": [each]} for each in ({"claim": "better"}, row | {"verdict": "proven"}, row | {"resolves": "1"})
    ]
    file = tmp_path / "nmtune.json"
    checkpoints.write_json(file, whole)
    assert report.read_results(file) == whole
    for part in damaged:
        checkpoints.write_json(file, whole | part)
        with pytest.raises(ValueError, match="damaged"):
            report.read_results(file)
    file.write_text(json.dumps(whole)[:5000], encoding="utf-8")
    with pytest.raises(ValueError, match="no JSON"):
        report.read_results(file)


def test_packages_are_written(tmp_path: Path):
    report.write_packages(tmp_path / "packages.txt")
    lines = (tmp_path / "packages.txt").read_text().splitlines()
    assert f"torch=={version('torch')}" in lines and lines == sorted(lines)


def test_packages_are_kept_beside_results():
    results = [*ROOT.glob("results/*.json"), *ROOT.glob("results/photos/*.json")]
    packages = {file: file.with_name(f"{file.stem}_packages.txt") for file in results}
    missing = [file for file in results if not packages[file].is_file()]
    assert not missing
    for file in results:
        assert re.search("^torch==", packages[file].read_text(), re.MULTILINE), packages[file]


def test_the_spread_of_seeds():
    assert report.spread([1.0, 2.0, 3.0]) == {"mean": 2.0, "std": 1.0, "values": [1.0, 2.0, 3.0]}
    assert report.spread([7.0])["std"] == 0.0


def test_an_option_that_is_off_is_no_setting_of_a_run():
    before = {"lr": 1e-3, "episodes": 3, "heads": True, "out": "runs/a-seed0", "seed": 0}
    later = before | {"accumulate": 1, "grad_checkpointing": False, "crop": None, "out": "runs/a-seed1", "seed": 1}
    assert report.setting_of(before) == report.setting_of(later)
    for change in ({"accumulate": 2}, {"grad_checkpointing": True}, {"lr": 2e-3}, {"heads": False}, {"episodes": 1}):
        assert report.setting_of(before) != report.setting_of(later | change), change


def test_the_scatter_of_earlier_results_counts_where_settings_agree(tmp_path: Path):
    arms = {"a": {"m": {"mean": 2.0, "std": 1.0, "values": [1.0, 2.0, 3.0]}}}
    about = {"seeds": [0, 1, 2], "machine": machine(), "settings": {"a": "x", "other": "y"}, "arms": arms}
    checkpoints.write_json(tmp_path / "r.json", about)
    found = report.Comparison({"a": [{"m": 1.0}, {"m": 2.0}]}, [0, 1], {}, set(), {"a": "x"})
    assert report.earlier_arms(tmp_path / "r.json", found) == {"a": [{"m": 1.0}, {"m": 2.0}, {"m": 3.0}]}
    for change in ({"settings": {"a": "z"}}, {"seeds": [0, 1, 2]}):  # other settings; no more seeds
        assert report.earlier_arms(tmp_path / "r.json", found._replace(**change)) == {}
    checkpoints.write_json(tmp_path / "r.json", about | {"machine": "another"})
    assert report.earlier_arms(tmp_path / "r.json", found) == {}
