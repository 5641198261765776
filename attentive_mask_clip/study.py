"""The small-scale study of A-CLIP: `python -m attentive_mask_clip.study` (`make reproduce-attentive-mask-clip`).

Arms are trained on the embedded emoji corpus, a stand-in for YFCC15M, and compared seed by seed. Before that, training
steps of all arms are timed once, in one process.
"""

import shutil
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from attentive_mask_clip import eval as evaluation
from attentive_mask_clip import timing
from shared.run import read_metrics
from shared.study import runner, statistics
from shared.study.report import Comparison
from shared.study.runner import Arm, Once, Study
from shared.study.statistics import Claim

STEP_TIMES = "runs/attentive_mask_clip/step_times.json"

ARMS = (  # in the order of the paper's argument
    Arm("clip", "train emoji-clip", heading="CLIP"),
    Arm("random", "train emoji --mask random --views 1 --no-ssl", heading="random 1x50%"),
    Arm("attentive", "train emoji --views 1 --no-ssl", heading="attentive 1x50%"),
    Arm(
        "high-drop",
        "train emoji --mask high --views 1 --no-ssl",
        heading="attentive 1x50%, high scores dropped",
        core=False,
    ),
    Arm("aclip", "train emoji", heading="A-CLIP: attentive 2x50% + SimCLR + BYOL"),
    Arm("aclip-eff", "train emoji --ema-image-size 20", heading="A-CLIP-eff: half-size EMA view", core=False),
    Arm("slip", "train emoji-slip", heading="SLIP", core=False),
)

# Masking rules are compared on online towers, which all arms have; A-CLIP on its EMA towers, as in the paper's suite.
EMA, ONLINE = "names_ood/top1", "online/names_ood/top1"
TO_TEXT, TO_IMAGE = "retrieval_ood/image_to_text_R@1", "retrieval_ood/text_to_image_R@1"
CLAIMS = (  # the paper's numbers: ImageNet zero-shot after training on YFCC15M (README of upstream)
    Claim("attentive 1x50 above random 1x50", "+4.5", ONLINE, "attentive", "random", 1, 4.5),
    Claim("random 1x50 below CLIP", "-2.6", ONLINE, "random", "clip", -1, -2.6),
    Claim("attentive 1x50 above CLIP", "+1.9", ONLINE, "attentive", "clip", 1, 1.9),
    Claim("dropping high scores far worse", "-12.8 (2x50)", ONLINE, "high-drop", "attentive", -1, -12.8),
    Claim("... and worse than random", "-9.5 (2x50)", ONLINE, "high-drop", "random", -1, -9.5),
    Claim("A-CLIP above attentive 1x50", "+4.4", ONLINE, "aclip", "attentive", 1, 4.4),
    Claim("A-CLIP above CLIP", "+6.3", EMA, "aclip", "clip", 1, 6.3),
    Claim("A-CLIP above SLIP", "+1.1", EMA, "aclip", "slip", 1, 1.1),
    Claim("A-CLIP-eff above CLIP", "+5.3", EMA, "aclip-eff", "clip", 1, 5.3),
    Claim("A-CLIP-eff slightly below A-CLIP", "-1.0", EMA, "aclip-eff", "aclip", -1, -1.0),
    Claim("SLIP above CLIP", "+5.2", EMA, "slip", "clip", 1, 5.2),
    Claim("image to text R@1, A-CLIP above CLIP", "+11.3 Flickr", TO_TEXT, "aclip", "clip", 1),
    Claim("text to image R@1, A-CLIP above CLIP", "+9.5 Flickr", TO_IMAGE, "aclip", "clip", 1),
)
SELECTIONS = {  # compared with attention by foreground share: (metric, what the paper shows)
    "random ones": ("kept/random_share", "shown in figures"),
    "the centre's": ("kept/centre_share", None),
    "before training": ("kept/untrained_share", None),
}


def kept_patches(arms: dict[str, list[dict]]) -> list[dict[str, str]]:
    """Compare the foreground share of patches kept by attention with other selections of the same run."""
    return [
        compared(
            arms[arm], f"{arm}: kept patches hold more foreground than {other}", paper, "kept/attentive_share", key
        )
        for arm in ("attentive", "aclip")
        if arm in arms
        for other, (key, paper) in SELECTIONS.items()
    ]


def compared(runs: list[dict], claim: str, paper: str | None, metric: str, baseline: str) -> dict[str, str]:
    """A row of the claims table for the difference of two measurements of the same runs."""
    values = ([measured[key] for measured in runs] for key in (metric, baseline))
    return statistics.judge(Claim(claim, paper, metric, "", ""), *values)


def step_times(times: dict[str, dict]) -> list[dict[str, str]]:
    """Rows with the paper's training times and the step times of `timing.py`."""
    return [
        {
            "claim": f"step time of {STUDY.headings[arm].split(':')[0]} / CLIP's",
            "paper": timing.PAPER[arm],
            "here": timing.ratio(times[arm]),
            "verdict": "not testable at this scale",
        }
        for arm in ("slip", "aclip", "aclip-eff")
        if arm in times
    ]


def more_rows(found: Comparison) -> list[dict[str, str]]:
    """Comparisons within an arm, step times if measured, and results that this scale cannot show."""
    arms = found.arms
    rows = kept_patches(arms)
    if "aclip" in arms:
        rows.append(compared(arms["aclip"], "A-CLIP: EMA towers above online", None, EMA, ONLINE))
    rows += step_times(next(iter(arms.values()))[0].get("step_times", {}))
    claim = "absolute ImageNet, Flickr30K, COCO and 26-set numbers"
    return [*rows, statistics.untestable(claim, "43.9 IN", "needs YFCC15M")]


def plot(found: Comparison, out: Path) -> None:
    """Write attentive_mask_clip_curves.png, and attentive_mask_clip_kept.png if A-CLIP's seed 0 was evaluated."""
    plot_curves(found.folders, out)
    for folder in found.folders.get("aclip", []):
        if folder.name == "aclip-seed0" and (folder / "kept.png").exists():
            shutil.copy(folder / "kept.png", out / "attentive_mask_clip_kept.png")


def plot_curves(folders: dict[str, list[Path]], out: Path) -> None:
    """attentive_mask_clip_curves.png: zero-shot accuracy of the online towers over steps and seconds; mean of seeds."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2))
    for color, (arm, of_arm) in zip(plt.get_cmap("tab10").colors, folders.items(), strict=False):
        points = [read_metrics(folder, "zero_shot_top1") for folder in of_arm]
        step, seconds, top1 = (
            np.mean([[line[key] for line in lines] for lines in points], axis=0)
            for key in ("step", "seconds", "zero_shot_top1")
        )
        for axis, x in zip(axes, (step, seconds), strict=True):
            axis.plot(x, top1, color=color, marker="o", ms=3, label=STUDY.headings.get(arm, arm))
    for axis, name in zip(axes, ("step", "training seconds"), strict=True):
        axis.set(xlabel=name, ylabel="emoji names OOD, top-1 (%), online towers")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(out / "attentive_mask_clip_curves.png", dpi=110)
    plt.close(figure)


STUDY = Study(
    folder="attentive_mask_clip",
    paper="Attentive Mask CLIP (arXiv 2212.08653)",
    stands_for="YFCC15M",
    before=(Once(f"attentive_mask_clip.timing --out {STEP_TIMES}"),),
    arms=ARMS,
    minutes={"core": 9, "all": 18},
    evaluate=lambda runs: evaluation.main(evaluation.Config(runs=tuple(runs), times=STEP_TIMES)),
    metrics=evaluation.METRICS,
    claims=CLAIMS,
    more_rows=more_rows,
    plot=plot,
)

if __name__ == "__main__":
    runner.main(STUDY)
