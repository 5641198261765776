"""python -m studies.attentive_mask_clip_timing: alternating arms, ratios to CLIP, and refused names."""

import json
from pathlib import Path

from scripts import finished, one_sentence
from test_attentive_mask_clip_train import SECONDS, folder  # noqa: F401

from studies import attentive_mask_clip_timing as timing

SCRIPT = "studies.attentive_mask_clip_timing"


def test_timing_script(cli, folder: Path):
    out = folder / "times.json"
    command = ["--arms", "aclip", "aclip-eff", "slip", "--batch-size", "4", "--rounds", "2", "--out", out]
    result = finished(cli(*command))
    times = json.loads(out.read_text())
    assert list(times) == ["clip", "aclip", "aclip-eff", "slip"] and times["clip"]["ratio"] == 1
    assert all(t["low"] <= t["ratio"] <= t["high"] and t["seconds"] > 0 for t in times.values())
    assert all(ratio in result.out for ratio in timing.PAPER.values())
    again = finished(cli(*command))
    assert "exists" in again.out and json.loads(out.read_text()) == times


def test_a_file_of_fewer_rounds_is_replaced(tmp_path: Path, monkeypatch):
    out, step = tmp_path / "times.json", {"seconds": 1.0, "ratio": 1.0, "low": 1.0, "high": 1.0}
    monkeypatch.setattr(timing, "step_times", lambda cfg: {"clip": step | {"rounds": [1.0] * cfg.rounds}})
    for earlier in ({"clip": step}, {"clip": step | {"rounds": [1.0]}}):
        out.write_text(json.dumps(earlier))
        timing.main(timing.Config(rounds=2, out=str(out)))
        assert json.loads(out.read_text())["clip"]["rounds"] == [1.0, 1.0]


def test_timing_refuses_unknown_names(in_process):
    for flag, message in {"--arms": "--arms takes clip, random", "--model": "--model is one of vit_s16"}.items():
        result = in_process(flag, "other")
        assert result.code == 2 and message in result.err and one_sentence(result.err)
