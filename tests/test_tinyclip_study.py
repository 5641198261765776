"""The study: arms as commands, runs compared and reported, the rows and plots that are its own."""

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest
import tyro
from test_tinyclip_eval import SETS, trained
from test_tinyclip_train import arms, corpus, folder  # noqa: F401

from shared import checkpoints
from shared.study import statistics
from shared.study.report import Comparison
from tinyclip import config, study
from tinyclip import eval as evaluation

# --------------------------------------------------------------------------------------------------------------- report


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, Path]:
    compared = ("teacher", "random-contrastive", "inherited-affinity", "auto")
    return {arm: trained(*command) for arm, command in arms(folder).items() if arm in compared}


def test_report(runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch):
    cfg = evaluation.Config(
        tuple(map(str, runs.values())), sets=SETS, report=str(tmp_path / "results.json"), device="cpu"
    )
    monkeypatch.setattr(evaluation, "throughput", lambda *_, **__: {"pairs_per_second": 10.0})
    claim = statistics.Claim("higher", "+1", "groups_id/top1", "inherited-affinity", "random-contrastive")
    metrics = {"groups_id/top1": "groups", "parameters_m": "M", "macs_g": "G"}
    monkeypatch.setattr(study, "STUDY", dataclasses.replace(study.STUDY, claims=(claim,), metrics=metrics))
    monkeypatch.setattr(study, "CLAIMS_AT_SIZES", ())  # they read names_ood
    monkeypatch.setattr(
        study, "learning_curve", lambda folder: [(4, 1.0), (8, 3.0 if "affinity" in str(folder) else 2.0)]
    )
    monkeypatch.setattr(evaluation, "METRICS", metrics)
    found = evaluation.main(cfg)
    summary = checkpoints.read_json(tmp_path / "results.json")
    assert list(summary["arms"]) == list(runs) and summary["seeds"] == [0]
    values = {arm: json.loads((runs[arm] / "results.json").read_text())["metrics"] for arm in runs}
    assert found == list(values.values())
    for arm in runs:
        assert summary["arms"][arm]["groups_id/top1"]["values"] == [values[arm]["groups_id/top1"]]
    assert values["auto"]["parameters_m"] < values["teacher"]["parameters_m"]
    assert values["inherited-affinity"]["macs_g"] < values["teacher"]["macs_g"]
    rows = {row["claim"]: row for row in summary["claims"]}
    assert rows["higher"] == statistics.judge(
        claim, *([values[arm]["groups_id/top1"]] for arm in ("inherited-affinity", "random-contrastive"))
    )
    assert rows["steps to the score of random weights, contrastive"]["here"] == "1.33x fewer"  # 8 of 6 steps
    assert "asked" in rows["sparsity reached within 5 points, auto"]["here"]
    assert rows["ImageNet zero-shot of the model zoo"]["verdict"] == "not testable at this scale"
    assert "not testable here" in capsys.readouterr().out
    for name in ("tinyclip_curves.png", "tinyclip_masks.png"):
        assert (tmp_path / name).stat().st_size > 10_000
    monkeypatch.setattr(evaluation, "evaluate_run", lambda *_: pytest.fail("evaluated twice"))
    evaluation.main(cfg)


def test_report_refuses(tmp_path: Path):
    with pytest.raises(ValueError, match="ARM-seedN"):
        study.STUDY.compare(["runs/other"], [{}], tmp_path / "r.json")
    assert not (tmp_path / "r.json").exists()


def test_claims_about_what_was_not_measured_are_left_out(runs: dict[str, Path], tmp_path: Path, capsys):
    folders = [str(runs[arm]) for arm in ("random-contrastive", "inherited-affinity")]
    study.STUDY.compare(folders, [{"seconds": 1.0}] * 2, tmp_path / "r.json")
    assert re.search("claims about .*names_ood/top1.* are left out: give --sets those sets", capsys.readouterr().out)
    rows = {row["claim"] for row in checkpoints.read_json(tmp_path / "r.json")["claims"]}
    assert rows and "both together, zero-shot" in {claim.claim for claim in study.CLAIMS} - rows


def test_curves(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(study, "learning_curve", lambda folder: [(1, 1.0), (2, 2.0)])
    runs = [{"names_ood/top1": x, "parameters_m": x, "pairs_per_second": x} for x in (1.0, 2.0)]
    study.plot(Comparison({"auto": runs}, [0, 1], {"auto": [tmp_path, tmp_path]}, set(), {}), tmp_path)
    assert (tmp_path / "tinyclip_curves.png").stat().st_size > 10_000
    assert not (tmp_path / "tinyclip_masks.png").exists()


# ----------------------------------------------------------------------------------------------------------------- rows


def test_steps_to_reach():
    curve = [(10, 1.0), (20, 3.0), (30, 3.0)]
    assert study.steps_to_reach(curve, 2.0) == 15 and study.steps_to_reach(curve, 0.5) == 5
    assert study.steps_to_reach(curve, 4.0) == math.inf


def test_speed_up_says_who_never_gets_there(monkeypatch):
    curves = {
        "a0": [(4, 2.0), (8, 3.0)],
        "b0": [(4, 1.0), (8, 2.0)],
        "a1": [(8, 1.0)],
        "b1": [(8, 2.0)],
        "zero": [(8, 0)],
    }
    monkeypatch.setattr(study, "learning_curve", curves.get)
    row = study.speed_up(["a0", "a1"], ["b0", "b1"])  # twice as fast, and never
    assert row["here"].startswith("1.00 ± ") and row["here"].endswith("x fewer, 1 of 2 never")
    assert row["verdict"] == "not resolved at this scale"
    assert study.speed_up(["a0"], ["zero"])["here"] == "8.00x fewer"  # a baseline that ends at 0


@pytest.mark.parametrize(
    ("gain", "size", "verdict"),
    [
        (1.0, 1.01, "reproduced"),
        (1.0, 0.9, "reproduced"),
        (1.0, 1.1, "not resolved at this scale"),
        (-1.0, 0.9, "not resolved at this scale"),
        (-1.0, 1.1, "not reproduced"),
    ],
)
def test_sizes_may_take_a_verdict(gain: float, size: float, verdict: str):
    claim = statistics.Claim("higher", "claimed", "m", "auto", "manual")
    method, baseline = ([{"m": m, "block_parameters_m": s}] * 2 for m, s in ((10 + gain, size), (10.0, 1.0)))
    row = statistics.judge(claim, [10 + gain] * 2, [10.0] * 2)
    row = study.with_sizes(row, claim, method, baseline)
    assert row["verdict"] == verdict and row["here"].endswith(f"{size:.2f}x the size")


# ----------------------------------------------------------------------------------------------------------------- arms


# Presets and overrides that results/tinyclip.json was measured with; TEACHER is the run folder of the same seed
COMMANDS = {
    "teacher": "emoji-teacher",
    "random-contrastive": "emoji-contrastive --init None",
    "random-affinity": "emoji --teacher TEACHER --init None",
    "inherited-contrastive": "emoji-contrastive --init TEACHER",
    "inherited-affinity": "emoji --teacher TEACHER --init TEACHER",
    "random-channels": "emoji --teacher TEACHER --init TEACHER --inherit random",
    "auto": "emoji-auto --teacher TEACHER --init TEACHER",
    "auto-half": """emoji-auto --teacher TEACHER --init TEACHER --steps 200 --prune-step 80 --sparsity-warmup 40
        --mask-lr 0.3 --lambda-lr -0.3 --target-sparsity 0.5""",
    "auto-progressive": """emoji-auto --teacher TEACHER --init runs/tinyclip/auto-half-seed3 --steps 200 --prune-step 80
        --sparsity-warmup 40 --mask-lr 0.3 --lambda-lr -0.3 --start-sparsity 0.5 --target-sparsity 0.75""",
    "auto-oneshot": """emoji-auto --teacher TEACHER --init TEACHER --steps 400 --prune-step 160 --sparsity-warmup 80
        --target-sparsity 0.75""",
}


def test_arms_are_commands_that_their_script_takes():
    """Each arm's command line, what it waits for, and that train.py reads it."""
    known = {arm.name: arm for arm in study.STUDY.chosen("all")}
    assert set(known) == set(COMMANDS)
    for name, arm in known.items():
        expected = COMMANDS[name].replace("TEACHER", "runs/tinyclip/teacher-seed3").split()
        expected += ["--seed", "3", "--out", f"runs/tinyclip/{name}-seed3"]
        ((_, *words),) = study.STUDY.words(arm, 3)
        assert words == ["-m", "tinyclip.train", *expected]
        cfg = tyro.extras.overridable_config_cli(config.PRESETS, args=words[2:])
        config.check_stage(cfg)
        assert arm.needs == {Path(folder).name.removesuffix("-seed3") for folder in (cfg.teacher, cfg.init) if folder}
    core = [arm.name for arm in study.STUDY.chosen("core")]
    assert core == list(COMMANDS)[:5]
