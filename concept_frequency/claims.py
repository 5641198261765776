"""What the paper claims, in the terms of the controlled experiment, and the comparison of its arms.

The arms are run folders ARM-seedN that the Makefile trains and eval.py measures. Verdicts are computed by
`shared.statistics.judge` from differences paired by seed.
"""

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from concept_frequency.curves import log_linear_curve, slope_per_decade, within_slope
from shared import checkpoints
from shared.study import report, statistics

Table = dict[str, dict[str, float]]  # of one run: concept -> assigned, text, image, integrated, accuracy

ARMS = {  # run folders ARM-seedN
    "zipf": "Zipf frequencies",
    "uniform": "equal frequencies",
    "reassigned": "Zipf, ranks given to other concepts",
}
METRICS = {
    "top1": "top-1",
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
    "seconds": "seconds",
}
PLANTED = 20  # percent of captions exchanged, to see whether the misalignment degree shows it


def claims() -> list[statistics.Claim]:
    """Differences between arms, or between two measures of one arm ("arm:metric" stands for the baseline; "0")."""
    return [
        statistics.Claim("accuracy rises with log frequency (points a decade)", "log-linear", "slope", "zipf", "0"),
        statistics.Claim("... and not on the same concepts, made equal", "implied", "slope_on_zipf", "zipf", "uniform"),
        statistics.Claim("... and for another assignment of frequencies", "log-linear", "slope", "reassigned", "0"),
        statistics.Claim("same concept at another frequency (points a decade)", "implied", "within", "reassigned", "0"),
        statistics.Claim("... from equal frequency to Zipf's", "implied", "within", "uniform", "0"),
        statistics.Claim("log frequency explains more than frequency (r)", "implied", "r_log", "zipf", "zipf:r_linear"),
        statistics.Claim(
            "... and its change more than the change of frequency (r)", "implied", "change_r_log", "reassigned",
            "reassigned:change_r_linear",
        ),
        statistics.Claim("ρ of the bins above that of shuffles", "0.83 to 0.97", "rho", "zipf", "zipf:rho_null"),
        statistics.Claim("points lost on the tail benchmark", "22.7", "rest", "zipf", "zipf:tail"),
        statistics.Claim("... fewer with equal frequencies", "implied", "tail", "uniform", "zipf"),
        statistics.Claim("frequent tenth of concepts above equal frequencies", "implied", "head", "zipf", "uniform"),
        statistics.Claim(
            f"misalignment degree with {PLANTED} % of captions exchanged", f"{PLANTED} planted", "misaligned_planted",
            "zipf", "zipf:misaligned", 1, PLANTED,
        ),
    ]  # fmt: skip


def column(table: Table, key: str) -> np.ndarray:
    """(K,) of one run, concepts in the order of the table."""
    return np.array([row[key] for row in table.values()], dtype=np.float64)


def changes(reference: Sequence[Table], other: Sequence[Table]) -> tuple[np.ndarray, np.ndarray]:
    """(change of log10 frequency, gain in accuracy), (S, K) each, of the reference over another arm, by seed."""
    pairs = list(zip(reference, other, strict=True))
    frequency = [np.log10(column(a, "assigned")) - np.log10(column(b, "assigned")) for a, b in pairs]
    return np.stack(frequency), np.stack([column(a, "accuracy") - column(b, "accuracy") for a, b in pairs])


def across_arms(metrics: dict[str, list[dict]], tables: dict[str, list[Table]]) -> None:
    """Add to each run's metrics what takes two arms: the run's own and zipf's of the same seed."""
    for arm, runs in tables.items():
        for found, own, zipf in zip(metrics[arm], runs, tables["zipf"], strict=True):
            frequency, accuracy = column(zipf, "assigned"), column(own, "accuracy")
            found["slope_on_zipf"] = slope_per_decade(frequency, accuracy, 1)["slope"]
            found["head"] = float(accuracy[frequency >= np.quantile(frequency, 0.9)].mean())
            if arm == "zipf":
                continue
            (change,), (gain,) = changes([zipf], [own])
            found["within"] = within_slope(change, gain, 1)["slope"]
            found["change_r_log"] = float(np.corrcoef(change, gain)[0, 1])
            found["change_r_linear"] = float(np.corrcoef(frequency - column(own, "assigned"), gain)[0, 1])


def pooled_within(tables: dict[str, list[Table]]) -> dict[str, str]:
    """A claims row: the slope within concepts of all seeds together, judged by its bootstrap over concepts.

    Of one seed the interval is shown, but how much another training would change is not in it: no verdict.
    """
    found, seeds = within_slope(*changes(tables["zipf"], tables["reassigned"])), len(tables["zipf"])
    low, high = found["low"], found["high"]
    if seeds < 2 or low <= 0 <= high:
        verdict = "not resolved at this scale"
    else:
        verdict = "reproduced" if low > 0 else "not reproduced"
    return {
        "claim": f"... all {seeds} seeds together, 95 % bootstrap over concepts", "paper": "implied",
        "here": f"{found['slope']:+.2f} ({low:.2f} to {high:.2f})", "verdict": verdict,
    }  # fmt: skip


def judged(metrics: dict[str, list[dict]], tables: dict[str, list[Table]]) -> list[dict[str, str]]:
    """A row for each claim whose arms were run."""
    rows = []
    for claim in claims():
        arm, _, metric = claim.baseline.partition(":")
        if claim.method not in metrics or (arm != "0" and arm not in metrics):
            continue
        method = [values[claim.metric] for values in metrics[claim.method]]
        baseline = [values[metric or claim.metric] for values in metrics[arm]] if arm != "0" else [0.0] * len(method)
        rows.append(statistics.judge(claim, method, baseline))
        if claim.metric == "within" and claim.method == "reassigned":
            rows.append(pooled_within(tables))
    return rows


def compare(runs: Sequence[str], results: Sequence[tuple[dict, Table]], path: Path, replay: str | None) -> None:
    """Group runs by arm and seed, judge the claims, print the tables, write `path` and the plots beside it."""
    found = report.compare_runs(runs, [{"metrics": dict(m), "table": t} for m, t in results], ARMS)
    if "zipf" not in found.arms:
        raise ValueError("--report needs the arm zipf among the runs")
    metrics = {arm: [each["metrics"] for each in of_seed] for arm, of_seed in found.arms.items()}
    tables = {arm: [each["table"] for each in of_seed] for arm, of_seed in found.arms.items()}
    across_arms(metrics, tables)
    rows = judged(metrics, tables)
    if replay:
        rows += checkpoints.read_json(Path(replay))["claims"]
    else:
        rows.append(statistics.untestable("published files: all correlations", "0.83 to 1.00", "name RESULTS=CLONE"))
    rows.append(statistics.untestable("34 models, RAM++ tags, 4,029 concepts in 400M pairs", "-", "needs the corpora"))
    title = 'No "zero-shot" without exponential data (arXiv 2404.04125)'
    summary = report.results(title, found.seeds, metrics, rows, found.commits)
    checkpoints.write_json(path, summary)
    plot_curves(tables, path.parent)
    slopes = ", ".join(f"{m['slope']:.1f} ({m['slope_low']:.1f} to {m['slope_high']:.1f})" for m in metrics["zipf"])
    report.show(summary, METRICS, "CC3M to LAION-400M", path)
    print(f"\nPoints a decade of the Zipf arm, 95 % bootstrap over concepts, by seed: {slopes}")


COLORS = plt.get_cmap("tab10").colors


def plot_curves(tables: dict[str, list[Table]], out: Path) -> None:
    """concept_frequency_curves.png: accuracy against frequency; the change of both for the same concept."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
    for color, (arm, label) in zip(COLORS, ARMS.items(), strict=False):
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
    curve = log_linear_curve(frequency, np.concatenate([column(table, "accuracy") for table in tables[arm]]), 8)
    error = 1.96 * curve.std / np.sqrt(np.maximum(curve.size / len(placed), 1))  # seeds share their concepts
    label += ", at the Zipf arm's" * (arm == "uniform")
    low = np.minimum(error, curve.mean)  # no accuracy is below 0
    shift = 1.05 ** (list(ARMS).index(arm) - 1)  # arms side by side
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
