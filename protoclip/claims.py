"""What ProtoCLIP claims, in the terms of the embedded corpus, and the comparison of its arms.

The arms are run folders ARM-seedN that the Makefile trains and eval.py measures. Verdicts are computed by
`shared.report.judge` from differences paired by seed.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from shared import report, run

ARMS = {  # run folders ARM-seedN, in the order of the paper's argument
    "clip": "CLIP",
    "clip-light-aug": "CLIP, ProtoCLIP's augmentation at paper scale",
    "clip-equal-time": "CLIP, as many seconds as ProtoCLIP",
    "proto-no-pbt": "+ prototypes, no back translation",
    "proto-pbt": "+ back translation",
    "protoclip": "+ external teacher = ProtoCLIP",
}
METRICS = {
    "names_ood/top1": "names OOD",
    "names_id/top1": "names ID",
    "subgroups_ood/top1": "subgroups OOD",
    "subgroups_ood/probe_best": "probe OOD (best)",
    "subgroups_ood/probe_final": "probe OOD (final)",
    "subgroups_id/probe_best": "probe ID (best)",
    "subgroups_ood/ami": "AMI OOD (0-1)",
    "retrieval_ood/mean_recall": "recall OOD",
    "modality_gap": "gap (0-2)",
    "seconds": "seconds",
}


def claims() -> list[report.Claim]:
    """The paper's claims in the terms of the embedded corpus (CC2.5M numbers: README of upstream, 8 GPUs)."""
    return [
        report.Claim(
            "linear probe above CLIP, seen styles", "+5.81 IN", "subgroups_id/probe_best", "protoclip", "clip", 1, 5.81
        ),
        report.Claim("... and at equal time", None, "subgroups_id/probe_best", "protoclip", "clip-equal-time"),
        report.Claim(
            "linear probe above CLIP, unseen style",
            "+5.81 IN",
            "subgroups_ood/probe_best",
            "protoclip",
            "clip",
            1,
            5.81,
        ),
        report.Claim("... and at equal time", None, "subgroups_ood/probe_best", "protoclip", "clip-equal-time"),
        report.Claim("... light augmentation alone", None, "subgroups_ood/probe_best", "clip-light-aug", "clip"),
        report.Claim("zero-shot above CLIP, seen styles", "+2.01 IN", "names_id/top1", "protoclip", "clip", 1, 2.01),
        report.Claim("zero-shot above CLIP, unseen style", "+2.01 IN", "names_ood/top1", "protoclip", "clip", 1, 2.01),
        report.Claim("... and at equal time", None, "names_ood/top1", "protoclip", "clip-equal-time"),
        report.Claim("... light augmentation alone", None, "names_ood/top1", "clip-light-aug", "clip"),
        report.Claim("back translation helps zero-shot", "claimed", "names_ood/top1", "proto-pbt", "proto-no-pbt"),
        report.Claim(
            "back translation helps the probe", "claimed", "subgroups_ood/probe_best", "proto-pbt", "proto-no-pbt"
        ),
        report.Claim("external teacher helps zero-shot", "claimed", "names_ood/top1", "protoclip", "proto-pbt"),
        report.Claim(
            "external teacher helps the probe", "claimed", "subgroups_ood/probe_best", "protoclip", "proto-pbt"
        ),
        report.Claim(
            "image clusters closer to classes (AMI, 0-1)", "claimed", "subgroups_ood/ami", "protoclip", "clip"
        ),
        report.Claim(
            "retrieval slightly lower", "-0.79 COCO", "retrieval_ood/mean_recall", "protoclip", "clip", -1, -0.79
        ),
    ]


def cost(method: list[dict], baseline: list[dict]) -> dict[str, str]:
    """Training seconds a sample, ProtoCLIP's over CLIP's, as upstream's README has them for one GPU."""
    ratios = [m["seconds"] / b["seconds"] for m, b in zip(method, baseline, strict=True)]
    claim = report.Claim("training time, ProtoCLIP / CLIP", "1.79x", "seconds", "", "", 1, 0.79)
    row, half = report.judge(claim, ratios, [1.0] * len(ratios)), report.interval(ratios)
    return row | {"here": f"{report.spread(ratios)['mean']:.2f}" + ("x" if half is None else f" ± {half:.2f}x")}


def compare(runs: list[str], results: list[dict[str, float]], path: Path) -> None:
    """Group runs by arm and seed, judge the claims, print the tables, write `path` and the plots beside the runs."""
    by_seed, seeds, folders, commits = report.compare_runs(runs, results, ARMS, "episode")
    if "clip-equal-time" in by_seed:  # its number of episodes was set beforehand: say how well the times agree
        seconds = [sum(values["seconds"] for values in by_seed[arm]) for arm in ("clip-equal-time", "protoclip")]
        if abs(seconds[0] / seconds[1] - 1) > 0.1:
            print(f"note: clip-equal-time took {seconds[0] / seconds[1]:.2f} times ProtoCLIP's seconds")
    rows = report.judge_all(claims(), by_seed)
    if {"clip", "protoclip"} <= set(by_seed):
        rows.append(cost(by_seed["protoclip"], by_seed["clip"]))
    rows.append(report.untestable("YFCC-15M: CLIP's accuracy in 33 % of its time", "claimed", "needs YFCC-15M"))
    rows.append(
        report.untestable("absolute ImageNet, COCO and 10-set numbers", "55.22 / 21.47 / 22.52", "needs CC2.5M")
    )
    summary = report.results("ProtoCLIP (arXiv 2206.10996)", seeds, by_seed, rows, commits)
    report.save(path, summary)
    plot_curves(folders, path.parent)
    report.show(summary, METRICS, "CC2.5M", path)


def plot_curves(folders: dict[str, list[Path]], out: Path) -> None:
    """protoclip_curves.png: zero-shot accuracy over steps and over seconds, modality gap over steps; mean of seeds."""
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.2))
    for color, (arm, of_arm) in zip(plt.get_cmap("tab10").colors, folders.items(), strict=False):
        points = [run.read_metrics(folder, "zero_shot_top1") for folder in of_arm]
        gaps = [run.read_metrics(folder, "modality_gap") for folder in of_arm]
        mean = lambda lines, key: np.mean([[line[key] for line in each] for each in lines], axis=0)  # noqa: E731
        axes[0].plot(
            mean(points, "step"),
            mean(points, "zero_shot_top1"),
            color=color,
            marker="o",
            ms=3,
            label=ARMS.get(arm, arm),
        )
        axes[1].plot(mean(points, "seconds"), mean(points, "zero_shot_top1"), color=color, marker="o", ms=3)
        axes[2].plot(mean(gaps, "step"), mean(gaps, "modality_gap"), color=color)
    titles = (
        ("step", "emoji names OOD, top-1 (%)"),
        ("training seconds", "emoji names OOD, top-1 (%)"),
        ("step", "modality gap, training batch"),
    )
    for axis, (x, y) in zip(axes, titles, strict=True):
        axis.set(xlabel=x, ylabel=y)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(out / "protoclip_curves.png", dpi=110)
    plt.close(figure)
