"""Running all studies in sequence: which are done, how long the others take, and which commands run."""

import json
from pathlib import Path

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


def write_results(folder: str, seeds: list[int], arms: dict[str, int]) -> None:
    """Results whose arms have the first so many of the seeds."""
    about = dict.fromkeys(("machine", "date", "commit", "corpus"), "-") | {"floors": {}, "settings": {}, "claims": []}
    spread = {arm: {"top1": {"mean": 1.0, "std": 0.0, "values": [1.0] * n}} for arm, n in arms.items()}
    Path(f"runs/{folder}").mkdir(parents=True, exist_ok=True)
    Path(f"runs/{folder}/results.json").write_text(
        json.dumps({"paper": folder, "seeds": seeds, "arms": spread} | about)
    )


def test_a_paper_is_done_with_all_seeds_and_arms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    protoclip = PAPERS["protoclip"]
    assert not everything.done(protoclip, (0, 1), "core")
    write_results("protoclip", [0, 1, 2], {"clip": 3, "protoclip": 2})
    assert everything.done(protoclip, (0, 1), "core") and not everything.done(protoclip, (2,), "core")
    write_results("protoclip", [0, 1, 2], {"clip": 3})
    assert not everything.done(protoclip, (0,), "core")
    Path("runs/protoclip/results.json").write_text('{"seeds": [0, 1], "arms"')  # damaged
    assert not everything.done(protoclip, (0,), "core")


def test_all_studies_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    calls = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(everything.presets, "folders", lambda: ["flame", *PAPERS])
    monkeypatch.setattr(everything, "study_of", lambda name: (PAPERS | {"flame": study("flame", "clip", 4)})[name])
    monkeypatch.setattr(everything, "run_script", lambda words, environment: calls.append(words))
    write_results("flame", [0, 1], {"clip": 2})
    everything.main(seeds=(0, 1))
    assert calls == [
        ["studies.protoclip", "--seeds", "0", "1", "--arms", "core"],
        ["studies.tinyclip", "--seeds", "0", "1", "--arms", "core"],
        ["studies.harness.overview", "runs"],
    ]
    printed = capsys.readouterr().out
    assert "flame is done" in printed and "tinyclip (40)" in printed
    assert "protoclip (24)" in printed and "64 minutes" in printed
    with pytest.raises(ValueError, match="at least one seed"):
        everything.main(seeds=())
