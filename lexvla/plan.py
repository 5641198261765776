"""`--dry-run`: sizes, schedule and a memory estimate of a run, without data and weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lexvla.config import SMOLLM2, Config
from lexvla.model import LexVLA
from lexvla.towers import create_model, patch_side
from shared import cli, data, run

SMOLLM2_SIZES = dict(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
)


def show(cfg: Config, process: run.Process, rates: Callable[[Config, int, int], dict[str, float]]) -> None:
    """Print the plan of a run; `rates(cfg, step, total)` has the learning rate and the weights of the penalties."""
    if not process.main:
        return
    words = cfg.max_vocabulary or 2_000
    model, lm = model_without_weights(cfg, words)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters()) - trained
    per_epoch = data.planned_size(cfg) // cfg.batch_size
    total = per_epoch * cfg.epochs
    steps = f"{total:,} ({per_epoch:,} an epoch)" if total else "depend on the size of --data"
    note = run.long_warmup(cfg.warmup, total)
    at = sorted({0, cfg.warmup, cfg.penalty_warmup, total // 2, total - 1})
    weights, image, text, s = memory(cfg, cfg.batch_size // process.world_size, model, lm, words)
    cli.show_plan(
        [
            ("parameters", f"{trained:,} trained, {frozen:,} frozen"),
            ("vocabulary", f"{words:,} at most" if cfg.max_vocabulary else f"about {words:,}, from the captions"),
            ("samples", f"{cfg.dataset_size:,} an epoch" if cfg.dataset_size else "all"),
            cli.disk_row(cfg.dataset_size, trained),
            cli.batch_row(cfg, process.world_size),
            ("steps", steps),
            *(("rates", described(rates(cfg, step, total), step)) for step in at if 0 <= step < total),
            cli.first_loss_row(cfg.batch_size),
            ("memory estimate", f"{weights + image + text + s:.1f} GiB a process: {weights:.1f} weights and Adam,"),
            ("", f"{image:.1f} image tokens, {text:.1f} language model (prompts of {cfg.max_length} tokens),"),
            ("", f"{s:.1f} representations"),
            *([("note", note)] if note else []),
        ]
    )


def described(rates: dict[str, float], step: int) -> str:
    return ", ".join(f"{name} {rate:.2e}" for name, rate in rates.items()) + f" at step {step:,}"


def model_without_weights(cfg: Config, words: int) -> tuple[LexVLA, Any]:
    """(the model on the meta device, the LM's configuration). An LM that is not here has the sizes of Llama 2 7B."""
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

    sizes = SMOLLM2_SIZES if cfg.lm == SMOLLM2 else {}
    about = AutoConfig.from_pretrained(cfg.lm) if Path(cfg.lm).is_dir() else LlamaConfig(**sizes)
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(about)
        model = create_model(cfg, lm, torch.arange(words), cfg.bias or 0.0, pretrained=False)
    return model, lm.config


def memory(cfg: Config, size: int, model: LexVLA, lm: Any, words: int) -> tuple[float, ...]:
    """GiB of (weights with Adam, image tokens, language model, representations) in one process, in bf16.

    size: pairs per process; lm: the LM's configuration; words: V.
    """
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters()) - trained
    gib, d, blocks = 2**30, lm.hidden_size, lm.num_hidden_layers
    D, tokens = model.image.adapter.proj.fc1.in_features, (cfg.image_size // patch_side(model.image.backbone)) ** 2 + 1
    weights = (16 * trained + 2 * frozen) / gib
    micro = size / cfg.accumulate
    cached = size if cfg.accumulate > 1 else 0  # pairs whose representations and gradients all micro-batches keep
    image = micro * tokens * (34 * D + 4 * d) / gib  # 34 D: a block's tokens in bf16
    s = (20 * micro + 16 * cached + 24 * cfg.batch_size) * words / gib
    text = micro * cfg.max_length * d * (2 * blocks + 34 if cfg.grad_checkpointing else 34 * blocks) / gib
    return weights, image, 0.0 if cfg.states or cfg.text == "bow" else text, s
