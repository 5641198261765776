"""Pretrained models that a reduction uses beside the captioner: image encoders and scorers.

An encoder's tokens, quantised by a k-means codebook, replace the captioner's codes; a selection is compared with random
ones on an encoder's features. A scorer says how well a caption fits its image: BLIP's matching head, or the cosine of
any dual encoder. Authors' code: showlab/datacentric.vlp@a488102, `V:` for its `vq_compress_model/`.

Shapes: B images, S their side, C channels of a token, D features, c numbers of a code, K codes, E embedding.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared import checkpoints, data, export, pretrained
from shared.errors import UserError
from tldr_reduction.blip import BLIP
from tldr_reduction.checkpoints import load_model, load_run
from tldr_reduction.cluster import as_float, nearest, train_kmeans
from tldr_reduction.datasets import eval_transform, of_lite0, view_of
from tldr_reduction.tokenizer import SCORED_LENGTH, WordPiece, eval_tokenizer, pre_caption

LITE0 = "efficientnet_lite0"
NAMES = f"{LITE0}, timm:NAME, another paper's run, local-dir:DIR of --export, or MODEL@TAG of open_clip"
SIDE = 128  # pixels of an image for EfficientNet-Lite0
ON_CPU = 32  # images per forward pass on a CPU
GRID = 3  # an image has GRID x GRID tokens
CODES, CODE_DIM = 256, 64  # size K and dimension c of an encoder's codebook

# ------------------------------------------------------------------------------------------------------------ encoders


class Encoder(NamedTuple):
    """The functions of an image encoder that a reduction calls."""

    transform: Callable  # PIL RGB -> (3, S, S), aspect ratio not kept
    map: Callable[[Tensor], Tensor]  # images (B, 3, S, S) -> last feature map (B, C, h, w)
    features: Callable[[Tensor], Tensor]  # images -> (B, D)

    @torch.no_grad()
    def tokens(self, images: Tensor) -> Tensor:
        """The feature map, averaged over 3 x 3 cells of the image: (B, 9, C) float32."""
        return F.adaptive_avg_pool2d(self.map(images).float(), GRID).flatten(2).transpose(1, 2)


def load_encoder(name: str, device: torch.device | str = "cpu") -> Encoder:
    """Load an encoder by its name (NAMES). UserError if it cannot be loaded."""
    kind, _, rest = name.partition(":")
    if name == LITE0:
        model = pretrained.fold_batch_norms(pretrained.efficientnet_lite0()).to(device)
        return Encoder(
            eval_transform(SIDE, of_lite0), in_batches(last_map(model.forward_intermediates)), in_batches(model)
        )
    if kind == "timm" and rest:
        model = load_timm(rest).to(device)
        settings = timm.data.resolve_model_data_config(model)
        normalise = data.ToNormalizedTensor(settings["mean"], settings["std"])
        view = eval_transform(settings["input_size"][-1], normalise)
        return Encoder(view, in_batches(last_map(model.forward_intermediates)), in_batches(model))
    if export.foreign(name, "tldr_reduction"):
        model, transform, _ = export.load_model(name, device)
        return Encoder(
            transform, in_batches(last_map(model.visual.forward_intermediates)), in_batches(model.encode_image)
        )
    raise UserError(f"there is no encoder {name!r}: it is {NAMES}")


def in_batches(encode: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return `encode` for channels-last images; on a CPU it runs on ON_CPU images at a time, which fit the cache."""

    def batched(images: Tensor) -> Tensor:
        size = ON_CPU if images.device.type == "cpu" else len(images)
        return torch.cat([encode(few.contiguous(memory_format=torch.channels_last)) for few in images.split(size)])

    return batched


def last_map(forward_intermediates: Callable) -> Callable[[Tensor], Tensor]:
    """Return a function images -> last feature map (B, C, h, w) of a tower of timm or open_clip."""

    def last(images: Tensor) -> Tensor:
        found = forward_intermediates(images, indices=1, intermediates_only=True, output_fmt="NCHW")
        return (found["image_intermediates"] if isinstance(found, dict) else found)[-1]

    return last


def load_timm(name: str) -> nn.Module:
    """A pretrained timm model without its classifier, in eval mode."""
    try:
        return timm.create_model(name, pretrained=True, num_classes=0).eval()
    except Exception as error:  # timm, the hub and the network raise all kinds
        why = checkpoints.one_line(error, 120)
        raise UserError(
            f"timm:{name} is not on this machine and could not be fetched ({why}); {LITE0} comes with a package"
        ) from error


# --------------------------------------------------------------------------------------------------------------- codes


class Codebook(NamedTuple):
    """Tokens (B, 9, C) -> codes (B, 9): projected on c principal axes, then the nearest of K centroids."""

    mean: Tensor  # (C,)
    axes: Tensor  # (C, c)
    centroids: Tensor  # (K, c), ordered along the first axis, so near indices are similar codes

    def __call__(self, tokens: Tensor) -> np.ndarray:
        flat = (tokens.cpu().flatten(0, 1) - self.mean) @ self.axes
        return nearest(flat, self.centroids)[0].view(len(tokens), -1).numpy().astype(np.uint16)

    def arrays(self) -> dict[str, np.ndarray]:
        return {name: value.numpy() for name, value in self._asdict().items()}


def fit_codebook(tokens: Tensor, seed: int) -> Codebook:
    """Fit a codebook to tokens (n, 9, C): k-means on their projections on the first principal axes, not whitened."""
    flat = as_float(tokens).flatten(0, 1)
    mean = flat.mean(0)
    centred = flat - mean
    _, vectors = torch.linalg.eigh((centred.T @ centred).double())  # ascending
    axes = vectors.flip(1)[:, :CODE_DIM].float().contiguous()
    centroids, _ = train_kmeans(centred @ axes, min(CODES, len(flat)), seed, niter=10)
    return Codebook(mean, axes, centroids[centroids[:, 0].argsort()].contiguous())


# ------------------------------------------------------------------------------------------------------------- scorers


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
def itm_scores(scorer: BLIP, tokenizer: WordPiece, images: Tensor, captions: list[str]) -> Tensor:
    """Probability that each caption matches its image, (B,). images (B, 3, S, S), B captions. V:models/blip_itm.py:41.

    Token 0 is [ENC], as in BLIP's training; theirs leaves [CLS] there.
    """
    ids, mask = scored_tokens(scorer, tokenizer, captions)
    ids[:, 0] = tokenizer.enc
    return scorer.itm(images, ids.to(images.device), mask.to(images.device)).softmax(dim=1)[:, 1]


def load_scorer(name: str, device: torch.device) -> Scorer:
    """Load a scorer: a run folder (BLIP's matching, or CLIP's cosine), transformers' BLIP, or any dual encoder that
    shared/export.py loads. UserError if `name` cannot be loaded.
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
        return itm_scores(blip, tokenizer, images, captions)

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
