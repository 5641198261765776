"""python -m studies.attentive_mask_clip_timing: alternating arms, ratios to CLIP, and refused names."""

import json
from pathlib import Path

import pytest
from scripts import finished, one_sentence

from studies import attentive_mask_clip_timing as timing

SCRIPT = "studies.attentive_mask_clip_timing"


def test_timing_script(cli, folder: Path):
    out = folder / "times.json"
    command = ["--model", "emoji", "--batch-size", "4", "--rounds", "2", "--out", out]
    result = finished(cli(*command))
    times = json.loads(out.read_text())
    assert list(times) == ["clip", "slip", "aclip", "aclip-eff"] and times["clip"]["ratio"] == 1
    assert all(t["low"] <= t["ratio"] <= t["high"] and t["seconds"] > 0 for t in times.values())
    assert all(ratio in result.out for ratio in timing.PAPER.values())
    again = finished(cli(*command))
    assert "exists" in again.out and json.loads(out.read_text()) == times


def test_operations_of_a_step():
    """CLIP's, by hand: a forward and two backward products; pixels need no gradient. A-CLIP-eff needs the fewest."""
    shape = timing.MODELS["emoji"]
    D, W, E, T = (shape[name] for name in ("vision_width", "text_width", "embed_dim", "context_length"))
    patches = (shape["image_size"] // shape["patch_size"]) ** 2
    L, pixels = 1 + patches, 3 * shape["patch_size"] ** 2
    block = lambda tokens, width: 2 * 12 * width**2 * tokens + 4 * tokens**2 * width  # noqa: E731
    last = 2 * 2 * D**2 * L + 2 * 10 * D**2 + 4 * L * D  # keys and values of all tokens, the rest of [CLS] alone
    towers = (shape["vision_layers"] - 1) * block(L, D) + last + shape["text_layers"] * block(T, W) + 2 * (D + W) * E
    found = timing.step_times(timing.Config(model="emoji", batch_size=4, rounds=1, device="cpu"))
    assert found["clip"]["flops"] == pytest.approx(3 * towers + 2 * 2 * D * pixels * patches, rel=1e-3)
    ratios = [found[arm]["flops"] / found["clip"]["flops"] for arm in ("slip", "aclip", "aclip-eff")]
    assert ratios == sorted(ratios, reverse=True)


def test_a_file_of_another_geometry_is_replaced(tmp_path: Path, monkeypatch):
    out, step = tmp_path / "times.json", {"seconds": 1.0, "ratio": 1.0, "low": 1.0, "high": 1.0, "flops": 1.0}
    monkeypatch.setattr(timing, "step_times", lambda cfg: {"clip": step | {"timed": cfg.timed}})
    cfg = timing.Config(arms=("clip",), rounds=2, out=str(out))
    for earlier in ({"clip": step}, {"clip": step | {"timed": timing.Config(batch_size=3, rounds=2).timed}}):
        out.write_text(json.dumps(earlier))
        timing.main(cfg)
        assert json.loads(out.read_text())["clip"]["timed"] == cfg.timed


def test_timing_refuses_unknown_names(in_process):
    for flag, message in {"--arms": "--arms takes clip, random", "--model": "--model is one of vit_s16"}.items():
        result = in_process(flag, "other")
        assert result.code == 2 and message in result.err and one_sentence(result.err)
