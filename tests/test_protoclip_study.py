"""The study: arms by seed, comparison and report."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_mutual_info_score
from test_protoclip_eval import EMOJI, cfg, runs, trained  # noqa: F401

from protoclip import eval as evaluation
from shared import checkpoints, layout, tars
from studies import protoclip as study
from studies.harness import runner
from studies.harness.floors import Floor
from studies.harness.report import Comparison
from studies.harness.verdicts import Claim

ROOT = Path(__file__).parent.parent


def test_report_of_two_arms_and_seeds(cfg: evaluation.Config, capsys: pytest.CaptureFixture, monkeypatch, tmp_path):
    metrics = {"groups_id/top1": "groups", "modality_gap": "gap", "seconds": "s"}
    claim = Claim("higher", "+1", "groups_id/top1", "protoclip", "clip")
    bars = (Floor("none", lambda: {"groups_id/top1": -1.0}),)
    claims = claim, study.CLAIMS[4]._replace(learned_by=None)
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
    time = rows[study.CLAIMS[4].claim]
    assert time["primary"] and time["metric"] == study.TIME and summary["floors"] == {"none": {"groups_id/top1": -1.0}}
    assert summary["arms"]["clip"][study.TIME]["values"] == [0.0, 0.0] and "extra_time" in summary["arms"]["protoclip"]
    for name in ("protoclip_curves.png", "protoclip_features.png"):
        assert (tmp_path / name).stat().st_size > 10_000

    # A second evaluation reads what the first has kept
    monkeypatch.setattr(evaluation, "evaluate_run", lambda *_: pytest.fail("evaluated twice"))
    evaluation.main(cfg)


def test_floors_of_the_pretrained_tower_apply_to_its_own_arms_only():
    floors = {floor.name: floor.arms for floor in study.FLOORS}
    assert floors["nearest neighbour on EfficientNet-Lite0"] == study.LITE0 and floors["chance"] == ()
    arms = {arm.name: arm for arm in study.ARMS}
    assert not any(arms[name].core for name in study.LITE0)
    both = [claim for claim in study.CLAIMS if {claim.method, claim.baseline} & set(study.LITE0)]
    assert both and all((claim.method, claim.baseline) == study.LITE0 and not claim.primary for claim in both)


def test_the_floor_of_the_probe_is_the_same_probe_on_pixels(monkeypatch: pytest.MonkeyPatch):
    """The probe gets pixels in [-1, 1] and labels of both splits of a set; other features can have another scale."""
    splits = {"train": (torch.tensor([[-255.0, 51.0]]), torch.tensor([1])), "test": (torch.ones(3, 2), torch.zeros(3))}

    def read(path: str, split: str, features, transform) -> tuple[torch.Tensor, torch.Tensor]:
        assert path == "sets/bars"
        return splits[split]

    def probe(train_x, train_y, test_x, test_y) -> dict[str, float]:
        assert len(train_y) == 1 and test_x.shape == (3, 2) and len(test_y) == 3
        return {"best": float(train_x[0, 0]), "final": float(train_x[0, 1]), "steps": 9.0}

    monkeypatch.setattr(study.floors, "read", read)
    monkeypatch.setattr(evaluation, "linear_probe", probe)
    found = {"bars/probe_best": -1.0, "bars/probe_final": pytest.approx(0.2)}
    assert study.probed(["sets/bars"]) == found
    assert study.probed(["sets/bars"], scale=1.0) == {"bars/probe_best": -255.0, "bars/probe_final": 51.0}


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


def test_seconds_until_clips_accuracy(tmp_path: Path):
    """Seconds to the first evaluation with CLIP's last accuracy, or all seconds of a run that never reaches it."""
    curves = {"clip": [(10, 3.0), (20, 5.0)], "fast": [(6, 4.0), (12, 5.5), (30, 9.0)], "slow": [(15, 1.0), (40, 4.0)]}
    folders, arms = {}, {}
    for arm, points in curves.items():
        folders[arm] = [tmp_path / arm]
        folders[arm][0].mkdir()
        lines = [json.dumps({"step": s, "seconds": s, "zero_shot_top1": top1}) for s, top1 in points]
        (folders[arm][0] / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        arms[arm] = [{"seconds": float(points[-1][0])}]
    study.derive(Comparison(arms, [0], folders, set()))
    found = {arm: values[0][study.TIME] for arm, values in arms.items()}
    assert found == {"clip": 0.0, "fast": pytest.approx(-0.4), "slow": 1.0}
    assert arms["slow"][0]["extra_time"] == 1.0
