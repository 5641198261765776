"""The scenes of the study, and what it measures of an encoder."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from nmtune_runs import corpus  # noqa: F401

from nmtune import config, encoders
from nmtune.datasets import open_labelled
from nmtune.pretrain import NoisyLabels
from shared import checkpoints, run
from studies import nmtune as study
from studies import nmtune_encoders as encoder_study
from studies import nmtune_scenes
from studies.harness import runner


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nmtune") / "scenes"
    nmtune_scenes.main(nmtune_scenes.Config(folder, names=4, tune_names=3, each=6, own_tests=2, tests=5))
    return folder


def task_of(scenes: Path) -> encoder_study.Task:
    tests = {"id": f"{scenes}/tune:test", "ood": f"{scenes}/ood:test"}
    return encoder_study.Task(f"{scenes}/tune:train", tests, own=f"{scenes}/pretrain:test")


def pretrained(scenes: Path, folder: Path, noise: float, seed: int) -> config.PretrainConfig:
    """A checkpoint of pre-training with random weights."""
    small = config.PRETRAIN_PRESETS["small-sup"][1]
    cfg = dataclasses.replace(small, data=f"{scenes}/pretrain:train", noise=noise, seed=seed, out=str(folder))
    torch.manual_seed(seed + round(noise * 10))
    encoder, *_ = encoders.create_model(cfg, 4)
    folder.mkdir()
    state = {"epoch": cfg.epochs, "seconds": 1.0, "noise": noise, "commit": "x", "config": dataclasses.asdict(cfg)}
    torch.save(state | {"state_dict": encoder.state_dict()}, folder / "checkpoint.pt")
    return cfg


def test_scenes_are_split_by_name_and_drawing(scenes: Path):
    paths = ("pretrain:train", "pretrain:test", "tune:train", "tune:test", "ood:test")
    sets = {path: open_labelled(f"{scenes}/{path}") for path in paths}
    assert [len(each) for each in sets.values()] == [24, 8, 18, 15, 15]
    assert all((np.bincount(each.labels) == len(each) // each.num_classes).all() for each in sets.values())
    assert sets["tune:train"].classnames == sets["tune:test"].classnames == sets["ood:test"].classnames
    assert not set(sets["pretrain:train"].classnames) & set(sets["tune:train"].classnames)
    pixels = {np.asarray(each.read(row)[0]).tobytes() for each in sets.values() for row in range(len(each))}
    assert len(pixels) == 80  # no scene is in two sets


def test_wrong_labels_that_are_learned_are_counted(scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An encoder that answers with the noisy labels of its training pictures has learned all of them."""
    cfg = pretrained(scenes, tmp_path / "run", 0.5, 3)
    samples = NoisyLabels(cfg, open_labelled(cfg.data))
    answers = {"noisy": samples.images.labels, "true": open_labelled(cfg.data).labels}
    found = {}
    for name, labels in answers.items():
        logits = torch.nn.functional.one_hot(torch.from_numpy(labels), 4).float()[None]
        monkeypatch.setattr(encoder_study, "encode_set", lambda *_, logits=logits, **__: (logits, None))
        found[name] = encoder_study.fitted(tmp_path / "run", cfg, "", run.setup(0, "cpu"))
    assert found["noisy"] == {"fitted_right": 100, "fitted_wrong": 100, "true_instead": 0}
    assert found["true"] == {"fitted_right": 100, "fitted_wrong": 0, "true_instead": 100}


def test_study_and_report(scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """The report has the measurements of two encoders with two seeds each and random weights."""
    short = {name: dataclasses.replace(cfg, epochs=1) for name, cfg in encoder_study.HEADS.items()}
    monkeypatch.setattr(encoder_study, "HEADS", short)
    monkeypatch.setattr(study, "TASK", task_of(scenes))
    for arm, noise in (("sup-00", 0.0), ("sup-30", 0.3)):
        for seed in (0, 1):
            pretrained(scenes, tmp_path / f"{arm}-seed{seed}", noise, seed)
    runs = tuple(str(path) for path in sorted(tmp_path.glob("*-seed?")))
    found = study.evaluate(runs)
    kept = (tmp_path / "sup-30-seed1/results.json").stat().st_mtime_ns
    assert study.evaluate(runs) == found
    assert (tmp_path / "sup-30-seed1/results.json").stat().st_mtime_ns == kept  # and it is not measured again
    bare = dataclasses.replace(study.STUDY, floors=())
    monkeypatch.setattr(study, "STUDY", bare)
    monkeypatch.chdir(tmp_path)
    runner.compare(bare, runs, found, tmp_path / "results.json")
    summary = checkpoints.read_json(tmp_path / "results.json")
    assert summary["seeds"] == [0, 1] and list(summary["arms"]) == ["sup-00", "sup-30"]
    noisy, clean = summary["arms"]["sup-30"], summary["arms"]["sup-00"]
    assert {"fitted_wrong", "true_instead"} <= set(noisy) and "fitted_wrong" not in clean
    assert {"own", "lp/id", "no-svd/ood", "z/nmtune/sve/id", "sve_id@none", "lsvr_ood"} <= set(noisy)
    assert noisy["noise"]["mean"] == pytest.approx(30)
    c2 = next(claim for claim in summary["claims"] if claim["claim"] == "C2 30 % label noise lowers LP OOD")
    assert c2["difference"] == pytest.approx(np.mean(np.subtract(noisy["lp/ood"]["values"], clean["lp/ood"]["values"])))
    assert "C4 NMTune above MLP, OOD, encoders with 30 % label noise" in capsys.readouterr().out
    assert (tmp_path / "nmtune_noise.png").is_file() and (tmp_path / "nmtune_spectra.png").is_file()
