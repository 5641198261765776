"""The concept frequency study: arms, commands, comparison and report, and claims that follow the effect."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from concept_frequency_runs import ARMS, EVAL, PIPELINE, arms, shards, write_published  # noqa: F401

from concept_frequency import eval
from concept_frequency.concepts import load_json
from studies import concept_frequency as study
from studies.harness import verdicts


@pytest.fixture(scope="module")
def runs(arms) -> dict[str, Path]:
    return {arm: arms[arm] for arm in ARMS}


def test_arms_are_measured_and_compared(runs, folder, monkeypatch):
    """The study's metrics of each arm, its claims and its plot; what eval.py measured is not measured again."""
    paths = [str(path) for path in runs.values()]
    results = study.evaluate(paths)
    of_all = {"mean_per_class", "misaligned", "tail", "rest", "slope_on_zipf", "head", "concepts"}
    assert all(of_all <= set(found) for found in results)
    assert [arm for arm, found in zip(runs, results, strict=True) if "within" in found] == [*runs][1:]
    zipf = results[0]
    assert zipf["counted_both"] > 0.5 and zipf["misaligned_40"] > zipf["misaligned_20"] > zipf["misaligned"]
    assert {name: row["image"] for name, row in zipf["concepts"].items()} == load_json(
        runs["zipf"] / "frequencies.json"
    )
    assert json.loads((runs["zipf"] / "results.json").read_text())["metrics"]["concepts"] == zipf["concepts"]
    stamp = (runs["zipf"] / "results.json").stat().st_mtime_ns
    assert study.evaluate(paths) == results and (runs["zipf"] / "results.json").stat().st_mtime_ns == stamp

    found = SimpleNamespace(arms={arm: [measured] for arm, measured in zip(runs, results, strict=True)})
    study.derive(found)
    rows = {row["claim"]: row for row in verdicts.judged(study.CLAIMS, found.arms, [((), study.of_all(-1.0))])}
    defined = {claim.claim for claim in study.CLAIMS if "ρ" not in claim.claim}  # bins of tiny arms may all be equal
    assert defined <= set(rows) <= {claim.claim for claim in study.CLAIMS}
    assert {row["verdict"] for row in rows.values()} == {"open", "no claim"}
    planted = rows["misalignment degree with 20 % of captions exchanged, above that with none"]
    assert planted["difference"] == pytest.approx(zipf["misaligned_20"] - zipf["misaligned"])
    panels, close = [], study.plt.close
    monkeypatch.setattr(study.plt, "close", lambda figure: panels.append(len(figure.axes)) or close(figure))
    study.plot(found, folder)
    assert (folder / "concept_frequency_curves.png").is_file() and panels == [2]  # none is empty


def test_the_nearest_picture_is_among_those_of_the_concepts(monkeypatch):
    """Of three classes two are concepts; the test picture of the first is nearest to the class that is none."""
    splits = {
        "train": (torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), torch.tensor([0, 1, 2])),
        "test": (torch.tensor([[1.0, 0.9], [0.9, 1.0], [1.0, 0.1], [1.0, 0.0]]), torch.tensor([0, 0, 2, 1])),
    }
    monkeypatch.setattr(study, "concepts", lambda: ["c", "a"])
    monkeypatch.setattr(study, "EvalSet", lambda *_: SimpleNamespace(classnames=["a", "b", "c"]))
    monkeypatch.setattr(study.floors, "read", lambda _, split: splits[split])
    # by cosine the first two are nearest to class 2, not 0; the third to class 0, not 2; the fourth does not count
    assert study.pixels() == study.of_all(0.0)
    splits["train"] = (splits["train"][0], torch.tensor([2, 1, 0]))
    found = study.pixels()
    assert found == {"mean_per_class": 100.0, "head": 100.0, study.LEARNED: 100.0}
    splits["test"] = (splits["test"][0], torch.tensor([0, 2, 2, 1]))
    assert study.pixels()["mean_per_class"] == pytest.approx(200 / 3)


def test_within_slope_is_not_biased_by_differences_between_concepts():
    """Accuracy that depends on the concept but not on its frequency biases only the slope between concepts."""
    rng = np.random.default_rng(0)
    frequency = 10 ** np.linspace(0, 3, 200)
    for effect in (0.0, 5.0):
        easy = 10 * np.log10(frequency)  # frequent concepts happen to be easy
        first, second = frequency, rng.permutation(frequency)
        scores = [
            easy + effect * np.log10(f) + rng.normal(0, 2, 200) + better for f, better in ((first, 7), (second, 0))
        ]
        between = study.slope_per_decade(first, scores[0])
        within = study.within_slope(np.log10(first) - np.log10(second), scores[0] - scores[1])
        assert between["low"] > effect + 8
        assert within["low"] < effect < within["high"] and within["high"] - within["low"] < 2
        two = study.within_slope(*(np.stack([x, x]) for x in (np.log10(first / second), scores[0] - scores[1])))
        assert two == pytest.approx(within)  # the same seed twice is no more evidence


def test_changes_are_of_the_same_concept():
    def table(frequency: list[int], accuracy: list[float]) -> eval.Table:
        rows = zip("abc", frequency, accuracy, strict=True)
        return {name: {"assigned": f, "accuracy": a} for name, f, a in rows}

    zipf, other = table([100, 10, 1], [50.0, 30.0, 10.0]), table([1, 10, 100], [40.0, 30.0, 20.0])
    change, gain = study.changes([zipf], [other])
    assert change.tolist() == [[2, 0, -2]] and gain.tolist() == [[10, 0, -10]]
    found = study.beside_zipf(other, zipf)
    assert found["within"] == pytest.approx(5) and found["slope_on_zipf"] == pytest.approx(10)
    assert found["head"] == 40 and found["change_r_log"] == pytest.approx(1)
    assert "within" not in study.beside_zipf(zipf, zipf)


def synthetic_arms(effect: float, seeds: int) -> dict[str, list[dict]]:
    """Metrics of arms in which a decade of frequency adds `effect` points of accuracy."""
    rng, names = np.random.default_rng(0), [f"c{i}" for i in range(120)]
    hard = rng.normal(0, 10, len(names))
    arms = {arm.name: [] for arm in study.ARMS}
    for seed in range(seeds):
        for arm in arms:
            rank = rng.permutation(len(names)) + 1
            frequency = 1000 // rank if arm != "uniform" else np.full(len(names), 50)
            accuracy = 40 + hard + effect * np.log10(frequency) + rng.normal(0, 3, len(names))
            found = eval.curve_metrics(frequency, accuracy, frequency) if arm != "uniform" else {}
            found |= {"rest": 40.0 + seed, "tail": 30.0, "misaligned": 0.0}
            found |= {f"misaligned_{share}": share + seed for share in study.PLANTED}
            rows = zip(names, frequency.tolist(), accuracy.tolist(), strict=True)
            found["concepts"] = {name: {"assigned": f, "accuracy": a} for name, f, a in rows}
            arms[arm].append(found | study.beside_zipf(found["concepts"], (arms["zipf"] + [found])[seed]["concepts"]))
    study.derive(SimpleNamespace(arms=arms))
    return arms


def judged(effect: float, seeds: int, floor: float = 0.0) -> dict[str, str]:
    arms = synthetic_arms(effect, seeds)
    rows = verdicts.judged(study.CLAIMS, arms, [((), study.of_all(floor))])
    return {row["claim"]: row["verdict"] for row in rows}


def test_claims_follow_the_effect():
    planted, none, one = judged(8.0, 6), judged(0.0, 6), judged(8.0, 1)
    of_frequency = [name for name in planted if "decade" in name or "above that at equal" in name]
    assert len(of_frequency) == 7 and len(planted) == len(study.CLAIMS)
    assert {planted[name] for name in of_frequency} == {"direction only"}  # the paper has no slope in points
    assert "direction only" not in {none[name] for name in of_frequency}
    assert set(one.values()) == {"open", "no claim"}
    assert set(judged(8.0, 6, floor=99.0).values()) == {"has not learned", "no claim"}


def test_study_adds_the_claims_of_a_clone(tmp_path, monkeypatch):
    """With `--upstream CLONE`, the replay's claims follow those of the arms and precede the untestable ones."""
    write_published(tmp_path / "clone")
    monkeypatch.chdir(tmp_path)
    more = study.STUDY.upstream(tmp_path / "clone")
    kept = json.loads((tmp_path / "runs/concept_frequency/replay/results.json").read_text())
    assert more == {"replayed": kept["claims"]} and len(kept["claims"]) > 5
    found = SimpleNamespace(arms=synthetic_arms(8.0, 2))  # all of a `report.Comparison` that is read
    rows, plain = study.more_rows(found, **more), study.more_rows(found)
    assert rows == [plain[0], *map(study.as_row, kept["claims"]), plain[-1]]
    for row, claim in zip(rows[1:-1], kept["claims"], strict=True):
        assert (row["claim"], row["paper"], row["where"]) == (claim["claim"], claim["paper"], claim["here"])
        assert row["verdict"] in verdicts.VERDICTS and row["difference"] is None and not row["primary"]
    assert "2 seeds together" in plain[0]["claim"] and plain[0]["interval"][0] < 8 < plain[0]["interval"][1]
    assert {row["verdict"] for row in plain[1:]} == {"not testable here"} and len(plain) == 3
    with pytest.raises(ValueError, match="needs the arm zipf"):
        study.STUDY.more_rows(SimpleNamespace(arms={"uniform": found.arms["uniform"]}))
