"""The study: arms by seed, comparison and report."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from protoclip_runs import EMOJI, cfg, runs, trained  # noqa: F401
from sklearn.metrics import adjusted_mutual_info_score

from protoclip import eval as evaluation
from shared import checkpoints, layout, tars
from studies import protoclip as study
from studies.harness import runner
from studies.harness.floors import Floor
from studies.harness.report import Comparison
from studies.harness.verdicts import Claim


def test_report_of_two_arms_and_seeds(cfg: evaluation.Config, capsys: pytest.CaptureFixture, monkeypatch, tmp_path):
    metrics = {"groups_id/top1": "groups", "modality_gap": "gap", "seconds": "s"}
    claim = Claim("higher", "+1", "groups_id/top1", "protoclip", "clip")
    bars = (Floor("none", lambda: {"groups_id/top1": -1.0}),)
    claims = claim, study.CLAIMS[-1]
    changed = dataclasses.replace(study.STUDY, metrics=metrics, claims=claims, floors=bars)
    monkeypatch.setattr(study, "STUDY", changed)
    monkeypatch.chdir(tmp_path)
    runner.compare(study.STUDY, cfg.runs, evaluation.main(cfg), tmp_path / "results.json")
    summary = checkpoints.read_json(tmp_path / "results.json")
    assert summary["seeds"] == [0, 1] and set(summary["arms"]) == {"clip", "protoclip"}
    top1 = {arm: metrics["groups_id/top1"]["values"] for arm, metrics in summary["arms"].items()}
    for arm, values in top1.items():  # what stands in the report was measured on that arm's checkpoints
        for seed, value in enumerate(values):
            folder = next(Path(path) for path in cfg.runs if path.endswith(f"{arm}-seed{seed}"))
            assert json.loads((folder / "results.json").read_text())["metrics"]["groups_id/top1"] == value
            for name in ("results.md", "features.npz"):
                assert (folder / name).is_file()
    rows = {row["claim"]: row for row in summary["claims"]}
    mean = sum(top1["protoclip"]) / 2 - sum(top1["clip"]) / 2
    assert rows["higher"]["difference"] == pytest.approx(mean) and not rows["higher"]["primary"]
    assert rows["higher"]["verdict"] in capsys.readouterr().out
    assert summary["floors"] == {"none": {"groups_id/top1": -1.0}} and study.CLAIMS[-1].claim in rows
    assert summary["arms"]["clip"]["extra_time"]["values"] == [0.0, 0.0]
    for name in ("protoclip_curves.png", "protoclip_features.png"):
        assert (tmp_path / name).stat().st_size > 10_000

    # A second evaluation reads what the first has kept
    monkeypatch.setattr(evaluation, "evaluate_run", lambda *_: pytest.fail("evaluated twice"))
    evaluation.main(cfg)


def test_the_floor_of_the_probe_is_the_same_probe_on_pixels(monkeypatch: pytest.MonkeyPatch):
    """The probe gets pixels in [-1, 1] and labels of both splits of a set."""
    splits = {"train": (torch.tensor([[-255.0, 51.0]]), torch.tensor([1])), "test": (torch.ones(3, 2), torch.zeros(3))}

    def probe(train_x, train_y, test_x, test_y) -> dict[str, float]:
        assert len(train_y) == 1 and test_x.shape == (3, 2) and len(test_y) == 3
        return {"best": float(train_x[0, 0]), "final": float(train_x[0, 1]), "steps": 9.0}

    monkeypatch.setattr(study, "SUBGROUPS", ["sets/bars"])
    monkeypatch.setattr(study.floors, "read", lambda path, split: splits[split])
    monkeypatch.setattr(evaluation, "linear_probe", probe)
    assert study.raw_pixel_probe() == {"bars/probe_best": -1.0, "bars/probe_final": pytest.approx(0.2)}


def write_greys(folder: Path, pictures: dict[str, list[tuple[int, int]]], classes: list[str]) -> str:
    """An evaluation set of pictures with one darker half; {split: (brightness of the upper half, label)}."""
    for split, of in pictures.items():
        samples = []
        for bright, label in of:
            pixels = np.full((24, 24, 3), 100, np.uint8)
            pixels[:12] = bright
            samples.append({"png": layout.png(pixels), "cls": str(label)})
        tars.write_split(folder / split, samples)
    layout.write_classes(folder, classes, ["{c}"])
    return str(folder)


def test_the_neighbours_caption_names_the_class_with_most_of_its_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Two bright pictures are nearest to the red cat, whose name shares a word with one class; one of them is of it."""
    pictures = {"train": [(200, 0), (20, 1)], "test": [(200, 0)]}
    names = write_greys(tmp_path / "names", pictures, ["red cat", "blue car"])
    groups = write_greys(tmp_path / "groups", {"test": [(210, 1), (190, 0), (30, 0)]}, ["car", "cat animal"])
    monkeypatch.setattr(study, "NAMES", [names])
    monkeypatch.setattr(study, "SUBGROUPS", [groups])
    assert study.neighbours_caption() == {"groups/top1": pytest.approx(200 / 3)}


def test_clusters_of_raw_pixels_against_scikit_learn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Bright and dark pictures of two colours cluster by colour; one of seven has the label of the other colour."""
    red, blue = [(250, 0, 0), (240, 0, 0), (30, 0, 0), (25, 0, 0)], [(0, 0, 30), (0, 0, 25), (0, 0, 20)]
    labels = [0, 0, 0, 0, 1, 1, 0]
    samples = []
    for colour, label in zip(red + blue, labels, strict=True):
        pixels = np.broadcast_to(np.array(colour, np.uint8), (24, 24, 3))
        samples.append({"png": layout.png(pixels), "cls": str(label)})
    tars.write_split(tmp_path / "subgroups_ood/test", samples)
    layout.write_classes(tmp_path / "subgroups_ood", ["a", "b"], ["{c}"])
    monkeypatch.setattr(study, "SUBGROUPS", ["", str(tmp_path / "subgroups_ood")])
    expected = adjusted_mutual_info_score([0, 0, 0, 0, 1, 1, 1], labels)
    assert study.pixel_clusters() == {"subgroups_ood/ami": pytest.approx(expected)}


def test_seconds_until_a_schedule_has_clips_accuracy():
    """Half-way between two schedules; before the shortest, all of its seconds; never, those of the longest."""
    points = [(40.0, 8.0), (10.0, 2.0), (20.0, 4.0)]
    assert study.seconds_to(3.0, points) == (15.0, True)
    assert study.seconds_to(1.0, points) == (10.0, True)
    assert study.seconds_to(9.0, points) == (40.0, False)
    names = iter(range(1, 9))
    of = {arm: {"seconds": 10.0 * next(names), study.PROBE_ID: 5.0, study.NAMES_OOD: 1.0} for arm in study.SCHEDULES}
    arms = {"clip": [{"seconds": 20.0, study.PROBE_ID: 5.0, study.NAMES_OOD: 2.0}]}
    arms |= {arm: [values] for arm, values in of.items()}
    study.derive(Comparison(arms, [0], {}, set()))
    found, shortest, longest = arms["protoclip"][0], 10.0, 10.0 * len(of)
    assert found["time/probe"] == shortest / 20 - 1 and found[f"reached/{study.PROBE_ID}"] == 1.0
    assert found["time/names"] == longest / 20 - 1 and found[f"reached/{study.NAMES_OOD}"] == 0.0
    assert found["extra_time"] == longest / 20 - 1 and arms["clip"][0]["time/probe"] == 0.0


def test_notes_count_runs_that_never_reach_clip_and_name_a_better_neighbour():
    values = {"time/probe": [0.2, 0.5, -0.3], f"reached/{study.PROBE_ID}": [0.0, 0.0, 1.0], "extra_time": [0.2] * 3}
    of = {metric: {"values": seeds} for metric, seeds in values.items()}
    summary = {"arms": {"protoclip": of | {study.PROBE_ID: {"mean": 50.0, "values": [50.0] * 3}}}}
    pixels = {"subgroups_id/nearest": 59.7}
    texts = " ".join(study.notes(summary | {"floors": {"nearest neighbour on raw pixels": pixels}}).values())
    assert "2 of 3" in texts and "59.70" in texts
    of[f"reached/{study.PROBE_ID}"]["values"] = [1.0] * 3
    assert study.notes({"arms": {"protoclip": of}, "floors": {}}) == {}
