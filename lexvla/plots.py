"""Explain a pair in words, and draw the paper's pictures.

    python -m lexvla.plots RUN apple.png "red fruit"

prints what each word adds to the pair's score, and draws word clouds of image, caption and a set of patches, and the
patches of words (Fig. 1 and 4). eval.py draws a set's word clouds, and maps of predicted classes (Fig. 3). That a score
is split into the shares of its words is ours.
"""

import dataclasses
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro
from torch import Tensor
from wordcloud import WordCloud

from lexvla.checkpoints import load_run
from lexvla.model import sparsify
from lexvla.text import encode_texts, pieces
from lexvla.towers import eval_transform
from shared import cli, data, run
from shared.errors import UserError
from shared.settings import Count, check_limits


@dataclasses.dataclass
class Config:
    """Print each word's share of the score of an image and a caption, and draw it."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Run folder."""
    image: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE")]
    """Image file."""
    caption: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CAPTION")]
    """Caption to compare it with."""
    k: Count = 10
    """Words to list."""
    topk: Count | None = None
    """Words kept in both representations; None: those above 1/sqrt(V)."""
    out: str = "explain.png"
    """Picture to write: word clouds of the image, of the caption, and of the patches most similar to the word with the
    largest share; below them, each patch's similarity to the words with the largest shares."""


# ------------------------------------------------------------------------------------------------------ words of a pair


def top_words(s: Tensor, words: Sequence[str], k: int = 10) -> list[tuple[str, float]]:
    """The k strongest words of one representation (V,), and their weights; words of weight 0 are left out."""
    values, index = s.sort(descending=True, stable=True)
    return [(words[i], v) for v, i in zip(values[:k].tolist(), index[:k].tolist(), strict=True) if v > 0]


def explain(s_img: Tensor, s_txt: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(values, word indices), (.., k) each: the k largest terms of the score sum_j s_img_j s_txt_j of pairs (.., V)."""
    values, index = (s_img * s_txt).sort(dim=-1, descending=True, stable=True)
    return values[..., :k], index[..., :k]


# ------------------------------------------------------------------------------------------------------------- pictures


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


# ----------------------------------------------------------------------------------------------------------- the script


@torch.no_grad()
def main(cfg: Config) -> None:
    """Print each word's share of the score of an image and a caption, and draw it."""
    check_limits(cfg)
    if Path(cfg.out).suffix != ".png" or not Path(cfg.out).parent.is_dir():
        raise UserError(f"--out {cfg.out} is no .png in a folder that exists")
    device = run.setup(0).device
    model, train_cfg, tokenizer, read = load_run(cfg.run)
    model.to(device)
    words = pieces(tokenizer, model.text.vocab_ids.tolist())
    if not Path(cfg.image).is_file():
        raise UserError(f"{cfg.image} does not exist")
    try:
        picture = data.decode_image(Path(cfg.image).read_bytes())
    except data.BrokenSample as error:
        raise UserError(f"{cfg.image} cannot be read: {error}") from error
    pixels = eval_transform(train_cfg.backbone, train_cfg.image_size)(picture)[None].to(device)
    s_img, s_txt = model.image(pixels)[0].cpu(), encode_texts(model, read, [cfg.caption], device=device)[0]
    sparse_img, sparse_txt = (sparsify(s, cfg.topk) for s in (s_img, s_txt))
    score, (values, ids) = (sparse_img @ sparse_txt).item(), explain(sparse_img, sparse_txt, cfg.k)
    ids = ids[values > 0]
    print(f"score {score:.3f}: image of {(sparse_img > 0).sum()} words, caption of {(sparse_txt > 0).sum()}")
    for value, word in zip(values.tolist(), ids.tolist(), strict=False):
        print(f"{value:.3f}  {100 * value / score:3.0f} %  {words[word].strip()}")
    clouds = {"image": dict(top_words(s_img, words, 40)), "caption": dict(top_words(s_txt, words, 40))}
    s_patch, masks = model.image.patches(pixels)[0].cpu(), {}
    side = math.isqrt(len(s_patch))
    for word in ids[:4].to(device):
        masks[words[word].strip()] = word_mask(s_patch, model.text.word(word).cpu(), (side, side))
    for name, mask in list(masks.items())[:1]:
        s_set = model.image.patch_set(pixels, mask.flatten()[None] > 0.5)[0].cpu()
        clouds[f"patches of {name}"] = dict(top_words(s_set, words, 40))
    plot_pair(pixels[0].cpu(), cfg.caption, clouds, masks, Path(cfg.out))
    print(f"drawn in {cfg.out}")


if __name__ == "__main__":
    cli.command_line(lambda: main(tyro.cli(Config)))
