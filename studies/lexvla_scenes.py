"""The study's corpus: pictures of two or three emoji, and sentences about them: `python -m studies.lexvla_scenes`.

    train/                          shards in img2dataset layout
    eval/retrieval_{known,mixed,new}/   scenes of held-out drawings, with a sentence each
    eval/patchdis/                  the same scenes, with masks (see patchdis.py)
    eval/patchdis_train/            scenes of training drawings, with masks, for the study's reference with labels
    manifest.json                   setting, counts, sha256 of every shard

An emoji has a name and keywords. Training sentences name it by its name or by one half of the keywords; so does
`known`. `new` names every emoji by a keyword of the other half, which no training sentence uses for it; `mixed` does so
for one emoji per scene. Sentences have articles and describe relative positions.
"""

import dataclasses
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import tyro

from shared import cli, data, layout
from shared.run import stable_hash
from shared.settings import Count, check_limits
from studies.corpora.captions import listed, relation
from studies.corpora.emoji_sources import Emoji
from studies.corpora.masks import write_masks
from studies.corpora.scenes import Scene, Scenes, Setting, several
from studies.corpora.sprites import Sprites, load_sprites, packages

FORMS = ("a picture of {}", "there is {}", "an image that shows {}", "photo of {}", "{}", "we see {} here")
WAYS = ("known", "mixed", "new")


@dataclasses.dataclass(frozen=True)
class Config:
    """Write the corpus. A finished folder is not changed; it is an error if its settings differ."""

    out: Path = Path("data/lexvla/scenes")
    """Folder to write; it appears only when complete."""
    corpus: Path = Path("data/emoji")
    """The emoji corpus, whose drawings are used."""
    image_size: Count = 128
    """Image side in pixels."""
    concepts: Count = 150
    """Number of emoji that scenes show."""
    samples: Count = 24_000
    """Training scenes."""
    eval_samples: Count = 1_000
    """Scenes of an evaluation set."""
    seed: int = 0
    """Seed of the choice of emoji, of scenes and of sentences."""


# ----------------------------------------------------------------------------------------------------------- sentences


def words_of(emoji: Emoji) -> tuple[list[str], list[str]]:
    """(training words of an emoji, new words): its name with half of its keywords, and the other half. Keywords that
    share a word with the name are left out."""
    in_name = set(emoji.name.split())
    tags = [tag for tag in emoji.tags if not in_name & set(tag.split()) and tag.replace(" ", "").isalpha()]
    tags.sort(key=lambda tag: stable_hash("half", emoji.hexcode, tag))
    half = len(tags) // 2
    return [emoji.name, *tags[:half]], tags[half:]


def word(emoji: Emoji, new: bool, rng: random.Random) -> str:
    """The word for an emoji in a sentence: with `new` one of its new words; otherwise its name in half of the cases,
    and any of its training words in the other half."""
    known, others = words_of(emoji)
    if new:
        return rng.choice(others)
    return known[0] if rng.random() < 0.5 else rng.choice(known)


def with_article(noun: str, rng: random.Random) -> str:
    if rng.random() < 0.5:
        return f"the {noun}"
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def sentence(nouns: Sequence[str], boxes: Sequence[tuple[int, int, int]], rng: random.Random) -> str:
    """A sentence about objects in boxes (top, left, side): a list, or the position of the first relative to the
    second."""
    things = [with_article(noun, rng) for noun in nouns]
    if rng.random() < 0.4:
        things[:2] = [f"{things[0]} {relation(boxes[0], boxes[1])} {things[1]}"]
    return rng.choice(FORMS).format(listed(things))


def caption(scenes: Scenes, scene: Scene, index: int, way: str, seed: int) -> str:
    """The sentence about scene `index` in one of WAYS."""
    rng = random.Random(f"{seed} {scenes.split} {index} {way}")
    one = rng.randrange(len(scene.concepts))
    new = [way == "new" or (way == "mixed" and i == one) for i in range(len(scene.concepts))]
    nouns = [word(scenes.emoji[c], other, rng) for c, other in zip(scene.concepts, new, strict=True)]
    return sentence(nouns, scene.boxes, rng)


# ------------------------------------------------------------------------------------------------------------- writing


def with_words(sprites: Sprites) -> Sprites:
    """The drawings of emoji that have a training word besides their name, and so at least one new word."""
    kept = [i for i, emoji in enumerate(sprites.emoji) if len(words_of(emoji)[0]) > 1]
    return Sprites(*([field[i] for i in kept] for field in sprites))


def write(folder: Path, cfg: Config, sprites: Sprites) -> dict[str, int]:
    """Write shards and evaluation sets; returns the number of samples of each and of concepts."""
    setting = Setting(cfg.image_size, (2, 3), (0.34, 0.47), clutter=(0, 0), concepts=cfg.concepts, seed=cfg.seed)
    sprites = with_words(sprites)
    train = Scenes(setting, "train", cfg.samples, sprites=sprites)
    held_out = Scenes(setting, "id", sprites=sprites)

    def samples() -> Iterator[dict]:
        for index in range(cfg.samples):
            scene = train.draw(index)
            text = caption(train, scene, index, "known", cfg.seed)
            about = {"names": [train.classnames[c] for c in scene.concepts]}
            yield {"png": layout.png(scene.pixels), "txt": text, "json": about}

    counts = {"concepts": len(train.emoji), "train": layout.write_pairs(folder / "train", samples())}
    for scenes, name in ((held_out, "patchdis"), (train, "patchdis_train")):
        chosen = list(several(scenes, cfg.eval_samples))
        pngs = [layout.png(scene.pixels) for _, scene in chosen]
        masks = (
            (f"{i:06d}.png", png, scene.labels) for i, (png, (_, scene)) in enumerate(zip(pngs, chosen, strict=True))
        )
        counts[name] = write_masks(folder / "eval" / name, scenes.classnames, masks)
        for way in WAYS if scenes is held_out else ():
            texts = [caption(scenes, scene, index, way, cfg.seed) for index, scene in chosen]
            pairs = ({"png": png, "txt": text} for png, text in zip(pngs, texts, strict=True))
            counts[f"retrieval_{way}"] = layout.write_retrieval(folder / f"eval/retrieval_{way}", pairs)
    return counts


def main(cfg: Config) -> None:
    check_limits(cfg)
    about = {name: value for name, value in dataclasses.asdict(cfg).items() if name not in ("out", "corpus")}
    versions = " ".join(f"{name} {of['version']}" for name, of in sorted(packages(cfg.corpus).items()))
    setting = about | {"packages": data.fingerprint(versions.encode()), "forms": list(FORMS)}
    layout.build(cfg.out, setting, lambda folder: {"counts": write(folder, cfg, load_sprites(cfg.corpus))})


if __name__ == "__main__":
    cli.command_line(lambda: main(tyro.cli(Config)))
