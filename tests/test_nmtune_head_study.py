"""One head with several seeds, and their mean in the comparison of heads."""

import dataclasses
import os

import numpy as np
import pytest
import torch
from test_nmtune_train import corpus, images, in_process, metrics, one_sentence  # noqa: F401

from nmtune import config
from nmtune import eval as evaluation
from shared import checkpoints
from studies import nmtune as study
from studies import nmtune_heads as head_study


@pytest.fixture
def features_file(tmp_path):
    """Three classes that overlap, so that seeds differ; test sets id and ood."""
    rng = np.random.default_rng(0)
    labels, centres = rng.integers(0, 3, 90), rng.standard_normal((3, 12))
    x, x1, x2 = (centres[labels] + noise * rng.standard_normal((90, 12)) for noise in (1, 1, 2))
    arrays = {"features": x, "labels": labels, "id_features": x1, "id_labels": labels}
    np.savez(tmp_path / "f.npz", **arrays, ood_features=x2, ood_labels=labels)
    return tmp_path / "f.npz"


@pytest.mark.parametrize("preset", ["lp", "nmtune"])
def test_heads_equal_those_of_training(in_process, features_file, tmp_path, preset, capsys):
    """Each seed's accuracy equals that of a run of nmtune.train with this seed; a study compares the means."""
    options = [preset, "--features", features_file, "--epochs", "2", "--batch-size", "32"]
    for seed in (30, 31, 32):
        out = tmp_path / (f"lite0-{preset}-seed3" if seed == 30 else str(seed))
        code, _, err = in_process("nmtune.train", *options, "--seed", seed, "--out", out)
        assert code == 0, err
    folder = tmp_path / f"lite0-{preset}-seed3"
    assert evaluation.compared_metrics(str(folder)) == {
        f"blackbox/{name}": metrics(folder)[-1][f"{name}/top1"] for name in ("id", "ood")
    }
    for said in ("", "nothing to do"):
        code, out, err = in_process("studies.nmtune_heads", "--run", folder, "--heads", 3, "--device", "cpu")
        assert code == 0 and said in out, err
    os.utime(features_file, ns=(1, 1))  # another file, older than the results
    code, out, err = in_process("studies.nmtune_heads", "--run", folder, "--heads", 3, "--device", "cpu")
    assert code == 0 and "nothing to do" not in out, err
    found = checkpoints.read_json(folder / "heads.json")
    assert found["seeds"] == [30, 31, 32]
    for name in ("id/top1", "ood/top1"):
        alone = [metrics(path)[-1][name] for path in (folder, tmp_path / "31", tmp_path / "32")]
        assert found["tests"][name] == alone
        assert evaluation.compared_metrics(str(folder))[f"blackbox/{name[:-5]}"] == pytest.approx(np.mean(alone))
    assert len({*found["tests"]["id/top1"], *found["tests"]["ood/top1"]}) > 1


def test_heads_of_other_runs_are_refused(in_process, features_file, tmp_path, images):
    """Unfinished runs, other data, views that are new in every step, no head, and runs of other scripts."""
    folder = tmp_path / "run"
    code, _, err = in_process("nmtune.train", "lp", "--features", features_file, "--epochs", "1", "--out", folder)
    assert code == 0, err
    state = checkpoints.load_checkpoint(folder / "checkpoint.pt")
    fresh = {"features": "", "encoder": "timm:resnet_emoji", "data": str(images), "views": "train", "workers": 0}
    cases = {
        "drew new views in every step": ({"config": state["config"] | fresh}, []),
        "is not finished: 0 of 1 epochs": ({"epoch": 0}, []),
        "was trained on other data": ({"data": "other"}, []),
        "--heads must be at least 1": ({}, ["--heads", "0"]),
    }
    for message, (changed, options) in cases.items():
        torch.save(state | changed, folder / "checkpoint.pt")
        code, _, err = in_process("studies.nmtune_heads", "--run", folder, *options)
        assert code == 2 and message in err and one_sentence(err), err
    assert not (folder / "heads.json").exists()
    cfg = dataclasses.replace(config.EMOJI_SUPERVISED, epochs=1)
    torch.save({"epoch": 1, "config": dataclasses.asdict(cfg)}, folder / "checkpoint.pt")
    with pytest.raises(ValueError, match="is not a run of nmtune that can be used here"):
        head_study.main(config.HeadStudyConfig(str(folder)))


def test_each_seed_of_the_study_has_heads_of_its_own():
    seeds, arm = [], next(arm for arm in study.STUDY.arms if arm.name == "lite0-mlp")
    for seed in (0, 1, 10):
        first, more = study.STUDY.words(arm, seed)
        number = int(first[first.index("--seed") + 1])
        assert more == ["studies.nmtune_heads", "--run", first[-1], "--heads", str(study.TUNINGS)]
        seeds += range(number, number + study.TUNINGS)
    assert len(set(seeds)) == 3 * study.TUNINGS
