"""Labelled scenes for the study of NMTune: `python -m studies.nmtune_scenes --out data/scenes-nmtune`.

A scene shows one emoji on a textured ground (studies/corpora/scenes.py); its label is the emoji's name.

    pretrain/{train,test}   scenes of 50 emoji: 50 a name to pre-train on, 20 to test
    shards/{00000..}.tar    the same training scenes with captions: the name, with some tags
    tune/{train,test}       scenes of 25 emoji of other groups: 50 a name to tune heads on, 200 in domain
    ood/test                out of domain: the same 25, 200 scenes a name, in a style that is drawn nowhere else

Training and in-domain test scenes have the same drawings, at other places, in other sizes and on other grounds.
"""

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tyro

from shared import cli, data, layout
from shared.settings import Count, check_limits
from shared.tars import write_split
from studies.corpora.scenes import RECIPE, Scenes, Setting
from studies.corpora.sprites import load_sprites, packages

PICTURES = dict(image_size=40, captioned_size=(0.5, 0.8), clutter=(0, 0), caption="tags")
PRETRAIN_GROUPS = ("animals-nature", "food-drink", "objects")
TUNE_GROUPS = ("travel-places", "activities")


@dataclass(frozen=True)
class Config:
    """Writes the scenes; a finished folder is left unchanged."""

    out: Path = Path("data/scenes-nmtune")
    """Output folder. It appears only when it is complete."""
    corpus: Path = Path("data/emoji")
    """Folder of the emoji corpus with the drawings."""
    names: Count = 50
    """Names of pre-training."""
    tune_names: Count = 25
    """Names of the downstream task."""
    each: Count = 50
    """Training scenes a name, in pre-training and downstream."""
    own_tests: Count = 20
    """Test scenes a name of pre-training."""
    tests: Count = 200
    """Test scenes a name downstream, in domain and out of domain."""


def labelled(scenes: Scenes, each: int, start: int = 0) -> Iterator[dict]:
    """`each` scenes of every concept, from scene number `start * concepts` on, as samples of an evaluation set."""
    concepts = len(scenes.emoji)
    for index in range(start * concepts, (start + each) * concepts):
        pixels = scenes.draw(index, (index % concepts,)).pixels
        yield {"png": layout.png(pixels), "cls": str(index % concepts)}


def captioned(scenes: Scenes, each: int) -> Iterator[dict]:
    """The training scenes of `labelled` with captions, as samples of training shards."""
    for index in range(each * len(scenes.emoji)):
        scene = scenes.draw(index, (index % len(scenes.emoji),))
        about = {"name": scenes.classnames[scene.concepts[0]]}
        yield {"png": layout.png(scene.pixels), "txt": scenes.caption(scene, index), "json": about}


def write(folder: Path, cfg: Config) -> dict:
    """Writes all sets; returns their sizes and the pre-training and downstream names."""
    sprites, counts = load_sprites(cfg.corpus), {}
    first = Setting(**PICTURES, groups=PRETRAIN_GROUPS, concepts=cfg.names)
    second = Setting(**PICTURES, groups=TUNE_GROUPS, concepts=cfg.tune_names, seed=1)
    pretrain, tune, ood = (
        Scenes(setting, split, sprites=sprites)
        for setting, split in ((first, "train"), (second, "train"), (second, "ood"))
    )
    for name, scenes, samples in (
        ("pretrain/train", pretrain, labelled(pretrain, cfg.each)),
        ("pretrain/test", pretrain, labelled(pretrain, cfg.own_tests, cfg.each)),
        ("tune/train", tune, labelled(tune, cfg.each)),
        ("tune/test", tune, labelled(tune, cfg.tests, cfg.each)),
        ("ood/test", ood, labelled(ood, cfg.tests)),
    ):
        counts[name] = write_split(folder / name, samples)
        layout.write_classes((folder / name).parent, scenes.classnames, ["{c}"])
    counts["shards"] = layout.write_pairs(folder / "shards", captioned(pretrain, cfg.each))
    return {"counts": counts, "names": {"pretrain": pretrain.classnames, "tune": tune.classnames}}


def main(cfg: Config) -> None:
    check_limits(cfg)
    fields = {name: value for name, value in dataclasses.asdict(cfg).items() if not isinstance(value, Path)}
    packed = data.fingerprint(json.dumps(packages(cfg.corpus), sort_keys=True).encode())
    pictures = {**PICTURES, "groups": [PRETRAIN_GROUPS, TUNE_GROUPS]}
    setting = {"data": "nmtune", "recipe": RECIPE, "pictures": pictures, "packages": packed, **fields}
    layout.build(cfg.out, setting, lambda folder: write(folder, cfg))


if __name__ == "__main__":
    cli.command_line(lambda: main(tyro.cli(Config)))
