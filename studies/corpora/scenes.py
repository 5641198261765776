"""Scenes: synthetic pictures of emoji, with exact masks. `python -m studies.corpora.scenes --out data/scenes`

A scene has one or more *captioned* emoji, uncaptioned clutter behind them, and a textured background; positions and
sizes are random. Captioned emoji are never covered. A scene is a pure function of (setting, split, index), so their
number is unlimited. `Scenes` draws them; this command writes them as shards:

    train/{00000..}.tar          img2dataset layout: .png, .txt (caption), .json (names, boxes, captions of all forms),
                                 .mask.png (concept of each pixel; the largest value of its dtype: none)
    eval/names_{id,ood}/         classification of scenes with one captioned emoji; `train` holds scenes for probes
    eval/retrieval_{id,ood}/     scenes of several emoji with their names as captions; retrieval_long_: long captions
    eval/patchdis_{id,ood}/      the same scenes as folders of images and masks
    manifest.json                setting, counts, licences of the drawings, sha256 of every shard

Splits: for each concept, one drawing in the training styles is held out (`id`), the others are `train`; `ood` is the
held-out style fluent-emoji-flat. The drawings are those of the emoji corpus, rendered once with transparency to
`sprites.npz` beside its manifest.
"""

import dataclasses
import json
import math
import random
import shutil
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
import tyro
from torch.utils.data import Dataset
from tqdm import tqdm

from shared import cli, data, layout
from shared.errors import UserError
from shared.run import stable_hash
from shared.settings import Count, Limits, check_limits
from shared.tars import write_split
from studies.corpora import emoji_sources
from studies.corpora.captions import FORMS, write_caption
from studies.corpora.masks import mask_png, write_masks
from studies.corpora.sprites import Sprites, load_sprites, packages, scaled

RECIPE = 1  # version; increased when the scenes of the same setting change
SIZES = 5  # number of different sizes of emoji
COARSE, FINE = 4, 12  # grid points along a side, for the background's colours and its grain
SPLITS = ("train", "id", "ood")


@dataclass(frozen=True)
class Setting:
    """The parameters of scenes."""

    image_size: Annotated[int, Limits(least=8)] = 48
    """Image side in pixels."""
    captioned: tuple[int, int] = (1, 1)
    """Fewest and most captioned emoji of a scene; their concepts differ."""
    captioned_size: tuple[float, float] = (0.35, 0.5)
    """Smallest and largest side of a captioned emoji, as a share of the image side."""
    clutter: tuple[int, int] = (2, 2)
    """Fewest and most uncaptioned drawings of a scene; 0 0: no clutter."""
    clutter_size: tuple[float, float] = (0.35, 0.5)
    """Smallest and largest side of clutter, as a share of the image side."""
    clutter_groups: tuple[str, ...] = ("symbols",)
    """Groups of emoji that clutter is drawn from, without the captioned concepts."""
    ground: float = 1.0
    """Strength of the background's texture, 0 (plain white) to 1 (coloured and grainy)."""
    caption: Literal["names", "tags", "positions", "long"] = "names"
    """Captions: names of the captioned emoji, names with some tags, names with positions, or several sentences."""
    noise: float = 0.0
    """Share of scenes with a wrong caption; it names the same number of other concepts."""
    distinct: Count | None = None
    """Number of distinct scenes, which come first; later scenes are near copies of them. None: all are distinct."""
    skew: float = 1.2
    """With `distinct`: distinct scene r is copied with probability proportional to 1 / (r + 10) ** skew."""
    concepts: Count | None = 100
    """Number of captioned concepts; a larger number adds concepts. None: all allowed by `groups` and `min_drawings`."""
    groups: tuple[str, ...] = ("animals-nature", "food-drink", "objects", "travel-places", "activities")
    """Groups of emoji that concepts are chosen from."""
    min_drawings: Annotated[int, Limits(least=2)] = 4
    """Fewest drawings of a concept in `styles`; one of them is held out."""
    styles: tuple[str, ...] = emoji_sources.TRAIN_STYLES
    """Drawing styles to train on."""
    seed: int = 0
    """Seed for choosing concepts and drawing scenes."""


@dataclass(frozen=True)
class Config(Setting):
    """Writes scenes as shards and evaluation sets; a finished folder is left unchanged."""

    out: Path = Path("data/scenes")
    """Output folder. It appears only when it is complete."""
    corpus: Path = Path("data/emoji")
    """Folder of the emoji corpus with the drawings."""
    samples: Count = 20000
    """Number of training scenes."""
    eval_samples: Count = 2000
    """Scenes per evaluation set; in sets with several emoji per scene, at most half the possible combinations."""


class Scene(NamedTuple):
    """One picture and its annotations."""

    pixels: np.ndarray
    """(S, S, 3) uint8."""
    labels: np.ndarray
    """(S, S) int16: visible concept of each pixel, -1 for none; the mask of concept c is `labels == c`."""
    concepts: tuple[int, ...]
    """Concepts of the captioned emoji in the picture."""
    said: tuple[int, ...]
    """Concepts named in the caption; with probability `noise`, others than `concepts`."""
    boxes: tuple[tuple[int, int, int], ...]
    """(top, left, side) of each captioned emoji."""
    original: int
    """Index of the scene that this is a near copy of, or its own index."""


# ------------------------------------------------------------------------------------------------------------- drawing


def uniforms(rng: np.random.Generator) -> Iterator[float]:
    """Endless random numbers in [0, 1)."""
    while True:
        yield from rng.random(64).tolist()


def interpolation(size: int, cells: int) -> np.ndarray:
    """(size, cells) float32: weights for linear interpolation from `cells` points to `size` pixels.

    They are multiples of 1/64, so that float32 sums are exact and the same on every machine.
    """
    at = np.linspace(0, cells - 1, size)
    low = np.minimum(at.astype(int), cells - 2)
    weight = np.round((at - low) * 64) / 64
    line = np.zeros((size, cells), np.float32)
    line[np.arange(size), low], line[np.arange(size), low + 1] = 1 - weight, weight
    return line


def place(sides: list[int], size: int, u: Iterator[float]) -> list[tuple[int, int]]:
    """Random (top, left) of squares that do not overlap; in cells of a grid if 16 random attempts fail."""
    for _ in range(16):
        places: list[tuple[int, int]] = []
        for side in sides:
            top, left = int(next(u) * (size - side + 1)), int(next(u) * (size - side + 1))
            if any(
                top < t + s and t < top + side and left < x + s and x < left + side
                for (t, x), s in zip(places, sides, strict=False)
            ):
                break
            places.append((top, left))
        else:
            return places
    cells, cell = size // max(sides), size // (size // max(sides))
    order = sorted((next(u), i) for i in range(cells**2))
    return [
        (i // cells * cell + int(next(u) * (cell - side + 1)), i % cells * cell + int(next(u) * (cell - side + 1)))
        for side, (_, i) in zip(sides, order, strict=False)
    ]


class Scenes(Dataset):
    """Scenes of one split, drawn on the fly: item i is (pixels (3, S, S) uint8, labels (S, S) int16, caption).

    `classnames[c]` is the name of concept c. `draw` returns all annotations of a scene. ValueError on an impossible
    setting.
    """

    def __init__(
        self,
        setting: Setting,
        split: Literal["train", "id", "ood"] = "train",
        samples: int = 100_000,
        corpus: Path | str = "data/emoji",
        sprites: Sprites | None = None,
    ):
        check(setting)
        self.setting, self.split, self.samples, size = setting, split, samples, setting.image_size
        sprites = sprites or load_sprites(Path(corpus))
        of_concept, clutter = choose(setting, sprites)
        self.emoji = list(of_concept)
        self.classnames = [one.name for one in self.emoji]
        self.sides = sides(setting.captioned_size, size)
        self.clutter_sides = sides(setting.clutter_size, size)
        chosen = [[(sprites.styles[i], sprites.pngs[i]) for i in of_concept[one][split]] for one in self.emoji]
        self.drawings = [
            [(style, {side: scaled(png, side) for side in self.sides}) for style, png in drawings]
            for drawings in chosen
        ]
        self.clutter = [
            {side: scaled(sprites.pngs[i], side) for side in self.clutter_sides}
            for i in (clutter[split] if setting.clutter[1] else ())
        ]
        self.coarse, self.fine = interpolation(size, COARSE), interpolation(size, FINE)
        copied = (np.arange(setting.distinct or 0) + 10.0) ** -setting.skew
        self.copied = np.cumsum(copied) / max(copied.sum(), 1e-9)

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, str]:
        if not 0 <= index < self.samples:
            raise IndexError(index)
        scene = self.draw(index)
        caption = self.caption(scene, index)
        return torch.from_numpy(scene.pixels).permute(2, 0, 1), torch.from_numpy(scene.labels), caption

    def rng(self, index: int, purpose: int = 0) -> np.random.Generator:
        return np.random.default_rng((self.setting.seed, SPLITS.index(self.split), index, purpose))

    def draw(self, index: int, concepts: tuple[int, ...] | None = None, without: int | None = None) -> Scene:
        """Scene `index`. concepts: those of the captioned emoji; None draws them. without: position in `concepts` of an
        emoji that is left out, so that the picture shows what is behind it."""
        s, original = self.setting, index
        if s.distinct is not None and index >= s.distinct:
            original = int(np.searchsorted(self.copied, self.rng(index, 1).random(), side="right"))
        rng = self.rng(original)
        u = uniforms(rng)
        picture = self.draw_ground(rng)
        if concepts is None:
            concepts = self.draw_concepts(between(s.captioned, next(u)), u)
        drawn = [pick(self.drawings[concept], next(u))[1] for concept in concepts]
        chosen = [pick(self.sides, next(u)) for _ in concepts]
        places = place(chosen, s.image_size, u)
        boxes = [(top, left, side) for (top, left), side in zip(places, chosen, strict=True)]
        clutter = self.draw_clutter(boxes, u)
        if original != index:
            boxes, clutter = self.shifted(index, boxes, clutter)
        for sprite, (top, left, side) in clutter:
            blend(picture, *sprite[side], top, left)
        labels = np.full(picture.shape[:2], -1, np.int16)
        for i, (concept, sprite, (top, left, side)) in enumerate(zip(concepts, drawn, boxes, strict=True)):
            if i != without:
                blend(picture, *sprite[side], top, left)
                labels[top : top + side, left : left + side][sprite[side][1][..., 0] < 255] = concept
        if original != index:
            gain = 240 + (33 * self.rng(index, 3).random(3)).astype(np.uint32)
            picture = np.minimum((picture * gain) >> 8, 255).astype(np.uint8)
        return Scene(picture, labels, tuple(concepts), self.said(index, concepts), tuple(boxes), original)

    def draw_ground(self, rng: np.random.Generator) -> np.ndarray:
        """(S, S, 3) uint8: interpolated random colours on a coarse grid, plus random brightness on a finer grid."""
        strength, coarse, fine = self.setting.ground, self.coarse, self.fine
        colours = np.floor(255 - strength * (24 + 195 * rng.random((3, coarse.shape[1], coarse.shape[1]))))
        grain = np.floor(strength * (48 * rng.random((fine.shape[1], fine.shape[1])) - 24))
        ground = coarse @ colours.astype(np.float32) @ coarse.T
        ground += fine @ grain.astype(np.float32) @ fine.T
        return np.ascontiguousarray(ground.astype(np.uint8).transpose(1, 2, 0))

    def draw_concepts(self, count: int, u: Iterator[float]) -> tuple[int, ...]:
        """`count` different random concepts."""
        found: dict[int, None] = {}
        while len(found) < count:
            found[int(next(u) * len(self.emoji))] = None
        return tuple(found)

    def draw_clutter(self, boxes: list[tuple[int, int, int]], u: Iterator[float]) -> list[tuple]:
        """[(sprite, box)] of clutter, apart from `boxes` and each other if 8 random attempts suffice, else anywhere."""
        size, taken, clutter = self.setting.image_size, list(boxes), []
        for _ in range(between(self.setting.clutter, next(u))):
            sprite, side = pick(self.clutter, next(u)), pick(self.clutter_sides, next(u))
            for _ in range(8):
                top, left = int(next(u) * (size - side + 1)), int(next(u) * (size - side + 1))
                if not any(
                    abs(2 * (top - t) + side - b) < 0.8 * (side + b)
                    and abs(2 * (left - x) + side - b) < 0.8 * (side + b)
                    for t, x, b in taken
                ):
                    break
            taken.append((top, left, side))
            clutter.append((sprite, (top, left, side)))
        return clutter

    def shifted(self, index: int, boxes: list, clutter: list) -> tuple[list, list]:
        """Boxes and clutter of a near copy: all are moved together by at most 1/16 of the side, within the picture."""
        every = np.array([*boxes, *(box for _, box in clutter)])
        first, last = every[:, :2].min(0), (every[:, :2] + every[:, 2:]).max(0)
        reach = self.setting.image_size // 16
        moves = (self.rng(index, 2).random(2) * (2 * reach + 1)).astype(int) - reach
        every[:, :2] += np.clip(moves, -first, self.setting.image_size - last)
        moved = [tuple(box) for box in every.tolist()]
        return moved[: len(boxes)], [(sprite, moved[len(boxes) + i]) for i, (sprite, _) in enumerate(clutter)]

    def said(self, index: int, concepts: tuple[int, ...]) -> tuple[int, ...]:
        """Concepts named in the caption: `concepts`, or with probability `noise` the same number of others."""
        if not self.setting.noise:
            return tuple(concepts)
        u = uniforms(self.rng(index, 4))
        said = concepts
        if next(u) < self.setting.noise:
            while set(said) & set(concepts):
                said = self.draw_concepts(len(concepts), u)
        return tuple(said)

    def caption(self, scene: Scene, index: int, form: str | None = None) -> str:
        """The caption of scene `index` in one of FORMS, by default that of the setting."""
        form, rng = form or self.setting.caption, random.Random(f"{self.setting.seed} {self.split} {index}")
        words = [self.emoji[concept] for concept in scene.said]
        return write_caption(form, words, scene.boxes, self.setting.image_size, rng)

    def about(self, scene: Scene, index: int) -> dict:
        """The .json of a scene's sample."""
        return {
            "names": [self.classnames[concept] for concept in scene.concepts],
            "hexcodes": [self.emoji[concept].hexcode for concept in scene.concepts],
            "boxes": scene.boxes,
            "named": [self.classnames[concept] for concept in scene.said],
            "original": scene.original,
            "split": self.split,
            "captions": {form: self.caption(scene, index, form) for form in FORMS},
            "width": self.setting.image_size,
            "height": self.setting.image_size,
        }


def pick(items: list, u: float):
    return items[int(u * len(items))]


def between(bounds: tuple[int, int], u: float) -> int:
    return bounds[0] + int(u * (bounds[1] - bounds[0] + 1))


def sides(shares: tuple[float, float], size: int) -> list[int]:
    """At most SIZES sides in pixels, from smallest to largest."""
    return sorted({int(side) for side in np.linspace(*shares, SIZES) * size})


def blend(picture: np.ndarray, colour: np.ndarray, clear: np.ndarray, top: int, left: int) -> None:
    """Draws a sprite (see `scaled`) on a picture, in place: colour + picture * clear / 255, rounded."""
    side = len(colour)
    region = picture[top : top + side, left : left + side]
    through = np.multiply(region, clear, dtype=np.uint16)
    through += 128
    through += through >> 8
    through >>= 8
    np.add(through, colour, out=region, casting="unsafe")


# ------------------------------------------------------------------------------------------------------------- choosing


def check(s: Setting) -> None:
    """ValueError on invalid settings."""
    check_limits(s)
    for name, least in (("captioned", 1), ("clutter", 0)):
        low, high = getattr(s, name)
        if not least <= low <= high:
            raise UserError(
                f"--{name} must be two numbers of at least {least}, the second not smaller, not {low} {high}"
            )
        small, large = getattr(s, f"{name}_size")
        if not 4 / s.image_size <= small <= large <= 1:
            raise UserError(
                f"--{name}-size must be two shares of the image side, the smaller first, from {4 / s.image_size:.3g} "
                f"(4 pixels) to 1, not {small} {large}"
            )
    largest = sides(s.captioned_size, s.image_size)[-1]
    if s.captioned[1] > (s.image_size // largest) ** 2:
        raise UserError(
            f"{s.captioned[1]} captioned emoji of {largest} pixels do not fit into {s.image_size} x {s.image_size}: "
            "lower --captioned or --captioned-size"
        )
    for name in ("ground", "noise"):
        if not 0 <= getattr(s, name) <= 1:
            raise UserError(f"--{name} must lie between 0 and 1, not {getattr(s, name)}")
    if not s.styles or (unknown := set(s.styles) - set(emoji_sources.TRAIN_STYLES)):
        names = ", ".join(emoji_sources.TRAIN_STYLES)
        raise UserError(f"--styles takes one or more of {names}, not {', '.join(sorted(unknown)) or 'none'}")


def choose(s: Setting, sprites: Sprites) -> tuple[dict, dict]:
    """({concept: {split: indices in `sprites`}}, {split: indices of clutter}). UserError if there are too few."""
    rows: dict[emoji_sources.Emoji, dict[str, list[int]]] = defaultdict(lambda: {split: [] for split in SPLITS})
    for row, (one, style) in enumerate(zip(sprites.emoji, sprites.styles, strict=True)):
        if style == emoji_sources.OOD_STYLE:
            rows[one]["ood"].append(row)
        elif style in s.styles:
            rows[one]["train"].append(row)
    for one, of in rows.items():
        if len(of["train"]) > 1:
            held_out = stable_hash("held out", s.seed, one.hexcode) % len(of["train"])
            of["id"] = [of["train"].pop(held_out)]
    usable = [
        one
        for one, of in rows.items()
        if one.group in s.groups and of["ood"] and len(of["train"]) + len(of["id"]) >= s.min_drawings
    ]
    usable = sorted(usable, key=lambda one: stable_hash("concept", s.seed, one.hexcode))[: s.concepts]
    if len(usable) < max(s.concepts or 1, 2 * s.captioned[1]):
        raise UserError(
            f"only {len(usable)} concepts of these groups have {s.min_drawings} drawings: lower "
            "--concepts, --captioned or --min-drawings, or name more --groups or --styles"
        )
    others = [of for one, of in rows.items() if one.group in s.clutter_groups and one not in usable]
    clutter = {split: [row for of in others for row in of[split]] for split in SPLITS}
    if s.clutter[1] and not all(clutter.values()):
        raise UserError(f"--clutter-groups {' '.join(s.clutter_groups)} have no drawings besides those of concepts")
    return {one: rows[one] for one in usable}, clutter


# -------------------------------------------------------------------------------------------------------------- writing


def training_samples(scenes: Scenes) -> Iterator[dict]:
    for index in tqdm(range(len(scenes)), "training scenes", unit="scene", disable=None):
        scene = scenes.draw(index)
        yield sample(scenes, scene) | {"txt": scenes.caption(scene, index), "json": scenes.about(scene, index)}


def sample(scenes: Scenes, scene: Scene) -> dict[str, bytes]:
    """A scene's picture and mask, as files of a sample."""
    return {"png": layout.png(scene.pixels), "mask.png": mask_png(scene.labels, len(scenes.emoji))}


def labelled(scenes: Scenes, count: int) -> Iterator[dict]:
    """Scenes of one captioned emoji, all concepts in turn."""
    for index in range(count):
        label = index % len(scenes.emoji)
        yield sample(scenes, scenes.draw(index, (label,))) | {"cls": str(label)}


def several(scenes: Scenes, count: int) -> Iterator[tuple[int, Scene]]:
    """(index, scene) of the first `count` scenes with different sets of concepts."""
    seen: set[frozenset[int]] = set()
    index = 0
    while len(seen) < count:
        scene = scenes.draw(index)
        if frozenset(scene.concepts) not in seen:
            seen.add(frozenset(scene.concepts))
            yield index, scene
        index += 1


def write(folder: Path, cfg: Setting, sprites: Sprites, samples: int, eval_samples: int) -> dict[str, int]:
    """Writes shards and evaluation sets; returns the numbers of samples and of concepts."""
    plain = dataclasses.replace(cfg, captioned=(1, 1), noise=0.0, distinct=None)
    together = dataclasses.replace(
        plain,
        captioned=tuple(max(2, number) for number in cfg.captioned),
        captioned_size=tuple(min(share, 0.5) for share in cfg.captioned_size),  # so that two fit
    )
    train = Scenes(cfg, "train", samples, sprites=sprites)
    differing = min(eval_samples, math.comb(len(train.emoji), together.captioned[0]) // 2)
    counts = {"concepts": len(train.emoji), "train": layout.write_pairs(folder / "train", training_samples(train))}
    for split in ("id", "ood"):
        names = folder / f"eval/names_{split}"
        scenes = Scenes(plain, split, sprites=sprites)
        counts[names.name] = write_split(names / "test", labelled(scenes, eval_samples))
        layout.write_classes(names, scenes.classnames, ["{c}"])  # like the captions, without "a drawing of"
        scenes = Scenes(together, split, sprites=sprites)
        chosen = list(several(scenes, differing))
        pngs = [layout.png(scene.pixels) for _, scene in chosen]
        for form, name in (("names", f"retrieval_{split}"), ("long", f"retrieval_long_{split}")):
            texts = [scenes.caption(scene, index, form) for index, scene in chosen]
            pairs = ({"png": png, "txt": text} for png, text in zip(pngs, texts, strict=True))
            counts[name] = layout.write_retrieval(folder / "eval" / name, pairs)
        masks = ((f"{i:06d}.png", pngs[i], scene.labels) for i, (_, scene) in enumerate(chosen))
        name = f"patchdis_{split}"
        counts[name] = write_masks(folder / "eval" / name, scenes.classnames, masks)
    probe = folder / "eval/names_id/train"
    counts["names_train"] = write_split(probe, labelled(Scenes(plain, "train", sprites=sprites), eval_samples))
    shutil.copytree(probe, folder / "eval/names_ood/train", copy_function=layout.link)
    return counts


def main(cfg: Config) -> None:
    check(cfg)
    about, setting = packages(cfg.corpus), dataclasses.asdict(cfg)
    for name in ("out", "corpus"):
        del setting[name]
    setting |= {"recipe": RECIPE, "packages": data.fingerprint(json.dumps(about, sort_keys=True).encode())}
    used = {f"@iconify-json/{style}" for style in (*cfg.styles, emoji_sources.OOD_STYLE)} | {"emojibase-data"}

    def write_all(folder: Path) -> dict:
        counts = write(folder, cfg, load_sprites(cfg.corpus), cfg.samples, cfg.eval_samples)
        return {"counts": counts, "packages": {name: about[name] for name in sorted(used)}}

    layout.build(cfg.out, setting, write_all)


if __name__ == "__main__":
    cli.command_line(lambda: main(tyro.cli(Config)))
