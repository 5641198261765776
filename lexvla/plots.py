"""Draw word clouds of images, sets of patches and captions (Fig. 1 and 4), the patches of a word (Fig. 4), and maps of
predicted classes (Fig. 3)."""

import math
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor
from wordcloud import WordCloud

from lexvla.model import LexVLA, TextEncoder


def word_cloud(weights: dict[str, float]) -> np.ndarray:
    """Picture (180, 360, 3) of words, whose sizes follow their weights; without words it shows "(none)".

    A piece with a leading space and the same piece without are one word, of the larger weight.
    """
    ascending = sorted(weights.items(), key=lambda item: item[1])
    weights = {word.strip() or word: value for word, value in ascending} or {"(none)": 1.0}
    cloud = WordCloud(width=360, height=180, background_color="white", random_state=0, colormap="viridis")
    return cloud.generate_from_frequencies(weights).to_array()


class PairWords(NamedTuple):
    """An image, its caption, and the strongest words of both."""

    pixels: Tensor
    """(3, H, W), normalised."""
    caption: str
    of_image: dict[str, float]
    """Words and their weights."""
    of_caption: dict[str, float]


def plot_words(pairs: Sequence[PairWords], path: Path) -> None:
    """Draw each image beside the word clouds of the image and of its caption, two images a row."""
    height = math.ceil(len(pairs) / 2)
    figure, axes = plt.subplots(
        height, 6, figsize=(14, 2.1 * height), squeeze=False, layout="constrained", width_ratios=(1, 2, 2) * 2
    )
    for axis in axes.flat:
        axis.axis("off")
    for (picture, image, caption), pair in zip(axes.reshape(-1, 3), pairs, strict=False):
        picture.imshow(picture_of(pair.pixels))
        picture.set_title(textwrap.fill(pair.caption, 24), fontsize=7)
        for axis, words, title in ((image, pair.of_image, "image"), (caption, pair.of_caption, "caption")):
            axis.imshow(word_cloud(words), interpolation="bilinear")
            axis.set_title(f"words of the {title}", fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def word_mask(s_patch: Tensor, s_word: Tensor, grid: tuple[int, int]) -> Tensor:
    """Similarity of each patch (P, V) to a word or class (V,): (gh, gw), scaled to 0..1 within the image."""
    sim = s_patch @ s_word
    return ((sim - sim.min()) / (sim.max() - sim.min()).clamp_min(1e-12)).view(*grid)


def word_rows(model: LexVLA, ids: Tensor) -> Tensor:
    """Representations of single words, ids (k,) -> (k, V): by the LM's codebook, or one-hot if there is no LM."""
    if isinstance(model.text, TextEncoder):
        return model.text.word(ids.to(model.text.codebook.device)).cpu()
    return torch.eye(len(model.text.vocab_ids))[ids]


def picture_of(pixels: Tensor) -> np.ndarray:
    """Normalised pixels (3, H, W) -> picture (H, W, 3) in 0..1."""
    picture = pixels.permute(1, 2, 0).numpy()
    return (picture - picture.min()) / np.ptp(picture).clip(1e-6)


def plot_pair(
    pixels: Tensor, caption: str, clouds: dict[str, dict[str, float]], masks: dict[str, Tensor], path: Path
) -> None:
    """Draw an image with its caption, word clouds by title, and the `word_mask` of each word."""
    figure, axes = plt.subplots(2, max(1 + len(clouds), len(masks)), figsize=(10, 4.4), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    axes[0, 0].imshow(picture_of(pixels))
    axes[0, 0].set_title(caption[:48], fontsize=8)
    for axis, (title, weights) in zip(axes[0, 1:], clouds.items(), strict=False):
        axis.imshow(word_cloud(weights), interpolation="bilinear")
        axis.set_title(title, fontsize=8)
    for axis, (word, mask) in zip(axes[1], masks.items(), strict=False):
        axis.imshow(mask.numpy(), vmin=0, vmax=1, cmap="magma")
        axis.set_title(word, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


@torch.no_grad()
def plot_patches(
    model: LexVLA,
    images: Iterable[tuple[Tensor, Tensor, int]],
    words: Sequence[str],
    s_class: Tensor,
    classnames: Sequence[str],
    path: Path,
) -> None:
    """Draw PatchDis images (pixels, mask, value to ignore) and, beside each, up to four of its classes.

    A class is shown by the similarity of patches to its strongest word, as brightness; the title has this word, and the
    three strongest words of the patches inside the class's mask.
    """
    device = next(model.parameters()).device
    images = list(images)
    figure, axes = plt.subplots(len(images), 5, figsize=(10, 2.1 * len(images)), squeeze=False)
    for row, (pixels, mask, ignore) in zip(axes, images, strict=True):
        s_patch = model.image.patches(pixels.to(device))[0].float().cpu()
        side = math.isqrt(len(s_patch))
        row[0].imshow(picture_of(pixels[0]))
        for axis, label in zip(row[1:], [c for c in mask.unique().tolist() if c != ignore][:4], strict=False):
            word = s_class[label].argmax()
            mask_of_word = word_mask(s_patch, word_rows(model, word), (side, side))
            axis.imshow(mask_of_word.numpy(), vmin=0, vmax=1, cmap="magma")
            inside = torch.nn.functional.adaptive_max_pool2d((mask == label).float(), side)[0].flatten() > 0
            top = model.image.patch_set(pixels.to(device), inside[None])[0].cpu().topk(3).indices.tolist()
            strongest = ", ".join(words[i].strip() for i in top)
            axis.set_title(f"{classnames[label][:24]}: {words[word].strip()}\n{strongest}", fontsize=7)
        for axis in row:
            axis.axis("off")
    figure.tight_layout(pad=0.4)
    figure.savefig(path, dpi=110)
    plt.close(figure)


class ClassMap(NamedTuple):
    """An image of PatchDis and the predicted classes of its patches."""

    pixels: Tensor
    """(3, S, S), normalised."""
    truth: Tensor
    """(H, W) class of each pixel, -1 for none."""
    predicted: Tensor
    """(gh, gw) class of each patch."""


def plot_class_maps(maps: Sequence[ClassMap], classnames: Sequence[str], path: Path) -> None:
    """Draw images, their true classes, and the predicted class of each patch (Fig. 3), with the classes' names below.

    A class of the image has the same colour in both maps and in the names. Pixels without a class are white; patches
    predicted as a class that is not in the image are grey, and so are the names of the most frequent of these.
    """
    palette = np.array([plt.get_cmap("tab10")(i)[:3] for i in range(10)] + [(1, 1, 1), (0.75, 0.75, 0.75)])
    figure, axes = plt.subplots(3, len(maps), figsize=(2.1 * len(maps), 8), squeeze=False, layout="constrained")
    for column, (pixels, truth, predicted) in zip(axes.T, maps, strict=True):
        shown = [c for c in truth.unique().tolist() if c >= 0][:10]
        colour = {c: i for i, c in enumerate(shown)} | {-1: 10}
        often = predicted.flatten().bincount().argsort(descending=True, stable=True)[: len(shown)].tolist()
        column[0].imshow(picture_of(pixels))
        for axis, classes, named in zip(column[1:], (truth, predicted), (shown, often), strict=True):
            index = np.full(classes.shape, 11)
            for c, i in colour.items():
                index[classes.numpy() == c] = i
            axis.imshow(palette[index])
            for line, c in enumerate(named[:4]):
                ink = palette[colour[c]] if c in colour else "0.45"
                style = {"transform": axis.transAxes, "ha": "center", "va": "top", "fontsize": 7, "color": ink}
                axis.text(0.5, -0.02 - 0.1 * line, classnames[c][:28], **style)
        for axis in column:
            axis.axis("off")
    figure.savefig(path, dpi=110)
    plt.close(figure)
