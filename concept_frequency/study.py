"""The small-scale study of concept frequency: `python -m concept_frequency.study` (`make reproduce-concept-frequency`).

The arms of the controlled experiment are trained on the embedded emoji corpus, a stand-in for CC-3M to LAION-400M, and
compared seed by seed. With a clone of the authors' repository (--upstream), the paper's figures are derived from their
published files as well.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from concept_frequency import eval as evaluation
from concept_frequency import replay
from concept_frequency.curves import log_linear_curve, within_slope
from concept_frequency.eval import PLANTED, Table, changes, column
from shared import run
from shared.study import runner, statistics
from shared.study.report import Comparison
from shared.study.runner import Arm, Study
from shared.study.statistics import Claim

ARMS = (
    Arm("zipf", "train emoji", heading="Zipf frequencies"),
    Arm("uniform", "train emoji-uniform", heading="equal frequencies"),
    Arm("reassigned", "train emoji-reassigned", heading="Zipf, ranks given to other concepts"),
)

CLAIMS = (  # an arm against another, against zero ("0"), or against another metric of the same arm ("arm:metric")
    Claim("accuracy rises with log frequency (points a decade)", "log-linear", "slope", "zipf", "0"),
    Claim("... and not on the same concepts, made equal", "implied", "slope_on_zipf", "zipf", "uniform"),
    Claim("... and for another assignment of frequencies", "log-linear", "slope", "reassigned", "0"),
    Claim("same concept at another frequency (points a decade)", "implied", "within", "reassigned", "0"),
    Claim("... from equal frequency to Zipf's", "implied", "within", "uniform", "0"),
    Claim("log frequency explains more than frequency (r)", "implied", "r_log", "zipf", "zipf:r_linear"),
    Claim(
        "... and its change more than the change of frequency (r)", "implied", "change_r_log", "reassigned",
        "reassigned:change_r_linear",
    ),
    Claim("ρ of the bins above that of shuffles", "0.83 to 0.97", "rho", "zipf", "zipf:rho_null"),
    Claim("points lost on the tail benchmark", "22.7", "rest", "zipf", "zipf:tail"),
    Claim("... fewer with equal frequencies", "implied", "tail", "uniform", "zipf"),
    Claim("frequent tenth of concepts above equal frequencies", "implied", "head", "zipf", "uniform"),
    Claim(
        f"misalignment degree with {PLANTED} % of captions exchanged", f"{PLANTED} planted", "misaligned_planted",
        "zipf", "zipf:misaligned", 1, PLANTED,
    ),
)  # fmt: skip


# -------------------------------------------------------------------------------------------- measurements and verdicts


def evaluate(runs: Sequence[str]) -> list[dict[str, Any]]:
    """What eval.py measures of run folders, with what takes two arms."""
    cfg = evaluation.Config(runs=tuple(runs))
    results = evaluation.main(cfg)
    evaluation.add_comparisons(results, cfg, run.setup(0, cfg.device))
    return results


def replay_clone(clone: Path) -> dict[str, Any]:
    """Claims rows of the authors' published files, for `more_rows`."""
    return {"replayed": replay.main(replay.Config(str(clone)))}


def tables_of(runs: Sequence[dict[str, Any]]) -> list[Table]:
    """The table of concepts of each seed."""
    return [measured["concepts"] for measured in runs]


def judged(arms: dict[str, list[dict[str, Any]]]) -> list[dict[str, str]]:
    """A row for each claim whose arms were run."""
    rows = []
    for claim in CLAIMS:
        arm, _, metric = claim.baseline.partition(":")
        if claim.method not in arms or (arm != "0" and arm not in arms):
            continue
        method = [values[claim.metric] for values in arms[claim.method]]
        baseline = [values[metric or claim.metric] for values in arms[arm]] if arm != "0" else [0.0] * len(method)
        rows.append(statistics.judge(claim, method, baseline))
        if claim.metric == "within" and claim.method == "reassigned":
            rows.append(pooled_within(tables_of(arms["zipf"]), tables_of(arms["reassigned"])))
    return rows


def pooled_within(zipf: list[Table], reassigned: list[Table]) -> dict[str, str]:
    """A claims row: the slope within concepts of all seeds together, judged by its bootstrap over concepts.

    One seed gets an interval but no verdict: how much another training run would change is not in it.
    """
    found, seeds = within_slope(*changes(zipf, reassigned)), len(zipf)
    low, high = found["low"], found["high"]
    if seeds < 2 or low <= 0 <= high:
        verdict = "not resolved at this scale"
    else:
        verdict = "reproduced" if low > 0 else "not reproduced"
    return {
        "claim": f"... all {seeds} seeds together, 95 % bootstrap over concepts", "paper": "implied",
        "here": f"{found['slope']:+.2f} ({low:.2f} to {high:.2f})", "verdict": verdict,
    }  # fmt: skip


def more_rows(found: Comparison, replayed: Sequence[dict[str, str]] = ()) -> list[dict[str, str]]:
    """All rows of the table of claims: of the arms, of the published files, and of what this scale cannot show."""
    if "zipf" not in found.arms:
        raise ValueError("--report needs the arm zipf among the runs")
    slopes = [f"{m['slope']:.1f} ({m['slope_low']:.1f} to {m['slope_high']:.1f})" for m in found.arms["zipf"]]
    print(f"Points a decade of the Zipf arm, 95 % bootstrap over concepts, by seed: {', '.join(slopes)}")
    files = statistics.untestable("published files: all correlations", "0.83 to 1.00", "name RESULTS=CLONE")
    corpora = statistics.untestable("34 models, RAM++ tags, 4,029 concepts in 400M pairs", "-", "needs the corpora")
    return [*judged(found.arms), *(replayed or [files]), corpora]


# ---------------------------------------------------------------------------------------------------------------- plots

COLORS = plt.get_cmap("tab10").colors


def plot(found: Comparison, out: Path) -> None:
    """concept_frequency_curves.png: accuracy against frequency; the change of both for the same concept."""
    tables = {arm: tables_of(runs) for arm, runs in found.arms.items()}
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
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
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(out / "concept_frequency_curves.png", dpi=110)
    plt.close(figure)


def plot_arm(axis: plt.Axes, tables: dict[str, list[Table]], arm: str, color, label: str) -> None:
    """Bins of an arm, all seeds pooled; equal frequencies are drawn at those of the Zipf arm, where they are flat."""
    placed = tables["zipf" if arm == "uniform" else arm]
    frequency = np.concatenate([column(table, "assigned") for table in placed])
    curve = log_linear_curve(
        frequency, np.concatenate([column(table, "accuracy") for table in tables[arm]]), evaluation.NUM_BINS
    )
    error = 1.96 * curve.std / np.sqrt(np.maximum(curve.size / len(placed), 1))  # seeds share their concepts
    label += ", at the Zipf arm's" * (arm == "uniform")
    low = np.minimum(error, curve.mean)  # no accuracy is below 0
    shift = 1.05 ** (list(STUDY.headings).index(arm) - 1)  # arms side by side
    axis.errorbar(curve.position * shift, curve.mean, (low, error), marker="o", capsize=2, color=color, label=label)


def plot_changes(axis: plt.Axes, change: np.ndarray, gain: np.ndarray) -> None:
    """Every concept of every seed, their means in ten bins of equal size, and the line of `within_slope`."""
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
    arms=ARMS,
    minutes={"core": 6, "all": 6},
    evaluate=evaluate,
    metrics=evaluation.METRICS,
    more_rows=more_rows,
    plot=plot,
    upstream=replay_clone,
)

if __name__ == "__main__":
    runner.main(STUDY)
