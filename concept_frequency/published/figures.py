"""Draw curves in the authors' style, above their own figures if a clone of their repository has them.

A line joins the bins that the paper plots. Bins that the paper leaves out are drawn as hollow markers.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from PIL import Image

from concept_frequency.statistics import Curve

STYLES = (("royalblue", "o"), ("indianred", "d"), ("forestgreen", "s"))  # color and marker of up to three models
PIXELS = 900  # longer side of the authors' images, which are several thousand pixels wide


class Column(NamedTuple):
    """A panel to draw, and the authors' image of the same panel."""

    title: str
    draw: Callable[[Axes], None]
    theirs: Path | None = None


def style(index: int, of: int) -> tuple:
    """(color, marker) of line `index` of `of` lines; two lines get the first and last of STYLES, like the authors'."""
    if of > len(STYLES):
        return plt.get_cmap("tab20")(index % 20), "o"
    return STYLES[round((len(STYLES) - 1) * index / max(of - 1, 1))]


def legend(name: str, rho: float, p: float) -> str:
    """A line's label, such as `RN50, ρ=0.97**`; two stars for p < 0.05."""
    return f"{name}, ρ={rho:.2f}" + "**" * (p < 0.05)


def draw_curve(
    axis: Axes, curve: Curve, bins: slice, label: str, index: int = 0, of: int = 1, interval: bool = False
) -> None:
    """Draw the line of mean score by frequency; `interval` adds 95 % intervals of the means (figure 27)."""
    color, marker = style(index, of)
    axis.plot(curve.position, curve.mean, marker, mfc="none", color=color, alpha=0.4)
    error = 1.96 * curve.std[bins] / np.sqrt(np.maximum(curve.size[bins], 1)) if interval else None
    axis.errorbar(
        curve.position[bins], curve.mean[bins], error, marker=marker, color=color, alpha=0.7, capsize=2, label=label
    )


def frame(axis: Axes, ylabel: str = "", logx: bool = True) -> None:
    """Format the axes like the authors' figures."""
    axis.set(xlabel="concept frequency" if logx else "", ylabel=ylabel)
    if logx:
        axis.set_xscale("log")
    axis.grid(linestyle=":")
    if axis.get_legend_handles_labels()[1]:
        axis.legend(fontsize=7)


def thumbnail(path: Path) -> Image.Image:
    """The image at `path` on a white background, at most PIXELS wide and high."""
    with Image.open(path) as image:
        image = image.convert("RGBA")
    image.thumbnail((PIXELS, PIXELS))
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def save(columns: Sequence[Column], path: Path, title: str, width: int = 4) -> None:
    """Draw `width` panels a row, and below each row the authors' images of its panels, if the clone has any."""
    rows = [columns[start : start + width] for start in range(0, len(columns), width)]
    heights = [height for row in rows for height in ([1.0] + [0.85] * any(each.theirs for each in row))]
    across = min(width, len(columns))
    wide, high = 3.6 * across, 3.0 * sum(heights) + 0.6  # inches
    figure, axes = plt.subplots(
        len(heights), across, figsize=(wide, high), squeeze=False, gridspec_kw={"height_ratios": heights}
    )
    for axis in axes.flat:
        axis.axis("off")
    line = iter(axes)
    for row in rows:
        for axis, column in zip(next(line), row, strict=False):
            axis.axis("on")
            column.draw(axis)
            axis.set_title(column.title, fontsize=9)
        if any(column.theirs for column in row):
            for axis, column in zip(next(line), row, strict=False):
                if column.theirs:
                    axis.imshow(thumbnail(column.theirs))
                    axis.set_title("theirs", fontsize=8)
    figure.suptitle(title, fontsize=10, y=1 - 0.1 / high)
    figure.subplots_adjust(0.6 / wide, 0.5 / high, 1 - 0.1 / wide, 1 - 0.5 / high, wspace=0.32, hspace=0.4)
    figure.savefig(path, dpi=90)
    plt.close(figure)
