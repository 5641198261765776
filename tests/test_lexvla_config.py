"""Presets, dry runs and settings that are refused before a run starts."""

import dataclasses
import re
from pathlib import Path

import pytest
from lexvla_runs import backbone, lm, states, tiny  # noqa: F401
from scripts import SHARDS, one_sentence

from lexvla import config, lite0, plan

SCRIPT = "lexvla.train"

ERRORS = {
    "paper preset without data": (["cc12m"], "--data is missing"),
    "missing shard": (["emoji", "--data", "/nowhere/{0..3}.tar"], "/nowhere/0.tar does not exist"),
    "states of another LM": (["emoji", "--max-length", "64"], "max_length 128"),
    "unknown LM": (["emoji", "--lm", "/nowhere"], "--lm /nowhere"),
    "unknown backbone": (["emoji", "--backbone", "vit_nothing"], "--backbone vit_nothing"),
    "no patches": (["emoji", "--image-size", "4"], "--image-size 4"),
    "half patches": (
        ["emoji", "--backbone", lite0.NAME, "--image-size", "20"],
        "multiples of 32",
    ),
    "no width": (["emoji", "--adapter-width", "0"], "--adapter-width must be at least 1"),
    "less than a batch": (["emoji", "--batch-size", "161"], "batch of 161"),
    "no steps between logs": (["emoji", "--log-every", "0"], "--log-every must be at least 1"),
    "negative weight": (["emoji", "--lambda-text", "-1"], "--lambda-text must be at least 0"),
    "bias that is no number": (["cc12m", "--dry-run", "--bias", "nan"], "--bias must be finite"),
    "no epsilon to plan": (["cc12m", "--dry-run", "--eps", "0"], "--eps must be above 0"),
    "a stream of tokens": (["emoji", "--dry-run", "--stream"], "--encode-once, --states"),
    "tokens and pixels": (["emoji", "--keep-in-memory"], "--encode-once keeps tokens"),
    "no word left": (["emoji", "--min-count", "9999"], "0 pieces"),
    "bad pattern": (["emoji", "--pattern", "["], "regular expression"),
    "no vocabulary": (["emoji", "--max-vocabulary", "-1"], "--max-vocabulary must be at least 2"),
    "no micro-batches": (["cc12m", "--dry-run", "--accumulate", "0"], "--accumulate must be at least 1"),
    "uneven micro-batches": (["cc12m", "--dry-run", "--batch-size", "6145"], "--batch-size 6145 cannot be divided"),
    "no pixels": (["cc12m", "--data", f"{SHARDS}/00000.tar", "--image-size", "0"], "--image-size must be at least 1"),
    "fp16 on a CPU": (["emoji", "--precision", "fp16", "--device", "cpu"], "fp16 needs a GPU"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_command_line_errors(in_process, tmp_path: Path, tiny: list[str], case: str):
    (preset, *options), message = ERRORS[case]
    defaults = tiny if preset.startswith("emoji") else []
    result = in_process(preset, *defaults, "--out", tmp_path / "run", *options)
    assert result.code == 2 and message in result.err and one_sentence(result.err), result.err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


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
    assert float(re.search(r"memory estimate +([\d.]+) GiB", result.out)[1]) > 0
    assert all(word in result.out for word in ("samples", "batch", "vocabulary"))


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
