"""The drawings of the emoji corpus with transparency, rendered once to `sprites.npz` beside the corpus's manifest."""

import dataclasses
import io
import json
import multiprocessing
import os
import zipfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from shared import checkpoints
from shared.errors import UserError
from studies.corpora import emoji, emoji_sources

SPRITE = 96  # side of sprites in pixels, before scaling


class Sprites(NamedTuple):
    """Drawings with transparency, as PNG bytes, SPRITE pixels wide, with the emoji and style of each."""

    emoji: list[emoji_sources.Emoji]
    styles: list[str]
    pngs: list[bytes]


def render(svg: str) -> bytes:
    """PNG bytes of an SVG, with a transparent background."""
    import resvg_py

    return bytes(resvg_py.svg_to_bytes(svg_string=svg, width=SPRITE, height=SPRITE, skip_system_fonts=True))


def render_sprites(modules: Path, chosen: list[emoji_sources.Emoji]) -> Sprites:
    """Renders all drawings of some emoji, on all cores."""
    drawings, _ = emoji.collect(modules, chosen)
    with ProcessPoolExecutor(min(os.cpu_count() or 1, 8), multiprocessing.get_context("spawn")) as pool:
        pngs = pool.map(render, [drawing.svg for drawing in drawings], chunksize=32)
        pngs = list(tqdm(pngs, "drawing sprites", len(drawings), unit="image", disable=None))
    return Sprites([drawing.emoji for drawing in drawings], [drawing.style for drawing in drawings], pngs)


def load_sprites(corpus: Path) -> Sprites:
    """All drawings of the emoji corpus, from `corpus`/sprites.npz, which is written if it is missing or outdated."""
    file, versions = corpus / "sprites.npz", json.dumps([SPRITE, packages(corpus)], sort_keys=True)
    if file.is_file() and (sprites := read_sprites(file, versions)):
        return sprites
    modules = emoji_sources.install(corpus.parent / ".npm")
    sprites = render_sprites(modules, emoji_sources.read_emoji(modules, None))
    write_sprites(file, versions, sprites)
    return sprites


def read_sprites(file: Path, versions: str) -> Sprites | None:
    """The sprites in a file of `write_sprites`; None if it has other `versions`. UserError if it cannot be read."""
    try:
        with np.load(file, allow_pickle=False) as stored:
            if stored["versions"].item() != versions:
                return None
            listed, ends, content = json.loads(stored["drawings"].item()), stored["ends"], stored["pngs"].tobytes()
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{file} cannot be read ({error}): remove it, and run this again") from error
    words = [emoji_sources.Emoji(a, b, tuple(tags), *rest) for a, b, tags, *rest in listed["emoji"]]
    pngs = [content[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    return Sprites([words[i] for i in listed["of"]], listed["styles"], pngs)


def write_sprites(file: Path, versions: str, sprites: Sprites) -> None:
    """Writes drawings to one .npz, atomically."""
    row = {one: i for i, one in enumerate(dict.fromkeys(sprites.emoji))}
    listed = {
        "emoji": [dataclasses.astuple(one) for one in row],
        "of": [row[one] for one in sprites.emoji],
        "styles": sprites.styles,
    }
    with checkpoints.replaced(file) as target:
        np.savez(
            target,
            versions=versions,
            drawings=json.dumps(listed),
            ends=np.cumsum([len(png) for png in sprites.pngs]),
            pngs=np.frombuffer(b"".join(sprites.pngs), np.uint8),
        )


def packages(corpus: Path) -> dict[str, dict]:
    """Versions and licences of the packages that the emoji corpus was made from."""
    if not (corpus / "manifest.json").is_file():
        raise UserError(f"{corpus} holds no emoji corpus: 'make data' builds data/emoji")
    return checkpoints.read_json(corpus / "manifest.json")["packages"]


def scaled(png: bytes, side: int) -> tuple[np.ndarray, np.ndarray]:
    """(colour times opacity (side, side, 3), 255 - opacity (side, side, 1)) of a sprite, both uint8."""
    picture = Image.open(io.BytesIO(png), formats=("PNG",)).convert("RGBA").resize((side, side), Image.HAMMING)
    rgba = np.asarray(picture).astype(np.uint16)
    opacity = np.where(rgba[..., 3:] < 16, 0, rgba[..., 3:])  # nearly invisible pixels are not in masks
    return ((rgba[..., :3] * opacity + 127) // 255).astype(np.uint8), (255 - opacity).astype(np.uint8)
