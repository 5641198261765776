"""Make pools with known redundancy and misalignment: `python -m studies.tldr_reduction_pool` rewrites captions of
scenes (studies/corpora/scenes.py), many of which are near copies of others.

    OUT/noise-NN/           shards in which NN % of the captions are bad: half of these are another concept's name, half
                            are generic (--bad: all of one kind); the other captions are the name with some of its tags
    OUT/oracle-NN.json      captions for --predictions by an oracle, which gives the true name, except for NN % of the
                            samples

A sample with a bad caption also has one in pools with more noise; captions depend only on the sample's key. The json of
a sample has its scene ("original"), true "name" and kind of caption ("noise": name, other, generic or mixed).
"""

import dataclasses
import json
import random
from pathlib import Path
from typing import Literal

import tyro

from shared import checkpoints, cli, data, tars
from shared.errors import UserError
from shared.run import stable_hash

GENERIC = ("an image of an icon", "picture", "a drawing on a background", "symbol clip art")
RECIPE = 1  # increase when equal scenes and shares give different pools


@dataclasses.dataclass
class Config:
    """Write pools and oracles' captions."""

    source: str = "data/tldr-scenes"
    """Folder of scenes, as `python -m studies.corpora.scenes` builds it, one captioned emoji each."""
    out: str = "data/tldr"
    """Folder to write; a finished one is not changed."""
    noise: tuple[int, ...] = (0, 30, 60)
    """Percent of bad captions of each pool."""
    bad: Literal["halves", "other", "generic", "mixed"] = "halves"
    """Kind of the bad captions: another concept's name (other), generic, the true name and another's (mixed), or half
    other and half generic (halves)."""
    oracle: tuple[int, ...] = (20, 50, 80)
    """Percent of wrong names of each oracle."""


def caption(key: str, true: str, names: list[str], name: str, percent: int, bad: str = "halves") -> tuple[str, str]:
    """Caption and kind of caption of one sample in the pool with `percent` bad captions."""
    rng = random.Random(stable_hash("noise", key))
    place, other = rng.random() * 100, rng.choice([each for each in names if each != name])
    if place >= percent:
        return true, "name"
    if bad == "halves":
        bad = "other" if rng.random() < 0.5 else "generic"
    if bad == "mixed":
        return " ".join(rng.sample([name, other], 2)), bad
    return other if bad == "other" else rng.choice(GENERIC), bad


def oracle_caption(key: str, names: list[str], name: str, percent: int) -> str:
    """Caption of one sample by the oracle with `percent` wrong names."""
    rng = random.Random(stable_hash("oracle", key))
    wrong, other = rng.random() * 100 < percent, rng.choice([each for each in names if each != name])
    return other if wrong else name


def main(cfg: Config) -> None:
    source, out = Path(cfg.source), Path(cfg.out)
    if not (source / "manifest.json").is_file():
        raise UserError(f"{source} holds no scenes: 'python -m studies.corpora.scenes --out {source}' builds them")
    made = {"recipe": RECIPE, "noise": list(cfg.noise), "oracle": list(cfg.oracle)}
    made |= {"bad": cfg.bad} if cfg.bad != "halves" else {}
    made["scenes"] = data.fingerprint((source / "manifest.json").read_bytes())
    if (out / "manifest.json").is_file():
        if checkpoints.read_json(out / "manifest.json") == made:
            return print(f"{out} is complete")
        raise UserError(f"{out} was made of other scenes or shares: choose another --out, or remove it")
    shards = tars.samples(data.expand_shards(str(source / "train")), ("png", "json"))
    everything = [(key, files["png"], json.loads(files["json"])) for key, files in shards]
    names = sorted({about["names"][0] for _, _, about in everything})
    for percent in cfg.noise:
        folder = out / f"noise-{percent:02}"
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(0, len(everything), 1000):
            samples = []
            for key, picture, about in everything[number : number + 1000]:
                name = about["names"][0]
                text, kind = caption(key, about["captions"]["tags"], names, name, percent, cfg.bad)
                description = {"original": about["original"], "name": name, "noise": kind}
                samples.append({"__key__": key, "png": picture, "txt": text, "json": json.dumps(description)})
            tars.write_tar(folder / f"{number // 1000:05}.tar", samples)
    for percent in cfg.oracle:
        captions = [
            {"image_id": key, "caption": oracle_caption(key, names, about["names"][0], percent)}
            for key, _, about in everything
        ]
        checkpoints.write_json(out / f"oracle-{percent:02}.json", captions)
    checkpoints.write_json(out / "manifest.json", made)
    distinct = len({about["original"] for _, _, about in everything})
    print(f"{out}: {len(everything):,} samples of {distinct:,} scenes and {len(names)} concepts")


if __name__ == "__main__":
    cli.command_line(lambda: main(tyro.cli(Config)))
