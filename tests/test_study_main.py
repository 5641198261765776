"""Running all studies in sequence: which remain, how long they take, and which commands run."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from studies.harness import __main__ as everything
from studies.harness.runner import Arm, Study


def study(folder: str, arms: str, minutes: float) -> Study:
    return Study(
        folder=folder,
        paper=folder,
        stands_for="CC3M",
        arms=tuple(Arm(name, f"train {name}", heading=name) for name in arms.split()),
        minutes={"core": minutes, "all": 2 * minutes},
        evaluate=lambda runs: [],
        metrics={},
    )


PAPERS = {"protoclip": study("protoclip", "clip protoclip", 12), "tinyclip": study("tinyclip", "auto", 20)}


def test_remaining_papers_are_those_without_all_seeds_and_arms(tmp_path: Path):
    papers, two = PAPERS | {"flame": study("flame", "clip", 4)}, everything.Options(seeds=(0, 1))
    assert everything.remaining(two, papers, tmp_path) == {"protoclip": 24, "tinyclip": 40, "flame": 8}
    for folder, seeds, arms in (("protoclip", [0, 1, 2], ("clip", "protoclip")), ("tinyclip", [0], ("auto",))):
        (tmp_path / folder).mkdir()
        of_arm = {"top1": {"values": seeds}}
        summary = {"paper": folder, "seeds": seeds, "arms": dict.fromkeys(arms, of_arm), "claims": []}
        (tmp_path / folder / "results.json").write_text(json.dumps(summary))
    left = everything.remaining(two, papers, tmp_path)
    assert left == {"tinyclip": 40.0, "flame": 8.0}  # tinyclip lacks seed 1
    text = everything.sentence(left, 3)
    assert text == "2 of 3 papers left: tinyclip (40 min), flame (8 min); about 0 h 48 min on two cores"
    assert everything.sentence({}, 3) == "all 3 papers are done"
    summary["arms"] = {"clip": of_arm, "protoclip": {"top1": {"values": [0]}}}  # protoclip has the first seed only
    (tmp_path / "protoclip/results.json").write_text(json.dumps(summary | {"seeds": [0, 1]}))
    assert list(everything.remaining(two, papers, tmp_path)) == ["protoclip", "tinyclip", "flame"]
    (tmp_path / "protoclip/results.json").write_text('{"seeds": [0, 1], "arms"')  # damaged
    assert list(everything.remaining(two, papers, tmp_path)) == ["protoclip", "tinyclip", "flame"]
    assert everything.remaining(everything.Options(seeds=(0,), arms="all"), PAPERS, tmp_path) == {"protoclip": 24}


def test_results_of_other_code_are_named(tmp_path: Path):
    (tmp_path / "flame").mkdir()
    (tmp_path / "flame/results.json").write_text(json.dumps({"commit": "0000000"}))
    (sentence,) = everything.older(["flame", "protoclip"], {"protoclip": 2.0}, tmp_path)
    assert sentence.startswith("flame was measured at commit 0000000, the code is at ")


def test_all_studies_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture):
    calls = []

    def call(words: list[str], **more: bool) -> SimpleNamespace:
        calls.append(words[1:])
        return SimpleNamespace(returncode=0)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(everything, "studies", lambda: PAPERS)
    monkeypatch.setattr(everything, "subprocess", SimpleNamespace(run=call))
    everything.main(everything.Options(seeds=(0, 1)))
    assert calls == [
        ["-m", "studies.protoclip", "--seeds", "0", "1", "--arms", "core"],
        ["-m", "studies.tinyclip", "--seeds", "0", "1", "--arms", "core"],
        ["-m", "studies.harness.overview", "runs"],
    ]
    assert "2 of 2 papers left: protoclip (24 min), tinyclip (40 min); about 1 h 04 min" in capfd.readouterr().out
    with pytest.raises(ValueError, match="at least one seed"):
        everything.main(everything.Options(seeds=()))
