"""The corpus of an arm of our experiment: concepts, frequencies assigned to them, pairs drawn, images and their views.

All images are kept in memory at a small size. Nothing in this file is from the paper.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.optimize import brentq
from torch import Tensor, nn

from concept_frequency.config import Config
from shared import checkpoints, data, run, tars
from shared.clip import image_side
from shared.errors import UserError
from shared.evalsets import EvalSet
from shared.run import stable_hash
from shared.views import NOISE, SmallView
from shared.zeroshot import build_classifier, label_ranks, per_class_accuracy

SIDE = 64  # pixels of the images kept in memory
STATISTICS = torch.full((3,), 0.5), torch.full((3,), 0.5)  # mean and std of images: they are -1..1

# ------------------------------------------------------------------------------------------------- concepts and images


class Concept(NamedTuple):
    """A concept and its images in the shards."""

    name: str
    tags: list[str]
    images: list[int]  # indices into Corpus.images


class Corpus(NamedTuple):
    """The labelled images of the chosen concepts, in memory."""

    concepts: list[Concept]
    keys: list[str]  # (I,) sample keys
    images: list[Image.Image]  # SIDE pixels wide and high
    broken: list[data.Broken]


def read_corpus(
    spec: str,
    names: Sequence[str],
    groups: Sequence[str],
    num_concepts: int | None,
    strict: bool,
    cache: str = "data/cache",
) -> Corpus:
    """Read the images of `num_concepts` concepts, drawn from the `names` that occur in the shards; None takes them all.

    The draw depends only on the names, so all arms and seeds have the same concepts. UserError if there are too few.
    """
    wanted, broken = set(names), []
    rows: dict[str, list[tuple[str, bytes]]] = {}
    words: dict[str, list[str]] = {}
    for path in data.local_shards(spec, Path(cache)):
        for key, about, image in read_labelled(path, broken):
            if about["name"] in wanted and (not groups or about.get("group") in groups):
                rows.setdefault(about["name"], []).append((key, image))
                words[about["name"]] = other_words(about.get("tags"))
    if len(rows) < (num_concepts or 1):
        raise UserError(
            f"{spec} has {len(rows)} concepts of the evaluation set, fewer than --num-concepts {num_concepts or 1}"
        )
    chosen = sorted(sorted(rows, key=lambda name: stable_hash("concept", name))[:num_concepts])
    concepts, keys, images = [], [], []
    for name in chosen:
        first = len(keys)
        for key, encoded in rows[name]:
            try:
                images.append(data.decode_image(encoded).resize((SIDE, SIDE)))
            except data.BrokenSample as error:
                broken.append(data.Broken(key, str(error)))
                continue
            keys.append(key)
        if len(keys) == first:
            raise UserError(f"concept {name!r} has no readable image in {spec}")
        concepts.append(Concept(name, words[name], list(range(first, len(keys)))))
    if strict and broken:
        raise UserError(f"--strict: sample {broken[0].key}: {broken[0].reason}")
    return Corpus(concepts, keys, images, broken)


def other_words(tags: object) -> list[str]:
    """Tags as a list of words, from a list or from a string with commas (the cell of a table)."""
    tags = tags.split(",") if isinstance(tags, str) else tags if isinstance(tags, list) else []
    return [word for tag in tags if (word := str(tag).strip())]


def read_labelled(path: str, broken: list[data.Broken]) -> Iterator[tuple[str, dict, bytes]]:
    """(key, .json, image bytes) of a shard's samples. Unreadable samples are appended to `broken`."""
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


def small(image: Image.Image) -> Tensor:
    """Resize an image to uint8 (3, SIDE, SIDE)."""
    image = image if image.size == (SIDE, SIDE) else image.resize((SIDE, SIDE))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


# ------------------------------------------------------------------------------ the treatment: each concept's frequency


def zipf_counts(num_concepts: int, total: int, exponent: float, generator: torch.Generator | None) -> np.ndarray:
    """Frequencies proportional to rank^-exponent with random ranks: (K,) int64, sum = total, each at least 1.

    UserError if total < K.
    """
    share = np.arange(1, num_concepts + 1, dtype=np.float64) ** -exponent
    return rounded(share / share.sum() * total, total)[torch.randperm(num_concepts, generator=generator).numpy()]


def log_uniform_counts(num_concepts: int, total: int, generator: torch.Generator | None) -> np.ndarray:
    """Frequencies from 1 up with a constant ratio, in random order: (K,) int64, sum = total.

    Their logarithms are evenly spaced, so that the bins of a curve hold about equally many concepts (a bin without a
    whole number in it is empty). UserError if total < K.
    """
    places = np.linspace(1, 0, num_concepts)
    span = 0.0 if total <= num_concepts else brentq(lambda x: np.exp(x * places).sum() - total, 0, math.log(total))
    return rounded(np.exp(span * places), total)[torch.randperm(num_concepts, generator=generator).numpy()]


def rounded(exact: np.ndarray, total: int) -> np.ndarray:
    """Round decreasing frequencies (K,) to int64 with sum = total, each at least 1. UserError if total < K.

    Frequencies are rounded down, and the largest remainders are rounded up until the sum is right. If raising zeros to
    1 makes the sum too large, the most frequent concepts are reduced.
    """
    if total < len(exact):
        raise UserError(f"--dataset-size {total} pairs cannot hold each of {len(exact)} concepts")
    counts = np.maximum(np.floor(exact), 1).astype(np.int64)
    missing = total - counts.sum()
    counts[np.argsort(counts - exact, kind="stable")[: max(missing, 0)]] += 1
    while missing < 0:
        payers = np.flatnonzero(counts > 1)[:-missing]
        counts[payers] -= 1
        missing += len(payers)
    return counts


def frequencies(cfg: Config, num_concepts: int, generator: torch.Generator | None) -> np.ndarray:
    """The frequencies (K,) of an arm's concepts."""
    if cfg.law == "log-uniform":
        return log_uniform_counts(num_concepts, cfg.dataset_size, generator)
    return zipf_counts(num_concepts, cfg.dataset_size, cfg.exponent, generator)


class Pairs(NamedTuple):
    """The training corpus of an arm. Row i is document i of the count."""

    concept: np.ndarray  # (N,) int64 concept of the image
    image: np.ndarray  # (N,) int64 row of Corpus.images
    caption: list[str]


def sample_pairs(counts: np.ndarray, concepts: Sequence[Concept], misaligned: float, seed: int) -> Pairs:
    """Draw N = sum(counts) pairs: f_c pairs of concept c, which use its images in turn, each with a random caption.

    The captions of a random share `misaligned` of the pairs are permuted cyclically.
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
    """A caption with the concept's name. Three of the seven forms also have one to three of its other words."""
    tags = [tag for tag in concept.tags if tag != concept.name]
    some = rng.permutation(tags)[: rng.integers(1, 4)] if tags else []
    form = FORMS[rng.integers(len(FORMS) if len(some) else 4)]
    return form.format(name=concept.name, tags=" ".join(some))


def make_pairs(cfg: Config, corpus: Corpus) -> tuple[np.ndarray, Pairs]:
    """(frequencies, pairs) of an arm, determined by its settings."""
    generator = torch.Generator().manual_seed(stable_hash("assignment", cfg.seed, cfg.assignment))
    counts = frequencies(cfg, len(corpus.concepts), generator)
    return counts, sample_pairs(counts, corpus.concepts, cfg.misaligned, stable_hash("pairs", cfg.seed, cfg.assignment))


class Arm:
    """The pairs of an arm for `shared.corpus.Corpus`; pair i is document i of the count."""

    strict = False

    def __init__(self, corpus: Corpus, counts: np.ndarray, pairs: Pairs):
        self.corpus, self.counts, self.pairs, self.broken = corpus, counts, pairs, corpus.broken
        self.names = [concept.name for concept in corpus.concepts]
        self.keys = np.array(corpus.keys)[pairs.image]
        pixels = (image.tobytes() for image in corpus.images)
        self.fingerprint = data.fingerprint(*pixels, "\n".join(pairs.caption).encode())

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, row: int) -> data.Pair:
        return data.Pair(str(self.keys[row]), self.corpus.images[self.pairs.image[row]], self.pairs.caption[row])

    def caption(self, row: int) -> str:
        return self.pairs.caption[row]

    def write(self, folder: Path) -> None:
        """Write pairs.parquet and frequencies.json."""
        write_pairs(folder / "pairs.parquet", self.corpus, self.pairs)
        checkpoints.write_json(folder / "frequencies.json", dict(zip(self.names, self.counts.tolist(), strict=True)))


def open_arm(cfg: Config) -> Arm:
    """The pairs of an arm, drawn from the images of --data."""
    offered = EvalSet(cfg.eval_set, None).classnames
    corpus = read_corpus(cfg.data, offered, cfg.groups, cfg.num_concepts, cfg.strict, cfg.cache)
    return Arm(corpus, *make_pairs(cfg, corpus))


def write_pairs(path: Path, corpus: Corpus, pairs: Pairs) -> None:
    """Write pairs.parquet (key, caption, concept), the input of `concept_frequency.count`."""
    names, keys = np.array([concept.name for concept in corpus.concepts]), np.array(corpus.keys)
    table = pd.DataFrame({"key": keys[pairs.image], "caption": pairs.caption, "concept": names[pairs.concept]})
    with checkpoints.replaced(path) as file:
        table.to_parquet(file)


def frequency_row(cfg: Config) -> tuple[str, str]:
    """The row of a dry run with the arm's frequencies."""
    concepts = cfg.num_concepts or 400
    if not cfg.num_concepts and Path(cfg.eval_set or "none").is_dir():
        concepts = len(EvalSet(cfg.eval_set, None).classnames)
    counts = np.sort(frequencies(cfg, concepts, None))[::-1]
    return "frequencies", f"{counts[0]:,} (most), {counts[concepts // 2]:,} (median), {counts[-1]:,} (least)"


# ---------------------------------------------------------------------------------------------------------------- views


def plain_view(size: int) -> Callable[[Image.Image], Tensor]:
    """The image transform of evaluation, image -> (3, size, size): the view with noise 0.5, the whole image."""
    view, plain = SmallView(size, *STATISTICS), torch.full((1, NOISE), 0.5)

    def transform(image: Image.Image) -> Tensor:
        return view.normalise([small(image)[None], plain])[0]

    return transform


# ------------------------------------------------------------------------------------------------------------- accuracy


class TestSet(NamedTuple):
    """Test images, in memory. No arm is trained on them."""

    images: Tensor  # (T, 3, SIDE, SIDE) uint8
    labels: Tensor  # (T,) int64 index of the concept


def read_test_set(folder: str, names: Sequence[str], workers: int = 0) -> TestSet:
    """Read the evaluation set's images of the concepts `names`. UserError if it has none."""
    place = {name: c for c, name in enumerate(names)}
    evaluation = EvalSet(folder, small)
    concept = torch.tensor([place.get(name, -1) for name in evaluation.classnames])
    images, labels = map(torch.cat, zip(*evaluation.batches(256, workers), strict=True))
    kept = concept[labels] >= 0
    if not kept.any():
        raise UserError(f"{folder} has no image of the run's {len(names)} concepts: choose another --eval-set")
    return TestSet(images[kept], concept[labels[kept]])


@torch.no_grad()
def zero_shot(
    model: nn.Module,
    tokenizer: Callable,
    test: TestSet,
    names: Sequence[str],
    num_views: int,
    device: torch.device,
    precision: str,
    batch_size: int = 256,
) -> Tensor:
    """Accuracy (K,) in percent of each concept among all K, prompt `{c}`, over `num_views` fixed views per image."""
    was_training = model.training
    model.eval()
    dtype = run.DTYPES[run.resolve_precision(precision, device)]
    classifier = build_classifier(model.encode_text, tokenizer, list(names), ["{c}"], batch_size, device, dtype)
    noise = torch.rand(num_views, NOISE, generator=torch.Generator().manual_seed(0))
    noise[0] = 0.5
    view, hits = SmallView(image_side(model), *STATISTICS), []
    for of_view in noise:
        for rows in torch.arange(len(test.labels)).split(batch_size):
            x = view.normalise([test.images[rows].to(device), of_view.expand(len(rows), NOISE).to(device)])
            with run.autocast(precision, device):
                features = F.normalize(model.encode_image(x).float(), dim=-1).cpu()
            hits.append(label_ranks(features, test.labels[rows], classifier) < 1)
    model.train(was_training)
    return per_class_accuracy(torch.cat(hits), test.labels.repeat(num_views), len(names))
