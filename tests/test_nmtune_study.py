"""The study: arms for each noise ratio and on black-box features, claims, floors, plots."""

import numpy as np
import pytest
import torch
from nmtune_runs import compared, encoder
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from nmtune import config
from studies import nmtune as study
from studies.harness import verdicts


def judged(found: study.Comparison, floor: float = 20.0) -> dict[str, dict]:
    bars = [((), {metric: floor for metric in ("lp/id", "lp/ood", "blackbox/id", "blackbox/ood")})]
    study.derive(found)
    rows = verdicts.judged(study.CLAIMS, found.arms, bars) + study.more_rows(found)
    return {row["claim"]: row for row in rows}


def test_claims_are_differences_of_encoders_and_of_heads():
    rows = judged(compared())
    primary = [claim for claim, row in rows.items() if row["primary"]]
    assert len(primary) == 9 and not [claim for claim in rows if "caption" in claim]
    c1 = rows["C1 10 % label noise raises LP ID"]
    assert c1["primary"] and c1["difference"] == pytest.approx(-2, abs=0.2) and c1["verdict"] == "not reproduced"
    assert rows["C1 30 % label noise lowers LP ID"]["verdict"] == "reproduced"  # -6, the paper has -2.1
    assert (
        rows["C2 10 % label noise lowers LP OOD"]["primary"] and not rows["C2 5 % label noise lowers LP OOD"]["primary"]
    )
    assert rows["C3 30 % label noise raises LSVR, OOD features"]["difference"] == pytest.approx(0.6, abs=0.01)
    correlation = rows["C3 higher SVE goes with lower LP ID (correlation over levels)"]
    assert correlation["difference"] == pytest.approx(-1, abs=0.01) and correlation["verdict"] == "direction only"
    c4 = rows["C4 NMTune above MLP, black box, OOD"]
    assert c4["primary"] and c4["difference"] == pytest.approx(0.9, abs=0.02) and c4["verdict"] == "reproduced"
    mean = rows["C4 NMTune above MLP, encoders, mean over levels of label noise, OOD"]
    assert mean["difference"] == pytest.approx(1, abs=0.1) and not mean["primary"]
    noisy = rows["C4 NMTune above LP, encoders with 30 % label noise, ID"]
    assert noisy["difference"] == pytest.approx(3, abs=0.1) and noisy["verdict"] == "reproduced"
    z = rows["L_COV of NMTune's z against MLP's, encoders with 30 % label noise, ID"]
    assert z["difference"] == pytest.approx(-0.9) and z["verdict"] == "no claim"
    untrained = judged(compared(), floor=80.0).values()
    assert {row["verdict"] for row in untrained} == {"has not learned", "no claim", "not testable here"}
    few = judged(compared(levels=(5, 30)))
    assert not [claim for claim in few if claim.startswith(("C1", "C2", "C3"))]
    unknown = compared()._replace(arms={"vit": [encoder(0, 0)]})
    with pytest.raises(ValueError, match="sup-30-seed0"):
        study.more_rows(unknown)


def test_heads_on_few_samples_have_a_floor_of_their_own(tmp_path, monkeypatch):
    """Their accuracies are judged by it: they are above the floor of few samples, but not above that of all."""
    found = compared()
    values = {arm: [45.0 + 0.01 * i * seed for seed in range(3)] for i, arm in enumerate(study.FEW_SAMPLES)}
    found.arms.update({arm: [{"blackbox/id": x, "blackbox/ood": x - 10} for x in each] for arm, each in values.items()})
    study.derive(found)
    features, labels = np.repeat(np.eye(4), 20, axis=0), np.repeat(np.arange(4), 20)
    features[:5] = features[20]  # five samples of class 0 look like class 1
    tests = {"id_features": features, "id_labels": labels, "ood_features": features[:5], "ood_labels": labels[:5]}
    np.savez(tmp_path / "f.npz", features=features, labels=labels, **tests)
    monkeypatch.setitem(study.LITE0, "features", str(tmp_path / "f.npz"))
    near = study.lite0_neighbour()
    assert set(near) == {"blackbox/id", "blackbox/ood", "few/id", "few/ood"} and near["few/id"] >= 75
    floors = {"blackbox/id": 60.0, "blackbox/ood": 60.0, "few/id": 44.0, "few/ood": 36.0}
    bars = [(study.BLACK_BOX + study.FEW_SAMPLES, floors)]
    rows = {row["claim"]: row["verdict"] for row in verdicts.judged(study.CLAIMS, found.arms, bars)}
    name = "C4 NMTune above MLP, black box, a tenth of the samples"
    assert rows[f"{name}, ID"] == "no difference above d" and rows[f"{name}, OOD"] == "has not learned"


def test_floors_by_hand_and_against_scikit_learn(tmp_path, monkeypatch):
    """Raw pixels of two tasks; pretrained features of two classes, of which scikit-learn has the accuracies."""
    splits = {
        "tune": (torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1])),
        "id": (torch.tensor([[2.0, 0.1], [0.1, 9.0]]), torch.tensor([0, 1])),
        "ood": (torch.tensor([[2.0, 0.1], [0.1, 9.0], [3.0, 1.0], [1.0, 2.0]]), torch.tensor([0, 1, 1, 1])),
    }
    second = splits | {"ood": (splits["ood"][0], torch.tensor([1, 0, 1, 0]))}
    monkeypatch.setattr(study, "TASKS", ("one", "two"))
    monkeypatch.setattr(study, "pixels", lambda task, split: (splits if task == "one" else second)[split])
    top1 = {"subgroups_id/top1": 5.0, "subgroups_ood/top1": 3.0}
    monkeypatch.setattr(study.floors, "nearest_neighbour", lambda sets: top1)
    # predictions out of domain are 0, 1, 0, 1: three of four right in task one, none in task two
    expected = {"nearest/id": 100.0, "nearest/ood": (75 + 0) / 2, "blackbox/id": 5.0, "blackbox/ood": 3.0}
    assert study.pixel_neighbour() == pytest.approx(expected)

    rng = np.random.default_rng(0)
    labels = np.arange(200) % 2
    features = rng.standard_normal((200, 3)) + labels[:, None]
    asked, truth = rng.standard_normal((50, 3)) + 0.5, np.arange(50) % 2
    np.savez(tmp_path / "f.npz", features=features, labels=labels, ood_features=asked, ood_labels=truth)
    monkeypatch.setitem(study.LITE0, "features", str(tmp_path / "f.npz"))
    near, found = study.lite0_neighbour(), study.logistic_regression()
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (features, asked)]
    few = study.few_samples(torch.from_numpy(labels))
    assert sorted(labels[few]) == [0] * 10 + [1] * 10
    for kind, rows in (("blackbox", np.arange(200)), ("few", few)):
        neighbour = KNeighborsClassifier(1).fit(unit[0][rows], labels[rows]).score(unit[1], truth)
        assert near[f"{kind}/ood"] == pytest.approx(100 * neighbour)
        of_each = [
            LogisticRegression(C=c).fit(features[rows], labels[rows]).score(asked, truth) for c in (0.03, 0.1, 0.3, 1)
        ]
        assert 100 * min(of_each) - 1e-6 <= found[f"{kind}/ood"] <= 100 * max(of_each) + 1e-6


def test_plots_show_differences_with_intervals(tmp_path):
    found = compared()
    of = study.differences(found.arms, "sup", "lp/id")
    noisy, clean = ([run["lp/id"] for run in found.arms[arm]] for arm in ("sup-30", "sup-00"))
    each = np.subtract(noisy, clean)
    assert of[0] == (0.0, 0.0) and of[30][0] == pytest.approx(np.mean(each)) and 0 < of[30][1] < 0.5
    study.STUDY.plot(found, tmp_path)
    assert (tmp_path / "nmtune_noise.png").is_file() and not (tmp_path / "nmtune_spectra.png").exists()


def test_arms_are_encoders_at_each_noise_ratio_and_heads_on_a_black_box():
    arms = [arm.name for arm in study.STUDY.chosen("core")]
    assert arms == ["sup-00", "sup-10", "sup-30", "lite0-lp", "lite0-mlp", "lite0-nmtune"]
    assert len(study.STUDY.chosen("all")) == 17
    known = {arm.name: arm for arm in study.STUDY.arms}
    compared_with = {each.partition(":")[0] for claim in study.CLAIMS for each in (claim.method, claim.baseline)}
    assert compared_with - {"0"} == set(known)
    pretraining, tuning = study.STUDY.words(study.STUDY.arms[9], 1)
    out = "runs/nmtune/clip-30-seed1"
    assert pretraining == ["nmtune.pretrain", "emoji-clip-30", "--seed", "1", "--out", out]
    assert tuning == ["studies.nmtune_encoders", "--encoder", out, "--methods", "lp"]
    _, tuning = study.STUDY.words(known["sup-30"], 1)
    assert tuning[-3:] == list(study.HEADS)  # C4 on encoders, and the spectra of z
    (head,) = study.STUDY.words(known["lite0-nmtune"], 1)
    heads = ["--seed", "10", "--heads", str(study.TUNINGS)]  # seed 2 of the study begins with 20
    assert head == ["nmtune.train", "emoji-lite0-nmtune", *heads, "--out", "runs/nmtune/lite0-nmtune-seed1"]
    (few,) = study.STUDY.words(known["lite0-mlp-few"], 1)
    assert few[:4] == ["nmtune.train", "emoji-lite0-mlp", "--train-fraction", "0.1"]
    features = config.PRESETS["emoji-lite0-nmtune"][1].features
    assert f"--out {features}" in study.STUDY.before[0].command and set(study.BLACK_BOX) < set(
        study.STUDY.before[0].arms
    )


def test_without_a_baseline_there_is_no_plot_of_noise(tmp_path):
    study.plot_noise({"clip-30": [{"lp/id": 1.0}]}, tmp_path)
    assert not list(tmp_path.iterdir())


def test_floors_need_no_training(monkeypatch):
    """Chance and raw pixels on a few drawings of the corpus; floors have the metrics of the arms' claims."""
    whole = study.open_labelled
    monkeypatch.setattr(study, "open_labelled", lambda spec: whole(spec).subset(np.arange(120)))
    monkeypatch.setattr(study, "TASKS", ("group",))
    monkeypatch.setattr(study, "SUBGROUPS", study.SUBGROUPS[1:])
    study.pixels.cache_clear()
    chance = study.chance()
    assert chance["few/ood"] == chance["blackbox/ood"]
    assert chance["lp/id"] == chance["lp/ood"] == pytest.approx(100 / 9) and chance["blackbox/ood"] == pytest.approx(
        100 / 98
    )
    neighbour, probe = study.pixel_neighbour(), study.pixel_probe()
    assert set(probe) == {"lp/id", "lp/ood"} and set(neighbour) == {"nearest/id", "nearest/ood", "blackbox/ood"}
    assert all(0 <= value <= 100 for value in (*probe.values(), *neighbour.values()))
    study.pixels.cache_clear()
