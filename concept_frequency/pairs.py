"""The controlled experiment's corpus: frequencies given to concepts at random, and the pairs drawn by them.

The treatment of the experiment; all ours. An arm's pairs are a function of its settings (config.py).
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from concept_frequency.config import Config
from shared import checkpoints, data, tars

SIDE = 64  # pixels of the images kept in memory


def permutation(n: int, generator: torch.Generator | np.random.Generator | None) -> np.ndarray:
    """A random order of range(n)."""
    if isinstance(generator, np.random.Generator):
        return generator.permutation(n)
    return torch.randperm(n, generator=generator).numpy()


def zipf_counts(
    num_concepts: int, total: int, exponent: float, generator: torch.Generator | np.random.Generator | None
) -> np.ndarray:
    """f (K,) int64, sum = total, each at least 1: f_c ~ rank_c^-exponent, ranks given to concepts at random.

    Rounded down, then the largest remainders get what is missing; where raising zeros to 1 took too much, the most
    frequent pay for it.
    """
    if total < num_concepts:
        raise ValueError(f"{total} pairs cannot hold each of {num_concepts} concepts")
    share = np.arange(1, num_concepts + 1, dtype=np.float64) ** -exponent
    exact = share / share.sum() * total
    counts = np.maximum(np.floor(exact), 1).astype(np.int64)
    missing = total - counts.sum()
    counts[np.argsort(counts - exact, kind="stable")[: max(missing, 0)]] += 1
    while missing < 0:
        payers = np.flatnonzero(counts > 1)[:-missing]
        counts[payers] -= 1
        missing += len(payers)
    return counts[permutation(num_concepts, generator)]


class Concept(NamedTuple):
    name: str
    tags: list[str]
    images: list[int]  # rows of the corpus


class Corpus(NamedTuple):
    """Labelled images in memory: those of the chosen concepts."""

    concepts: list[Concept]
    keys: list[str]  # (I,) sample keys
    images: Tensor  # (I, 3, SIDE, SIDE) uint8
    broken: list[data.Broken]


class Pairs(NamedTuple):
    """The corpus that an arm trains on; row i is document i of the count."""

    concept: np.ndarray  # (N,) int64 what the image shows
    image: np.ndarray  # (N,) int64 row of Corpus.images
    caption: list[str]


def read_corpus(spec: str, names: Sequence[str], groups: Sequence[str], num_concepts: int, strict: bool) -> Corpus:
    """The images of `num_concepts` concepts, drawn from those of `names` that the shards hold.

    The draw depends on the names alone, so that all arms and seeds have the same concepts.
    """
    wanted, broken = set(names), []
    rows: dict[str, list[tuple[str, bytes]]] = {}
    words: dict[str, list[str]] = {}
    for path in data.expand_shards(spec):
        for key, about, image in read_labelled(data.fetch(path, Path("data/cache")), broken):
            if about["name"] in wanted and (not groups or about.get("group") in groups):
                rows.setdefault(about["name"], []).append((key, image))
                words[about["name"]] = list(about.get("tags", ()))
    if len(rows) < num_concepts:
        raise ValueError(
            f"{spec} holds {len(rows)} concepts of the evaluation set, fewer than --num-concepts {num_concepts}"
        )
    chosen = sorted(sorted(rows, key=lambda name: data.stable_hash("concept", name))[:num_concepts])
    concepts, keys, images = [], [], []
    for name in chosen:
        first = len(keys)
        for key, encoded in rows[name]:
            try:
                image = data.decode_image(encoded).resize((SIDE, SIDE))
            except data.BrokenSample as error:
                broken.append(data.Broken(key, str(error)))
                continue
            keys.append(key)
            images.append(torch.from_numpy(np.array(image)).permute(2, 0, 1))
        if len(keys) == first:
            raise ValueError(f"concept {name!r} has no readable image in {spec}")
        concepts.append(Concept(name, words[name], list(range(first, len(keys)))))
    if strict and broken:
        raise ValueError(f"--strict: sample {broken[0].key}: {broken[0].reason}")
    return Corpus(concepts, keys, torch.stack(images), broken)


def read_labelled(path: str, broken: list[data.Broken]) -> Iterator[tuple[str, dict, bytes]]:
    """(key, .json, image bytes) of a shard's samples; what cannot be read is appended to `broken`."""
    members: dict[str, dict[str, bytes]] = {}
    for name, content in tars.read_tar(path, broken, {"json", *tars.IMAGE_EXTENSIONS}):
        key, extension = tars.key_of(name)
        members.setdefault(key, {})[extension] = content
    for key, files in members.items():
        image = next((files[e] for e in tars.IMAGE_EXTENSIONS if e in files), None)
        try:
            about = json.loads(files["json"])
            if image is None or not isinstance(about["name"], str):
                raise KeyError
        except (KeyError, TypeError, ValueError):
            broken.append(data.Broken(key, "no image, or no .json with a name"))
            continue
        yield key, about, image


def sample_pairs(counts: np.ndarray, concepts: Sequence[Concept], misaligned: float, seed: int) -> Pairs:
    """N = sum(counts) pairs: of concept c, f_c times one of its images in turn, each with a caption drawn anew.

    A share `misaligned` of the pairs, drawn at random, exchange their captions among each other in a circle.
    """
    rng = np.random.default_rng(seed)
    concept = np.repeat(np.arange(len(concepts)), counts)
    image = np.empty(len(concept), dtype=np.int64)
    for c, start in enumerate(np.cumsum(counts) - counts):
        order = rng.permutation(concepts[c].images)
        image[start : start + counts[c]] = np.resize(order, counts[c])
    caption = [make_caption(concepts[c], rng) for c in concept.tolist()]
    moved = rng.permutation(len(concept))[: round(misaligned * len(concept))]
    for row, text in zip(moved, [caption[i] for i in np.roll(moved, 1)], strict=True):
        caption[row] = text
    order = rng.permutation(len(concept))
    return Pairs(concept[order], image[order], [caption[i] for i in order])


FORMS = (
    "{name}",
    "a drawing of {name}",
    "{name} icon",
    "picture of {name}",
    "{name}, {tags}",
    "{tags} {name}",
    "the {name}",
)


def make_caption(concept: Concept, rng: np.random.Generator) -> str:
    """The concept's name in a phrase, half of the time among one to three of its other words."""
    tags = [tag for tag in concept.tags if tag != concept.name]
    some = rng.permutation(tags)[: rng.integers(1, 4)] if tags else []
    form = FORMS[rng.integers(len(FORMS) if len(some) else 4)]
    return form.format(name=concept.name, tags=" ".join(some))


def make_pairs(cfg: Config, corpus: Corpus) -> tuple[np.ndarray, Pairs]:
    """(frequencies, pairs) of an arm: a function of its settings."""
    generator = torch.Generator().manual_seed(data.stable_hash("assignment", cfg.seed, cfg.assignment))
    counts = zipf_counts(cfg.num_concepts, cfg.total, cfg.exponent, generator)
    return counts, sample_pairs(
        counts, corpus.concepts, cfg.misaligned, data.stable_hash("pairs", cfg.seed, cfg.assignment)
    )


def write_pairs(path: Path, corpus: Corpus, pairs: Pairs) -> None:
    """pairs.parquet (key, caption, concept): what `concept_frequency.count` counts."""
    names = [concept.name for concept in corpus.concepts]
    table = pa.table(
        {
            "key": [corpus.keys[i] for i in pairs.image],
            "caption": pairs.caption,
            "concept": [names[c] for c in pairs.concept],
        }
    )
    with checkpoints.replaced(path) as file:
        pq.write_table(table, file)
