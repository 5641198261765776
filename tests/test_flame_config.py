"""Presets, dry runs and settings that are refused before a run starts."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from flame_runs import EVAL, bank, captions, embed_flags, tiny, tiny_llm  # noqa: F401
from scripts import SHARDS

from flame import config
from flame.model import create_model

SCRIPT = "flame.train"


@pytest.mark.parametrize("preset", ["emoji", "emoji-clip", "cc3m-vitb16"])
@pytest.mark.usefixtures("no_initial_values")
def test_dry_run(in_process, preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)  # where there is no data
    result = in_process(preset, "--dry-run")
    assert result.code == 0 and not list(tmp_path.iterdir()), result.err
    assert all(word in result.out for word in ("parameters", "samples", "batch", "steps"))
    assert float(re.search(r"memory estimate +([\d.]+) GiB", result.out)[1]) > 0
    if preset == "cc3m-vitb16":
        assert re.search(r"steps +30,240\b", result.out) and "327.3 GB" in result.out
        assert re.search(r"learning rate +lr 5.000e-04 at step 2,000", result.out)


def test_a_dry_run_counts_your_own_captions(in_process, tmp_path: Path):
    shutil.copy(SHARDS / "00000.tar", tmp_path / "mine.tar")  # 1,000
    result = in_process("small-clip", "--data", tmp_path / "mine.tar", "--epochs", 2, "--dry-run")
    assert result.code == 0 and re.search(r"^steps +14\b", result.out, re.M), (result.out, result.err)
    assert "100 of 14 steps" in result.out  # of warm-up


def test_the_nce_preset_has_no_bias():
    with torch.device("meta"):
        assert create_model(config.PRESETS["cc3m-vitb16-nce"][1], 8).logit_bias is None
