"""What A-CLIP claims, in the terms of the embedded corpus, and the comparison of its arms.

The arms are run folders ARM-seedN that reproduce.mk trains and eval.py measures. Verdicts are computed by
`shared.statistics.judge` from differences paired by seed.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from shared import checkpoints, run
from shared.study import report, statistics

ARMS = {  # run folders ARM-seedN, in the order of the paper's argument
    "clip": "CLIP",
    "random": "random 1x50%",
    "attentive": "attentive 1x50%",
    "high-drop": "attentive 1x50%, high scores dropped",
    "aclip": "A-CLIP: attentive 2x50% + SimCLR + BYOL",
    "aclip-eff": "A-CLIP-eff: half-size EMA view",
    "slip": "SLIP",
}
METRICS = {
    "names_ood/top1": "names OOD",
    "online/names_ood/top1": "names OOD, online",
    "names_id/top1": "names ID",
    "subgroups_ood/top1": "subgroups OOD",
    "retrieval_ood/image_to_text_R@1": "I2T R@1 OOD",
    "retrieval_ood/text_to_image_R@1": "T2I R@1 OOD",
    "subgroups_ood/probe_final": "probe OOD",
    "kept/attentive_share": "kept foreground",
    "kept/high_drop_share": "... high drop",
    "kept/centre_share": "... centre",
    "kept/random_share": "... random",
    "seconds": "seconds",
}


def claims() -> list[statistics.Claim]:
    """Differences of arms. Masking rules are compared with the online towers, which all arms have; A-CLIP, as in the
    paper's suite, has its EMA towers. The paper's numbers are ImageNet zero-shot (README of upstream)."""
    ema, online = "names_ood/top1", "online/names_ood/top1"
    to_text, to_image = "retrieval_ood/image_to_text_R@1", "retrieval_ood/text_to_image_R@1"
    return [
        statistics.Claim("attentive 1x50 above random 1x50", "+4.5", online, "attentive", "random", 1, 4.5),
        statistics.Claim("random 1x50 below CLIP", "-2.6", online, "random", "clip", -1, -2.6),
        statistics.Claim("attentive 1x50 above CLIP", "+1.9", online, "attentive", "clip", 1, 1.9),
        statistics.Claim("dropping high scores far worse", "-12.8 (2x50)", online, "high-drop", "attentive", -1, -12.8),
        statistics.Claim("... and worse than random", "-9.5 (2x50)", online, "high-drop", "random", -1, -9.5),
        statistics.Claim("A-CLIP above attentive 1x50", "+4.4", online, "aclip", "attentive", 1, 4.4),
        statistics.Claim("A-CLIP above CLIP", "+6.3", ema, "aclip", "clip", 1, 6.3),
        statistics.Claim("A-CLIP above SLIP", "+1.1", ema, "aclip", "slip", 1, 1.1),
        statistics.Claim("A-CLIP-eff above CLIP", "+5.3", ema, "aclip-eff", "clip", 1, 5.3),
        statistics.Claim("A-CLIP-eff slightly below A-CLIP", "-1.0", ema, "aclip-eff", "aclip", -1, -1.0),
        statistics.Claim("SLIP above CLIP", "+5.2", ema, "slip", "clip", 1, 5.2),
        statistics.Claim("image to text R@1, A-CLIP above CLIP", "+11.3 Flickr", to_text, "aclip", "clip", 1),
        statistics.Claim("text to image R@1, A-CLIP above CLIP", "+9.5 Flickr", to_image, "aclip", "clip", 1),
    ]


def within(arms: dict[str, list[dict]]) -> list[statistics.Claim]:
    """Comparisons of two measurements of one arm, as claims between made-up arms that `judge_all` can read."""
    rows = []
    for arm in ("attentive", "aclip"):
        for baseline in ("random", "centre", "untrained"):
            if arm in arms:
                ours = [values["kept/attentive_share"] for values in arms[arm]]
                theirs = [values[f"kept/{baseline}_share"] for values in arms[arm]]
                other = {"random": "random ones", "centre": "the centre's", "untrained": "before training"}[baseline]
                claim = f"{arm}: kept patches hold more foreground than {other}"
                paper = "shown in figures" if baseline == "random" else None
                rows.append(statistics.judge(statistics.Claim(claim, paper, "", "", ""), ours, theirs))
    if "aclip" in arms:
        ema, online = ([values[f"{p}names_ood/top1"] for values in arms["aclip"]] for p in ("", "online/"))
        rows.append(
            statistics.judge(statistics.Claim("A-CLIP: EMA towers above online", None, "", "", ""), ema, online)
        )
    return rows


def compare(runs: list[str], results: list[dict[str, float]], path: Path, times: dict[str, dict] | None = None) -> None:
    """Judge the claims, print the tables, write `path` and the curves beside it."""
    arms, seeds, folders, commits = report.compare_runs(runs, results, ARMS)
    rows = statistics.judge_all(claims(), arms) + within(arms)
    for arm, paper in {"slip": "2.67x", "aclip": "1.16x", "aclip-eff": "0.86x"}.items():
        if times and arm in times:
            t = times[arm]
            rows.append(
                {
                    "claim": f"step time of {ARMS[arm].split(':')[0]} / CLIP's",
                    "paper": paper,
                    "here": f"{t['ratio']:.2f}x ({t['low']:.2f}-{t['high']:.2f})",
                    "verdict": "not testable at this scale",
                }
            )
    rows.append(
        statistics.untestable("absolute ImageNet, Flickr30K, COCO and 26-set numbers", "43.9 IN", "needs YFCC15M")
    )
    summary = report.results("Attentive Mask CLIP (arXiv 2212.08653)", seeds, arms, rows, commits)
    checkpoints.write_json(path, summary)
    plot_curves(folders, path.parent)
    report.show(summary, METRICS, "YFCC15M", path)


def plot_curves(folders: dict[str, list[Path]], out: Path) -> None:
    """attentive_mask_clip_curves.png: zero-shot accuracy of the online towers over steps and seconds; mean of seeds."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2))
    for color, (arm, of_arm) in zip(plt.get_cmap("tab10").colors, folders.items(), strict=False):
        points = [run.read_metrics(folder, "zero_shot_top1") for folder in of_arm]
        mean = {key: np.mean([[p[key] for p in each] for each in points], axis=0) for key in ("step", "seconds")}
        top1 = np.mean([[p["zero_shot_top1"] for p in each] for each in points], axis=0)
        for axis, key in zip(axes, ("step", "seconds"), strict=True):
            axis.plot(mean[key], top1, color=color, marker="o", ms=3, label=ARMS.get(arm, arm))
    for axis, name in zip(axes, ("step", "training seconds"), strict=True):
        axis.set(xlabel=name, ylabel="emoji names OOD, top-1 (%), online towers")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(out / "attentive_mask_clip_curves.png", dpi=110)
    plt.close(figure)
