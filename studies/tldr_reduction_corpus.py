"""Make TL;DR's emoji corpus: `python -m studies.tldr_reduction_corpus` writes data/emoji_tldr from data/emoji.

    clean/   one drawing style with true names: the clean captioning set (in the paper COCO and Visual Genome)
    pool/    the other six training styles with noisy captions: the data to be reduced (in the paper CC3M and others)
    vocab.txt, noise.json

By a fixed seed, an image of the pool gets the name of its emoji (55 %), a single keyword of its emoji (20 %), or the
name of another emoji (25 %) as its caption. The pool is redundant because it has the same emoji in six styles. All
models are evaluated on the style fluent-emoji-flat, which is in neither folder.
"""

import dataclasses
import functools
import json
import random
from collections import Counter
from pathlib import Path

import tyro

from shared import checkpoints, cli, data, tars
from shared.errors import UserError
from tldr_reduction.tokenizer import build_vocab

CLEAN_STYLE = "noto"
SHARES = {"name": 0.55, "keyword": 0.20, "other": 0.25}
SEED = 0


@dataclasses.dataclass
class Config:
    """Write the emoji corpus of the `emoji` presets."""

    source: str = "data/emoji"
    """The embedded corpus, as `python -m studies.corpora.emoji` builds it."""
    out: str = "data/emoji_tldr"
    """Folder to write."""


def samples(folder: Path):
    """(key, image bytes, description) of the corpus' training shards, in order."""
    for key, files in tars.samples(data.expand_shards(str(folder / "train")), ("png", "json")):
        yield key, files["png"], json.loads(files["json"])


def noisy_caption(key: str, description: dict, names: list[str]) -> tuple[str, str]:
    """Caption and kind of noise of one image of the pool, which depend only on its key."""
    rng = random.Random(data.stable_hash(SEED, key))
    kind = rng.choices(list(SHARES), SHARES.values())[0]
    name = description["name"]
    if kind == "keyword":
        return rng.choice(description["tags"] or [name]), kind
    if kind == "other":
        return rng.choice([other for other in names if other != name]), kind
    return name, kind


def write(folder: Path, entries: list[tuple[str, bytes, str, dict]], size: int = 1000) -> None:
    """Write entries as shards in img2dataset layout, after deleting the folder's shards; the same entries give the same
    bytes."""
    for old in folder.glob("*.tar"):
        old.unlink()
    to_json = functools.partial(json.dumps, ensure_ascii=False, sort_keys=True)
    for first in range(0, len(entries), size):
        shard = [
            {"__key__": key, "png": image, "txt": caption, "json": to_json(about)}
            for key, image, caption, about in entries[first : first + size]
        ]
        tars.write_tar(folder / f"{first // size:05}.tar", shard)


def main(cfg: Config) -> None:
    source, out = Path(cfg.source), Path(cfg.out)
    if not (source / "manifest.json").is_file():
        raise UserError(f"{source} is not the embedded corpus: 'make data' builds it")
    version = checkpoints.read_json(source / "manifest.json").get("version")
    made, marker = {"version": version, "seed": SEED, "shares": SHARES}, out / "noise.json"
    if marker.is_file() and made.items() <= checkpoints.read_json(marker).items():
        print(f"{out} is up to date")
        return
    marker.unlink(missing_ok=True)  # there is no noise.json until everything is written
    everything = list(samples(source))
    names = sorted({description["name"] for *_, description in everything})
    clean, pool, kinds = [], [], Counter()
    for key, image, description in everything:
        if description["style"] == CLEAN_STYLE:
            clean.append((key, image, description["name"], description))
            continue
        caption, kind = noisy_caption(key, description, names)
        kinds[kind] += 1
        pool.append((key, image, caption, description | {"noise": kind}))
    write(out / "clean", clean)
    write(out / "pool", pool)
    vocab = build_vocab(caption for *_, caption, _ in clean + pool)
    with checkpoints.replaced(out / "vocab.txt") as file:
        file.write(("\n".join(vocab) + "\n").encode())
    checkpoints.write_json(marker, made | {"counts": kinds, "clean": len(clean)})
    print(f"{out}: {len(clean):,} clean pairs, {len(pool):,} noisy ones ({dict(kinds)}), {len(vocab):,} word pieces")


if __name__ == "__main__":
    cli.command_line(lambda: main(tyro.cli(Config)))
