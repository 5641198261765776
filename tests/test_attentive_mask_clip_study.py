"""The study: arms and their commands, compared and reported."""

import json
from pathlib import Path

import pytest
import torch
import tyro
from test_attentive_mask_clip_train import ARMS

from attentive_mask_clip import config, study, timing
from attentive_mask_clip import eval as evaluation
from shared.study.report import Comparison


def test_the_report_has_what_the_study_declares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """`eval --report --times` of two arms, as the study runs it, with measurements that are given."""
    report, times = tmp_path / "report/results.json", tmp_path / "times.json"
    step = {"seconds": 2.0, "ratio": 1.5, "low": 1.25, "high": 2.0}
    times.write_text(json.dumps({"clip": step | {"ratio": 1.0}, "aclip": step}))
    runs = [str(tmp_path / f"{arm}-seed0") for arm in ("aclip", "clip")]
    for run in map(Path, runs):
        run.mkdir()
        torch.save({"epoch": 2, "config": {"epochs": 2}, "commit": "abc"}, run / "checkpoint.pt")
        lines = [{"step": n, "seconds": n / 2, "zero_shot_top1": n / 4} for n in (3, 6)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "aclip-seed0/kept.png").write_bytes(b"picture")
    given = dict.fromkeys([*evaluation.METRICS, "kept/untrained_share"], 2.0)
    monkeypatch.setattr(evaluation, "evaluated", lambda path, *_: given | {"names_ood/top1": 2.0 + ("aclip" in path)})
    evaluation.main(evaluation.Config(runs=tuple(runs), times=str(times), report=str(report), device="cpu"))
    found, shown = json.loads(report.read_text()), capsys.readouterr().out
    assert list(found["arms"]) == ["clip", "aclip"] and set(found["arms"]["clip"]) == set(given)
    claims = {row["claim"]: row for row in found["claims"]}
    expected = {claim.claim for claim in study.CLAIMS if {claim.method, claim.baseline} == {"clip", "aclip"}}
    assert expected and expected == set(claims) & {claim.claim for claim in study.CLAIMS}
    assert claims["A-CLIP above CLIP"]["here"] == "+1.00"
    time = claims["step time of A-CLIP / CLIP's"]
    assert (time["paper"], time["here"]) == ("1.16x", "1.50x (1.25-2.00)") and str(report) in shown
    pictures = {"attentive_mask_clip_curves.png", "attentive_mask_clip_kept.png"}
    assert {path.name for path in report.parent.iterdir()} == pictures | {"results.json", "results_packages.txt"}
    assert (report.parent / "attentive_mask_clip_kept.png").read_bytes() == b"picture"


def test_rows_of_an_arm_compare_measurements_of_the_same_run():
    kept = {"kept/attentive_share": 90.0, "kept/random_share": 75.0, "kept/centre_share": 90.0}
    run = kept | {"kept/untrained_share": 92.0, "names_ood/top1": 3.0, "online/names_ood/top1": 2.5}
    rows = {row["claim"]: row for row in study.more_rows(Comparison({"aclip": [run]}, [0], {}, set(), {}))}
    here = {
        claim.removeprefix("aclip: kept patches hold more foreground than "): r["here"] for claim, r in rows.items()
    }
    assert (here["random ones"], here["the centre's"], here["before training"]) == ("+15.00", "+0.00", "-2.00")
    assert here["A-CLIP: EMA towers above online"] == "+0.50"
    assert not any("step time" in claim for claim in rows)  # none were measured


def test_the_arms_of_the_study_are_those_that_are_timed():
    for arm in study.STUDY.chosen("all"):
        words = arm.command.removeprefix("train ").split()
        assert words == (["emoji", "--ema-image-size", "20"] if arm.name == "aclip-eff" else ARMS[arm.name])
        cfg = tyro.extras.overridable_config_cli(config.PRESETS, args=words)
        assert all(getattr(cfg, name) == value for name, value in timing.ARMS[arm.name].items()), arm.name
