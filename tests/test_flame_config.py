"""Presets, dry runs and settings that are refused before a run starts."""

import ast
import dataclasses
import re
from pathlib import Path

import pytest
import torch
from scripts import one_sentence
from test_flame_train import (  # noqa: F401
    EVAL,
    SCRIPT,
    SECONDS,
    SHARDS,
    bank,
    captions,
    embed_flags,
    folder,
    tiny,
    tiny_llm,
)

from flame import config, embed
from flame.model import create_model
from shared import data

ERRORS = {
    "paper preset without data": (["cc3m-vitb16"], "--data is missing: it takes image-text shards"),
    "paper preset without bank": (["cc3m-vitb16", "--data", f"{SHARDS}/00000.tar"], "--bank is missing"),
    "missing shard": (["emoji", "--data", "/nowhere/{0..3}.tar"], "shard /nowhere/0.tar does not exist"),
    "missing bank": (["emoji", "--bank", "/nowhere"], "no bank of caption embeddings at /nowhere"),
    "bank of other data": (["emoji", "--data", f"{SHARDS}/00001.tar"], "has no embeddings of sample"),
    "no caption file": (["emoji-clip", "--captions", "no.json"], "caption file no.json does not exist"),
    "unknown model": (["emoji", "--model", "RN50"], "--model is one of ViT-B-16"),
    "image that patches do not tile": (["emoji", "--image-size", "41"], "patches of 8 pixels do not tile"),
    "too many facets": (["emoji", "--facet-ids", "0", "1", "--facets", "3"], "--facets 3 cannot be drawn from 2"),
    "facets beyond the bank": (["emoji", "--facet-ids", "11", "--facets", "1"], "has 11 facets an image"),
    "facets twice": (["emoji", "--facet-ids", "1", "1", "--facets", "1"], "should be different numbers"),
    "cooldown without its schedule": (["emoji", "--cooldown", "5"], "must be passed together"),
    "less than a batch": (["emoji", "--batch-size", "161"], "less than one batch of 161"),
    "no steps between logs": (["emoji", "--log-every", "0"], "--log-every must be at least 1"),
    "fp16 on a CPU": (["emoji", "--precision", "fp16", "--device", "cpu"], "fp16 needs a GPU"),
    "no learning": (["emoji", "--lr", "0"], "--lr must be above 0"),
    "no width": (["emoji", "--hidden-dim", "0"], "--hidden-dim must be at least 1, not 0"),
    "negative decay": (["emoji", "--weight-decay", "-1"], "--weight-decay must be at least 0"),
    "scale beyond its clamp": (["emoji", "--logit-scale", "1000"], "--logit-scale must be in 1..100"),
    "bias that is no number": (["emoji", "--dry-run", "--logit-bias", "nan"], "--logit-bias must be finite, not nan"),
    "no decay to plan": (["emoji", "--dry-run", "--eps", "nan"], "--eps must be at least 0, not nan"),
    "negative window": (["emoji", "--dry-run", "--window-shards", "-1"], "--window-shards must be at least 0, not -1"),
    "negative size": (["emoji", "--dataset-size", "-3"], "--dataset-size must be at least 1"),
    "no text layers": (["emoji-clip", "--text-layers", "0"], "--text-layers must be at least 1"),
    "no room for a word": (["emoji-clip", "--max-length", "2"], "--max-length must be at least 3"),
    "cooldown beyond the run": (
        ["emoji", "--schedule", "const-cooldown", "--cooldown", "16"],
        "--cooldown 16 is longer than the 15 steps",
    ),
    "curve of a retrieval set": (
        ["emoji-clip", "--eval-every", "1", "--eval-set", EVAL / "retrieval_ood"],
        "is a retrieval set, but a classification set is needed",
    ),
    "curve of texts that are not embedded": (
        ["emoji", "--eval-every", "1", "--eval-set", EVAL / "subgroups_ood"],
        "the texts of this evaluation set are not embedded",
    ),
    "locked tower without weights": (["emoji", "--lock-image"], "--lock-image has weights of EfficientNet-Lite0 only"),
    "distinct captions one by one": (["emoji", "--distinct-captions"], "--distinct-captions needs --keep-in-memory"),
    "no evaluation set": (["emoji", "--eval-every", "1", "--eval-set", "/nowhere"], "/nowhere does not exist"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_command_line_errors(in_process, tiny: list, tmp_path: Path, case: str):
    (preset, *options), message = ERRORS[case]
    defaults = tiny if preset.startswith("emoji") else ["--precision", "fp32"]
    result = in_process(preset, *defaults, "--out", tmp_path / "run", *options)
    assert result.code == 2 and message in result.err and one_sentence(result.err), result.err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_help_documents_every_field(in_process):
    for module in (config, embed):
        tree = ast.parse(Path(module.__file__).read_text())
        fields = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Config").body
        documented = 0
        for field, text in zip(fields, [*fields[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign):
                assert isinstance(text, ast.Expr), f"{field.target.id} has no docstring"
                documented += 1
        assert documented == len(dataclasses.fields(module.Config))
    result = in_process("emoji", "--help")
    assert result.code == 0 and "--bank" in result.out


@pytest.mark.parametrize("preset", ["emoji", "emoji-clip", "emoji-lite0", "emoji-resnet-clip", "cc3m-vitb16"])
def test_dry_run(in_process, preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)  # where there is no data
    result = in_process(preset, "--dry-run")
    assert result.code == 0 and not list(tmp_path.iterdir()), result.err
    words = ("parameters", "learning rate", "samples", "batch", "steps")
    assert all(word in result.out for word in words)
    assert float(re.search(r"memory estimate +([\d.]+) GiB", result.out)[1]) > 0
    if preset == "cc3m-vitb16":
        assert "steps              30,240 (945 an epoch)" in result.out and "327.3 GB" in result.out
        assert re.search(r"learning rate +5.000e-04 at step 2,000", result.out)
    if preset == "emoji-lite0":
        assert re.search(r"samples +7,146 an epoch", result.out) and "540 (27 an epoch)" in result.out


def test_dry_run_counts_the_samples_of_the_data(in_process, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Those of --data, if it is there; otherwise only the memory of a step is known."""
    for preset in ("emoji-lite0", "emoji"):
        corpus = config.PRESETS[preset][1].data
        assert not Path(corpus).is_dir() or len(data.open_pairs(corpus)) == config.SIZES[corpus]
    monkeypatch.chdir(tmp_path)
    result = in_process("small", "--dry-run", "--data", "absent")
    assert result.code == 0 and re.search("^samples +all of --data$", result.out, re.MULTILINE)
    assert "steps" not in result.out and "memory estimate" in result.out


def test_presets_are_the_published_settings():
    cfg = config.PRESETS["cc3m-vitb16"][1]
    assert (cfg.lr, cfg.beta1, cfg.beta2, cfg.eps, cfg.weight_decay) == (5e-4, 0.9, 0.95, 1e-8, 0.5)
    assert (cfg.batch_size, cfg.epochs, cfg.warmup, cfg.facets, cfg.crop_scale) == (3072, 32, 2000, 6, 0.9)
    assert (cfg.model, cfg.hidden_dim, cfg.dataset_size) == ("ViT-B-16", None, 2_905_954)
    assert (cfg.logit_scale, cfg.logit_bias) == (10, -10)
    with torch.device("meta"):
        nce = create_model(config.PRESETS["cc3m-vitb16-nce"][1], 8)
    assert nce.logit_bias is None and config.PRESETS["cc3m-vitb16-nce"][1].logit_scale == 1 / 0.07


def test_rows_of_presets_claim_no_table_that_was_not_read():
    for script, rows in config.PAPER_ROWS.items():
        for preset, row in rows.items():
            words = row.source.lower()
            assert "table" not in words and "ablation" not in words, (script, preset)
