"""The study of concept frequency on photographs: `python -m studies.concept_frequency --corpus photos --photos DIR`.

Our pipeline counts the nouns in the captions of Flickr8k. A CLIP with a locked EfficientNet-Lite0 trains on these
captions, and recall is measured for each noun of the test captions. Since nouns differ in more than frequency, another
arm drops three quarters of the captions that contain one of a random half of the nouns.
`python -m studies.concept_frequency_photos --out RUN` trains one such model; studies/harness/locked_clip.py exports it.

Why the effect can appear: nouns occur in one to thousands of the 30,000 captions. The effect would vanish if
the pretrained tower and the other words of a caption were enough to find the photograph.
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
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
from studies.concept_frequency import COLORS, changes, column, plot_changes, pooled_rows, within_slope
from studies.harness import floors, locked_clip, photos, verdicts
from studies.harness.floors import Floor
from studies.harness.report import Comparison
from studies.harness.runner import Arm, Study
from studies.harness.verdicts import Claim

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
    rng = np.random.default_rng(data.stable_hash("thinned", seed))
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
    file = HOME / f"nouns-{data.stable_hash(SPACY, MIN_IMAGES, *test.captions):016x}.json"
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
    home = HOME / f"captions-{data.stable_hash(SPACY, *captions, *names):016x}"
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


# ---------------------------------------------------------------------------------------------------------------- study


def claim(text: str, paper: str, metric: str, method: str, baseline: str, primary: bool = False) -> Claim:
    return Claim(text, paper, metric, method, baseline, 1, None, primary, None, RECALL)


CLAIMS = (  # a claim with the text of one in study.py tests the same
    claim("accuracy rises with log frequency (points a decade)", "log-linear", "slope", "captions", "0", True),
    claim("log frequency explains more than frequency (r)", "implied", "r_log", "captions", "captions:r_linear", True),
    claim("ρ of the bins above that of shuffles", "0.83 to 0.97", "rho", "captions", "captions:rho_null", True),
    claim("same concept at another frequency (points a decade)", "implied", "within", "thinned", "0"),
    claim("recall of texts rises with log frequency (points a decade)", "log-linear", "slope_i2t", "captions", "0"),
    claim("... log frequency explains more (r)", "implied", "r_log_i2t", "captions", "captions:r_linear_i2t"),
    claim("... ρ above that of shuffles", "0.83 to 0.97", "rho_i2t", "captions", "captions:rho_null_i2t"),
)


def derive(found: Comparison) -> None:
    """Add to each `thinned` run its slope within nouns: how a noun's recall changes with its log frequency, relative to
    the `captions` run of the same seed."""
    for other, all_captions in zip(found.arms.get("thinned", []), found.arms.get("captions", []), strict=False):
        (change,), (gain,) = changes([all_captions["concepts"]], [other["concepts"]])
        other["within"] = within_slope(change, gain, 1)["slope"]


def more_rows(found: Comparison, **_: Any) -> list[dict[str, Any]]:
    """Claims rows: the slope within nouns over all seeds together, and what this scale cannot show."""
    corpora = verdicts.not_testable("34 models, RAM++ tags, 4,029 concepts in 400M pairs", "-", "needs the corpora")
    return [*pooled_rows(found, "captions", "thinned"), corpora]


def chance() -> dict[str, float]:
    found = floors.chance([photos.RETRIEVAL])
    return found | {"slope": 0.0, "slope_i2t": 0.0}


def correlation_floor(shards: str, own: bool) -> dict[str, float]:
    """Metrics of canonical correlation with words, which takes no gradient step, and its curve over the same counts.

    `shards` and `own` are those of `photos.training_set`.
    """
    features, of_image = photos.training_set(shards, own=own)
    found, test = photos.correlate(features, [" ".join(texts) for texts in of_image]), test_set()
    counts = nouns_of_captions(Config.data).sum(0)
    numbers = curve_of(found.image(test.features), found.text(test.captions), counts)
    return {key: value for key, value in numbers.items() if key != "concepts"}


_, JOINED, SINGLE = photos.floors_on(photos.RETRIEVAL)
FLOORS = (
    Floor("chance", chance),
    dataclasses.replace(JOINED, measure=functools.partial(correlation_floor, photos.JOINED, own=False)),
    dataclasses.replace(SINGLE, measure=functools.partial(correlation_floor, photos.SINGLE, own=True)),
)


def plot(found: Comparison, out: Path) -> None:
    """concept_frequency_photos.png: recall of nouns against their frequency; changes of both for the same noun."""
    tables = {arm: [measured["concepts"] for measured in runs] for arm, runs in found.arms.items()}
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
    for color, (arm, of_arm) in zip(COLORS, tables.items(), strict=False):
        counts, scores = (np.concatenate([column(table, key) for table in of_arm]) for key in ("assigned", "accuracy"))
        curve = log_linear_curve(counts, scores, NUM_BINS)
        error = 1.96 * curve.std / np.sqrt(np.maximum(curve.size / len(of_arm), 1))
        left.errorbar(curve.position, curve.mean, error, marker="o", capsize=2, color=color, label=STUDY.headings[arm])
    left.set(xscale="log", xlabel="captions with the noun, right edge of the bin", ylabel=f"text to image R@{K} (%)")
    left.set_title("between nouns: mean of a bin, ± 95 % over nouns", fontsize=10)
    left.legend(fontsize=8, loc="lower right")
    if {"captions", "thinned"} <= set(tables):
        plot_changes(right, *changes(tables["captions"], tables["thinned"]))
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(out / "concept_frequency_photos.png", dpi=110)
    plt.close(figure)


STUDY = Study(
    folder="concept_frequency",
    on="photos",
    paper='No "zero-shot" without exponential data (arXiv 2404.04125)',
    stands_for="CC3M to LAION-400M",
    corpus=f"Flickr8k, {photos.RESIZED}: 30,000 English captions and the nouns in them; EfficientNet-Lite0 was "
    "pretrained on ImageNet-1k and is locked, its projection and the text tower are from scratch",
    before=(photos.FLICKR8K, photos.CAPTIONS, photos.FEATURES),
    arms=(
        Arm("captions", "studies.concept_frequency_photos", heading="all captions"),
        Arm("thinned", "studies.concept_frequency_photos --thin 0.75", heading="a random half of the nouns rarer"),
    ),
    minutes={"core": 2, "all": 2},
    evaluate=evaluate,
    derive=derive,
    derived_from={"thinned": ("captions",)},
    metrics={
        RECALL: f"text to image R@{K}",
        "retrieval_en/text_to_image_R@1": "R@1",
        "retrieval_en/image_to_text_R@1": "image to text R@1",
        "slope": "points a decade",
        "within": "... same noun",
        "rho": "ρ, bins 1:-1",
        "rho_null": "ρ, shuffled",
        "r_log": "r of log",
        "r_linear": "r of count",
        "slope_i2t": "points a decade I2T",
        "seconds": "seconds",
    },
    sets=(photos.RETRIEVAL,),
    floors=FLOORS,
    claims=CLAIMS,
    more_rows=more_rows,
    plot=plot,
)


if __name__ == "__main__":
    cli.command_line(lambda: train(tyro.cli(Config)))
