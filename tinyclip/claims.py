"""What TinyCLIP claims, in the terms of the embedded corpus, and the comparison of its arms.

The arms are run folders ARM-seedN that the Makefile trains and eval.py measures. Verdicts are computed by
`shared.statistics.judge` from differences paired by seed.
"""

import math
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from shared import checkpoints, run
from shared.study import report, statistics

ARMS = {  # run folders ARM-seedN, in the order of the paper's argument
    "teacher": "teacher (100 %)",
    "random-contrastive": "50 %: random weights, contrastive",
    "random-affinity": "50 %: random weights, affinity",
    "inherited-contrastive": "50 %: inherited, contrastive",
    "inherited-affinity": "50 %: inherited, affinity = TinyCLIP by hand",
    "random-channels": "50 %: random channels and layers, affinity",
    "auto": "50 %: learned masks = TinyCLIP auto",
    "auto-half": "50 %: learned masks, 200 steps",
    "auto-progressive": "25 %: from the one above, 200 steps more",
    "auto-oneshot": "25 %: in one stage of 400 steps",
}
METRICS = {
    "names_ood/top1": "names OOD",
    "names_id/top1": "names ID",
    "subgroups_ood/top1": "subgroups OOD",
    "retrieval_ood/mean_recall": "recall OOD",
    "retrieval_id/mean_recall": "recall ID",
    "parameters_m": "parameters (M)",
    "block_parameters_m": "in blocks (M)",
    "macs_g": "MACs (G)",
    "pairs_per_second": "pairs/s",
}


def claims() -> list[statistics.Claim]:
    """The paper's claims in the terms of the embedded corpus; IN: ImageNet zero-shot top-1 of the model zoo."""
    top1, recall = "names_ood/top1", "retrieval_ood/mean_recall"
    rows = []
    for metric, what in ((top1, "zero-shot"), (recall, "retrieval")):
        for start in ("random", "inherited"):
            rows.append(
                statistics.Claim(
                    f"affinity above contrastive, {start} weights, {what}",
                    "claimed",
                    metric,
                    f"{start}-affinity",
                    f"{start}-contrastive",
                )
            )
        for loss in ("contrastive", "affinity"):
            rows.append(
                statistics.Claim(
                    f"inherited above random weights, {loss}, {what}",
                    "claimed",
                    metric,
                    f"inherited-{loss}",
                    f"random-{loss}",
                )
            )
        rows.append(
            statistics.Claim(f"both together, {what}", "claimed", metric, "inherited-affinity", "random-contrastive")
        )
    return rows + [
        statistics.Claim("half the size against the teacher, by hand", None, top1, "inherited-affinity", "teacher"),
        statistics.Claim("half the size against the teacher, learned masks", None, top1, "auto", "teacher"),
        statistics.Claim("learned masks above by hand", "+1.6 IN", top1, "auto", "inherited-affinity", 1, 1.6),
        statistics.Claim(
            "first channels and every other layer above random ones",
            None,
            top1,
            "inherited-affinity",
            "random-channels",
        ),
        statistics.Claim(
            "progressive above one stage, 25 %, zero-shot", "claimed", top1, "auto-progressive", "auto-oneshot"
        ),
        statistics.Claim(
            "progressive above one stage, 25 %, retrieval", "claimed", recall, "auto-progressive", "auto-oneshot"
        ),
    ]


def learning_curve(folder: Path) -> list[tuple[int, float]]:
    """(step, names OOD top-1 with bare names) of a run."""
    return [(line["step"], line["zero_shot_top1"]) for line in run.read_metrics(folder, "zero_shot_top1")]


def steps_to_reach(curve: list[tuple[int, float]], goal: float) -> float:
    """The first step at which the curve, linear between its points, reaches `goal`; infinite if it never does."""
    before, low = 0, 0.0
    for step, value in curve:
        if value >= goal:
            return before + (step - before) * (goal - low) / (value - low) if value > low else float(step)
        before, low = step, value
    return math.inf


def speed_up(method: list[Path], baseline: list[Path]) -> dict[str, str]:
    """How many times fewer steps the method needs to where the baseline ends, seed by seed. The paper: 1.4 to 7.8."""
    ratios = []
    for ours, theirs in zip(map(learning_curve, method), map(learning_curve, baseline), strict=True):
        steps, goal = theirs[-1]
        ratios.append(steps / max(steps_to_reach(ours, goal), 1.0))  # a baseline at 0 is reached by the first step
    claim = statistics.Claim("steps to the score of random weights, contrastive", "1.4-7.8x fewer", "", "", "", 1, 0.4)
    row = statistics.judge(claim, ratios, [1.0] * len(ratios))
    half, never = statistics.interval(ratios), sum(ratio == 0 for ratio in ratios)
    here = f"{statistics.spread(ratios)['mean']:.2f}" + ("" if half is None else f" ± {half:.2f}") + "x fewer"
    return row | {"here": here + (f", {never} of {len(ratios)} never" if never else "")}


def with_sizes(
    row: dict[str, str], claim: statistics.Claim, method: list[dict], baseline: list[dict]
) -> dict[str, str]:
    """The row with the sizes it compares; no verdict where the better arm is also larger by more than 2 %."""
    gain, growth = (
        sum(values[metric] for values in method) / sum(values[metric] for values in baseline) - 1
        for metric in (claim.metric, "block_parameters_m")
    )
    row = row | {"here": f"{row['here']} at {1 + growth:.2f}x the size"}
    return row | {"verdict": "not resolved at this scale"} if abs(growth) > 0.02 and growth * gain > 0 else row


def sparsity(runs: list[dict[str, float]], arm: str) -> dict[str, str]:
    """What is pruned away in the end against what was asked for."""
    reached = [100 * values["sparsity_reached"] for values in runs]
    target = 100 * runs[0]["target_sparsity"]
    worst = max(abs(value - target) for value in reached)
    here = f"{statistics.spread(reached)['mean']:.1f} for {target:.1f} asked, at most {worst:.1f} off"
    verdict = "reproduced" if worst < 5 else "not reproduced"
    return {"claim": f"sparsity reached within 5 points, {arm}", "paper": "by design", "here": here, "verdict": verdict}


def compare(runs: list[str], results: list[dict[str, float]], path: Path) -> None:
    """Group runs by arm and seed, judge the claims, print the tables, write `path` and the plots beside it."""
    by_seed, seeds, paths, commits = report.compare_runs(runs, results, ARMS, "step")
    needed = {claim.metric for claim in claims()}
    if missing := {name for values in by_seed.values() for run_ in values for name in needed - run_.keys()}:
        raise ValueError(f"--report compares by {', '.join(sorted(missing))}: give --sets those sets, too")
    rows = []
    for claim in claims():
        for row in statistics.judge_all([claim], by_seed):
            masked = claim.method.startswith("auto") and claim.baseline != "teacher"  # sizes only come out close
            pair = by_seed[claim.method], by_seed[claim.baseline]
            rows.append(with_sizes(row, claim, *pair) if masked else row)
    curves = [paths.get(arm, ()) for arm in ("inherited-affinity", "random-contrastive")]
    if all(curves) and all(map(learning_curve, curves[0] + curves[1])):
        rows.append(speed_up(*curves))
    rows += [sparsity(by_seed[arm], arm) for arm in by_seed if "sparsity_reached" in by_seed[arm][0]]
    rows.append(
        statistics.untestable("ImageNet zero-shot of the model zoo", "41.1 to 64.5", "needs LAION-400M, YFCC-15M")
    )
    rows.append(
        statistics.untestable("8.9 % of ViT-B/16's parameters, +3.5 over it", "41.1 against 37.6", "needs YFCC-15M")
    )
    summary = report.results("TinyCLIP (arXiv 2309.12314)", seeds, by_seed, rows, commits)
    checkpoints.write_json(path, summary)
    plot(paths, summary["arms"], path.parent / "tinyclip_curves.png")
    if masked := [arm for arm in by_seed if (paths[arm][0] / "masks.pt").exists()]:
        plot_masks(
            {arm: checkpoints.load_checkpoint(paths[arm][0] / "masks.pt") for arm in masked},
            path.parent / "tinyclip_masks.png",
        )
    report.show(summary, METRICS, "LAION-400M", path)


def plot(paths: dict[str, list[Path]], arms: dict[str, dict], path: Path) -> None:
    """Accuracy over steps, against parameters and against measured pairs per second; means over seeds."""
    figure, axes = plt.subplots(1, 3, figsize=(16, 4.6))
    for color, arm in zip(plt.get_cmap("tab10").colors, paths, strict=False):
        curves = np.array([learning_curve(folder) for folder in paths[arm]])  # (seeds, points, 2)
        if curves.size:
            axes[0].plot(*curves.mean(axis=0).T, color=color, marker="o", ms=3, label=ARMS.get(arm, arm))
        top1 = arms[arm]["names_ood/top1"]
        for axis, key in zip(axes[1:], ("parameters_m", "pairs_per_second"), strict=True):
            if key in arms[arm]:
                axis.errorbar(arms[arm][key]["mean"], top1["mean"], top1["std"], color=color, marker="o", capsize=3)
    for axis, x in zip(axes, ("step", "parameters without token embedding (M)", "pairs per second"), strict=True):
        axis.set(xlabel=x, ylabel="emoji names OOD, top-1 (%)")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_masks(masks: dict[str, dict], path: Path) -> None:
    """Which heads, neurons and hidden dimensions are left when the masks are cut, a row of panels for each tower."""
    rows = [(arm, tower) for arm in masks for tower in ("image", "text")]
    figure, axes = plt.subplots(len(rows), 3, figsize=(13, 2.2 * len(rows)), squeeze=False, width_ratios=[1, 4, 3])
    for (arm, tower), panel in zip(rows, axes, strict=True):
        for axis, kind in zip(panel, ("heads", "intermediate", "hidden"), strict=True):
            if kind not in masks[arm][tower]:
                axis.axis("off")
                continue
            z = masks[arm][tower][kind].reshape(1, -1) if kind == "hidden" else masks[arm][tower][kind]
            kept = 100 * (z != 0).float().mean().item()
            order = z.sort(dim=1, descending=True).values if kind == "intermediate" else z
            axis.imshow(order, aspect="auto", cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
            name = {"heads": "heads", "intermediate": "neurons, sorted", "hidden": "hidden dimensions"}[kind]
            axis.set_title(f"{arm}, {tower}: {name}, {kept:.0f} % left", fontsize=8)
            axis.set_ylabel("" if kind == "hidden" else "layer", fontsize=8)
            axis.set_yticks([] if kind == "hidden" else range(len(z)))
            axis.tick_params(labelsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
