"""The start of the codebook."""

import dataclasses

import pytest
import torch
from tldr_reduction_runs import folder, tiny  # noqa: F401

from shared import run
from shared.run import stable_hash
from tldr_reduction import codebook, config
from tldr_reduction.datasets import open_pairs
from tldr_reduction.model import build

SCRIPT = "tldr_reduction.train"


def test_keyword_start(folder, monkeypatch, tiny):
    """The paper's codebook: embedded keywords, scaled to the tokens' mean and variance; equal on every call."""

    def embed(texts: list[str]) -> torch.Tensor:  # a different vector for every text
        seeds = [torch.Generator().manual_seed(stable_hash(text)) for text in texts]
        return torch.stack([torch.randn(16, generator=seed) for seed in seeds])

    monkeypatch.setattr(codebook, "text_embedder", lambda name, dim: embed)
    sizes = dict(image_size=16, patch_size=8, width=32, layers=1, heads=2, text_width=32, text_layers=1, text_heads=2)
    sizes |= dict(code_dim=16, num_codes=24, codebook_init="keywords")
    cfg = dataclasses.replace(
        config.PRESETS["small-captioner"][1], data=str(folder / "pool"), vocab=str(folder / "vocab.txt"), **sizes
    )
    pairs, weights, process = open_pairs(cfg.data), [], run.Process(0, 1, torch.device("cpu"))
    for _ in range(2):
        torch.manual_seed(0)
        model = build(cfg, 300)
        codebook.start_codebook(model, cfg, pairs, process)
        weights.append(model.quantize.embedding.weight.detach().clone())
    assert torch.equal(*weights)
    assert 0.3 < weights[0].std() < 3
    (folder / "tags.txt").write_text("".join(f"tag {i}\n" for i in range(24)))
    for other in (dict(keywords=str(folder / "tags.txt")), dict(codebook_init="xavier")):
        codebook.start_codebook(model, dataclasses.replace(cfg, **other), pairs, process)
        assert not torch.equal(model.quantize.embedding.weight, weights[0])
    assert model.quantize.embedding.weight.abs().max() <= (6 / (24 + 16)) ** 0.5
    short = dataclasses.replace(cfg, keywords=str(folder / "tags.txt"), num_codes=25)
    with pytest.raises(ValueError, match="--num-codes 25"):
        short.check(1)
