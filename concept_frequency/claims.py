"""What the paper claims, in the terms of the controlled experiment, and the comparison of its arms.

The arms are run folders ARM-seedN that the Makefile trains and eval.py measures. Verdicts are computed by
`shared.report.judge` from differences paired by seed.
"""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from concept_frequency.curves import log_linear_curve, slope_per_decade
from shared import report, run

ARMS = {  # run folders ARM-seedN
    "zipf": "Zipf frequencies",
    "uniform": "equal frequencies",
    "reassigned": "Zipf, ranks given to other concepts",
}
METRICS = {
    "top1": "top-1",
    "slope": "points a decade",
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


def claims() -> list[report.Claim]:
    """Differences between arms, or between two measures of one arm ("arm:metric" stands for the baseline)."""
    return [
        report.Claim("accuracy rises with log frequency (points a decade)", "log-linear", "slope", "zipf", "0", 1),
        report.Claim("... and not on the same concepts, made equal", "implied", "slope_on_zipf", "zipf", "uniform", 1),
        report.Claim("... and for another assignment of frequencies", "log-linear", "slope", "reassigned", "0", 1),
        report.Claim("ρ of the bins above that of shuffles", "0.83 to 0.97", "rho", "zipf", "zipf:rho_null", 1),
        report.Claim("accuracy changes with frequency (r of changes)", "implied", "difference_r", "reassigned", "0", 1),
        report.Claim("log frequency explains more than frequency (r)", "implied", "r_log", "zipf", "zipf:r_linear", 1),
        report.Claim("points lost on the tail benchmark", "22.7", "rest", "zipf", "zipf:tail", 1),
        report.Claim("... fewer with equal frequencies", "implied", "tail", "uniform", "zipf", 1),
        report.Claim("frequent tenth of concepts above equal frequencies", "implied", "head", "zipf", "uniform", 1),
        report.Claim(
            f"misalignment degree with {PLANTED} % of captions exchanged", f"{PLANTED} planted", "misaligned_planted",
            "zipf", "zipf:misaligned", 1, PLANTED,
        ),
    ]  # fmt: skip


def across_arms(by_arm: dict[str, dict], tables: dict[str, dict[str, dict]]) -> None:
    """Add to one seed's metrics what takes more than one arm; `tables` are concept -> assigned, accuracy."""
    names = list(tables["zipf"])
    accuracy = {arm: np.array([table[name]["accuracy"] for name in names]) for arm, table in tables.items()}
    frequency = {arm: np.array([table[name]["assigned"] for name in names]) for arm, table in tables.items()}
    frequent = frequency["zipf"] >= np.quantile(frequency["zipf"], 0.9)
    for arm in tables:
        by_arm[arm]["slope_on_zipf"] = slope_per_decade(frequency["zipf"], accuracy[arm], 1)["slope"]
        by_arm[arm]["head"] = float(accuracy[arm][frequent].mean())
        change = np.log(frequency["zipf"]) - np.log(frequency[arm])
        gain = accuracy["zipf"] - accuracy[arm]
        if arm == "reassigned":
            by_arm[arm]["difference_r"] = float(np.corrcoef(change, gain)[0, 1])


def compare(runs: list[str], results: list[tuple[dict, dict]], path: Path, replay: str | None) -> None:
    """Group runs by arm and seed, judge the claims, print the tables, write `path` and the plots beside it."""
    arms: dict[str, dict[int, dict]] = {}
    tables: dict[str, dict[int, dict]] = {}
    commits: set[str] = set()
    for folder, (metrics, table) in zip(map(Path, runs), results, strict=True):
        arm, _, seed = folder.name.rpartition("-seed")
        if not arm or not seed.isdigit():
            raise ValueError(f"--report compares run folders named ARM-seedN, not {folder}")
        state = run.load_checkpoint(folder / "checkpoint.pt")
        cfg = state["config"]
        if state["step"] < cfg["epochs"] * (cfg["total"] // cfg["batch_size"]):
            raise ValueError(f"{folder} is not finished: it stands at step {state['step']}")
        commits.add(state.get("commit", "unknown"))
        arms.setdefault(arm, {})[int(seed)] = dict(metrics)
        tables.setdefault(arm, {})[int(seed)] = table
    if "zipf" not in arms:
        raise ValueError("--report needs the arm zipf among the runs")
    order = [arm for arm in ARMS if arm in arms] + sorted(set(arms) - set(ARMS))
    seeds = sorted(arms["zipf"])
    for arm in order:
        if sorted(arms[arm]) != seeds:
            raise ValueError(f"arm {arm} has seeds {sorted(arms[arm])}, but zipf has {seeds}")
    for seed in seeds:
        across_arms({arm: arms[arm][seed] for arm in order}, {arm: tables[arm][seed] for arm in order})
    by_seed = {arm: [arms[arm][seed] for seed in seeds] for arm in order}

    rows = []
    for claim in claims():
        arm, _, metric = claim.baseline.partition(":")
        if claim.method not in by_seed or (arm != "0" and arm not in by_seed):
            continue
        method = [values[claim.metric] for values in by_seed[claim.method]]
        baseline = [0.0] * len(seeds) if arm == "0" else [values[metric or claim.metric] for values in by_seed[arm]]
        rows.append(report.judge(claim, method, baseline))
    if replay:
        rows += json.loads(Path(replay).read_text())["claims"]
    else:
        rows.append(report.untestable("published files: all correlations", "0.83 to 1.00", "name RESULTS=CLONE"))
    rows.append(report.untestable("34 models, RAM++ tags, 4,029 concepts in 400M pairs", "-", "needs the corpora"))
    title = 'No "zero-shot" without exponential data (arXiv 2404.04125)'
    summary = report.results(title, seeds, by_seed, rows, commits)
    report.save(path, summary)
    plot_curves({arm: [tables[arm][seed] for seed in seeds] for arm in order}, path.parent)
    slopes = ", ".join(f"{m['slope']:.1f} ({m['slope_low']:.1f} to {m['slope_high']:.1f})" for m in by_seed["zipf"])
    print(f"\nEmbedded emoji corpus, a stand-in; seeds {', '.join(map(str, seeds))}; percent; mean ± std\n")
    print(report.arms_table(summary["arms"], METRICS))
    print(f"\nPoints a decade of the Zipf arm, 95 % bootstrap over concepts, by seed: {slopes}")
    print(f"\nDifferences paired by seed, ± 95 % interval\n\n{report.table(rows)}\n\nwritten to {path}")


def plot_curves(tables: dict[str, list[dict[str, dict]]], out: Path) -> None:
    """concept_frequency_curves.png: accuracy on the Zipf arm's frequencies; differences of two assignments."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
    names = [list(table) for table in tables["zipf"]]
    column = lambda arm, key: np.concatenate(  # noqa: E731
        [[table[name][key] for name in order] for table, order in zip(tables[arm], names, strict=True)]
    )
    frequency = column("zipf", "assigned")
    for color, (arm, label) in zip(plt.get_cmap("tab10").colors, ARMS.items(), strict=False):
        if arm in tables:
            own = column(arm, "assigned") if arm == "reassigned" else frequency
            curve = log_linear_curve(own, column(arm, "accuracy"), 8)
            error = 1.96 * curve.std / np.sqrt(curve.size)
            left.errorbar(curve.position, curve.mean, error, marker="o", capsize=2, color=color, label=label)
    left.set(xscale="log", xlabel="concept frequency (equal arm: of the Zipf arm)", ylabel="accuracy, unseen style (%)")
    left.legend(fontsize=8)
    if "reassigned" in tables:
        change = np.log10(frequency) - np.log10(column("reassigned", "assigned"))
        gain = column("zipf", "accuracy") - column("reassigned", "accuracy")
        right.scatter(change, gain, s=4, alpha=0.3)
        right.plot(np.sort(change), np.polyval(np.polyfit(change, gain, 1), np.sort(change)), color="black")
        right.set(xlabel="change of log10 frequency between two assignments", ylabel="change of accuracy (points)")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(out / "concept_frequency_curves.png", dpi=110)
    plt.close(figure)
