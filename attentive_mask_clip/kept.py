"""Patches that masking keeps: how much of an image's foreground lies in them, and a picture of them.

The README of the authors' code (microsoft/A-CLIP@0e51942) shows such pictures; it has no code for them.
"""

import io
import math
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from attentive_mask_clip.crops import MEAN, STD, eval_transform
from attentive_mask_clip.model import ACLIP, CLIP, attentive_keep_ids
from shared import checkpoints
from shared.errors import UserError
from shared.evalsets import EvalSet
from shared.tars import read_tar


def object_masks(eval_set: EvalSet) -> Tensor | None:
    """(N, S, S) 1 where a sample's `mask.png` marks an object (sets of scenes have it); None if a set has no masks.

    UserError if a mask cannot be read, or if masks differ in size.
    """
    masks = []
    for shard in eval_set.shards:
        for name, content in read_tar(shard, [], {"mask.png"}):
            try:
                mask = np.array(Image.open(io.BytesIO(content), formats=["PNG"]))
                masks.append(torch.from_numpy(mask != np.iinfo(mask.dtype).max))
            except Exception as error:  # PIL raises OSError, SyntaxError, ValueError, struct.error ...
                raise UserError(f"{name} in {shard} is no mask: {checkpoints.one_line(error, 100)}") from error
            if mask.shape != masks[0].shape:
                raise UserError(f"{name} in {shard} is {mask.shape}, but other masks are {tuple(masks[0].shape)}")
    return torch.stack(masks).float() if masks else None


def pixel_values(images: Tensor) -> Tensor:
    """Normalised images (B, 3, S, S) -> values from 0 to 1."""
    mean, std = (torch.tensor(x, device=images.device).view(1, 3, 1, 1) for x in (MEAN, STD))
    return images * std + mean


def foreground(images: Tensor) -> Tensor:
    """(B, S, S) 1 where a normalised image (B, 3, S, S) is not white: the drawing of an emoji."""
    return (pixel_values(images) < 0.98).any(dim=1).float()


@torch.no_grad()
def attention_scores(model: CLIP, images: Tensor) -> Tensor:
    """(B, N) scores of all patches of images (B, 3, S, S), by the tower that scores them in training; CLIP: its own."""
    tower = model.visual_ema if isinstance(model, ACLIP) else model.visual
    return torch.cat([tower(batch, return_scores=True)[1] for batch in images.split(256)])


def images_and_objects(folder: str, model: CLIP, batch_size: int) -> tuple[Tensor, Tensor]:
    """A set's images (N, 3, S, S) for the model, and (N, S, S) 1 where they show an object, by masks or `foreground`.

    UserError if the masks do not have the size of the images, or if blocks do not tile the model's patches.
    """
    eval_set, side = EvalSet(folder, eval_transform(model.image_size)), model.image_size // model.patch_size
    if side % model.block:
        raise UserError(
            f"--foreground {folder}: blocks of {model.block}x{model.block} patches do not tile this model's {side} "
            "patches a side"
        )
    images, masks = torch.cat([batch for batch, _ in eval_set.batches(batch_size)]), object_masks(eval_set)
    if masks is not None and masks.shape != images[:, 0].shape:
        raise UserError(
            f"--foreground {folder} has masks of shape {tuple(masks.shape)} for images of shape "
            f"{tuple(images[:, 0].shape)}: it must have a mask of the model's image size for each image"
        )
    return images, foreground(images) if masks is None else masks


@torch.no_grad()
def kept_foreground(model: CLIP, images: Tensor, alpha: Tensor, keep_ratio: float = 0.5) -> dict[str, float]:
    """Foreground among the patches that masking keeps, in percent.

    images (B, 3, S, S), alpha (B, S, S), above 0 on foreground; a patch is foreground if any of its pixels is. Returns
    three metrics for each selection X. `X_share`: share of kept patches that are foreground. `X_recall`: share of
    foreground patches that are kept. `X_pixels`: share of an image's foreground pixels that are kept, averaged over
    images. X: attentive (the model's own attention), high_drop (its low scores), centre (the blocks nearest to the
    centre) or random (expectation over random patches, as many as attentive keeps).
    """
    was_training, block = model.training, model.block
    model.eval()
    scores = attention_scores(model, images)
    model.train(was_training)
    pixels = F.avg_pool2d((alpha > 0).float()[:, None], model.patch_size).flatten(1)  # (B, N), share of each patch
    patches = (pixels > 0).float()
    grid = math.isqrt(patches.shape[1])
    axis = torch.arange(grid, device=images.device) - (grid - 1) / 2
    centre = -(axis[:, None] ** 2 + axis**2).flatten().expand(len(images), -1)
    kept = {
        "attentive": attentive_keep_ids(scores, keep_ratio, block),
        "high_drop": attentive_keep_ids(scores, keep_ratio, block, "high"),
        "centre": attentive_keep_ids(centre, keep_ratio, block),
    }
    total = patches.sum()
    results = {}
    for name, ids in kept.items():
        hits = patches.gather(1, ids).sum()
        results[f"{name}_share"] = 100 * (hits / ids.numel()).item()
        results[f"{name}_recall"] = 100 * (hits / total).item()
        results[f"{name}_pixels"] = 100 * (pixels.gather(1, ids).sum(1) / pixels.sum(1)).nanmean().item()
    count = kept["attentive"].shape[1]
    return results | {
        "random_share": 100 * patches.mean().item(),
        "random_recall": 100 * count / patches.shape[1],
        "random_pixels": 100 * count / patches.shape[1],
    }


def plot_kept(before: CLIP, after: CLIP, images: Tensor, path: Path, keep_ratio: float = 0.5) -> None:
    """Plot one row per image (B, 3, S, S): the image; patches kept by attention and by high-drop, each before and after
    training; random patches. Dropped patches are grey."""
    pixels, side = pixel_values(images).clamp(0, 1), images.shape[2] // after.patch_size
    noise = torch.rand(len(images), side**2, generator=torch.Generator().manual_seed(0))
    untrained, trained = (attention_scores(model, images) for model in (before, after))
    columns = {
        "image": None,
        "attentive,\nuntrained": attentive_keep_ids(untrained, keep_ratio, after.block),
        "attentive": attentive_keep_ids(trained, keep_ratio, after.block),
        "high drop,\nuntrained": attentive_keep_ids(untrained, keep_ratio, after.block, "high"),
        "high drop": attentive_keep_ids(trained, keep_ratio, after.block, "high"),
    }
    columns["random"] = noise.argsort(dim=1)[:, : columns["attentive"].shape[1]]
    figure, axes = plt.subplots(len(images), len(columns), figsize=(1.3 * len(columns), 1.3 * len(images) + 0.4))
    for j, (title, ids) in enumerate(columns.items()):
        shown = pixels
        if ids is not None:
            kept = torch.zeros_like(noise).scatter_(1, ids, 1.0)
            mask = F.interpolate(kept.view(-1, 1, side, side), scale_factor=after.patch_size)
            shown = pixels * mask + (0.25 * pixels + 0.55) * (1 - mask)
        for i, image in enumerate(shown):
            axes[i, j].imshow(image.permute(1, 2, 0).numpy())
            axes[i, j].axis("off")
        axes[0, j].set_title(title, fontsize=9)
    figure.tight_layout(pad=0.3)
    figure.savefig(path, dpi=130)
    plt.close(figure)
