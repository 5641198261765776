"""The A-CLIP study: arms, commands, comparison and report."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import tyro

from attentive_mask_clip import config
from attentive_mask_clip import eval as evaluation
from attentive_mask_clip.model import create_model
from studies import attentive_mask_clip as study
from studies import attentive_mask_clip_timing as timing
from studies.harness import runner, verdicts
from studies.harness.floors import Floor
from studies.harness.runner import Arm

KEPT = [f"kept/{rule}_pixels" for rule in ("attentive", "random", "centre", "untrained")]


def test_the_report_has_what_the_study_declares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """Two arms with given measurements and step times."""
    report, times = tmp_path / "report/results.json", tmp_path / "times.json"
    step = {"seconds": 2.0, "ratio": 1.5, "low": 1.25, "high": 2.0, "rounds": [2.0, 2.2, 1.9], "flops": 3e9}
    slow = step | {"rounds": [each * (2.67 + 0.01 * i) / 1.16 for i, each in enumerate(step["rounds"])]}
    times.write_text(json.dumps({"clip": step | {"flops": 2e9}, "aclip": step, "slip": slow, "aclip-eff": step}))
    runs = [str(tmp_path / f"{arm}-seed0") for arm in ("aclip", "clip")]
    for run in map(Path, runs):
        run.mkdir()
        torch.save({"config": {"epochs": 2}, "commit": "abc"}, run / "checkpoint.pt")
    (tmp_path / "aclip-seed0/kept.png").write_bytes(b"picture")
    names = [f"{towers}{name}/top1" for towers in ("", "online/") for name in study.SETS]
    given = dict.fromkeys([*names, *KEPT], 2.0)
    bars = (Floor("none", lambda: {study.EMA: 1.0}), Floor("high", lambda: {study.ONLINE: 2.0}))
    monkeypatch.setattr(study, "STUDY", dataclasses.replace(study.STUDY, floors=bars, sets=()))
    monkeypatch.setattr(
        evaluation, "evaluated", lambda path, *_: given | {"names_ood/top1": 2.0 + 2 * ("aclip" in path)}
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(study, "STEP_TIMES", str(times))
    results = evaluation.main(evaluation.Config(runs=tuple(runs), times=str(times), device="cpu"))
    runner.compare(study.STUDY, runs, results, report)
    found, shown = json.loads(report.read_text()), capsys.readouterr().out
    assert list(found["arms"]) == ["clip", "aclip", study.ROUNDS] and set(found["arms"]["clip"]) == {
        *given,
        study.EMA,
        study.ONLINE,
        "step/seconds",
        "step/gflop",
    }
    claims = {row["claim"]: row for row in found["claims"]}
    expected = {claim.claim for claim in study.CLAIMS if {claim.method, claim.baseline} == {"clip", "aclip"}}
    assert expected and expected <= set(claims)
    row = claims["A-CLIP above CLIP"]
    assert row["difference"] == 1.0 and row["primary"] and not found["claims"][-1]["primary"]
    speed = claims["step time of A-CLIP / SLIP's - 1 (by rounds)"]
    assert speed["primary"] and speed["difference"] == pytest.approx(1.16 / 2.67 - 1, abs=0.01) and speed["seeds"] == 3
    assert speed["verdict"] == "reproduced"
    assert claims["step time of A-CLIP-eff / CLIP's - 1 (by rounds)"]["difference"] == 0
    assert claims["step time of SLIP / CLIP's - 1 (by rounds)"]["difference"] == pytest.approx(1.31, abs=0.01)
    assert claims["operations of a step of A-CLIP / CLIP's"]["where"] == "1.50x" and str(report) in shown
    assert found["arms"]["aclip"]["step/gflop"]["mean"] == 3.0
    drawn = {"attentive_mask_clip_kept.png", "attentive_mask_clip_arms.png"}
    written = drawn | {"logs", "results.json", "results_packages.txt"}
    assert {path.name for path in report.parent.iterdir()} == written
    assert (report.parent / "attentive_mask_clip_kept.png").read_bytes() == b"picture"


def test_rows_of_an_arm_compare_measurements_of_the_same_run():
    kept = {"kept/attentive_pixels": 90.0, "kept/random_pixels": 50.0, "kept/centre_pixels": 90.0}
    run = kept | {"kept/untrained_pixels": 92.0, study.EMA: 3.0, study.ONLINE: 2.5}
    rows = {row["claim"]: row for row in verdicts.judged(study.CLAIMS, {"aclip": [run]}, [])}
    differences = {claim.split(" than ")[-1]: row["difference"] for claim, row in rows.items() if "aclip:" in claim}
    assert differences == {"random patches": 40.0, "patches at the centre": 0.0, "attention before training": -2.0}
    assert rows["A-CLIP: EMA towers above online"]["difference"] == 0.5
    assert not any("step time" in claim for claim in rows)  # none were measured


def test_timed_arms_have_the_settings_of_the_study():
    for arm in study.MAIN:
        cfg = parsed(arm)
        for name, value in timing.ARMS.get(arm.name, {}).items():
            assert getattr(cfg, name) == value, (arm.name, name)
        half = study.MODELS["scenes"]["image_size"] // 2 if arm.name == "aclip-eff" else None
        assert cfg.ema_image_size == half, arm.name


def test_floors_of_an_arm_are_those_of_its_scenes(monkeypatch: pytest.MonkeyPatch):
    """Every arm has chance and raw pixels, each from the evaluation sets of the scenes that the arm trains on."""
    monkeypatch.setattr(study.floors, "chance", lambda sets: {f"chance {Path(sets[0]).parts[1]}": 1.0})
    monkeypatch.setattr(study.floors, "nearest_neighbour", lambda sets: {f"pixels {Path(sets[0]).parts[1]}": 2.0})
    below = [floor for floor in study.FLOORS if not floor.ceiling]
    for arm in study.ARMS:
        corpus = Path(parsed(arm).data).parts[1]
        found = [name for floor in below if arm.name in floor.arms for name in floor.measure() if "online" not in name]
        assert found == [f"chance {corpus}", f"pixels {corpus}"], arm.name


def test_floors_are_of_both_towers_and_their_mean():
    found = study.both({f"{name}/top1": value for name, value in zip(study.SETS, (10.0, 30.0), strict=True)})
    assert found[study.EMA] == found[study.ONLINE] == 20.0 and found[f"online/{study.SETS[1]}/top1"] == 30.0


def test_plot_of_scenes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Accuracy over the object's share, without clutter, and over the clutter, for objects of one size."""
    figures = []
    monkeypatch.setattr(study.plt, "close", figures.append)
    arms = {arm.name: [{study.ONLINE: 3.0}] * 2 for arm in study.ARMS}
    study.plot_scenes({arm: arms[arm] for arm in arms if arm != "clip-large"}, tmp_path)
    assert not list(tmp_path.iterdir())
    study.plot_scenes(arms, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["attentive_mask_clip_scenes.png"]
    drawn = [[list(line.get_xdata()) for line in axis.lines if line.get_marker() == "o"] for axis in figures[0].axes]
    assert drawn == [[pytest.approx([7.29, 17.64, 49.0])] * 3, [[0, 1, 2]] * 3]


def test_every_arm_trains_on_scenes_that_the_study_builds():
    """Each on one corpus, and the corpora are built for the arms on them alone."""
    built = {once.command.split()[2]: once.arms for once in study.STUDY.before if "scenes --out" in once.command}
    assert set(built) == {study.folder(corpus) for corpus in study.CORPORA}
    for arm in study.ARMS:
        cfg = parsed(arm)
        cfg.check_patches()
        corpus = str(Path(cfg.data).parent)
        assert cfg.eval_set == f"{corpus}/eval/names_ood" and cfg.model == "scenes"
        assert [folder for folder, arms in built.items() if arm.name in arms] == [corpus]
    assert set().union(*built.values()) == set(study.STUDY.headings)


def test_attention_and_random_masks_keep_the_same_number_of_patches():
    """19 of 36 single patches."""
    arms = {arm.name: parsed(arm) for arm in study.MAIN}
    made = {arm: create_model("aclip", "scenes", **arms[arm].model_settings()) for arm in ("attentive", "random")}
    scores, boxes = torch.rand(3, 36), torch.tensor([[[0, 0, 48, 48]] * 2] * 3)
    for model in made.values():
        assert model.block == 1 and model.keep_ids(scores, boxes, torch.rand(3, 36)).shape == (3, 19)


def parsed(arm: Arm) -> config.Config:
    return tyro.extras.overridable_config_cli(config.PRESETS, args=arm.command.split()[1:])
