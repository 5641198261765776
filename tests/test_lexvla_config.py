"""Presets, dry runs and settings that are refused before a run starts."""

import dataclasses
import re
import shutil
from pathlib import Path

import pytest
from lexvla_runs import backbone, lm, states, tiny  # noqa: F401
from scripts import SHARDS

from lexvla import config, plan

SCRIPT = "lexvla.train"


@pytest.mark.parametrize("preset", config.PRESETS)
def test_dry_run(in_process, preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)  # where there are neither data nor weights
    result = in_process(preset, "--dry-run")
    assert result.code == 0 and result.err == "" and not list(tmp_path.iterdir()), result.err
    cfg = config.PRESETS[preset][1]
    if preset.startswith("cc12m"):
        assert re.search(r"^steps +17,964 \(1,497 an epoch\)", result.out, re.MULTILINE)
        assert "lr 5.00e-04" in result.out and "lambda_text 1.00e-03" in result.out
        trained = int(re.search(r"parameters +([\d,]+) trained", result.out)[1].replace(",", ""))
        lora = 0 if cfg.text == "bow" else 19_988_480
        assert trained == 17_149 * 4096 + 17_055_488 + lora + 1
    if cfg.lm == config.SMOLLM2 and cfg.text != "bow":
        assert 1.3e8 < int(re.search(r"([\d,]+) frozen", result.out)[1].replace(",", "")) < 3e8
    assert float(re.search(r"memory estimate +([\d.]+) GiB", result.out)[1]) > 0
    assert all(word in result.out for word in ("samples", "batch", "vocabulary"))


def test_a_dry_run_counts_your_own_captions(in_process, tmp_path: Path):
    shutil.copy(SHARDS / "00000.tar", tmp_path / "mine.tar")  # 1,000
    result = in_process("small", "--data", tmp_path / "mine.tar", "--epochs", 2, "--dry-run")
    assert result.code == 0 and re.search(r"^steps +14\b", result.out, re.M), (result.out, result.err)
    assert "100 of 14 steps" in result.out  # of warm-up


A100_40GB = 40e9 / 2**30


@pytest.mark.parametrize("preset", [name for name in config.PRESETS if name.startswith("cc12m")])
def test_paper_presets_fit_the_machines_that_they_name(preset: str):
    cfg = config.PRESETS[preset][1]  # for the GPUs that cc12m's row names
    model, lm = plan.model_without_weights(cfg, cfg.max_vocabulary)

    def gib(accumulate: int) -> float:
        changed = dataclasses.replace(cfg, accumulate=accumulate)
        return sum(plan.memory(changed, cfg.batch_size // 8, model, lm, cfg.max_vocabulary))

    assert cfg.batch_size % (8 * cfg.accumulate) == 0
    assert gib(cfg.accumulate) < 0.9 * A100_40GB  # the rest is for what the estimate leaves out
    if cfg.accumulate > 1:
        assert gib(1) > A100_40GB and gib(cfg.accumulate // 2) > 0.9 * A100_40GB
