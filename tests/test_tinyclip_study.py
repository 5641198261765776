"""The study: arms, commands, comparison and report, and its own metrics, rows and plots."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import tyro
from tinyclip_runs import arms, sets, trained  # noqa: F401

from shared import checkpoints
from studies import tinyclip as study
from studies.harness import runner
from studies.harness.floors import Floor
from studies.harness.report import Comparison
from studies.harness.verdicts import Claim
from tinyclip import config
from tinyclip import eval as evaluation

# --------------------------------------------------------------------------------------------------------------- report


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, Path]:
    compared = ("teacher", "random-contrastive", "inherited-affinity", "auto")
    return {arm: trained(*command) for arm, command in arms(folder).items() if arm in compared}


def test_report(runs: dict[str, Path], sets, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch):
    given = dict(sets=sets, throughput=False, device="cpu")
    cfg = evaluation.Config(tuple(map(str, runs.values())), **given)
    arms = "inherited-affinity", "random-contrastive"
    claim = Claim("higher", "+1", "groups_id/top1", *arms, primary=True)
    faster = Claim("faster", "1.4x", study.SAVED, *arms, -1, learned_by="groups_id/top1")
    metrics, bars = {"groups_id/top1": "groups", "macs_g": "G"}, (Floor("none", lambda: {"groups_id/top1": -1.0}),)
    known = tuple(dataclasses.replace(study.ARMS[0], name=arm, heading=arm) for arm in runs)
    changed = dict(claims=(faster, claim), metrics=metrics, floors=bars, sets=(), arms=known)
    monkeypatch.setattr(study, "STUDY", dataclasses.replace(study.STUDY, **changed))
    curve = [(4, 1.0), (8, 3.0)], [(4, 1.0), (8, 2.0)]
    monkeypatch.setattr(study, "learning_curve", lambda folder: curve["affinity" not in str(folder)])
    monkeypatch.setattr(study, "LONG", arms[1])
    monkeypatch.setattr(evaluation, "METRICS", metrics)
    monkeypatch.chdir(tmp_path)
    found = evaluation.main(cfg)
    runner.compare(study.STUDY, cfg.runs, found, tmp_path / "results.json")
    summary = checkpoints.read_json(tmp_path / "results.json")
    assert set(summary["arms"]) == set(runs) and summary["seeds"] == [0]
    values = {arm: json.loads((runs[arm] / "results.json").read_text())["metrics"] for arm in runs}
    for arm, measured in zip(runs, found, strict=True):
        assert measured | values[arm] == measured  # and what it was compared with another for
        assert summary["arms"][arm]["groups_id/top1"]["values"] == [values[arm]["groups_id/top1"]]
    assert values["auto"]["parameters_m"] < values["teacher"]["parameters_m"]
    assert values["inherited-affinity"]["macs_g"] < values["teacher"]["macs_g"]
    rows = {row["claim"]: row for row in summary["claims"]}
    difference = values[arms[0]]["groups_id/top1"] - values[arms[1]]["groups_id/top1"]
    assert rows["higher"]["difference"] == pytest.approx(difference) and summary["claims"][0] == rows["higher"]
    assert rows["faster"]["difference"] == pytest.approx(-0.25)  # half way between steps 4 and 8
    assert rows["ImageNet zero-shot of the model zoo"]["verdict"] == "not testable here"
    assert "not testable here" in capsys.readouterr().out
    for name in ("tinyclip_curves.png", "tinyclip_masks.png"):
        assert (tmp_path / name).stat().st_size > 10_000


def test_claims_about_what_was_not_measured_are_left_out(runs: dict[str, Path], tmp_path: Path, capsys, monkeypatch):
    folders = [str(runs[arm]) for arm in ("random-contrastive", "inherited-affinity")]
    monkeypatch.chdir(tmp_path)
    changed = dataclasses.replace(study.STUDY, floors=(Floor("none", dict),), sets=())
    runner.compare(changed, folders, [{"seconds": 1.0}] * 2, tmp_path / "r.json")
    rows = {row["claim"] for row in checkpoints.read_json(tmp_path / "r.json")["claims"]}
    assert rows and "both together" in {claim.claim for claim in study.CLAIMS} - rows


# ------------------------------------------------------------------------------------------------- metrics and plots


def test_reached():
    curve = [(10, 1.0), (20, 3.0), (30, 3.0)]
    assert study.reached(curve, 2.0) == 15 and study.reached(curve, 0.5) == 5
    assert study.reached(curve, 4.0) is None
    assert study.reached([(8, 0.0)], 0.0) == 8


def test_students_are_compared_with_the_one_from_scratch(monkeypatch):
    """Each student is compared with that with random weights which trains three times as long."""
    curves = {
        study.LONG: [(10, 2.0)],
        study.IA: [(10, 4.0)],
        study.IC: [(2, 1.0), (4, 1.5)],
        study.AUTO: [(2, 1.0), (4, 2.0)],
    }
    monkeypatch.setattr(study, "learning_curve", lambda folder: curves[folder.name])
    arms, folders = {arm: [{}] for arm in curves}, {arm: [Path(arm)] for arm in curves}
    study.derive(Comparison(arms, [0], folders, set()))
    assert arms[study.LONG] == [{study.SAVED: 0.0}] and arms[study.IA] == [{study.SAVED: -0.5}]
    assert arms[study.IC] == [{study.SAVED: 0.0}]  # it never reaches the score
    assert arms[study.AUTO] == [{study.SAVED: pytest.approx(-0.6)}]


def test_means_over_styles():
    arms = {study.IA: [{"names_ood/top1": 30.0, "names_id/top1": 34.0}], study.AUTO: [{"names_ood/top1": 1.0}]}
    study.derive(Comparison(arms, [0], {}, set()))
    assert arms[study.IA][0][study.TOP1] == 32.0 and study.TOP1 not in arms[study.AUTO][0]


def test_macs_of_small_networks_are_in_millions():
    arms = {"by-hand": [{"macs_g": 0.00999}], "auto": [{}]}
    study.macs_in_millions(Comparison(arms, [0], {}, set()))
    assert arms["by-hand"][0]["macs_m"] == pytest.approx(9.99) and arms["auto"] == [{}]


def test_plots(tmp_path: Path, monkeypatch):
    figures = []
    monkeypatch.setattr(study.plt, "close", figures.append)
    monkeypatch.setattr(study, "learning_curve", lambda folder: [(1, 1.0), (3, 2.0)])
    runs = [dict.fromkeys((study.TOP1, "parameters_m"), x) for x in (1.0, 2.0)]
    arms = dict.fromkeys([arm.name for arm in study.ARMS], runs)
    folders = {arm: [tmp_path, tmp_path] for arm in arms}
    study.plot(Comparison(arms, [0, 1], folders, set(), {}), tmp_path)
    assert (tmp_path / "tinyclip_curves.png").stat().st_size > 10_000
    assert not (tmp_path / "tinyclip_masks.png").exists()
    drawn = [line.get_label() for axis in figures[0].axes for line in axis.lines]
    assert {arm.heading for arm in study.ARMS} <= set(drawn)


def test_the_tower_of_the_ceiling():
    tower = study.tower()
    assert tower.network(torch.zeros(2, 3, tower.side, tower.side)).shape == (2, tower.width)


# ----------------------------------------------------------------------------------------------------------------- arms


def settings() -> dict[str, config.Config]:
    """{arm: its settings}; train.py accepts each arm's command line."""
    found = {}
    for arm in study.ARMS:
        ((module, *words),) = study.STUDY.words(arm, 3)
        assert module == "tinyclip.train" and words[-4:-1] == ["--seed", "3", "--out"]
        found[arm.name] = tyro.extras.overridable_config_cli(config.PRESETS, args=words)
        dataclasses.replace(found[arm.name], dry_run=True).check(1)
    return found


def test_arms_wait_for_their_teachers_and_first_weights():
    for arm, cfg in zip(study.ARMS, settings().values(), strict=True):
        teacher_or_first = {Path(path).name.removesuffix("-seed3") for path in (cfg.teacher, cfg.init) if path}
        assert arm.needs == teacher_or_first, arm.name
        assert cfg.data == f"{study.SCENES}/train" and cfg.ignore_equal_captions


def test_arms_of_a_claim_differ_in_what_it_compares():
    """The loss, the initial weights, or the number of stages; steps, size and data are the same."""
    arms = settings()
    loss, weights = ("alpha", "teacher"), ("init",)
    masks = ("model", "masks", "target_sparsity", "prune_step", "sparsity_warmup", "mask_lr", "lambda_lr")
    for method, baseline, what in (
        (study.IA, study.IC, loss),
        (study.RA, study.RC, loss),
        (study.IC, study.RC, weights),
        (study.IA, study.RA, weights),
        (study.AUTO, study.IA, masks),
    ):
        of = dataclasses.asdict(arms[method]), dataclasses.asdict(arms[baseline])
        differing = {name for name, value in of[0].items() if value != of[1][name]}
        assert differing - {"out", "eval_every"} == set(what)
    first, second, one = (arms[name] for name in (study.HALF, *study.STAGES))
    assert first.steps + second.steps == one.steps and (first.model, second.model) == ("emoji-50", one.model)
    assert first.steps == second.steps == arms[study.IA].steps == study.STEPS
    assert arms[study.LONG].steps == 3 * study.STEPS and arms["vit-teacher"].steps == 5 * study.STEPS


def test_core_arms_judge_inheritance_affinity_and_masks():
    primary = [claim for claim in study.CLAIMS if claim.primary]
    core = {arm.name for arm in study.STUDY.chosen("core")}
    assert core == {"vit-teacher", study.RC, study.IC, study.IA, study.AUTO}
    assert sum({claim.method, claim.baseline} <= core for claim in primary) == 3
    assert study.CLAIMS[: len(primary)] == tuple(primary)
    known = {arm.name for arm in study.ARMS}
    assert all({claim.method, claim.baseline.partition(":")[0]} <= known for claim in study.CLAIMS)
