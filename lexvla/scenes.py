"""Scenes of several emoji with a label for each pixel, for PatchDis: `python -m lexvla.scenes`.

Drawings of the held-out style are rendered with their transparency, which gives exact masks. A folder that this writes,
or any other of the same layout, is what eval.py reads:

    classnames.txt     one class a line
    images/KEY.png     (or .jpg)
    masks/KEY.png      class of each pixel; the largest value of the mask's type, 255 or 65535, is ignored
"""

import io
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import resvg_py
import torch
import tyro
from PIL import Image
from torch import Tensor
from torchvision import transforms

from lexvla.build import normalize
from shared import emoji, emoji_sources, run

CELL = 48  # pixels; a scene has 2 x 2 cells
IGNORE = 65535


def labelled_images(folder: str, side: int, backbone: str) -> Iterator[tuple[Tensor, Tensor, int]]:
    """(pixels (1, 3, side, side), mask (1, H, W) int64, value to ignore) of each image of a PatchDis folder."""
    resize = transforms.Resize((side, side), interpolation=transforms.InterpolationMode.BICUBIC)
    transform = transforms.Compose([resize, normalize(backbone)])
    classes = len((Path(folder) / "classnames.txt").read_text(encoding="utf-8").splitlines())
    masks = sorted((Path(folder) / "masks").glob("*.png"))
    if not masks:
        raise FileNotFoundError(f"{folder}/masks holds no .png; 'python -m lexvla.scenes' makes such a folder")
    for file in masks:
        image = next((Path(folder) / "images").glob(f"{file.stem}.*"), None)
        if image is None:
            raise FileNotFoundError(f"{folder}/images has no picture for masks/{file.name}")
        mask = np.asarray(Image.open(file))
        if mask.ndim != 2:
            raise ValueError(f"{file} has {mask.ndim} dimensions, a mask holds one class id a pixel")
        ignore = 255 if mask.dtype == np.uint8 else IGNORE
        if (largest := mask[mask != ignore].max(initial=0)) >= classes:
            raise ValueError(f"{file} has class {largest}, but classnames.txt has {classes} lines")
        yield transform(Image.open(image).convert("RGB"))[None], torch.from_numpy(mask.astype(np.int64))[None], ignore


def draw(svg: str, side: int) -> Image.Image:
    """RGBA picture of an SVG document, transparent where it draws nothing."""
    png = resvg_py.svg_to_bytes(svg_string=svg, width=side, height=side, skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(png))).convert("RGBA")


def compose(drawings: list, classes: list[int], rng: random.Random) -> tuple[Image.Image, np.ndarray]:
    """(picture on white, mask (2 CELL, 2 CELL) uint16) of 2 to 4 drawings, each in a cell of its own."""
    canvas = Image.new("RGBA", (2 * CELL, 2 * CELL), "white")
    mask = np.full((2 * CELL, 2 * CELL), IGNORE, dtype=np.uint16)
    for cell, drawing, label in zip(rng.sample(range(4), len(drawings)), drawings, classes, strict=True):
        side = rng.randint(CELL - 8, CELL)
        left, top = (CELL * part + rng.randint(0, CELL - side) for part in (cell % 2, cell // 2))
        picture = draw(drawing.svg, side)
        canvas.alpha_composite(picture, (left, top))
        mask[top : top + side, left : left + side][np.asarray(picture)[..., 3] > 127] = label
    return canvas.convert("RGB"), mask


def main(out: Path = Path("data/lexvla/scenes"), corpus: Path = Path("data/emoji"), scenes: int = 200) -> None:
    """Writes the scenes; a finished folder is left as it is.

    Args:
        out: Folder to write. It appears there only when it is complete.
        corpus: The embedded corpus; its npm packages are beside it.
        scenes: Number of scenes.
    """
    if out.exists():
        return
    if not (corpus / "manifest.json").is_file():
        raise FileNotFoundError(f"{corpus} holds no corpus: 'make data' builds it")
    try:
        modules = emoji_sources.install(corpus.parent / ".npm")
    except emoji_sources.BuildError as error:
        raise ValueError(str(error)) from error
    drawings, _ = emoji.collect(modules, emoji_sources.read_emoji(modules, None))
    drawings = [drawing for drawing in drawings if drawing.split == "ood"]
    rng = random.Random(emoji.SEED)
    chosen = []
    while len(chosen) < scenes:
        some = rng.sample(drawings, rng.randint(2, 4))
        if len({drawing.emoji.subgroup for drawing in some}) == len(some):
            chosen.append(some)
    names = sorted({drawing.emoji.name for some in chosen for drawing in some})
    label = {name: i for i, name in enumerate(names)}
    scratch = out.with_name(out.name + ".tmp")
    for folder in ("images", "masks"):
        (scratch / folder).mkdir(parents=True, exist_ok=True)
    for i, some in enumerate(chosen):
        picture, mask = compose(some, [label[drawing.emoji.name] for drawing in some], rng)
        picture.save(scratch / f"images/{i:05d}.png")
        Image.fromarray(mask).save(scratch / f"masks/{i:05d}.png")
    (scratch / "classnames.txt").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    scratch.rename(out)


if __name__ == "__main__":
    run.command_line(lambda: tyro.cli(main))
