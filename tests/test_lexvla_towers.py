"""Towers by name: LoRA of a configuration, tokens of the frozen backbone."""

import dataclasses
from pathlib import Path

import pytest
import torch
from test_lexvla_train import SCRIPT, SECONDS, SHARDS, backbone, folder  # noqa: F401
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
)

from lexvla import config, towers, train
from lexvla.config import Config
from lexvla.model import (
    LoRALinear,
)
from lexvla.towers import with_lora
from shared import data


def tiny_lm(**sizes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    defaults = dict(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    return LlamaForCausalLM(LlamaConfig(**(defaults | sizes), num_key_value_heads=1)).eval()


def test_lora_targets_of_a_run():
    lm = with_lora(tiny_lm(), Config(lora_rank=2, lora_targets=("q_proj", "down_proj")))
    assert sum(isinstance(module, LoRALinear) for module in lm.modules()) == 4  # two layers in each of two blocks
    lm = with_lora(tiny_lm(), Config(lora_rank=2, lora_targets=("q_proj", "down_proj"), states="states.pt"))
    assert [name for name, m in lm.named_modules() if isinstance(m, LoRALinear)] == ["model.layers.1.mlp.down_proj"]
    for targets, sentence in (
        (("q_proj", "v_prj"), "--lora-targets v_prj: the LM's layers are down_proj, gate_proj"),
        (("q_proj", "lm_head"), "text codebook"),
    ):
        with pytest.raises(ValueError, match=sentence):
            with_lora(tiny_lm(), Config(lora_rank=2, lora_targets=targets))
    with pytest.raises(ValueError, match="none of q_proj"):
        with_lora(tiny_lm(), Config(lora_rank=2, lora_targets=("q_proj",), states="states.pt"))


def test_frozen_tokens_are_the_backbones(backbone: Path):
    cfg = dataclasses.replace(config.EMOJI, backbone=str(backbone), image_size=16)
    image = towers.create_image_encoder(cfg, torch.randn(40, 8), -1.0)
    pairs, cpu = data.open_pairs(f"{SHARDS}/00000.tar", 30), torch.device("cpu")
    transform = towers.eval_transform(cfg.backbone, 16)
    encoded = train.TokenDataset(pairs, transform, image, cpu, "fp32")
    pixels = torch.stack([transform(pairs.read(row).image) for row in range(30)])
    tokens = torch.stack([encoded[i][0] for i in range(30)])
    torch.testing.assert_close(tokens, image.frozen(pixels), rtol=1e-3, atol=1e-3)  # kept in half precision
    torch.testing.assert_close(image(tokens), image(pixels), rtol=1e-2, atol=1e-2)
    assert [encoded[i][1] for i in range(30)] == [pairs.caption(row) for row in range(30)]
