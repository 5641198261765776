"""Short and long captions of the embedded corpus: `python -m studies.flame_recaption`.

The paper has MiniCPM-Llama3-V-2.5 write a short and a long caption for every image, and keeps the alt text as a third.
The embedded corpus has no captioner, so captions are composed from the words of each emoji: raw is the name, short adds
a few keywords, long is a few sentences. All drawings of an emoji share them. For
photographs with several captions (studies.corpora.photos), raw is the first, short the second, long all joined.
Files are lists of {"__key__": sample, "caption": text}, the layout of the authors' caption files.
"""

import dataclasses
import random
from pathlib import Path

import tyro

from shared import checkpoints, cli, data, tars
from shared.errors import UserError

KINDS = ("raw", "short", "long")
SHORT = (
    "{name} with {tags}",
    "a drawing of {name}: {tags}",
    "{name}, {tags}",
    "an icon of {name} that stands for {tags}",
)
LONG = (
    "A small drawing of {name} on a white background. It belongs to {subgroup}, a part of {group}.{words}",
    "This icon, from the {subgroup} of {group}, shows {name}.{words} There is nothing behind it.",
    "We see {name}, drawn with simple shapes.{words} Similar things are found under {subgroup}, in {group}.",
)


@dataclasses.dataclass
class Config:
    data: str = "data/emoji/train"
    """Training shards of the embedded corpus, or of photographs with several captions each."""
    out: str = "data/flame/captions"
    """Folder for raw.json, short.json and long.json."""


def captions(about: dict) -> tuple[str, str, str]:
    """(raw, short, long) of an emoji or a photograph, from the .json of one of its samples; deterministic."""
    if isinstance(about.get("captions"), list):
        sentences = [text.rstrip(" .") + "." for text in about["captions"]]
        return about["captions"][0], about["captions"][:2][-1], " ".join(sentences)
    rng = random.Random(f"recaption {about['hexcode']}")
    tags = rng.sample(about["tags"], len(about["tags"]))
    words = {key: about[key].replace("-", " and " if key == "group" else " ") for key in ("group", "subgroup")}
    words |= {"name": about["name"], "tags": ", ".join(tags[:3])}
    keywords = f" It may stand for {', '.join(tags[:7])}." if tags else ""
    short = rng.choice(SHORT).format(**words) if tags else f"a drawing of {about['name']}"
    return about["name"], short, rng.choice(LONG).format(words=keywords, **words)


def main(cfg: Config) -> None:
    lists: dict[str, list[dict[str, str]]] = {kind: [] for kind in KINDS}
    for key, about in tars.descriptions(data.expand_shards(cfg.data)):
        needed = set() if isinstance(about.get("captions"), list) else {"hexcode", "name", "tags", "group", "subgroup"}
        if lacking := needed - about.keys():
            missing = ", ".join(sorted(lacking))
            raise UserError(f"{cfg.data}, sample {key} has no {missing}: these are no shards of the emoji corpus")
        for kind, text in zip(KINDS, captions(about), strict=True):
            lists[kind].append({"__key__": key, "caption": text})
    if not lists["raw"]:
        raise UserError(f"{cfg.data} holds no sample with a .json: 'make data' builds the embedded corpus")
    Path(cfg.out).mkdir(parents=True, exist_ok=True)
    for kind, entries in lists.items():
        checkpoints.write_json(Path(cfg.out) / f"{kind}.json", entries)
    print(f"{cfg.out}: {len(lists['raw']):,} samples, {len({e['caption'] for e in lists['raw']}):,} different names")


if __name__ == "__main__":
    cli.command_line(lambda: main(tyro.cli(Config, description=__doc__)))
