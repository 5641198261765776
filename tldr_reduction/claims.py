"""What TL;DR claims, in the terms of the embedded corpus, and the comparison of its arms.

The arms are run folders ARM-seedN that reproduce.mk trains and eval.py measures. Verdicts are computed by
`shared.statistics.judge` from differences paired by seed.
"""

import csv
import json
import textwrap
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from shared import checkpoints, data
from shared.run import read_metrics
from shared.study import report, statistics

ARMS = {  # run folders ARM-seedN, in the order of the paper's argument; -steps: as many steps as the full data
    "full": "full, T_o",
    "random": "25 % at random, T_o",
    "codes": "25 % by codes, T_o",
    "random-refined": "25 % at random, T_o; T_g",
    "tldr": "25 % by codes, T_o; T_g = TL;DR",
    "random-steps": "25 % at random, T_o, equal steps",
    "codes-steps": "25 % by codes, T_o, equal steps",
    "random-refined-steps": "25 % at random, T_o; T_g, equal steps",
    "tldr-steps": "TL;DR, equal steps",
    "full-refined": "full, T_o; T_g",
    "generated-steps": "25 % by codes, T_g only, equal steps",
    "first-steps": "first quarter of the file, T_o; T_g, equal steps",
    "itm-steps": "25 % of highest ITM, T_o; T_g, equal steps",
    "image-steps": "25 % by image-embedding clusters, T_o; T_g, equal steps",
    "text-steps": "25 % by text-embedding clusters, T_o; T_g, equal steps",
    "farthest-steps": "farthest 25 % of each cluster, T_o; T_g, equal steps",
    "tldr10-steps": "TL;DR 10 %, equal steps",
    "tldr50-steps": "TL;DR 50 %, equal steps",
    **{f"drop-random{p}": f"{p} % dropped at random, T_o" for p in (10, 30, 50, 70)},
    **{f"drop-itm{p}": f"{p} % of lowest ITM dropped, T_o" for p in (10, 30, 50, 70)},
    "blip-random-refined-steps": "BLIP: 25 % at random, T_o; T_g",
    "blip-tldr-steps": "BLIP: TL;DR",
}
METRICS = {
    "names_ood/top1": "names OOD",
    "names_ood/top5": "names OOD, top-5",
    "names_id/top1": "names ID",
    "subgroups_ood/top1": "subgroups OOD",
    "retrieval_ood/image_to_text_R@1": "I2T R@1 OOD",
    "retrieval_ood/text_to_image_R@1": "T2I R@1 OOD",
    "data/pairs": "pairs",
    "steps": "steps",
    "data/emoji": "distinct emoji",
    "itm/after_mean": "ITM mean",
    "itm/after_below_half": "ITM < 0.5",
    "itm/auc": "ITM AUC, true names against others'",
    "data/generated_right": "T_g is the name",
    "data/nmi": "NMI of clusters and subgroups",
    "codes/codes_used": "codes used",
    "early_loss_ita": "ITC loss, epochs 0-2",
    "seconds": "seconds",
}


SCORE = "names_ood/top5"  # what verdicts are about: top-1 at this scale counts a few dozen images of 1,500


def claims() -> list[statistics.Claim]:
    """Differences of arms. The paper's numbers are BLIP on CC3M, fine-tuned COCO TR@1: another unit, so signs count."""
    rows = []  # claim, paper, method, baseline
    for suffix, when in (("-steps", "equal steps"), ("", "equal epochs")):
        rows += [
            (f"codes above random, T_o ({when})", "+3.2", f"codes{suffix}", f"random{suffix}"),
            (f"refining above T_o, random sample ({when})", "+4.1", f"random-refined{suffix}", f"random{suffix}"),
            (f"TL;DR above random, T_o ({when})", "+7.5", f"tldr{suffix}", f"random{suffix}"),
            (f"TL;DR above random, refined ({when})", "+3.4", f"tldr{suffix}", f"random-refined{suffix}"),
            (f"TL;DR above full data, T_o ({when})", "+1.9", f"tldr{suffix}", "full"),
        ]
    rows += [
        ("refining above T_o, full data", "+4.5", "full-refined", "full"),
        ("TL;DR below full data, refined (equal steps)", "-2.3", "tldr-steps", "full-refined"),
        ("codes above image embeddings (equal steps)", "+2.2", "tldr-steps", "image-steps"),
        ("codes above text embeddings (equal steps)", "+3.8", "tldr-steps", "text-steps"),
        ("stride above largest distance (equal steps)", "+0.5", "tldr-steps", "farthest-steps"),
        ("10 % below 25 % (equal steps)", "-3.9", "tldr10-steps", "tldr-steps"),
        ("50 % above 25 % (equal steps)", "+2.0", "tldr50-steps", "tldr-steps"),
        ("TL;DR above the first quarter (equal steps)", None, "tldr-steps", "first-steps"),
        ("TL;DR above highest ITM (equal steps)", None, "tldr-steps", "itm-steps"),
        ("BLIP: TL;DR above random, refined", "+3.4", "blip-tldr-steps", "blip-random-refined-steps"),
    ]
    for percent, paper in ((10, "+1.3"), (30, "+3.2"), (50, "+4.4"), (70, "+2.4")):
        rows += [
            (f"{percent} % dropped: lowest ITM above random", paper, f"drop-itm{percent}", f"drop-random{percent}")
        ]
    made = [
        statistics.Claim(text, paper, SCORE, method, baseline, -1 if (paper or "+").startswith("-") else 1)
        for text, paper, method, baseline in rows
    ]
    alone = "generated-steps", "tldr-steps"
    return [
        *made,
        statistics.Claim("T_g alone below T_o; T_g", "collapses", SCORE, *alone, -1),
        statistics.Claim("T_g alone: lower ITC loss at first", "shown", "early_loss_ita", *alone, -1),
        statistics.Claim("distinct emoji kept, codes above random", None, "data/emoji", "tldr", "random"),
    ]


def itm_rows(arms: dict[str, list[dict]]) -> list[dict]:
    """ITM before (full pool) and after reduction and refinement, by one scorer."""
    arm = next((arm for arm in ("tldr-steps", "tldr") if arm in arms), None)
    if arm is None or "itm/after_mean" not in arms[arm][0]:
        return []
    values = {key: [run[f"itm/{key}"] for run in arms[arm]] for key in ("before_below_half", "after_below_half")}
    claim = statistics.Claim("share of ITM scores below 0.5, after - before", "-21 (37 to 16)", "", "", "", -1, -21.0)
    return [statistics.judge(claim, values["after_below_half"], values["before_below_half"])]


def compare(runs: list[str], results: list[dict[str, float]], path: Path) -> None:
    """Judge the claims, print the tables, write `path` and the plots beside it."""
    arms, seeds, folders, commits = report.compare_runs(runs, results, ARMS)
    rows = statistics.judge_all(claims(), arms) + itm_rows(arms)
    rows.append(
        statistics.untestable("absolute COCO, Flickr30K and ImageNet numbers", "72.8 TR@1", "needs CC3M and COCO")
    )
    rows.append(statistics.untestable("training time at 25 %", "19 h to 4.7 h", "follows from the number of steps"))
    summary = report.results("TL;DR (arXiv 2305.20087)", seeds, arms, rows, commits)
    checkpoints.write_json(path, summary)
    plot_fractions(summary["arms"], path.parent)
    plot_curves(folders, path.parent)
    reduced = next((folders[arm][0] for arm in ("tldr", "tldr-steps") if arm in folders), None)
    if reduced is not None:
        reduction = Path(json.loads((reduced / "config.json").read_text())["data"]).parent
        if (reduction / "report.json").is_file():
            plot_itm(reduction, path.parent)
            plot_clusters(reduction, path.parent)
    report.show(summary, METRICS, "CC3M", path)


# ------------------------------------------------------------------------------------------------------------- plots


def plot_itm(reduction: Path, out: Path) -> None:
    """tldr_reduction_itm.png: histogram of matching scores before and after, one scorer."""
    itm = json.loads((reduction / "report.json").read_text()).get("itm")
    if itm is None:
        return
    figure, axis = plt.subplots(figsize=(6, 3.6))
    for shift, (when, label) in enumerate((("before", "pool, T_o"), ("after", "TL;DR, T_o; T_g"))):
        density = np.array(itm[when]["histogram"])
        axis.bar((np.arange(len(density)) + 0.3 + 0.4 * shift) / len(density), density, 0.4 / len(density), label=label)
    axis.set(xlabel="image-text matching score", ylabel="density")
    axis.legend()
    figure.tight_layout()
    figure.savefig(out / "tldr_reduction_itm.png", dpi=110)
    plt.close(figure)


def plot_clusters(reduction: Path, out: Path, clusters: int = 6, columns: int = 8) -> None:
    """tldr_reduction_clusters.png: members of some clusters; kept ones framed, with T_o; T_g, dropped ones with T_o."""
    from tldr_reduction.views import open_pairs

    source = json.loads((reduction / "config.json").read_text())["data"]
    if any(map(data.is_remote, source.split("::"))):  # a file's word is no reason to fetch, or to run pipe:COMMAND
        return
    pairs = open_pairs(source)
    row_of = {str(key): row for row, key in enumerate(pairs.keys)}
    members: dict[str, list[dict]] = {}
    with open(reduction / "report.csv", newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            if line.get("cluster"):
                members.setdefault(line["cluster"], []).append(line)
    fitting = sorted((c for c in members if len(members[c]) >= columns), key=int)
    chosen = [fitting[i] for i in np.linspace(0, len(fitting) - 1, min(clusters, len(fitting))).astype(int)]
    if not chosen:
        return
    figure, axes = plt.subplots(len(chosen), columns, figsize=(1.7 * columns, 1.9 * len(chosen)), squeeze=False)
    for axis_row, cluster in zip(axes, chosen, strict=True):
        for axis, line in zip(axis_row, members[cluster], strict=False):
            pair = pairs.read(row_of[line["key"]])
            axis.imshow(pair.image)
            axis.set(xticks=[], yticks=[])
            kept = line["kept"] == "1"
            for spine in axis.spines.values():
                spine.set(color="tab:green" if kept else "lightgrey", linewidth=3 if kept else 1)
            text = textwrap.fill(line["caption"] if kept else f"dropped: {pair.caption}", 24, max_lines=3)
            axis.set_xlabel(text, fontsize=6, color="black" if kept else "grey")
        axis_row[0].set_ylabel(f"cluster {cluster}", fontsize=8)
    figure.tight_layout()
    figure.savefig(out / "tldr_reduction_clusters.png", dpi=110)
    plt.close(figure)


def plot_fractions(arms: dict[str, dict], out: Path) -> None:
    """tldr_reduction_fractions.png: accuracy against the kept share, by selection and by what is dropped."""
    curves = {
        "TL;DR, equal steps": {10: "tldr10-steps", 25: "tldr-steps", 50: "tldr50-steps", 100: "full-refined"},
        "random, T_o, equal steps": {25: "random-steps", 100: "full"},
        "lowest ITM dropped, equal epochs": {100 - p: f"drop-itm{p}" for p in (10, 30, 50, 70)} | {100: "full"},
        "dropped at random, equal epochs": {100 - p: f"drop-random{p}" for p in (10, 30, 50, 70)} | {100: "full"},
    }
    figure, axis = plt.subplots(figsize=(6.5, 4))
    for label, points in curves.items():
        points = {share: arms[arm][SCORE] for share, arm in sorted(points.items()) if arm in arms}
        if len(points) > 1:
            means, spreads = ([value[key] for value in points.values()] for key in ("mean", "std"))
            axis.errorbar(list(points), means, spreads, marker="o", capsize=3, label=label)
    axis.set(xlabel="share of the pool (%)", ylabel=f"{METRICS[SCORE]} (%)")
    axis.grid(alpha=0.3)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(out / "tldr_reduction_fractions.png", dpi=110)
    plt.close(figure)


CURVES = ("full", "random-steps", "random-refined-steps", "codes-steps", "tldr-steps", "full-refined")


def plot_curves(folders: dict[str, list[Path]], out: Path) -> None:
    """tldr_reduction_curves.png: zero-shot accuracy while the arms of equal steps train, mean over seeds."""
    figure, axis = plt.subplots(figsize=(6.5, 4))
    for arm in CURVES:
        curves = [
            [(line["step"], line["zero_shot_top1"]) for line in read_metrics(folder, "zero_shot_top1")]
            for folder in folders.get(arm, ())
        ]
        if curves and curves[0]:
            steps, accuracy = np.array(curves).mean(0).T
            axis.plot(steps, accuracy, marker="o", label=ARMS[arm])
    axis.set(xlabel="step", ylabel="names OOD, top-1 (%)")
    axis.grid(alpha=0.3)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(out / "tldr_reduction_curves.png", dpi=110)
    plt.close(figure)
