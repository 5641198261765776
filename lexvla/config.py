"""LexVLA's settings and presets.

Presets named cc12m* are the paper's (one setting and its ablations); `small` and `emoji*`, on the scenes of the study,
are ours.
"""

import dataclasses
import re
from typing import Literal

from shared import cli
from shared.errors import UserError
from shared.presets import EMBEDDED, OWN, Row

NO_EXPORT = "--export: open_clip has no towers that end in a vocabulary, as LexVLA's do"


@dataclasses.dataclass
class Config:
    """Defaults are the paper's; a field says so if the paper does not state its value."""

    data: str = ""
    """Shards in img2dataset layout ('cc12m/{00000..01242}.tar', several lists joined by '::', a folder), or a .tsv."""
    out: str = "runs/lexvla/run"
    """Run folder: config.json, metrics.jsonl, tensorboard/, checkpoint.pt. With a checkpoint in it, the run resumes."""
    dataset_size: int | None = None
    """Number of samples to use, from the start of the data; None uses all."""
    window_shards: int = 0
    """0: all shards are available, and samples are shuffled over all of them. S: each process reads its share of the
    shards S at a time, fetched ahead and deleted afterwards, so the data may be larger than the disk. --dataset-size is
    then the number of samples per epoch: if the shards hold more, each epoch leaves out different samples; if fewer,
    samples repeat. A new run first reads all shards once, for the vocabulary."""
    cache: str = "data/cache"
    """Folder for copies of remote shards, for the index of large data, and for tokens of --encode-once."""

    backbone: str = "facebook/dinov2-base"
    """Frozen image backbone: a folder or hub name for transformers (with a /), or a timm model, such as
    efficientnet_lite0_maps (see lite0.py)."""
    encode_once: bool = False
    """Encode all images once, without random crops, and train on the tokens, which are kept in `cache`. Ours."""
    image_size: int = 224
    """Image side in pixels. Not stated in the paper."""
    adapter_width: int | None = None
    """Width of the adapter's block; a linear layer first maps the tokens to it. None: the backbone's width. Ours."""
    adapter_hidden: int = 2048
    """Width of the adapter's second MLP. The adapter's layout is not stated in the paper; this gives its 17M."""
    lm: str = "meta-llama/Llama-2-7b-hf"
    """Llama-style causal LM: folder or hub name."""
    states: str = ""
    """File that keeps the frozen LM's states of captions, from which LoRA adapts only the last MLP; those that are
    missing are computed first. Empty: the LM runs in training. Ours."""
    grad_checkpointing: bool = False
    """Recompute the LM's blocks in the backward pass instead of keeping them."""
    text: Literal["lm", "bow"] = "lm"
    """lm, or bow: the ablation's bag of the caption's content words (see text.py)."""
    lora_rank: int = 8
    """Rank of LoRA; 0: none. Not stated in the paper."""
    lora_alpha: float = 16.0
    """LoRA's alpha: its scale times its rank. Not stated in the paper."""
    max_length: int = 128
    """Tokens of a prompt, including the text around the caption; longer captions are cut. Not stated in the paper."""

    min_count: int = 1
    """Minimum number of occurrences in the captions for a piece of the vocabulary. The rule is not stated in the
    paper."""
    max_vocabulary: int | None = 17_149
    """Number of pieces, the most frequent ones; None: no limit. The paper has 17,149."""
    pattern: str | None = None
    """Regular expression that a piece must match as a whole to be in the vocabulary; a leading space is the start of a
    word. Not stated in the paper."""
    bias: float | None = 0.0
    """Added to all logits before elu1p; None: minus two standard deviations of the LM's logits of the first 256
    captions. Ours."""
    penalty: Literal["overuse", "flops", "none"] = "overuse"
    """Eq. 7, or eq. 6 (ablation), or neither. Computed on the global batch (not stated in the paper)."""
    lambda_image: float = 5e-4
    """Final weight of the images' penalty. For flops not stated in the paper."""
    lambda_text: float = 1e-3
    """Final weight of the captions' penalty. For flops not stated in the paper."""
    penalty_warmup: int = 2000
    """Steps over which both weights rise quadratically."""
    epochs: int = 12
    """Passes over the data."""
    batch_size: int = 6144
    """Pairs per step, over all processes together."""
    accumulate: int = 1
    """Micro-batches a step, to save memory. Gradients equal those of one batch; the towers' forward pass runs twice."""
    lr: float = 5e-4
    """Peak learning rate of all trained parameters."""
    warmup: int = 0
    """Steps of linear warm-up. Not stated in the paper."""
    eps: float = 1e-6
    """Adam's epsilon; its betas are 0.9 and 0.98. Not stated in the paper."""

    seed: int = 0
    """Seed of initial weights, shuffles and crops."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """auto: bf16 if the processor supports it. Norms, penalties and losses are always fp32."""
    workers: int = 8
    """Loader processes per training process; they do not change the order of samples."""
    strict: bool = False
    """Stop at the first broken sample instead of counting and replacing it."""
    save_every: int = 1000
    """Steps between checkpoints; there is one at the end, too."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    eval_every: int = 0
    eval_set: str = ""
    dry_run: bool = False
    """Print sizes, schedule and a memory estimate, and stop; needs neither data nor weights."""


PAPER = Config(dataset_size=9_200_000, grad_checkpointing=True, accumulate=4)
SMALL = Config(
    backbone="facebook/dinov2-small",
    encode_once=True,
    adapter_hidden=256,
    lm="data/smollm2-135m",
    lora_rank=16,
    lora_alpha=32.0,
    min_count=5,
    max_vocabulary=None,
    pattern=" ?[a-z]{2,}",
    bias=None,
    lambda_image=0.3,
    lambda_text=0.3,
    penalty_warmup=150,
    epochs=10,
    batch_size=128,
    lr=2e-3,
    warmup=100,
    workers=0,
    save_every=200,
)
EMOJI = dataclasses.replace(
    SMALL,
    data="data/lexvla/scenes/train",
    backbone="efficientnet_lite0_maps",
    image_size=128,
    adapter_width=192,
    adapter_hidden=512,
    states="data/lexvla/states.pt",
    lambda_image=0.1,
    lambda_text=0.1,
    penalty_warmup=40,
    epochs=4,
)


def _preset(about: str, base: Config = PAPER, **settings) -> tuple[str, Config]:
    """A preset: what it is, and `base` with other `settings`."""
    return about, dataclasses.replace(base, **settings)


PRESETS = {
    "small": ("LexVLA with the overuse penalty on your own --data and the --states of their captions, small", SMALL),
    "emoji": ("LexVLA with the overuse penalty on scenes of emoji", EMOJI),
    "emoji-none": _preset("... without a penalty", EMOJI, penalty="none"),
    "emoji-flops": _preset("... with the FLOPs loss", EMOJI, penalty="flops", lambda_image=1.0, lambda_text=1.0),
    "emoji-bow": _preset("... with bags of words in the LM's place", EMOJI, text="bow", lora_rank=0),
    "cc12m": _preset("LexVLA: DINOv2 base, Llama 2 7B, CC12M, 12 epochs"),
    "cc12m-flops": _preset("its ablation: FLOPs loss", penalty="flops"),
    "cc12m-bow": _preset("its ablation: bag of words for text", text="bow", lora_rank=0, accumulate=1),
    "cc12m-clip": _preset("its ablation: CLIP's image backbone", backbone="vit_base_patch16_clip_quickgelu_224.openai"),
}


def check(cfg: Config, world_size: int) -> None:
    """Raise ValueError on invalid settings before work starts."""
    cli.check_data(cfg, "cc12m/{00000..01242}.tar")
    cli.check_batch(cfg, world_size)
    check_model(cfg)


def check_model(cfg: Config) -> None:
    """The checks that need no files; a dry run makes only these."""
    cli.check_counts(
        cfg,
        *("epochs", "batch_size", "save_every", "log_every", "adapter_hidden", "max_length", "image_size"),
    )
    cli.check_counts(cfg, "adapter_width")
    cli.check_counts(cfg, "max_vocabulary", least=2)
    cli.check_counts(cfg, "dataset_size")
    cli.check_counts(cfg, "lora_rank", "penalty_warmup", "warmup", "min_count", "workers", least=0)
    cli.check_counts(cfg, "window_shards", least=0)
    cli.check_rates(cfg, "lr", "eps", "lora_alpha", "lambda_image", "lambda_text")
    cli.check_finite(cfg, "bias")
    if cfg.encode_once and cfg.window_shards:
        raise UserError("--encode-once keeps all tokens in memory; --window-shards is for data that do not fit")
    if cfg.pattern is not None:
        try:
            re.compile(cfg.pattern)
        except re.error as error:
            raise UserError(f"--pattern {cfg.pattern!r} is no regular expression: {error}") from error


CC12M, A100 = "CC12M, 9.2M pairs", "8 x A100 40 GB"
LEFT_OUT = {  # rows of the paper's tables without a preset, and why
    "Table 1, the other methods": "models of others: `lexvla.eval` measures those that open_clip loads",
    "Table 2, random patches, CLIP and VDR": "not trained here: `lexvla.eval patchdis` measures them",
    "Fig. 5, sparsity": "an evaluation of the same run, made by each `lexvla.eval`; of other models for CLIP and VDR",
    "Figs. 1, 3, 4 and 6": "pictures of the same runs, made by `lexvla.eval` and the study",
    "Table 1, top 512 words": "an evaluation of the same run: `lexvla.eval --topk 512`",
    "Table 3, hyperparameters": "a picture that could not be read",
}
PAPER_ROWS = {
    "train": {
        "small": OWN,
        **dict.fromkeys(("emoji", "emoji-none", "emoji-flops", "emoji-bow"), EMBEDDED),
        "cc12m": Row("Tables 1 and 2, LexVLA", CC12M, A100, "active words 1,081 of 17,149"),
        "cc12m-flops": Row("Table 1, FLOPs loss", CC12M, A100),
        "cc12m-bow": Row("Table 1, bag of words", CC12M, A100),
        "cc12m-clip": Row("Tables 1 and 2, CLIP's image backbone", CC12M, A100),
    }
}
