"""Presets, dry runs and settings that are refused before a run starts."""

import dataclasses
import re
from pathlib import Path

import pytest
from scripts import one_sentence
from test_lexvla_train import SCRIPT, SECONDS, SHARDS, backbone, folder, lm, states, tiny  # noqa: F401
from transformers import AutoTokenizer

from lexvla import config, train
from lexvla.model import lexical_prompt
from shared import data

ERRORS = {
    "paper preset without data": (["cc12m"], "--data is missing: it takes image-text shards"),
    "missing shard": (["emoji", "--data", "/nowhere/{0..3}.tar"], "shard /nowhere/0.tar does not exist"),
    "missing states": (["emoji", "--states", "no.pt"], "--states no.pt does not exist"),
    "states of another LM": (["emoji", "--max-length", "64"], "was made with max_length 128"),
    "unknown LM": (["emoji", "--lm", "/nowhere"], "--lm /nowhere is no folder or hub name"),
    "unknown backbone": (["emoji", "--backbone", "vit_nothing"], "--backbone vit_nothing could not be loaded"),
    "no patches": (["emoji", "--image-size", "4"], "--image-size 4 is below the 8 pixels of a patch of"),
    "half patches": (
        ["emoji", "--backbone", config.LITE0, "--image-size", "20"],
        "--image-size 20 is no multiple of 32",
    ),
    "no width": (["emoji", "--adapter-width", "0"], "--adapter-width must be at least 1"),
    "less than a batch": (["emoji", "--batch-size", "161"], "holds 160 pairs, less than one batch of 161"),
    "no steps between logs": (["emoji", "--log-every", "0"], "--log-every must be at least 1"),
    "negative weight": (["emoji", "--lambda-text", "-1"], "--lambda-text must be at least 0"),
    "bias that is no number": (["cc12m", "--dry-run", "--bias", "nan"], "--bias must be finite, not nan"),
    "no decay to plan": (["cc12m", "--dry-run", "--beta2", "1"], "--beta2 must be below 1, not 1"),
    "negative window": (["cc12m", "--dry-run", "--window-shards", "-1"], "--window-shards must be at least 0, not -1"),
    "too large a crop": (["emoji", "--crop-scale", "2"], "--crop-scale must be above 0"),
    "no word left": (["emoji", "--min-count", "9999"], "0 pieces of the vocabulary are left"),
    "bad pattern": (["emoji", "--pattern", "["], "is no regular expression"),
    "words without an LM": (["emoji-bow"], "--text bow has no LM"),
    "bias of bags": (["emoji-bow", "--states", "", "--bias", "None"], "--text bow has no logits"),
    "no vocabulary": (["emoji", "--max-vocabulary", "-1"], "--max-vocabulary must be at least 2"),
    "no micro-batches": (["cc12m", "--dry-run", "--accumulate", "0"], "--accumulate must be at least 1"),
    "uneven micro-batches": (["cc12m", "--dry-run", "--batch-size", "6145"], "--batch-size 6145 cannot be divided"),
    "no pixels": (["cc12m", "--data", f"{SHARDS}/00000.tar", "--image-size", "0"], "--image-size must be at least 1"),
    "penalty of nothing": (["emoji-dense", "--penalty", "flops"], "--head dense has no words to penalise"),
    "fp16 on a CPU": (["emoji", "--precision", "fp16", "--device", "cpu"], "fp16 needs a GPU"),
    "no evaluation set": (["emoji", "--eval-every", "1", "--eval-set", "/nowhere"], "--eval-set /nowhere does not"),
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
    options = ["--data", f"{SHARDS}/00000.tar"] if preset.startswith(("emoji", "small")) else []
    result = in_process(preset, "--dry-run", *options)
    assert result.code == 0 and result.err == "" and not list(tmp_path.iterdir()), result.err
    cfg = config.PRESETS[preset][1]
    if preset.startswith("cc12m"):
        assert re.search(r"^steps +17,964 \(1,497 an epoch\)", result.out, re.MULTILINE)
        trained = int(re.search(r"parameters +([\d,]+) trained", result.out)[1].replace(",", ""))
        lora = 0 if cfg.text == "bow" else 19_988_480
        assert trained == 17_149 * 4096 + 17_055_488 + lora + 1
    assert float(re.search(r"memory estimate +([\d.]+) GiB", result.out)[1]) > 0
    assert all(word in result.out for word in ("learning rate", "samples", "batch", "vocabulary"))


A100_40GB = 40e9 / 2**30


@pytest.mark.parametrize("preset", [name for name in config.PRESETS if name.startswith("cc12m")])
def test_paper_presets_fit_the_machines_that_they_name(preset: str):
    assert config.PAPER_ROWS["train"][preset].gpus == "8 x A100 40 GB"
    cfg = config.PRESETS[preset][1]
    model, lm = train.model_without_weights(cfg, cfg.max_vocabulary)

    def gib(accumulate: int) -> float:
        changed = dataclasses.replace(cfg, accumulate=accumulate)
        config.check_model(changed)
        return sum(train.memory(changed, cfg.batch_size // 8, model, lm, cfg.max_vocabulary))

    assert cfg.batch_size % (8 * cfg.accumulate) == 0
    assert gib(cfg.accumulate) < 0.9 * A100_40GB  # the rest is for what the estimate leaves out
    if cfg.accumulate > 1:
        assert gib(1) > A100_40GB and gib(cfg.accumulate // 2) > 0.9 * A100_40GB


def test_the_estimate_takes_prompts_as_long_as_they_are(in_process, lm: Path, folder: Path):
    """If the LM's tokenizer and the data are available; otherwise the estimate takes --max-length."""
    options = ["--data", f"{SHARDS}/00000.tar", "--dry-run", "--states", "", "--bias", "0"]
    known, unknown = (in_process("emoji", *options, "--lm", name) for name in (lm, "/nowhere/lm"))
    mean, longest = map(int, re.search(r"prompts +(\d+) tokens on average, the longest (\d+)", known.out).groups())
    pairs, tokenizer = data.open_pairs(f"{SHARDS}/00000.tar"), AutoTokenizer.from_pretrained(lm)
    lengths = [len(tokenizer(lexical_prompt(pairs.caption(row)))["input_ids"]) for row in range(len(pairs))]
    assert longest == min(max(lengths), 128) and mean == round(sum(min(n, 128) for n in lengths) / len(lengths))
    assert re.search(r"prompts +128 tokens, by --max-length", unknown.out), unknown.err
    cfg = config.PRESETS["cc12m"][1]
    model, about = train.model_without_weights(cfg, 100)
    short, long = (train.memory(cfg, 96, model, about, 100, length)[2] for length in (64, None))
    assert long == 2 * short
