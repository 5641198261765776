"""Logs of runs that count, and what is made from them again.

DIR/logs/PAPER/ARM.jsonl beside a results file DIR/PAPER.json has the settings of an arm and, for each seed, the metrics
that its tables need and a thinned curve. `python -m studies.harness recompute` makes tables and verdicts from them.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from scipy.stats import t as student_t

from shared.checkpoints import read_json, write_text
from shared.errors import UserError
from shared.evaluation import table
from shared.run import read_metrics
from studies.harness import report, verdicts

POINTS = 24  # of a curve


def beside(results: Path) -> Path:
    """Folder of the logs of a results file."""
    return results.parent / "logs" / results.stem


def needed(study: Any) -> set[str]:
    """The metrics of an arm's table and of claims."""
    of_claims = {name for claim in study.claims for name in (claim.metric, claim.learned_by)}
    return of_claims | {claim.baseline.partition(":")[2] for claim in study.claims} | set(study.metrics)


def curve(folder: Path) -> dict[str, list]:
    """At most POINTS points of a run's loss and of its score: {"loss": [[step, value], ...], "zero_shot_top1": ...}."""
    found = {}
    for key in ("loss", "zero_shot_top1"):
        lines = read_metrics(folder, key) if (folder / "metrics.jsonl").is_file() else []
        rows = sorted({round(i) for i in np.linspace(0, len(lines) - 1, min(POINTS, len(lines)))})
        if lines:
            found[key] = [[lines[row]["step"], float(f"{lines[row][key]:.4g}")] for row in rows]
    return found


def write(study: Any, found: report.Comparison, folder: Path) -> None:
    """Write the logs of all runs: a first line with an arm's settings, then a line for each seed."""
    wanted, by_picture = needed(study), report.by_picture(study, found.arms)
    for arm, runs in found.arms.items():
        lines = [{"arm": arm, "setting": found.settings.get(arm), "settings": found.configs.get(arm, {})}]
        folders = found.folders.get(arm, [None] * len(runs))  # rounds of timed steps have none
        seeds = found.seeds if arm in found.folders else range(len(runs))
        for at, run, path in zip(seeds, runs, folders, strict=True):
            metrics = {key: value for key, value in run.items() if key in wanted and isinstance(value, (int, float))}
            metrics |= {key: run[key] for key in by_picture.get(arm, ())}
            lines.append({"seed": at, "metrics": metrics, "curve": curve(path) if path else {}})
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / f"{arm}.jsonl", "".join(json.dumps(line, default=str) + "\n" for line in lines))


def read(folder: Path) -> dict[str, list[dict]]:
    """{arm: lines of its runs}, in order of seeds."""
    return {
        file.stem: [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()[1:]]
        for file in sorted(folder.glob("*.jsonl"))
    }


def recompute(study: Any, results: Path) -> str:
    """Tables of arms and claims from the logs. UserError if they differ from the tables of the results file."""
    summary, kept = report.read_results(results, study.paper), read(beside(results))
    study = study.as_in(summary)
    arms = {arm: [line["metrics"] for line in kept[arm]] for arm in summary["arms"] if arm in kept}
    again = summary | {"claims": report.rows_again(study, summary, arms), "arms": report.spreads(arms)}
    texts = [f"{report.named_arms(study, each)}\n\n{report.claims_table(each)}" for each in (summary, again)]
    if texts[0] != texts[1]:
        pairs = zip(*(text.splitlines() for text in texts), strict=False)
        line = next((pair for pair in pairs if pair[0] != pair[1]), ("another number of lines", ""))
        raise UserError(f"{results} differs from its logs: {line[0]} is {line[1]}")
    return texts[1]


# ----------------------------------------------------------------------------------------------------------------- band


def interval(values: Sequence[float], count: int, level: float) -> tuple[float, float]:
    """The (1 - level) prediction interval of the mean of `count` further runs, from the values of earlier ones."""
    scatter, mean = verdicts.own(values), float(np.mean(values))
    half = student_t.ppf(1 - level / 2, scatter.df) * scatter.std * math.sqrt(1 / len(values) + 1 / count)
    return mean - half, mean + half


def band(study: Any, found: report.Comparison, committed: dict) -> list[dict]:
    """Rows that say whether the means of these runs lie in the prediction intervals of the committed ones, which hold
    together at 95 %: for each arm that has the same settings, the metrics of primary claims."""
    pairs = dict.fromkeys(
        (arm, claim.metric)
        for claim in study.claims if claim.primary for arm in (claim.method, claim.baseline)
        if arm in found.settings and found.settings[arm] == committed["settings"].get(arm)
        and claim.metric in committed["arms"].get(arm, {}) and all(claim.metric in run for run in found.arms[arm])
    )  # fmt: skip
    rows = []
    for arm, metric in pairs:
        values, earlier = [run[metric] for run in found.arms[arm]], committed["arms"][arm][metric]["values"]
        if len(earlier) > 1 and len(set(earlier)) > 1:
            low, high = interval(earlier, len(values), verdicts.LEVEL / len(pairs))
            inside = low <= np.mean(values) <= high
            rows.append({"arm": arm, "metric": metric, "here": float(np.mean(values)), "low": low, "high": high,
                         "inside": bool(inside)})  # fmt: skip
    return rows


def show_band(study: Any, found: report.Comparison, committed: Path, plot: Path) -> None:
    """Print whether these runs lie in the band of the committed ones, and draw both: final metrics, and curves of the
    score where there are logs."""
    rows = band(study, found, read_json(committed))
    if not rows:
        print(f"{committed} has no runs with these settings: nothing to compare with")
        return
    lines = [{"arm": row["arm"], "metric": row["metric"], "here": f"{row['here']:.2f}",
              "band": f"{row['low']:.2f} to {row['high']:.2f}", "inside": "yes" if row["inside"] else "NO"}
             for row in rows]  # fmt: skip
    print(f"\nThese runs beside those of {committed} (95 % band for the mean of as many runs):\n\n{table(lines)}")
    outside = sum(not row["inside"] for row in rows)
    print(f"{len(rows) - outside} of {len(rows)} lie in the band; {plot} draws it")
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 0.3 * len(rows) + 3))
    for color, (arm, runs) in zip(plt.get_cmap("tab10").colors, read(beside(committed)).items(), strict=False):
        curves = [run["curve"].get("zero_shot_top1", []) for run in runs]
        if arm in found.folders and curves and curves[0] and len({len(each) for each in curves}) == 1:
            steps, values = np.array(curves[0])[:, 0], np.array(curves)[:, :, 1]
            left.fill_between(steps, values.min(0), values.max(0), color=color, alpha=0.25, label=arm)
            for folder in found.folders[arm]:
                points = curve(folder).get("zero_shot_top1", [])
                left.plot([step for step, _ in points], [score for _, score in points], color=color, lw=1)
    left.set(xlabel="step", ylabel="zero-shot top-1 (%)", title="curves: committed runs (band), these (lines)")
    for y, row in enumerate(rows):
        centre, half = (row["low"] + row["high"]) / 2, max((row["high"] - row["low"]) / 2, 1e-9)
        right.plot([-1, 1], [y, y], color="0.8", lw=8, solid_capstyle="butt")
        values = [(run[row["metric"]] - centre) / half for run in found.arms[row["arm"]]]
        right.plot(values, [y] * len(values), "k.", ms=4)
        right.plot((row["here"] - centre) / half, y, "o", color="tab:green" if row["inside"] else "tab:red")
    right.set(yticks=range(len(rows)), yticklabels=[f"{row['arm']}: {row['metric']}" for row in rows],
              xlabel="half widths of the band", title="final metrics: mean (circle), runs (dots)")  # fmt: skip
    if left.get_legend_handles_labels()[0]:
        left.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(plot, dpi=100)
    plt.close(figure)
