"""Scorers of how well captions fit images: BLIP's matching head, or the cosine of any dual encoder.

Authors' code: showlab/datacentric.vlp@a488102, `V:` for its `vq_compress_model/`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared import export
from shared.errors import UserError
from tldr_reduction.checkpoints import load_model, load_run
from tldr_reduction.datasets import eval_transform, view_of
from tldr_reduction.model import BLIP
from tldr_reduction.tokenizer import SCORED_LENGTH, WordPiece, eval_tokenizer, pre_caption


class Scorer(NamedTuple):
    """The functions of a model that scores how well captions fit images."""

    transform: Callable  # PIL RGB -> (3, S, S)
    score: Callable[[Tensor, list[str]], Tensor]  # images (B, 3, S, S), captions -> (B,)
    encode_image: Callable[[Tensor], Tensor]  # images -> (B, E), unit
    encode_text: Callable[[list[str]], Tensor]  # captions -> (B, E), unit
    matches: bool  # True: scores are probabilities of a match. False: cosines


def scored_tokens(scorer: BLIP, tokenizer: WordPiece, captions: list[str]) -> tuple[Tensor, Tensor]:
    """Tokenize captions for matching or embedding as in training, but cut at `SCORED_LENGTH` tokens: ids (B, T), mask
    (B, T)."""
    length = min(SCORED_LENGTH, scorer.text_encoder.max_positions)
    return tokenizer([pre_caption(caption) for caption in captions], length)


@torch.no_grad()
def itm_scores(scorer: BLIP, tokenizer: WordPiece, images: Tensor, captions: list[str], cls: bool = False) -> Tensor:
    """Probability that each caption matches its image, (B,). images (B, 3, S, S), B captions.

    Token 0 is [ENC], as in BLIP's training; with `cls` it is [CLS], as in V:models/blip_itm.py:41-55.
    """
    ids, mask = scored_tokens(scorer, tokenizer, captions)
    ids[:, 0] = tokenizer.cls if cls else tokenizer.enc
    return scorer.itm(images, ids.to(images.device), mask.to(images.device)).softmax(dim=1)[:, 1]


def load_scorer(name: str, device: torch.device, cls: bool = False) -> Scorer:
    """Load a scorer: a run folder (BLIP's matching, or CLIP's cosine), transformers' BLIP, or any dual encoder that
    shared/export.py loads.

    `cls`: a BLIP scores with [CLS] at position 0. ValueError or UserError if `name` cannot be loaded.
    """
    if export.foreign(name, "tldr_reduction"):
        model, transform, tokenizer = export.load_model(name, device)
        return cosines(model, transform, tokenizer, device)
    if (Path(name) / "checkpoint.pt").is_file():
        model, settings, tokenizer = load_run(name)
        if settings.stage == "clip":
            return cosines(model, view_of(model, settings), eval_tokenizer(tokenizer, settings), device)
    if name.startswith(export.LOCAL):
        raise UserError(f"{name} holds no open_clip_config.json: name a folder that --export wrote")
    blip, settings, tokenizer = load_model(name, "blip")
    blip.to(device)

    def encode_text(captions: list[str]) -> Tensor:
        ids, mask = scored_tokens(blip, tokenizer, captions)
        return blip.encode_text(ids.to(device), mask.to(device))

    def score(images: Tensor, captions: list[str]) -> Tensor:
        return itm_scores(blip, tokenizer, images, captions, cls)

    return Scorer(eval_transform(settings.image_size), score, blip.encode_image, encode_text, True)


def cosines(model: nn.Module, transform: Callable, tokenizer: Callable, device: torch.device) -> Scorer:
    """Scorer that computes the cosines of a dual encoder. transform: PIL RGB -> (3, S, S); tokenizer: captions -> ids
    (B, T)."""
    model.to(device)

    @torch.no_grad()
    def encode_image(images: Tensor) -> Tensor:
        return F.normalize(model.encode_image(images).float(), dim=-1)

    @torch.no_grad()
    def encode_text(captions: list[str]) -> Tensor:
        return F.normalize(model.encode_text(tokenizer(captions).to(device)).float(), dim=-1)

    def score(images: Tensor, captions: list[str]) -> Tensor:
        return (encode_image(images) * encode_text(captions)).sum(dim=1)

    return Scorer(transform, score, encode_image, encode_text, False)
