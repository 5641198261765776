"""Results files, and the tables of pages that are generated from them."""

import json
import re
from importlib.metadata import version
from pathlib import Path

import pytest

from shared import checkpoints
from studies.harness import overview, protocol, report, runner

ROOT = Path(__file__).parent.parent
HOMES = "results", "results/photos"


RESULTS = [(on, file) for on, home in (("emoji", "results"), ("photos", "results/photos"))
           for file in sorted((ROOT / home).glob("*.json"))]  # fmt: skip


@pytest.mark.parametrize(("on", "file"), RESULTS, ids=lambda value: getattr(value, "stem", value))
def test_committed_results(on: str, file: Path, monkeypatch: pytest.MonkeyPatch):
    """Files have one schema and are judged by the current claims; numbers are called verdicts only with the protocol's
    hash, ten seeds (five on photographs) and an interval for each."""
    monkeypatch.chdir(ROOT)
    summary, study = report.read_results(file), runner.study_of(file.stem, on)
    assert all(summary["floors"].values()) and set(summary["headings"]) <= set(summary["arms"])
    for metrics in summary["arms"].values():
        assert len({len(value["values"]) for value in metrics.values()}) == 1
    again = runner.judged_again(study, summary)["claims"]
    assert [(row["claim"], row["verdict"]) for row in again] == [
        (row["claim"], row["verdict"]) for row in summary["claims"]
    ], "run `make readme`"
    if protocol.standing(study, summary) == "verdict":
        assert set(summary["floors"]) <= {floor.name for floor in study.floors}
        assert len(summary["seeds"]) >= (10 if on == "emoji" else 5) and min(summary["seeds"]) >= 1000
        assert all(row["interval"] for row in summary["claims"] if row["primary"] and row["difference"] is not None)


@pytest.mark.parametrize("file", sorted(ROOT.glob("results/*.json")), ids=lambda file: file.stem)
def test_pages_have_the_numbers_of_the_results(file: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    both = [overview.read(Path(of)) for of in HOMES]
    for path, filled in (
        (Path(file.stem, "README.md"), overview.with_claims),
        (Path(f"results/{file.stem}.md"), overview.with_results),
    ):
        page = path.read_text()
        assert page == filled(page, file.stem, *both), "run `make readme`"


@pytest.mark.parametrize(("on", "paper"), [(on, file.stem) for on, file in RESULTS])
def test_a_protocol_says_all_of_each_primary_claim(on: str, paper: str):
    """A metric, a side, d, and where the mechanism can act; of its arms, those that the study has."""
    study = runner.study_of(paper, on)
    arms = {arm.name for arm in study.arms}
    primary = [claim for claim in study.claims if claim.primary]
    assert primary and len(study.seeds) >= (10 if on == "emoji" else 5) and min(study.seeds) >= 1000
    assert len(set(study.metrics.values())) == len(study.metrics)  # a heading is one column
    for claim in primary:
        assert claim.where and claim.negligible and claim.paper, claim
        assert claim.effect is None or claim.sign * claim.effect >= 2 * claim.negligible * (1 - 1e-9), claim
        assert {claim.method, claim.baseline.partition(":")[0]} - {"0", "rounds of timed steps"} <= arms, claim


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
