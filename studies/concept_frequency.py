"""The study of concept frequency: `python -m studies.concept_frequency` (`make reproduce-concept-frequency`).

Trains the arms of the controlled experiment on the embedded emoji corpus, a stand-in for CC-3M to LAION-400M, and
compares them by seed. With a clone of the authors' repository (--upstream), it also recomputes the paper's figures from
their published files.

Why the effect can appear: frequencies span one to three decades and are assigned to concepts at random, so they are
independent of the concepts' difficulty. The effect would vanish if all concepts, or none, were frequent enough to be
learned.

A correlation of bins needs many concepts in each bin. Under Zipf's law most concepts are rare, and the bins of frequent
ones hold three or eight. The primary claims about the curve are therefore judged where frequencies are spread evenly
over their logarithm, with the same number of pairs; the claims about rare concepts under Zipf's law.

On photographs (`--corpus photos --photos DIR`): our pipeline counts the nouns in the captions of Flickr8k. A CLIP with
a locked EfficientNet-Lite0 trains on these captions, and recall is measured for each noun of the test captions
(concept_frequency_nouns.py). Since nouns differ in more than frequency, another arm drops three quarters of the
captions that contain one of a random half of the nouns.

Why the effect can appear: nouns occur in one to thousands of the 30,000 captions. The effect would vanish if the
pretrained tower and the other words of a caption were enough to find the photograph.
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from concept_frequency import eval as evaluation
from concept_frequency import let_it_wag, train
from concept_frequency.assigned import make_pairs, read_corpus, read_test_set, write_pairs
from concept_frequency.concepts import read_concepts
from concept_frequency.config import PRESETS
from concept_frequency.eval import Table
from concept_frequency.published import replay
from concept_frequency.statistics import log_linear_curve, slope_per_decade
from shared import checkpoints, probes, run
from shared.errors import UserError
from shared.evalsets import EvalSet
from studies import concept_frequency_nouns as nouns
from studies.concept_frequency_nouns import RECALL, K
from studies.harness import ceiling, floors, photos, runner, verdicts
from studies.harness.floors import Floor
from studies.harness.report import Comparison
from studies.harness.runner import Arm, Study
from studies.harness.verdicts import Claim

ARMS = (
    Arm("zipf", "train emoji", heading="Zipf frequencies"),
    Arm("uniform", "train emoji-uniform", heading="equal frequencies"),
    Arm("even", "train emoji-log-uniform", heading="frequencies evenly spread over their log"),
    Arm("flatter", "train emoji --exponent 0.5", heading="flatter: rank to the power of -0.5", core=False),
    Arm("reassigned", "train emoji-reassigned", heading="Zipf, ranks given to other concepts", core=False),
)

METRICS = {  # of an arm, with their headings
    "mean_per_class": "mean per class",
    "slope": "points a decade",
    "within": "... same concept",
    "rho": "ρ, bins 1:-1",
    "rho_null": "ρ, shuffled",
    "rho_counted": "ρ on our counts",
    "spearman": "rank r, no bins",
    "tail": "tail benchmark",
    "rest": "the rest",
    "counted_both": "rank r of our counts",
    "misaligned": "misaligned (%)",
    "seconds": "training seconds",
}
PLANTED = 5, 20, 40  # percent of captions exchanged in the Zipf arm, to test whether the misalignment degree detects it
LEARNED = "frequent"  # accuracy on the tenth of concepts that is most frequent in the arm; it must exceed the floor


def claim(text: str, paper: str | None, metric: str, method: str, baseline: str, sign: int = 1, **more) -> Claim:
    """A claim that is judged only if the accuracy of its stronger arm on frequent concepts is above the floor."""
    return Claim(text, paper, metric, method, baseline, sign, learned_by=LEARNED, **more)


RISE, RHO = "accuracy rises with log frequency (points a decade)", "ρ of the bins above that of shuffles"
LEAST_RHO = 0.83  # in the legends of the paper's main figure
EVEN = "frequencies spread evenly over their logarithm, so that the curve has points at all of them"
CLAIMS = (
    claim(RISE, "log-linear", "slope", "even", "0", primary=True, negligible=3.0, where=EVEN),
    claim("slope above that at equal frequency", "implied", "slope_on_even", "even", "uniform", primary=True,
          negligible=3.0, where=EVEN),
    claim("log frequency explains more than frequency (r)", "implied", "r_log", "even", "even:r_linear", primary=True,
          negligible=0.03, where=EVEN),
    claim(RHO, "0.83 to 0.97", "rho", "even", "even:rho_null", effect=LEAST_RHO, primary=True, negligible=0.4,
          where=EVEN),
    claim("rare concepts worse than at equal frequency", "implied", "tail", "zipf", "uniform", -1, primary=True,
          negligible=3.0, where="most concepts of Zipf's law have three to eight pairs"),
    claim(f"Zipf's law: {RISE}", "log-linear", "slope", "zipf", "0"),
    claim("Zipf's law: slope above that at equal frequency", "implied", "slope_on_zipf", "zipf", "uniform"),
    claim("Zipf's law: log frequency explains more than frequency (r)", "implied", "r_log", "zipf", "zipf:r_linear"),
    claim(f"Zipf's law: {RHO}", "0.83 to 0.97", "rho", "zipf", "zipf:rho_null", effect=LEAST_RHO),
    claim(f"Zipf's law, assigned again: {RISE}", "log-linear", "slope", "reassigned", "0"),
    claim(f"flatter law: {RISE}", "log-linear", "slope", "flatter", "0"),
    claim(f"flatter law: {RHO}", "0.83 to 0.97", "rho", "flatter", "flatter:rho_null", effect=LEAST_RHO),
    claim("same concept at another frequency (points a decade)", "implied", "within", "reassigned", "0"),
    claim(
        "its change of log frequency explains more than that of frequency (r)", "implied", "change_r_log", "reassigned",
        "reassigned:change_r_linear",
    ),
    claim("more points lost on the tail benchmark than at equal frequency", "up to 20", "lost", "zipf", "uniform"),
    # the frequent tenth has 0.6 decades more pairs than at equal frequency: about 6.4 points by the slope of pilot runs
    claim("frequent tenth of concepts above equal frequencies", "implied", "head", "zipf", "uniform", negligible=3.2),
    *(
        claim(
            f"misalignment degree with {share} % of captions exchanged, above that with none", None,
            f"misaligned_{share}", "zipf", "zipf:misaligned",
        )
        for share in PLANTED
    ),
)  # fmt: skip


# ------------------------------------------------------------------------------------------------- floors and ceiling


@functools.cache
def concepts() -> list[str]:
    """Names of the concepts; all arms have the same."""
    cfg = PRESETS["emoji"][1]
    offered = EvalSet(cfg.eval_set, lambda image: image).classnames
    corpus = read_corpus(cfg.data, offered, cfg.groups, cfg.num_concepts, strict=False)
    return [concept.name for concept in corpus.concepts]


def of_all(accuracy: float) -> dict[str, float]:
    """The metrics of a model with this mean accuracy, which is also expected on a random tenth of the concepts."""
    return {"mean_per_class": accuracy, "head": accuracy, LEARNED: accuracy}


def pixels() -> dict[str, float]:
    """Accuracy of the nearest training image by raw pixels."""
    eval_set, chosen = PRESETS["emoji"][1].eval_set, set(concepts())
    wanted = torch.tensor([name in chosen for name in EvalSet(eval_set, lambda image: image).classnames])
    splits = []
    for split in ("train", "test"):
        x, labels = floors.read(eval_set, split)
        splits += [x[wanted[labels]], labels[wanted[labels]]]
    return of_all(probes.nearest_neighbour(*splits))


def on_labels() -> dict[str, float]:
    """Accuracy of the image tower trained on labels of all drawings: the ceiling."""
    cfg = PRESETS["emoji"][1]
    tower = functools.partial(ceiling.open_clip_tower, cfg.model)
    return of_all(next(iter(ceiling.trained_on_labels(tower, [cfg.eval_set], classes=concepts(), epochs=100).values())))


FLOORS = (
    Floor("chance", lambda: of_all(100 / PRESETS["emoji"][1].num_concepts)),
    Floor("nearest neighbour on raw pixels", pixels),
    Floor("image tower trained on labels of all drawings", on_labels, ceiling=True),
)


# -------------------------------------------------------------------------------------------- measurements and verdicts


def evaluate(runs: Sequence[str]) -> list[dict[str, Any]]:
    """The metrics of run folders from eval.py, with those of planted misalignment and of comparisons with `zipf`."""
    cfg = evaluation.Config(tuple(runs), eval_set="data/emoji/eval/names_ood")
    results, process = evaluation.main(cfg), run.setup(0, cfg.device)
    by_name = {Path(path).name: found for path, found in zip(runs, results, strict=True)}
    for folder, found in zip(map(Path, runs), results, strict=True):
        seed = folder.name.rpartition("-seed")[2]
        if (zipf := by_name.get(f"zipf-seed{seed}")) is None:
            continue
        benchmark = tail_benchmark(folder.parent / f"let_it_wag-seed{seed}", zipf["concepts"], cfg)
        found |= tail_accuracy(folder, found["concepts"], benchmark, cfg, process)
        found |= beside_zipf(found["concepts"], zipf["concepts"])
        if found is zipf:
            found |= exchanged(folder, list(found["concepts"]), cfg.spacy)
    return results


def exchanged(folder: Path, names: list[str], pipeline: str) -> dict[str, float]:
    """Misalignment degrees of a run's corpus after the captions of PLANTED shares of its pairs were exchanged."""
    settings, _ = train.load_run(folder, "cpu")
    corpus, found = read_corpus(settings.data, names, (), len(names), False), {}
    for share in PLANTED:
        path = folder / f"exchanged-{share}.parquet"
        if not path.exists():
            write_pairs(path, corpus, make_pairs(dataclasses.replace(settings, misaligned=share / 100), corpus)[1])
        found[f"misaligned_{share}"] = evaluation.misaligned(evaluation.count_pairs(path, names, pipeline))
    return found


def column(table: Table, key: str) -> np.ndarray:
    """(K,) values of `key` in the order of the table's concepts."""
    return np.array([row[key] for row in table.values()], dtype=np.float64)


def changes(reference: Sequence[Table], other: Sequence[Table]) -> tuple[np.ndarray, np.ndarray]:
    """(change of log10 frequency, gain in accuracy), each (S, K), from another arm to the reference arm, by seed."""
    pairs = list(zip(reference, other, strict=True))
    frequency = [np.log10(column(a, "assigned")) - np.log10(column(b, "assigned")) for a, b in pairs]
    return np.stack(frequency), np.stack([column(a, "accuracy") - column(b, "accuracy") for a, b in pairs])


def within_slope(changes: ArrayLike, gains: ArrayLike, repetitions: int = 1000, seed: int = 0) -> dict[str, float]:
    """Slope of the gain in score on the change of log10 frequency of the *same* concept, from (S, K) seeds by concepts.

    Properties of a concept that are equal in both arms (such as its difficulty) cancel in the differences. Each seed
    has an intercept, since one arm may be better overall. 95 % bootstrap interval over concepts; a concept is drawn
    with all its seeds. Not in the paper, which has no model at two frequencies.
    """
    x, y = (np.atleast_2d(np.asarray(each, dtype=np.float64)) for each in (changes, gains))
    rng, (_, num_concepts) = np.random.default_rng(seed), x.shape

    def slope(columns: NDArray[np.int64]) -> float:
        dx, dy = x[:, columns], y[:, columns]
        dx = dx - dx.mean(axis=1, keepdims=True)
        return float((dx * dy).sum() / (dx**2).sum())

    drawn = [slope(rng.integers(num_concepts, size=num_concepts)) for _ in range(repetitions)]
    low, high = np.quantile(drawn, (0.025, 0.975))
    return {"slope": slope(np.arange(num_concepts)), "low": float(low), "high": float(high)}


def beside_zipf(own: Table, zipf: Table) -> dict[str, float]:
    """Metrics that compare an arm with the Zipf arm: slope of its accuracy on Zipf frequencies, changes by concept."""
    frequency, accuracy = column(zipf, "assigned"), column(own, "accuracy")
    found = {
        "slope_on_zipf": slope_per_decade(frequency, accuracy, 1)["slope"],
        "head": float(accuracy[frequency >= np.quantile(frequency, 0.9)].mean()),
    }
    if own is not zipf:
        (change,), (gain,) = changes([zipf], [own])
        found["within"] = within_slope(change, gain, 1)["slope"]
        found["change_r_log"] = float(np.corrcoef(change, gain)[0, 1])
        found["change_r_linear"] = float(np.corrcoef(frequency - column(own, "assigned"), gain)[0, 1])
    return found


def tail_benchmark(folder: Path, table: Table, cfg: evaluation.Config) -> Path:
    """Write a tail benchmark for one seed: the half of the concepts that our counts in the Zipf arm find least often.

    Its images are those of the unseen style and held-out drawings of the other styles, on which no arm was trained,
    without near-duplicates. One image is drawn of each class that has more than one (the authors: 450 of more than
    450).
    """
    folder.mkdir(parents=True, exist_ok=True)
    counts, out = folder / "counts.json", folder / "set"
    checkpoints.write_json(counts, {name: row["integrated"] for name, row in table.items()})
    images = (cfg.eval_set, *filter(lambda path: Path(path).is_dir(), [cfg.eval_set.replace("_ood", "_id")]))
    let_it_wag.build(
        let_it_wag.Config(
            counts=(str(counts),), images=tuple(dict.fromkeys(images)), out=str(out), n=len(table) // 2, per_class=1
        )
    )
    return out


def tail_accuracy(
    run_folder: Path, table: Table, benchmark: Path, cfg: evaluation.Config, process: run.Process
) -> dict[str, float]:
    """{"tail": percent on the benchmark, "rest": percent on other concepts' images}, each among all K concepts."""
    settings, model = train.load_run(run_folder, process.device)
    names, tail = list(table), read_concepts(benchmark)
    test = read_test_set(str(benchmark), names, cfg.workers)
    accuracy = evaluation.scored(model, test, names, settings, cfg, process)
    rest = [row["accuracy"] for name, row in table.items() if name not in tail]
    return {"tail": accuracy.nanmean().item(), "rest": float(np.mean(rest)), "tail_classes": len(tail)}


def replay_clone(clone: Path) -> dict[str, Any]:
    """Compute the claims rows of the authors' published files, for `more_rows`."""
    return {"replayed": replay.main(replay.Config(str(clone)))}


def derive(found: Comparison) -> None:
    """Add to each run its accuracy on its most frequent tenth of concepts (on all if they are equally frequent), and
    the points lost on the tail benchmark; to the arms `even` and `uniform` the slope on the frequencies of `even`."""
    for runs in found.arms.values():
        for measured in runs:
            frequency, accuracy = (column(measured["concepts"], key) for key in ("assigned", "accuracy"))
            measured[LEARNED] = float(accuracy[frequency >= np.quantile(frequency, 0.9)].mean())
            if "tail" in measured:
                measured["lost"] = measured["rest"] - measured["tail"]
    even = found.arms.get("even", [])
    for arm in {"even", "uniform"} & set(found.arms):
        for measured, spread in zip(found.arms[arm], even, strict=False):
            frequency, accuracy = column(spread["concepts"], "assigned"), column(measured["concepts"], "accuracy")
            measured["slope_on_even"] = slope_per_decade(frequency, accuracy, 1)["slope"]


def tables_of(runs: Sequence[dict[str, Any]]) -> list[Table]:
    """The table of concepts of each run."""
    return [measured["concepts"] for measured in runs]


def pooled_within(zipf: list[Table], reassigned: list[Table]) -> dict[str, Any]:
    """A claims row: the slope within concepts over all seeds, with a bootstrap interval over concepts.

    The interval does not include the variation between training runs, so the row has no verdict.
    """
    found = within_slope(*changes(zipf, reassigned))
    low, high = found["low"], found["high"]
    return {
        "claim": f"... all {len(zipf)} seeds together, 95 % bootstrap over concepts", "primary": False, "paper": "-",
        "metric": "within", "difference": found["slope"], "interval": [low, high], "resolves": (high - low) / 2,
        "verdict": "no claim",
    }  # fmt: skip


def pooled_rows(found: Comparison, reference: str, other: str) -> list[dict[str, Any]]:
    """`pooled_within` of two arms; no row if one is missing or a run has no table, as in results that are extended."""
    arms = [found.arms.get(arm, []) for arm in (reference, other)]
    if not all(arms) or not all("concepts" in measured for runs in arms for measured in runs):
        return []
    return [pooled_within(*map(tables_of, arms))]


NOT_REPLAYED = "published files: all correlations"


def variables_of(summary: dict) -> str:
    """The variable of make with which the published files were replayed, if they were."""
    return "" if NOT_REPLAYED in (row["claim"] for row in summary["claims"]) else "UPSTREAM=CLONE"


def more_rows(found: Comparison, replayed: Sequence[dict[str, str]] = ()) -> list[dict[str, Any]]:
    """Rows for all seeds together, for the published files, and for claims that cannot be tested at this scale."""
    if "zipf" not in found.arms:
        raise UserError("--report needs the arm zipf among the runs")
    rows = pooled_rows(found, "zipf", "reassigned")
    files = verdicts.not_testable(NOT_REPLAYED, "0.83 to 1.00", "name UPSTREAM=CLONE")
    corpora = verdicts.not_testable("34 models, RAM++ tags, 4,029 concepts in 400M pairs", "-", "needs the corpora")
    return [*rows, *(map(as_row, replayed) if replayed else [files]), corpora]


def as_row(claim: dict[str, str]) -> dict[str, Any]:
    """The row of the claims table for a claim of the replay, which does not compare arms."""
    return verdicts.not_testable(claim["claim"], claim["paper"], claim["here"]) | {"verdict": claim["verdict"]}


# ---------------------------------------------------------------------------------------------------------------- plots

COLORS = plt.get_cmap("tab10").colors


def plot(found: Comparison, out: Path) -> None:
    """Draw concept_frequency_curves.png: accuracy by frequency; and with the arm `reassigned` of ARMS=all, the changes
    of both for the same concept."""
    tables = {arm: tables_of(runs) for arm, runs in found.arms.items()}
    panels = 1 + ("reassigned" in tables)
    figure, axes = plt.subplots(1, panels, figsize=(5.5 * panels, 4.2), squeeze=False)
    left, right = axes[0, 0], axes[0, -1]
    for color, (arm, label) in zip(COLORS, STUDY.headings.items(), strict=False):
        if arm in tables:
            plot_arm(left, tables, arm, color, label)
    left.set(
        xscale="log", xlabel="concept frequency, right edge of the bin", ylabel="accuracy, unseen style (%)",
        title="between concepts: mean of a bin, ± 95 % over concepts",
    )  # fmt: skip
    left.set_ylim(bottom=-2)
    left.legend(fontsize=8, loc="upper left")
    if "reassigned" in tables:
        plot_changes(right, *changes(tables["zipf"], tables["reassigned"]))
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(out / "concept_frequency_curves.png", dpi=110)
    plt.close(figure)


def plot_arm(axis: plt.Axes, tables: dict[str, list[Table]], arm: str, color, label: str) -> None:
    """Draw the bins of an arm over all seeds. The arm of equal frequencies is drawn at the Zipf arm's frequencies."""
    placed = tables["zipf" if arm == "uniform" else arm]
    frequency = np.concatenate([column(table, "assigned") for table in placed])
    curve = log_linear_curve(
        frequency, np.concatenate([column(table, "accuracy") for table in tables[arm]]), evaluation.NUM_BINS
    )
    error = 1.96 * curve.std / np.sqrt(np.maximum(curve.size / len(placed), 1))  # seeds have the same concepts
    label += ", at the Zipf arm's" * (arm == "uniform")
    low = np.minimum(error, curve.mean)  # no accuracy is below 0
    shift = 1.05 ** (list(STUDY.headings).index(arm) - 1)  # so that arms do not overlap
    axis.errorbar(curve.position * shift, curve.mean, (low, error), marker="o", capsize=2, color=color, label=label)


def plot_changes(axis: plt.Axes, change: np.ndarray, gain: np.ndarray) -> None:
    """Draw each concept of each seed, the means of ten bins of equal size, and the line of `within_slope`."""
    found = within_slope(change, gain)
    axis.scatter(change, gain, s=4, alpha=0.15, color="grey", label="a concept in one seed")
    order = np.argsort(change, axis=None)
    bins = np.array_split(order, 10)
    x, y = ([values.flat[rows].mean() for rows in bins] for values in (change, gain))
    error = [1.96 * gain.flat[rows].std() / np.sqrt(len(rows) / len(gain)) for rows in bins]
    axis.errorbar(x, y, error, fmt="o", capsize=2, color=COLORS[2], label="mean of a tenth of them")
    ends = np.array([change.min(), change.max()])
    label = f"{found['slope']:.1f} points a decade ({found['low']:.1f} to {found['high']:.1f})"
    axis.plot(ends, gain.mean() + found["slope"] * (ends - change.mean()), color="black", label=label)
    axis.set(
        xlabel="change of log10 frequency between two assignments", ylabel="change of accuracy (points)",
        title="within concepts: the same one at two frequencies",
    )  # fmt: skip
    axis.legend(fontsize=8, loc="lower right")


STUDY = Study(
    folder="concept_frequency",
    paper='No "zero-shot" without exponential data (arXiv 2404.04125)',
    stands_for="CC3M to LAION-400M",
    corpus="Embedded emoji corpus, of which 400 concepts with frequencies assigned at random; all towers from scratch",
    arms=ARMS,
    minutes={"core": 2, "all": 4},
    terms="Frequency: the number of training pairs of a concept; a decade: ten times as many. Slope: points of "
    "accuracy per decade. r: correlation of accuracy with (log) frequency over concepts. ρ: the same after averaging "
    "in bins of log frequency, as the paper does; shuffles: with accuracies exchanged among concepts.",
    evaluate=evaluate,
    derive=derive,
    metrics=METRICS | {LEARNED: "frequent tenth"},
    small=("slope", "slope_on_even", "r_log", "rho", "tail"),
    sets=(PRESETS["emoji"][1].eval_set,),
    floors=FLOORS,
    claims=CLAIMS,
    more_rows=more_rows,
    plot=plot,
    upstream=replay_clone,
    variables_of=variables_of,
)


# ---------------------------------------------------------------------------------------------------------- photographs


NOUNS = "nouns of captions occur with each other, so a noun's recall depends on others' frequencies, too"


def of_nouns(text: str, paper: str, metric: str, method: str, baseline: str, d: float | None = None) -> Claim:
    """A claim about nouns of captions, which is primary if it has a d."""
    effect = LEAST_RHO if metric == "rho" else None
    return Claim(text, paper, metric, method, baseline, 1, effect, d is not None, d, RECALL, NOUNS)


PHOTOS_CLAIMS = (  # a claim with the text of one in CLAIMS tests the same
    of_nouns("accuracy rises with log frequency (points a decade)", "log-linear", "slope", "captions", "0", 1.0),
    of_nouns(
        "log frequency explains more than frequency (r)", "implied", "r_log", "captions", "captions:r_linear", 0.03
    ),
    of_nouns("ρ of the bins above that of shuffles", "0.83 to 0.97", "rho", "captions", "captions:rho_null", 0.4),
    of_nouns("same concept at another frequency (points a decade)", "implied", "within", "thinned", "0"),
    of_nouns("recall of texts rises with log frequency (points a decade)", "log-linear", "slope_i2t", "captions", "0"),
    of_nouns("... log frequency explains more (r)", "implied", "r_log_i2t", "captions", "captions:r_linear_i2t"),
    of_nouns("... ρ above that of shuffles", "0.83 to 0.97", "rho_i2t", "captions", "captions:rho_null_i2t"),
)


def derive_photos(found: Comparison) -> None:
    """Add to each `thinned` run its slope within nouns: how a noun's recall changes with its log frequency, relative to
    the `captions` run of the same seed."""
    for other, all_captions in zip(found.arms.get("thinned", []), found.arms.get("captions", []), strict=False):
        (change,), (gain,) = changes([all_captions["concepts"]], [other["concepts"]])
        other["within"] = within_slope(change, gain, 1)["slope"]


def more_rows_on_photos(found: Comparison, **_: Any) -> list[dict[str, Any]]:
    """Claims rows: the slope within nouns over all seeds together, and what this scale cannot show."""
    corpora = verdicts.not_testable("34 models, RAM++ tags, 4,029 concepts in 400M pairs", "-", "needs the corpora")
    return [*pooled_rows(found, "captions", "thinned"), corpora]


def chance_of_photos() -> dict[str, float]:
    found = floors.chance([photos.RETRIEVAL])
    return found | {"slope": 0.0, "slope_i2t": 0.0}


def correlation_floor(shards: str, own: bool) -> dict[str, float]:
    """Metrics of canonical correlation with words, which takes no gradient step, and its curve over the same counts.

    `shards` and `own` are those of `photos.training_set`.
    """
    features, of_image = photos.training_set(shards, own=own)
    found, test = photos.correlate(features, [" ".join(texts) for texts in of_image]), nouns.test_set()
    counts = nouns.nouns_of_captions(nouns.Config.data).sum(0)
    numbers = nouns.curve_of(found.image(test.features), found.text(test.captions), counts)
    return {key: value for key, value in numbers.items() if key != "concepts"}


_, JOINED, SINGLE = photos.floors_on(photos.RETRIEVAL)
PHOTOS_FLOORS = (
    Floor("chance", chance_of_photos),
    dataclasses.replace(JOINED, measure=functools.partial(correlation_floor, photos.JOINED, own=False)),
    dataclasses.replace(SINGLE, measure=functools.partial(correlation_floor, photos.SINGLE, own=True)),
)


def plot_photos(found: Comparison, out: Path) -> None:
    """concept_frequency_photos.png: recall of nouns against their frequency; changes of both for the same noun."""
    tables = {arm: [measured["concepts"] for measured in runs] for arm, runs in found.arms.items()}
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
    for color, (arm, of_arm) in zip(COLORS, tables.items(), strict=False):
        counts, scores = (np.concatenate([column(table, key) for table in of_arm]) for key in ("assigned", "accuracy"))
        curve = log_linear_curve(counts, scores, evaluation.NUM_BINS)
        error = 1.96 * curve.std / np.sqrt(np.maximum(curve.size / len(of_arm), 1))
        left.errorbar(curve.position, curve.mean, error, marker="o", capsize=2, color=color, label=PHOTOS.headings[arm])
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


PHOTOS = Study(
    folder="concept_frequency",
    on="photos",
    paper='No "zero-shot" without exponential data (arXiv 2404.04125)',
    stands_for="CC3M to LAION-400M",
    corpus=f"Flickr8k, {photos.RESIZED}: 30,000 English captions and the nouns in them; EfficientNet-Lite0 was "
    "pretrained on ImageNet-1k and is locked, its projection and the text tower are from scratch",
    before=(photos.FLICKR8K, photos.CAPTIONS, photos.FEATURES),
    arms=(
        Arm("captions", "studies.concept_frequency_nouns", heading="all captions"),
        Arm("thinned", "studies.concept_frequency_nouns --thin 0.75", heading="a random half of the nouns rarer"),
    ),
    minutes={"core": 2, "all": 2},
    evaluate=nouns.evaluate,
    derive=derive_photos,
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
        "seconds": "training seconds",
    },
    sets=(photos.RETRIEVAL,),
    floors=PHOTOS_FLOORS,
    claims=PHOTOS_CLAIMS,
    more_rows=more_rows_on_photos,
    plot=plot_photos,
)

if __name__ == "__main__":
    runner.main(STUDY)
