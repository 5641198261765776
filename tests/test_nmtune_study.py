"""The study: arms for each noise ratio and on black-box features, claims, floors, plots; on scenes and photographs."""

import json
from pathlib import Path

import numpy as np
import pytest
import tyro

from nmtune import config
from shared import layout
from shared.tars import write_split
from studies import nmtune as study
from studies.harness import verdicts
from studies.nmtune_encoders import Task

SEEDS = (0, 1, 2)


def encoder(level: int, seed: int) -> dict[str, float]:
    """Metrics of an encoder: accuracy falls and spectra rise with noise; NMTune is a point above MLP, MLP two above
    LP, and each of its losses brings half a point."""
    noise = np.random.default_rng([level, seed]).normal(0, 0.05, 4)
    numbers = {"sve_id": 4 + 0.01 * level, "noise": level, "own": 60 - 0.2 * level + noise[0]}
    numbers["lsvr_ood"] = 3 + 0.02 * level + 0.001 * noise[0]
    for i, part in enumerate(("id", "ood")):
        lp = 50 - 0.2 * level + seed + noise[1 + i]
        numbers |= {f"lp/{part}": lp, f"mlp/{part}": lp + 2, f"nmtune/{part}": lp + 3 + noise[3]}
        numbers |= {f"no-{term}/{part}": lp + 2.5 for term in study.WITHOUT}
        for metric in ("sve", "lsvr"):
            numbers |= {f"z/mlp/{metric}/{part}": 3.0, f"z/nmtune/{metric}/{part}": 4.0 + 0.1 * seed}
    return numbers


def compared(levels=config.NOISE) -> study.Comparison:
    arms = {f"sup-{level:02d}": [encoder(level, seed) for seed in SEEDS] for level in levels}
    for arm, more in zip(study.BLACK_BOX, (0, 1.5, 2.4), strict=True):
        arms[arm] = [{f"blackbox/{part}": 70 + more + 0.01 * seed * more for part in ("id", "ood")} for seed in SEEDS]
    return study.Comparison(arms=arms, seeds=list(SEEDS), folders={}, commits={"x"}, settings={})


def judged(found: study.Comparison, floor: float = 20.0) -> dict[str, dict]:
    bars = [((), {metric: floor for metric in ("lp/id", "lp/ood", "own", "blackbox/id", "blackbox/ood")})]
    study.over_levels(found)
    rows = verdicts.judged(study.CLAIMS, found.arms, bars) + study.more_rows(found)
    return {row["claim"]: row for row in rows}


# -------------------------------------------------------------------------------------------------------------- claims


def test_claims_are_differences_of_encoders_and_of_heads():
    rows = judged(compared())
    primary = [claim for claim, row in rows.items() if row["primary"]]
    assert len(primary) == 9 and not [claim for claim in rows if "caption" in claim]
    c1 = rows["C1 5 % label noise raises LP ID"]
    assert c1["primary"] and c1["effect"] == 0.58 and c1["verdict"] == "not reproduced"  # -1 here
    assert rows["C1 10 % label noise raises LP ID"]["effect"] is None  # figure 1 has -0.31
    assert rows["C1 30 % label noise lowers LP ID"]["verdict"] == "reproduced"  # -6, the paper has -2.1
    assert (
        rows["C2 10 % label noise lowers LP OOD"]["primary"] and not rows["C2 5 % label noise lowers LP OOD"]["primary"]
    )
    assert rows["C3 30 % label noise raises LSVR, OOD features"]["difference"] == pytest.approx(0.6, abs=0.01)
    own = rows["30 % label noise lowers accuracy on the pre-training's own names"]
    assert own["effect"] == -6.85 and own["difference"] == pytest.approx(-6, abs=0.2)
    correlation = rows["C3 higher SVE goes with lower LP ID (correlation over levels)"]
    assert correlation["difference"] == pytest.approx(-1, abs=0.01) and correlation["verdict"] == "direction only"
    c4 = rows["C4 NMTune above MLP, black box, OOD"]
    assert c4["primary"] and c4["difference"] == pytest.approx(0.9, abs=0.02) and c4["verdict"] == "reproduced"
    mean = rows["C4 NMTune above MLP, ID, encoders, mean over 0, 5, 10 % label noise"]
    assert mean["difference"] == pytest.approx(1, abs=0.1) and not mean["primary"] and mean["verdict"] == "reproduced"
    loss = rows["L_COV helps NMTune, ID, encoders, mean over 0, 5, 10 % label noise"]
    assert loss["difference"] == pytest.approx(0.5, abs=0.1) and loss["effect"] == 0.92
    noisy = rows["C4 NMTune above LP, ID, encoders with 30 % label noise"]
    assert noisy["difference"] == pytest.approx(3, abs=0.1) and noisy["verdict"] == "reproduced"
    z = rows["LSVR of NMTune's z below MLP's, OOD, encoders, mean over 0, 5, 10 % label noise"]
    assert z["sign"] == -1 and z["difference"] == pytest.approx(1.1) and z["verdict"] == "not reproduced"
    untrained = judged(compared(), floor=80.0).values()
    assert {row["verdict"] for row in untrained} == {"has not learned", "not testable here"}
    few = judged(compared(levels=(5, 30)))
    assert not [claim for claim in few if claim.startswith(("C1", "C2", "C3")) or "mean over" in claim]
    unknown = compared()._replace(arms={"vit": [encoder(0, 0)]})
    with pytest.raises(ValueError, match="sup-30-seed0"):
        study.more_rows(unknown)


def test_negligible_differences_are_at_most_half_of_the_papers():
    for claim in study.CLAIMS:
        assert claim.effect is None or claim.negligible <= abs(claim.effect) / 2


def test_means_and_correlations_need_their_levels():
    found = compared(levels=(0, 5, 10, 30))
    study.over_levels(found)
    clean = found.arms["sup-00"][1]
    expected = np.mean([found.arms[f"sup-{level:02d}"][1]["mlp/ood"] for level in (0, 5, 10)])
    assert clean["levels/mlp/ood"] == pytest.approx(expected) and study.SVE_LP not in clean
    found = compared(levels=(0, 5, 30))
    study.over_levels(found)
    assert not [metric for metric in found.arms["sup-00"][0] if metric.startswith("levels/")]


# ---------------------------------------------------------------------------------------------------------------- arms


def test_arms_are_encoders_at_each_noise_ratio_and_heads_on_a_black_box():
    arms = [arm.name for arm in study.STUDY.chosen("core")]
    assert arms == ["sup-00", "sup-05", "sup-10", "sup-30", "lite0-lp", "lite0-mlp", "lite0-nmtune"]
    primary = [claim for claim in study.CLAIMS if claim.primary]
    assert {arm for claim in primary for arm in (claim.method, claim.baseline)} == set(arms)
    known = {arm.name: arm for arm in study.STUDY.arms}
    compared_with = {each.partition(":")[0] for claim in study.CLAIMS for each in (claim.method, claim.baseline)}
    assert compared_with - {"0"} == set(known)
    (pretraining,) = study.STUDY.words(known["clip-30"], 1)
    options = f"--data {study.DATA['clip']} --epochs 28 --noise 0.3 --seed 1 --out runs/nmtune/clip-30-seed1"
    assert pretraining == ["nmtune.pretrain", "small-clip", *options.split()]
    heads = {}
    for name in study.ON_LITE0:
        ((module, *words),) = study.STUDY.words(known[name], 1)
        heads[name] = tyro.extras.overridable_config_cli(config.PRESETS, args=words)
        assert module == "nmtune.train" and heads[name].features == study.FEATURES and heads[name].heads == 1
    lp, mlp, nmtune = (heads[arm] for arm in study.BLACK_BOX)
    assert (lp.lr, lp.weight_decay, mlp.lr, nmtune.lr) == (0.1, 0.0, 1e-3, 1e-3)
    assert mlp.loss_weights(1280) == (0, 0, 0) and nmtune.loss_weights(1280) == (12.8, 0.01, 0.01)
    assert [heads[arm].loss_weights(1280) for arm in study.LEFT_OUT.values()] == [
        (0, 0.01, 0.01), (12.8, 0, 0.01), (12.8, 0.01, 0)
    ]  # fmt: skip
    assert f"--out {study.FEATURES}" in study.STUDY.before[1].command


def test_on_photographs_an_arm_pretrains_on_cifar10():
    arms = {arm.name: arm for arm in study.PHOTOS_ARMS}
    (pretraining,) = study.PHOTOS.words(arms["sup-10"], 1)
    assert pretraining[:2] == ["nmtune.pretrain", "small-sup"] and f"{study.CIFAR10}:train" in pretraining
    assert {"0.1", "runs/photos/nmtune/sup-10-seed1"} <= set(pretraining)
    assert set(arms) == {arm.name for arm in study.ARMS if not arm.name.startswith("clip")}


def test_a_head_on_the_black_box_has_the_mean_of_domains(tmp_path: Path):
    folder = tmp_path / "lite0-mlp-seed0"
    folder.mkdir()
    line = {"step": 9, "id/top1": 95.0, "art_painting/top1": 60.0, "cartoon/top1": 40.0, "sketch/top1": 20.0}
    (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    (found,) = study.evaluate_photos([str(folder)])
    assert found["blackbox/ood"] == pytest.approx(40) and found["blackbox/sketch"] == 20 and found["blackbox/id"] == 95


# -------------------------------------------------------------------------------------------------------------- floors


def picture(label: int, seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 90, (16, 16, 3), dtype=np.uint8)
    pixels[4 * label : 4 * label + 4] += 150
    return layout.png(pixels)


@pytest.fixture
def task(tmp_path: Path) -> Task:
    """Pictures with a bright band that determines the class: easy in domain, upside down out of domain."""
    for name, splits in {"photo": ("train", "test"), "one": ("test",), "two": ("test",)}.items():
        for split in splits:
            labels = [i % 3 for i in range(30)]
            shown = [2 - label if name != "photo" else label for label in labels]
            samples = (
                {"png": picture(s, i + 100 * (split == "test")), "cls": str(y)}
                for i, (s, y) in enumerate(zip(shown, labels, strict=True))
            )
            write_split(tmp_path / name / split, samples)
        layout.write_classes(tmp_path / name, ["dog", "horse", "house"], ["a {c}"])
    tests = {"id": f"{tmp_path}/photo:test", "one": f"{tmp_path}/one:test", "two": f"{tmp_path}/two:test"}
    return Task(f"{tmp_path}/photo:train", tests)


def test_floors_are_measured_in_and_out_of_domain(task: Task, tmp_path: Path):
    features, labels = np.repeat(np.eye(4), 20, axis=0), np.repeat(np.arange(4), 20)
    tests = {"id_features": features, "id_labels": labels}
    for name in ("one", "two"):
        tests |= {f"{name}_features": features[:30], f"{name}_labels": np.array([0] * 30)}
    np.savez(tmp_path / "f.npz", features=features, labels=labels, **tests)
    chance, near, probe, lite0 = (floor.measure() for floor in study.floors_of(task, str(tmp_path / "f.npz")))
    assert set(chance) == set(near) == {"lp/id", "lp/ood", "blackbox/id", "blackbox/ood"}
    assert chance["lp/ood"] == pytest.approx(100 / 3)
    assert near["lp/id"] == near["blackbox/id"] > 90 and near["lp/ood"] < 50 and probe["lp/id"] > probe["lp/ood"]
    assert lite0 == {"blackbox/id": 100.0, "blackbox/ood": pytest.approx(200 / 3)}


# --------------------------------------------------------------------------------------------------------------- plots


def test_plots_show_differences_with_intervals(tmp_path):
    found = compared()
    of = study.differences(found.arms, "sup", "lp/id")
    noisy, clean = ([run["lp/id"] for run in found.arms[arm]] for arm in ("sup-30", "sup-00"))
    each = np.subtract(noisy, clean)
    assert of[0] == (0.0, 0.0) and of[30][0] == pytest.approx(np.mean(each)) and 0 < of[30][1] < 0.5
    study.STUDY.plot(found, tmp_path)
    assert (tmp_path / "nmtune_noise.png").is_file() and not (tmp_path / "nmtune_spectra.png").exists()


def test_without_a_baseline_there_is_no_plot_of_noise(tmp_path):
    study.plot_noise({"clip-30": [{"lp/id": 1.0}]}, tmp_path)
    assert not list(tmp_path.iterdir())
