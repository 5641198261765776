"""The study: arms by seed, compared and reported."""

import dataclasses
import json
from pathlib import Path

import pytest
from test_protoclip_eval import EMOJI, cfg, runs, trained  # noqa: F401

from protoclip import eval as evaluation
from protoclip import study
from shared import checkpoints
from shared.study import statistics

ROOT = Path(__file__).parent.parent


def test_report_of_two_arms_and_seeds(cfg: evaluation.Config, capsys: pytest.CaptureFixture, monkeypatch):
    metrics = {"groups_id/top1": "groups", "modality_gap": "gap", "seconds": "s"}
    claim = statistics.Claim("higher", "+1", "groups_id/top1", "protoclip", "clip")
    monkeypatch.setattr(study, "STUDY", dataclasses.replace(study.STUDY, metrics=metrics, claims=(claim,)))
    evaluation.main(cfg)
    summary = checkpoints.read_json(cfg.report)
    assert summary["seeds"] == [0, 1] and set(summary["arms"]) == {"clip", "protoclip"}
    top1 = {arm: metrics["groups_id/top1"]["values"] for arm, metrics in summary["arms"].items()}
    for arm, values in top1.items():  # what stands in the report was measured on that arm's checkpoints
        for seed, value in enumerate(values):
            folder = next(Path(path) for path in cfg.runs if path.endswith(f"{arm}-seed{seed}"))
            assert json.loads((folder / "results.json").read_text())["metrics"]["groups_id/top1"] == value
            assert (folder / "results.md").is_file() and (folder / "features.png").is_file()
    expected = statistics.judge(claim, top1["protoclip"], top1["clip"])
    assert summary["claims"][0] == expected
    assert expected["verdict"].removesuffix(" at this scale") in capsys.readouterr().out
    for name in ("protoclip_curves.png", "protoclip_features.png"):
        assert (Path(cfg.report).parent / name).stat().st_size > 10_000

    # A second evaluation reads what the first has kept
    monkeypatch.setattr(evaluation, "evaluate_run", lambda *_: pytest.fail("evaluated twice"))
    evaluation.main(cfg)


def test_the_pretrained_tower_is_a_bar_for_its_own_arms_alone():
    floors = {floor.name: floor.arms for floor in study.FLOORS}
    assert floors["nearest neighbour on EfficientNet-Lite0"] == study.LITE0 and floors["chance"] == ()
    arms = {arm.name: arm for arm in study.ARMS}
    assert not any(arms[name].core for name in study.LITE0)
    both = [claim for claim in study.CLAIMS if {claim.method, claim.baseline} & set(study.LITE0)]
    assert both and all((claim.method, claim.baseline) == study.LITE0 and not claim.primary for claim in both)


def test_report_refuses_uneven_seeds(cfg: evaluation.Config):
    with pytest.raises(ValueError, match=r"arm protoclip has seeds \[0\], but clip has \[0, 1\]"):
        study.STUDY.compare(list(cfg.runs[:3]), [{"seconds": 1.0}] * 3, Path(cfg.report))
    with pytest.raises(ValueError, match="ARM-seedN"):
        study.STUDY.compare(["runs/other"], [{}], Path(cfg.report))
