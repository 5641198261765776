"""Presets, dry runs and settings that are refused before a run starts."""

import ast
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

from flame import config
from flame.model import create_model

ERRORS = {
    "paper preset without data": (["cc3m-vitb16"], "--data is missing: it takes image-text shards"),
    "paper preset without bank": (["cc3m-vitb16", "--data", f"{SHARDS}/00000.tar"], "--bank is missing"),
    "missing shard": (["emoji", "--data", "/nowhere/{0..3}.tar"], "shard /nowhere/0.tar does not exist"),
    "missing bank": (["emoji", "--bank", "/nowhere"], "/nowhere is no bank: make it with 'python -m flame.embed'"),
    "unknown model": (["emoji", "--model", "RN-1"], "'RN-1' is not an open_clip config"),
    "bank of other data": (["emoji", "--data", f"{SHARDS}/00001.tar"], "has no embeddings of sample"),
    "no caption file": (["emoji-clip", "--captions", "no.json"], "caption file no.json does not exist"),
    "image that patches do not tile": (["emoji", "--image-size", "41"], "patches of 8 pixels do not tile"),
    "too many facets": (["emoji", "--facet-ids", "0", "1", "--facets", "3"], "--facets 3 cannot be drawn from 2"),
    "facets beyond the bank": (["emoji", "--facet-ids", "11", "--facets", "1"], "has 11 facets an image"),
    "facets twice": (["emoji", "--facet-ids", "1", "1", "--facets", "1"], "should be different numbers"),
    "less than a batch": (["emoji", "--batch-size", "161"], "less than one batch of 161"),
    "no steps between logs": (["emoji", "--log-every", "0"], "--log-every must be at least 1"),
    "fp16 on a CPU": (["emoji", "--precision", "fp16", "--device", "cpu"], "fp16 needs a GPU"),
    "no learning": (["emoji", "--lr", "0"], "--lr must be above 0, not 0"),
    "no width": (["emoji", "--hidden-dim", "0"], "--hidden-dim must be at least 1, not 0"),
    "negative decay": (["emoji", "--weight-decay", "-1"], "--weight-decay must be at least 0"),
    "scale beyond its clamp": (["emoji", "--logit-scale", "1000"], "--logit-scale must be in 1..100"),
    "bias that is no number": (["emoji", "--dry-run", "--logit-bias", "nan"], "--logit-bias must be finite, not nan"),
    "no epsilon": (["emoji", "--dry-run", "--eps", "nan"], "--eps must be finite, not nan"),
    "negative size": (["emoji", "--dataset-size", "-3"], "--dataset-size must be at least 1"),
    "curve of a retrieval set": (
        ["emoji-clip", "--eval-every", "1", "--eval-set", EVAL / "retrieval_ood"],
        "is a retrieval set: it must be a classification set",
    ),
    "curve of texts that are not embedded": (
        ["emoji", "--eval-every", "1", "--eval-set", EVAL / "subgroups_ood"],
        "the texts of this evaluation set are not embedded",
    ),
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
    tree = ast.parse(Path(config.__file__).read_text())
    for name in ("Config", "EmbedConfig"):
        fields = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name).body
        for field, text in zip(fields, [*fields[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign):
                assert isinstance(text, ast.Expr), f"{field.target.id} has no docstring"
    result = in_process("emoji", "--help")
    assert result.code == 0 and "--bank" in result.out


@pytest.mark.parametrize("preset", ["emoji", "emoji-clip", "cc3m-vitb16"])
def test_dry_run(in_process, preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)  # where there is no data
    result = in_process(preset, "--dry-run")
    assert result.code == 0 and not list(tmp_path.iterdir()), result.err
    assert all(word in result.out for word in ("parameters", "samples", "batch", "steps"))
    assert float(re.search(r"memory estimate +([\d.]+) GiB", result.out)[1]) > 0
    if preset == "cc3m-vitb16":
        assert "steps              30,240" in result.out and "327.3 GB" in result.out
        assert re.search(r"learning rate +lr 5.000e-04 at step 2,000", result.out)


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
    for presets in config.SCRIPTS.values():
        for preset, (row, _) in presets.items():
            assert "table" not in row.lower() and "ablation" not in row.lower(), preset


def test_no_number_stands_beside_settings_that_are_not_published():
    """YFCC15M's are not: its rows name the figure alone."""
    for preset, (row, cfg) in config.PRESETS.items():
        if cfg.dataset_size == 15_061_521:
            assert "published" in row and not re.search(r"\d+\.\d", row), preset
