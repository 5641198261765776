"""Pretrained image encoders, for reductions without a codebook captioner.

A k-means codebook turns an encoder's tokens into code vectors. A selection is compared with random ones on an encoder's
features.

Shapes: B images, S their side, C channels of a token, D features, c numbers of a code, K codes.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from shared import checkpoints, data, export, pretrained
from shared.errors import UserError
from tldr_reduction.cluster import as_float, nearest, train_kmeans

LITE0 = "efficientnet_lite0"
NAMES = f"{LITE0}, timm:NAME, timm:NAME:FILE, another paper's run, local-dir:DIR of --export, or MODEL@TAG of open_clip"
SIDE = 128  # pixels of an image for EfficientNet-Lite0
ON_CPU = 32  # images per forward pass on a CPU
GRID = 3  # an image has GRID x GRID tokens

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


def square(size: int, mean: tuple, std: tuple) -> transforms.Compose:
    """PIL RGB -> normalised (3, S, S)."""
    resize = transforms.Resize((size, size), InterpolationMode.BICUBIC)
    return transforms.Compose([resize, data.ToNormalizedTensor(mean, std)])


def load_encoder(name: str, device: torch.device | str = "cpu") -> Encoder:
    """Load an encoder by its name (NAMES). ValueError or UserError if it cannot be loaded."""
    kind, _, rest = name.partition(":")
    if name == LITE0:
        model = pretrained.fold_batch_norms(pretrained.efficientnet_lite0()).to(device)
        view = square(SIDE, pretrained.LITE0_MEAN, pretrained.LITE0_STD)
        return Encoder(view, in_batches(last_map(model.forward_intermediates)), in_batches(model))
    if kind == "timm" and rest:
        model = load_timm(*rest.partition(":")[::2]).to(device)
        settings = timm.data.resolve_model_data_config(model)
        view = square(settings["input_size"][-1], settings["mean"], settings["std"])
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


def load_timm(name: str, file: str = "") -> nn.Module:
    """A timm model without its classifier, in eval mode, with the weights in `file` or, without it, timm's."""
    try:
        model = timm.create_model(name, pretrained=not file, num_classes=0)
    except Exception as error:  # timm, the hub and the network raise all kinds
        why = checkpoints.one_line(error, 120)
        raise UserError(
            f"timm:{name} is not on this machine and could not be fetched ({why}); timm:{name}:FILE takes weights from "
            f"a file, or name {LITE0}"
        ) from error
    if file:
        if not Path(file).is_file():
            raise UserError(f"{file}, the weights of timm:{name}, does not exist")
        state = checkpoints.load_checkpoint(file)
        state = state.get("state_dict", state.get("model", state))
        missing, _ = model.load_state_dict(state, strict=False)
        if missing:
            raise UserError(f"{file} holds no weights of timm:{name}: it lacks {missing[0]}")
    return model.eval()


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


def fit_codebook(tokens: Tensor, num_codes: int, code_dim: int, seed: int) -> Codebook:
    """Fit a codebook to tokens (n, 9, C): k-means on their projections on the first principal axes, not whitened."""
    flat = as_float(tokens).flatten(0, 1)
    mean = flat.mean(0)
    centred = flat - mean
    _, vectors = torch.linalg.eigh((centred.T @ centred).double())  # ascending
    axes = vectors.flip(1)[:, :code_dim].float().contiguous()
    centroids, _ = train_kmeans(centred @ axes, min(num_codes, len(flat)), seed, niter=10)
    return Codebook(mean, axes, centroids[centroids[:, 0].argsort()].contiguous())
