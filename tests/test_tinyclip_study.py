"""The study: arms, commands, comparison and report, and its own metrics, rows and plots."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro
from PIL import Image
from tinyclip_runs import arms, sets, trained  # noqa: F401

from shared import checkpoints, layout
from shared.tars import write_split
from studies import tinyclip as study
from studies.corpora import scenes
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
    faster = Claim("faster", "1.4x", study.TIME, *arms, -1, learned_by="groups_id/top1")
    metrics, bars = {"groups_id/top1": "groups", "macs_g": "G"}, (Floor("none", lambda: {"groups_id/top1": -1.0}),)
    changed = dict(claims=(faster, claim), metrics=metrics, floors=bars, sets=())
    monkeypatch.setattr(study, "STUDY", dataclasses.replace(study.STUDY, **changed))
    curve = [(4, 2.0, 1.0), (8, 4.0, 3.0)], [(4, 2.0, 1.0), (8, 4.0, 2.0)]
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
    assert not (tmp_path / "tinyclip_teachers.png").exists()


def test_claims_about_what_was_not_measured_are_left_out(runs: dict[str, Path], tmp_path: Path, capsys, monkeypatch):
    folders = [str(runs[arm]) for arm in ("random-contrastive", "inherited-affinity")]
    monkeypatch.chdir(tmp_path)
    changed = dataclasses.replace(study.STUDY, floors=(Floor("none", dict),), sets=())
    runner.compare(changed, folders, [{"seconds": 1.0}] * 2, tmp_path / "r.json")
    rows = {row["claim"] for row in checkpoints.read_json(tmp_path / "r.json")["claims"]}
    assert rows and "both together" in {claim.claim for claim in study.CLAIMS} - rows


def test_a_run_is_measured_on_sets_of_what_it_was_trained_on(tmp_path: Path, monkeypatch):
    for name, data in (("names", "data/emoji/train_names"), ("scenes", f"{study.SCENES}/train")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"data": data}))
    monkeypatch.setattr(evaluation, "main", lambda cfg: [{Path(path).name: 1.0 for path in cfg.sets}])
    names, scenes = study.evaluate([str(tmp_path / name) for name in ("names", "scenes")])
    assert set(names) == {"bare_names_ood", "bare_names_id", "retrieval_xm_en"}
    assert set(scenes) == {"names_ood", "names_id"}


# ------------------------------------------------------------------------------------------------- metrics and plots


def test_reached():
    curve = [(10, 1.0, 1.0), (20, 3.0, 3.0), (30, 4.0, 3.0)]
    assert study.reached(curve, 2.0) == (15, 2.0) and study.reached(curve, 0.5) == (5, 0.5)
    assert study.reached(curve, 4.0) is None
    assert study.reached([(8, 2.0, 0.0)], 0.0) == (8, 2.0)


def test_students_are_compared_with_those_from_scratch(monkeypatch):
    """Each student is compared with that of its corpus with random weights which trains three times as long."""
    curves = {
        "random-contrastive-long": [(10, 5.0, 2.0)],
        "inherited-affinity": [(10, 20.0, 4.0)],
        "inherited-contrastive": [(2, 2.0, 1.0), (4, 4.0, 1.5)],
        "vit-random-contrastive-long": [(8, 8.0, 1.0)],
        "auto": [(2, 2.0, 1.0), (4, 4.0, 2.0)],
    }
    monkeypatch.setattr(study, "learning_curve", lambda folder: curves[folder.name])
    arms, folders = {arm: [{}] for arm in curves}, {arm: [Path(arm)] for arm in curves}
    study.derive(Comparison(arms, [0], folders, set()))
    assert arms["random-contrastive-long"] == [{study.STEPS: 0.0, study.TIME: 0.0}]
    assert arms["inherited-affinity"] == [{study.STEPS: -0.5, study.TIME: 1.0}]
    assert arms["inherited-contrastive"] == [{study.STEPS: 0.0, study.TIME: 0.0}]  # it never reaches the score
    assert arms["auto"] == [{study.STEPS: -0.75, study.TIME: -0.75}]


def test_means_over_styles():
    arms = {"teacher": [{"bare_names_ood/top1": 30.0, "bare_names_id/top1": 34.0}], "auto": [{"names_ood/top1": 1.0}]}
    study.derive(Comparison(arms, [0], {}, set()))
    assert arms["teacher"][0][study.TOP1] == 32.0 and study.TOP1_SCENES not in arms["teacher"][0] | arms["auto"][0]


def test_macs_of_small_networks_are_in_millions():
    arms = {"by-hand": [{"macs_g": 0.00999}], "auto": [{}]}
    study.macs_in_millions(Comparison(arms, [0], {}, set()))
    assert arms["by-hand"][0]["macs_m"] == pytest.approx(9.99) and arms["auto"] == [{}]


def test_plots(tmp_path: Path, monkeypatch):
    figures = []
    monkeypatch.setattr(study.plt, "close", figures.append)
    monkeypatch.setattr(study, "learning_curve", lambda folder: [(1, 1.0, 1.0), (2, 3.0, 2.0)])
    metrics = (study.TOP1, study.TOP1_SCENES, "parameters_m")
    runs = [dict.fromkeys(metrics, x) for x in (1.0, 2.0)]
    arms = dict.fromkeys([arm.name for arm in study.STUDY.arms], runs)
    folders = {arm: [tmp_path, tmp_path] for arm in arms}
    study.plot(Comparison(arms, [0, 1], folders, set(), {}), tmp_path)
    (tmp_path / "tinyclip_teachers.png").unlink()
    study.plot_teachers({arm: arms[arm] for arm in arms if arm != "vit-teacher-200"}, tmp_path)
    assert not (tmp_path / "tinyclip_teachers.png").exists()  # a teacher is missing
    study.plot_teachers(arms, tmp_path)
    for name in ("tinyclip_curves.png", "tinyclip_teachers.png"):
        assert (tmp_path / name).stat().st_size > 10_000
    assert not (tmp_path / "tinyclip_masks.png").exists()
    drawn = [line.get_label() for axis in figures[1].axes for line in axis.lines]
    assert {arm.heading for arm in study.STUDY.arms} <= set(drawn)  # more arms than the map has colours


def test_words_of_neighbours(tmp_path: Path, monkeypatch):
    """Four training pictures of two names; each picture is found by the words of the name of the nearest one."""
    colours = {"red heart": [(255, 0, 0), (200, 0, 0)], "green leaf": [(0, 255, 0), (0, 200, 0)]}

    def picture(colour: tuple, side: int = 24) -> bytes:
        image = Image.new("RGB", (side, side), (128, 128, 128))
        image.paste(colour, (0, 0, side // 2, side))
        return layout.png(np.asarray(image))

    named = [(label, colour) for label, of in enumerate(colours.values()) for colour in of]
    train = ({"png": picture(colour), "cls": str(label)} for label, colour in named)
    write_split(tmp_path / "names/train", train)
    layout.write_classes(tmp_path / "names", [*colours], ["{c}"])
    asked = {"a green leaf": (0, 230, 0), "a red heart": (230, 0, 0), "unknown words": (240, 10, 0)}
    pairs = ({"png": picture(colour), "txt": text} for text, colour in asked.items())
    layout.write_retrieval(tmp_path / "pairs", pairs)
    monkeypatch.setattr(study, "NAMES", [str(tmp_path / "names")])
    monkeypatch.setattr(study, "PAIRS", str(tmp_path / "pairs"))
    found = study.words_of_neighbours()
    assert found["pairs/image_to_text_R@1"] == pytest.approx(200 / 3)  # "unknown words" has no known word


def test_towers_of_the_ceiling():
    for model in ("emoji-100", "emoji-convnet-100"):
        tower = study.tower(model)
        assert tower.network(torch.zeros(2, 3, tower.side, tower.side)).shape == (2, tower.width)


# ----------------------------------------------------------------------------------------------------------------- arms


def test_arms_are_commands_that_their_script_takes():
    """train.py accepts each arm's command line, and arms wait for their teachers and first weights."""
    for arm in study.STUDY.chosen("all"):
        ((module, *words),) = study.STUDY.words(arm, 3)
        assert module == "tinyclip.train" and words[-4:-1] == ["--seed", "3", "--out"]
        cfg = tyro.extras.overridable_config_cli(config.PRESETS, args=words)
        dataclasses.replace(cfg, dry_run=True).check(1)
        teacher_or_first = {Path(path).name.removesuffix("-seed3") for path in (cfg.teacher, cfg.init) if path}
        assert arm.needs == teacher_or_first, arm.name
        pairs = f"{study.SCENES}/train" if arm in study.VITS else "data/emoji/train_names"
        assert cfg.data == (study.NEW_PAIRS if arm.name.endswith("-new") else pairs)


def test_each_student_of_the_curve_has_the_teacher_it_is_drawn_against():
    """Worse teachers differ from the best in their numbers of steps only, of which the same share is warm-up."""
    arms = {arm.name: arm for arm in study.STUDY.arms}
    made = {}
    for teacher, student in study.CURVE.items():
        assert arms[student].needs == {teacher}
        ((_, *words),) = study.STUDY.words(arms[teacher], 0)
        made[teacher] = tyro.extras.overridable_config_cli(config.PRESETS, args=words)
    best = made["vit-teacher"]
    assert [cfg.steps for cfg in made.values()] == [40, 100, 200, 400, 600, 1200]
    for cfg in made.values():
        assert abs(cfg.warmup - best.warmup * cfg.steps / best.steps) < 1
        assert dataclasses.replace(cfg, steps=best.steps, warmup=best.warmup, out=best.out) == best


def test_new_pairs_are_those_behind_the_ones_that_teachers_see():
    """The larger folder begins with the scenes that all other arms train on; the new ones come after them."""
    once = {before.command.split()[2]: before for before in study.STUDY.before}
    folders = study.SCENES, f"{study.SCENES}-more"
    first, more = (tyro.cli(scenes.Config, args=once[folder].command.split()[1:]) for folder in folders)
    assert dataclasses.replace(more, out=first.out, samples=first.samples, eval_samples=first.eval_samples) == first
    shards = [f"{more.out}/train/{shard:05}.tar" for shard in range(more.samples // 1000)]
    assert study.NEW_PAIRS.split("::") == shards[first.samples // 1000 :] and len(shards) == 2 * first.samples // 1000
    users = {arm.name for arm in study.STUDY.arms if f"{more.out}/" in arm.command}
    assert users == set(once[str(more.out)].arms) == {"vit-random-affinity-new"}


def test_arms_that_count_equal_captions_have_a_twin():
    """All ViTs but these leave equal captions out; batches of emoji names have none."""
    arms = {arm.name: arm.command for arm in study.STUDY.arms}
    for arm in study.COUNTED:
        assert arms[arm].removesuffix(" --no-ignore-equal-captions") == arms[arm.removesuffix("-counted")] != arms[arm]
    for arm in study.STUDY.arms:
        ((_, *words),) = study.STUDY.words(arm, 0)
        cfg = tyro.extras.overridable_config_cli(config.PRESETS, args=words)
        left_out = arm in study.VITS and arm.name not in study.COUNTED
        assert (cfg.ignore_equal_captions, cfg.distinct_captions) == (left_out, arm in study.RESNETS), arm.name


def test_two_stages_take_as_many_steps_as_one():
    first, second, one = "auto-quarter", *study.TENTHS
    arms = {arm.name: study.STUDY.words(arm, 0)[0][1:] for arm in study.STUDY.arms}
    before, after, whole = (
        tyro.extras.overridable_config_cli(config.PRESETS, args=arms[arm]) for arm in (first, second, one)
    )
    assert after.init == study.STUDY.out(first, 0) and after.start_sparsity == before.target_sparsity
    assert before.steps + after.steps == whole.steps and before.prune_step + after.prune_step == whole.prune_step
    assert after.target_sparsity == whole.target_sparsity


def test_core_arms_are_those_of_primary_claims():
    """Core arms are those of primary claims and of the claim about masks, and the teacher."""
    primary = [claim for claim in study.CLAIMS if claim.primary]
    compared = {arm for claim in primary for arm in (claim.method, claim.baseline)}
    core = {arm.name for arm in study.STUDY.chosen("core")}
    assert core == compared | {"vit-teacher", *study.QUARTERS}
    assert study.CLAIMS[: len(primary)] == tuple(primary)
    known = {arm.name for arm in study.STUDY.arms}
    assert all({claim.method, claim.baseline.partition(":")[0]} <= known for claim in study.CLAIMS)
