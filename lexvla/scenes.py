"""Scenes of several emoji with a label for each pixel, for PatchDis: `python -m lexvla.scenes`.

Drawings of the held-out style are rendered with their transparency, which gives exact masks. A folder that this writes,
or any other of the same layout, is what eval.py reads:

    classnames.txt     one class a line
    images/KEY.png     (or .jpg)
    masks/KEY.png      class of each pixel; the largest value of the mask's type, 255 or 65535, is ignored

`scenes.json` beside them says how this script made them; where it is there already, it has to be what is asked for.
"""

import io
import json
import random
import tempfile
from pathlib import Path

import numpy as np
import resvg_py
import tyro
from PIL import Image

from lexvla.eval import IGNORE
from shared import checkpoints, cli, data
from shared.corpora import emoji, emoji_sources

CELL = 48  # pixels; a scene has 2 x 2 cells


def draw(svg: str, side: int) -> Image.Image:
    """RGBA picture of an SVG document, transparent where it draws nothing."""
    png = resvg_py.svg_to_bytes(svg_string=svg, width=side, height=side, skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(png)), formats=("PNG",)).convert("RGBA")


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


def check_made(out: Path, made: dict) -> None:
    """ValueError if the folder `out` was made otherwise; an older one does not say more than how many scenes it has."""
    try:
        kept = json.loads((out / "scenes.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        kept = made | {"scenes": len(list((out / "masks").glob("*.png")))}
    if what := checkpoints.changes(kept, made):
        raise ValueError(f"{out} was made with other settings: {what}; choose another --out, or remove it")


def main(out: Path = Path("data/lexvla/scenes"), corpus: Path = Path("data/emoji"), scenes: int = 200) -> None:
    """Writes the scenes; a finished folder is left as it is, and refused if it is not what is asked for.

    Args:
        out: Folder to write. It appears there only when it is complete.
        corpus: The embedded corpus; its npm packages are beside it.
        scenes: Number of scenes.
    """
    if scenes < 1:
        raise ValueError(f"--scenes must be at least 1, not {scenes}")
    if not (corpus / "manifest.json").is_file():
        raise FileNotFoundError(f"{corpus} holds no corpus: 'make data' builds it")
    packages = json.loads((corpus / "manifest.json").read_text(encoding="utf-8"))["packages"]
    versions = " ".join(f"{name} {about['version']}" for name, about in sorted(packages.items()))
    made = {"scenes": scenes, "seed": emoji.SEED, "cell": CELL, "packages": data.fingerprint(versions.encode())}
    if out.exists():
        check_made(out, made)
        return print(f"{out} is there already")
    try:
        modules = emoji_sources.install(corpus.parent / ".npm")
    except emoji_sources.BuildError as error:
        raise ValueError(str(error)) from error
    drawings, _ = emoji.collect(modules, emoji_sources.read_emoji(modules, None))
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
        write([drawing for drawing in drawings if drawing.split == "ood"], Path(scratch) / "scenes", scenes)
        checkpoints.write_json(Path(scratch) / "scenes/scenes.json", made)
        (Path(scratch) / "scenes").rename(out)
    print(f"{out}: {scenes} scenes")


def write(drawings: list, folder: Path, scenes: int) -> None:
    """So many scenes of these drawings into a new folder."""
    rng = random.Random(emoji.SEED)
    chosen = []
    while len(chosen) < scenes:
        some = rng.sample(drawings, rng.randint(2, 4))
        if len({drawing.emoji.subgroup for drawing in some}) == len(some):
            chosen.append(some)
    names = sorted({drawing.emoji.name for some in chosen for drawing in some})
    label = {name: i for i, name in enumerate(names)}
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    for i, some in enumerate(chosen):
        picture, mask = compose(some, [label[drawing.emoji.name] for drawing in some], rng)
        picture.save(folder / f"images/{i:05d}.png")
        Image.fromarray(mask).save(folder / f"masks/{i:05d}.png")
    (folder / "classnames.txt").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")


if __name__ == "__main__":
    cli.command_line(lambda: tyro.cli(main))
