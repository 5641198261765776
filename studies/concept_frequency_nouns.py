"""A CLIP that is trained on captions of photographs, and its recall of each noun in the test captions.

`python -m studies.concept_frequency_nouns --out RUN` trains one on Flickr8k, with a locked EfficientNet-Lite0; --thin
makes a random half of the nouns rarer. studies/harness/locked_clip.py exports it.
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import tyro
from torch import Tensor

from concept_frequency.captions import lemmas_of, load_spacy, tag_captions
from concept_frequency.concepts import Concepts, caption_concepts
from concept_frequency.eval import INNER, NUM_BINS
from concept_frequency.evaluate import concept_recall
from concept_frequency.model import InvertedIndex, known_terms, query_terms
from concept_frequency.statistics import (
    correlation,
    log_linear_curve,
    permutation_null,
    slope_per_decade,
    unbinned,
)
from shared import checkpoints, cli, data, run, zeroshot
from shared.errors import UserError
from shared.run import stable_hash
from studies.harness import locked_clip, photos

SPACY = "en_core_web_sm"
MIN_IMAGES = 10  # fewest test photographs with a noun for it to be measured, as in the paper
K = 10  # of recall
HOME = Path("runs/photos/concept_frequency")
RECALL = f"retrieval_en/text_to_image_R@{K}"

# ------------------------------------------------------------------------------------------------------------ one model


@dataclasses.dataclass
class Config(locked_clip.Settings):
    """Settings of a CLIP that is trained on captions of photographs; its text tower is from scratch."""

    model: str = "Lite0-emoji"
    """open_clip config with EfficientNet-Lite0 as image tower."""
    max_length: int = 24
    """Maximum tokens of a caption, with start and end; longer captions are cut."""

    thin: float = 0.0
    """Share of the captions to drop among those with one of a random half of the nouns. An epoch has as many captions
    as before, so the others repeat more often."""


def thinned(captions: Sequence[str], nouns: Sequence[str], share: float, seed: int) -> list[int]:
    """Rows of the captions that are kept; the seed draws the half of the nouns and the captions to drop."""
    rng = np.random.default_rng(stable_hash("thinned", seed))
    rare = {nouns[i] for i in rng.permutation(len(nouns))[: len(nouns) // 2]}
    dropped = rng.random(len(captions)) < share
    return [row for row, text in enumerate(captions) if not (dropped[row] and photos.words(text) & rare)]


def train(cfg: Config) -> Path:
    """Run `locked_clip.train` on the captions that are kept, whose rows are written to rows.npy in the run folder."""
    if not 0 <= cfg.thin <= 1:
        raise UserError(f"--thin is a share of 0 to 1, not {cfg.thin}")
    captions = captions_of(cfg.data)
    rows = thinned(captions, test_nouns().names, cfg.thin, cfg.seed) if cfg.thin else list(range(len(captions)))
    kept = Path(cfg.out) / "rows.npy"
    if kept.exists() and not np.array_equal(np.load(kept), rows):
        raise UserError(f"{cfg.out} has a run on other captions: choose another --out")
    kept.parent.mkdir(parents=True, exist_ok=True)
    checkpoints.save_array(kept, np.array(rows))
    return locked_clip.train(cfg, rows)


def captions_of(shards: str) -> list[str]:
    pairs = data.open_pairs(shards)
    return [pairs.caption(row) for row in range(len(pairs))]


# -------------------------------------------------------------------------------------------------- recall of each noun


class TestSet(NamedTuple):
    """Flickr8k's 1,000 test photographs and their captions."""

    features: Tensor  # (I, 1280)
    captions: list[str]  # five an image
    each: int


@functools.cache
def test_set() -> TestSet:
    features, captions, _ = photos.test_set(photos.RETRIEVAL)
    each = min(map(len, captions))
    return TestSet(features, [text for texts in captions for text in texts[:each]], each)


@functools.cache
def test_nouns() -> Concepts:
    """The nouns of the test captions, as the paper finds them: in MIN_IMAGES photographs or more. Found once, for all
    runs."""
    test = test_set()
    file = HOME / f"nouns-{stable_hash(SPACY, MIN_IMAGES, *test.captions):016x}.json"
    if not file.is_file():
        docs = load_spacy(SPACY).pipe(test.captions, disable=["ner"])
        found = caption_concepts([[(t.lemma_, t.pos_) for t in doc] for doc in docs], MIN_IMAGES, test.each)
        file.parent.mkdir(parents=True, exist_ok=True)
        checkpoints.write_json(file, found._replace(names=[name for name in found.names if name])._asdict())
    return Concepts(**checkpoints.read_json(file))


@functools.cache
def nouns_of_captions(shards: str) -> np.ndarray:
    """(N, K) bool: the test nouns in each of N training captions. Our pipeline tags them once, for all runs."""
    captions, names = captions_of(shards), test_nouns().names
    home = HOME / f"captions-{stable_hash(SPACY, *captions, *names):016x}"
    if not (home / "nouns.npy").is_file():
        home.mkdir(parents=True, exist_ok=True)
        with run.lock(home):
            index, lemmas = InvertedIndex.build(tag_captions(captions, SPACY)), lemmas_of(SPACY)
            found = index.matches([known_terms(query_terms(name, lemmas), index.place) for name in names])
            checkpoints.save_array(home / "nouns.npy", found.toarray())
    return np.load(home / "nouns.npy")


def curve_of(images: Tensor, texts: Tensor, counts: np.ndarray) -> dict[str, Any]:
    """Recalls, and statistics of each noun's recall against its count; "concepts" is the table of nouns."""
    test, nouns = test_set(), test_nouns()
    owner = torch.arange(len(images)).repeat_interleave(test.each)
    numbers: dict[str, Any] = {
        f"retrieval_en/{metric}": value for metric, value in zeroshot.retrieval_metrics(images, texts, owner).items()
    }
    _, _, by_text, by_image = concept_recall(images, texts, nouns, K)
    for way, recall in (("", by_text), ("_i2t", by_image)):
        scores = 100 * np.array([recall[name] for name in nouns.names])
        flat = unbinned(counts, scores)
        numbers |= {
            f"slope{way}": slope_per_decade(counts, scores)["slope"],
            f"rho{way}": correlation(log_linear_curve(counts, scores, NUM_BINS), INNER)[0],
            f"rho_null{way}": float(np.nanmean(permutation_null(counts, scores, None, NUM_BINS, INNER))),
            f"r_log{way}": flat["pearson"],
            f"r_linear{way}": float(np.corrcoef(counts, scores)[0, 1]),
            f"spearman{way}": flat["spearman"],
        }
    rows = zip(nouns.names, counts.tolist(), strict=True)
    table = {name: {"assigned": max(n, 1), "accuracy": 100 * by_text[name]} for name, n in rows}
    return numbers | {"concepts": table}


def measure_run(folder: Path) -> dict[str, Any]:
    """Measure a finished run with `curve_of`, counting nouns in the captions that it was trained on."""
    both = locked_clip.encode(folder, test_set().features, test_set().captions)
    shards = checkpoints.read_json(folder / "config.json")["data"]
    counts = nouns_of_captions(shards)[np.load(folder / "rows.npy")].sum(0)
    return curve_of(*both, counts) | {"seconds": run.read_metrics(folder)[-1]["seconds"]}


def evaluate(runs: Sequence[str]) -> list[dict[str, Any]]:
    return photos.evaluated("concept_frequency", runs, measure_run)


if __name__ == "__main__":
    cli.command_line(lambda: train(tyro.cli(Config)))
