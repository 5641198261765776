"""Presets, dry runs and settings that are refused before a run starts."""

import re
from pathlib import Path

import pytest

from protoclip import config, train

SCRIPT = "protoclip.train"


DRY_RUNS = {  # parameters, steps
    "small": (None, None),  # no published numbers
    "small-clip": (None, None),
    "emoji": (None, None),
    "emoji-clip": (None, None),
    "cc3m-rn50": ("106.7", 156_400),
    "cc3m-rn50-clip": ("102.0", 156_256),
    "cc3m-rn50-clip-light": ("102.0", 156_256),
    "cc3m-rn50-1gpu": ("106.7", 312_500),
    "cc3m-rn50-1gpu-clip": ("102.0", 312_504),
}


@pytest.mark.parametrize("preset", train.PRESETS)
@pytest.mark.usefixtures("no_initial_values")
def test_dry_run(in_process, preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)  # where there is no data
    parameters, steps = DRY_RUNS[preset]
    cfg = config.PRESETS[preset][1]
    result = in_process(preset, "--dry-run")
    assert result.code == 0 and result.err == "" and not list(tmp_path.iterdir())
    total = int(re.search(r"parameters +([\d,]+) trained", result.out)[1].replace(",", ""))
    assert parameters is None or f"{total / 1e6:.1f}" == parameters
    assert re.search(rf"^steps +{steps or cfg.episodes * cfg.steps_per_episode:,}$", result.out, re.MULTILINE)
    assert float(re.search(r"memory estimate +([\d.]+) GiB", result.out)[1]) > 0
