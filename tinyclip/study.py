"""The small-scale study of TinyCLIP: `python -m tinyclip.study` (`make reproduce-tinyclip`).

A teacher and students of half and a quarter of its size are trained on the embedded emoji corpus, a stand-in for
LAION-400M, and compared seed by seed.
"""

import math
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from shared.checkpoints import load_checkpoint
from shared.run import read_metrics
from shared.study import runner, statistics
from shared.study.report import Comparison
from shared.study.runner import Arm, Study
from shared.study.statistics import Claim
from tinyclip import eval as evaluation

GIVEN = "--teacher {teacher} --init {teacher}"
HALF_TIME = "--steps 200 --prune-step 80 --sparsity-warmup 40 --mask-lr 0.3 --lambda-lr -0.3"
ONE_STAGE = "--steps 400 --prune-step 160 --sparsity-warmup 80 --target-sparsity 0.75"
SECOND_STAGE = f"--teacher {{teacher}} --init {{auto-half}} {HALF_TIME} --start-sparsity 0.5 --target-sparsity 0.75"
ARMS = (  # {random, inherited} x {contrastive, affinity}; then random channels, learned masks, one stage or two
    Arm("teacher", "train emoji-teacher", heading="teacher (100 %)"),
    Arm("random-contrastive", "train emoji-contrastive --init None", heading="50 %: random weights, contrastive"),
    Arm("random-affinity", "train emoji --teacher {teacher} --init None", heading="50 %: random weights, affinity"),
    Arm("inherited-contrastive", "train emoji-contrastive --init {teacher}", heading="50 %: inherited, contrastive"),
    Arm("inherited-affinity", f"train emoji {GIVEN}", heading="50 %: inherited, affinity = TinyCLIP by hand"),
    Arm(
        "random-channels",
        f"train emoji {GIVEN} --inherit random",
        heading="50 %: random channels and layers, affinity",
        core=False,
    ),
    Arm("auto", f"train emoji-auto {GIVEN}", heading="50 %: learned masks = TinyCLIP auto", core=False),
    Arm(
        "auto-half",
        f"train emoji-auto {GIVEN} {HALF_TIME} --target-sparsity 0.5",
        heading="50 %: learned masks, 200 steps",
        core=False,
    ),
    Arm(
        "auto-progressive",
        f"train emoji-auto {SECOND_STAGE}",
        heading="25 %: from the one above, 200 steps more",
        core=False,
    ),
    Arm(
        "auto-oneshot",
        f"train emoji-auto {GIVEN} {ONE_STAGE}",
        heading="25 %: in one stage of 400 steps",
        core=False,
    ),
)

TOP1, RECALL = "names_ood/top1", "retrieval_ood/mean_recall"


def loss_and_weights(metric: str, what: str) -> list[Claim]:
    """The paper's claims on affinity mimicking and weight inheritance, each alone and both together."""
    pairs = {
        f"affinity above contrastive, random weights, {what}": ("random-affinity", "random-contrastive"),
        f"affinity above contrastive, inherited weights, {what}": ("inherited-affinity", "inherited-contrastive"),
        f"inherited above random weights, contrastive, {what}": ("inherited-contrastive", "random-contrastive"),
        f"inherited above random weights, affinity, {what}": ("inherited-affinity", "random-affinity"),
        f"both together, {what}": ("inherited-affinity", "random-contrastive"),
    }
    return [Claim(claim, "claimed", metric, method, baseline) for claim, (method, baseline) in pairs.items()]


CLAIMS = (  # IN: ImageNet zero-shot top-1 of the model zoo
    *loss_and_weights(TOP1, "zero-shot"),
    *loss_and_weights(RECALL, "retrieval"),
    Claim("half the size against the teacher, by hand", None, TOP1, "inherited-affinity", "teacher"),
    Claim("half the size against the teacher, learned masks", None, TOP1, "auto", "teacher"),
    Claim(
        "first channels and every other layer above random ones", None, TOP1, "inherited-affinity", "random-channels"
    ),
)
CLAIMS_AT_SIZES = (  # between networks that masks cut, whose sizes only come out close
    Claim("learned masks above by hand", "+1.6 IN", TOP1, "auto", "inherited-affinity", 1, 1.6),
    Claim("progressive above one stage, 25 %, zero-shot", "claimed", TOP1, "auto-progressive", "auto-oneshot"),
    Claim("progressive above one stage, 25 %, retrieval", "claimed", RECALL, "auto-progressive", "auto-oneshot"),
)


def more_rows(found: Comparison) -> list[dict[str, str]]:
    """Claims between cut networks, the speed-up, the sparsity that masks reached, and what this scale cannot show."""
    rows, arms = [], found.arms
    for claim in CLAIMS_AT_SIZES:
        for row in statistics.judge_all([claim], arms):
            rows.append(with_sizes(row, claim, arms[claim.method], arms[claim.baseline]))
    curves = [found.folders.get(arm, []) for arm in ("inherited-affinity", "random-contrastive")]
    if all(curves) and all(map(learning_curve, curves[0] + curves[1])):
        rows.append(speed_up(*curves))
    rows += [sparsity(runs, arm) for arm, runs in arms.items() if "sparsity_reached" in runs[0]]
    needs = "needs LAION-400M, YFCC-15M"
    rows.append(statistics.untestable("ImageNet zero-shot of the model zoo", "41.1 to 64.5", needs))
    claim = "8.9 % of ViT-B/16's parameters, +3.5 over it"
    return [*rows, statistics.untestable(claim, "41.1 against 37.6", "needs YFCC-15M")]


def with_sizes(row: dict[str, str], claim: Claim, method: list[dict], baseline: list[dict]) -> dict[str, str]:
    """The row with the sizes it compares; no verdict where the better arm is also larger by more than 2 %."""
    gain, growth = (
        sum(values[metric] for values in method) / sum(values[metric] for values in baseline) - 1
        for metric in (claim.metric, "block_parameters_m")
    )
    row = row | {"here": f"{row['here']} at {1 + growth:.2f}x the size"}
    return row | {"verdict": "not resolved at this scale"} if abs(growth) > 0.02 and growth * gain > 0 else row


def learning_curve(folder: Path) -> list[tuple[int, float]]:
    """(step, names OOD top-1 with bare names) of a run."""
    return [(line["step"], line["zero_shot_top1"]) for line in read_metrics(folder, "zero_shot_top1")]


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
    claim = Claim("steps to the score of random weights, contrastive", "1.4-7.8x fewer", "", "", "", 1, 0.4)
    row = statistics.judge(claim, ratios, [1.0] * len(ratios))
    half, never = statistics.interval(ratios), sum(ratio == 0 for ratio in ratios)
    here = f"{statistics.spread(ratios)['mean']:.2f}" + ("" if half is None else f" ± {half:.2f}") + "x fewer"
    return row | {"here": here + (f", {never} of {len(ratios)} never" if never else "")}


def sparsity(runs: list[dict[str, float]], arm: str) -> dict[str, str]:
    """What is pruned away in the end against what was asked for."""
    reached = [100 * values["sparsity_reached"] for values in runs]
    target = 100 * runs[0]["target_sparsity"]
    worst = max(abs(value - target) for value in reached)
    here = f"{statistics.spread(reached)['mean']:.1f} for {target:.1f} asked, at most {worst:.1f} off"
    verdict = "reproduced" if worst < 5 else "not reproduced"
    return {"claim": f"sparsity reached within 5 points, {arm}", "paper": "by design", "here": here, "verdict": verdict}


def plot(found: Comparison, out: Path) -> None:
    """tinyclip_curves.png, and tinyclip_masks.png where the first seed of an arm has cut masks."""
    plot_curves(found, out / "tinyclip_curves.png")
    files = {arm: folders[0] / "masks.pt" for arm, folders in found.folders.items()}
    if masks := {arm: load_checkpoint(file) for arm, file in files.items() if file.exists()}:
        plot_masks(masks, out / "tinyclip_masks.png")


def plot_curves(found: Comparison, path: Path) -> None:
    """Accuracy over steps, against parameters and against measured pairs per second; means over seeds."""
    figure, axes = plt.subplots(1, 3, figsize=(16, 4.6))
    for color, (arm, runs) in zip(plt.get_cmap("tab10").colors, found.arms.items(), strict=False):
        curves = np.array([learning_curve(folder) for folder in found.folders[arm]])  # (seeds, points, 2)
        if curves.size:
            label = STUDY.headings.get(arm, arm)
            axes[0].plot(*curves.mean(axis=0).T, color=color, marker="o", ms=3, label=label)
        for axis, key in zip(axes[1:], ("parameters_m", "pairs_per_second"), strict=True):
            if {key, TOP1} <= runs[0].keys():
                x, y = (statistics.spread([values[metric] for values in runs]) for metric in (key, TOP1))
                axis.errorbar(x["mean"], y["mean"], y["std"], color=color, marker="o", capsize=3)
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


STUDY = Study(
    folder="tinyclip",
    paper="TinyCLIP (arXiv 2309.12314)",
    stands_for="LAION-400M",
    arms=ARMS,
    minutes={"core": 12, "all": 24},
    passes="step",
    evaluate=lambda runs: evaluation.main(evaluation.Config(runs=tuple(runs))),
    metrics=evaluation.METRICS,
    claims=CLAIMS,
    more_rows=more_rows,
    plot=plot,
)

if __name__ == "__main__":
    runner.main(STUDY)
