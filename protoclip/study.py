"""The small-scale study of ProtoCLIP: `python -m protoclip.study` (`make reproduce-protoclip`).

Arms are trained on the embedded emoji corpus, a stand-in for CC2.5M, and compared seed by seed.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

from protoclip import eval as evaluation
from shared.run import read_metrics
from shared.study import runner, statistics
from shared.study.report import Comparison
from shared.study.runner import Arm, Once, Study
from shared.study.statistics import Claim

ARMS = (
    Arm("clip", "train emoji-clip", heading="CLIP"),
    Arm(
        "clip-light-aug",
        "train emoji-clip --augmentation light",
        heading="CLIP, ProtoCLIP's augmentation at paper scale",
    ),
    Arm(
        "clip-equal-time",
        "train emoji-clip --episodes 58",
        heading="CLIP, as many seconds as ProtoCLIP",
        core=False,
    ),
    Arm(
        "proto-no-pbt",
        "train emoji --w-external 0 --no-back-translate",
        heading="+ prototypes, no back translation",
    ),
    Arm("proto-pbt", "train emoji --w-external 0", heading="+ back translation"),
    Arm("protoclip", "train emoji", heading="+ external teacher = ProtoCLIP"),
)

NAMES_ID, NAMES_OOD = "names_id/top1", "names_ood/top1"
PROBE_ID, PROBE_OOD = "subgroups_id/probe_best", "subgroups_ood/probe_best"
CLAIMS = (  # the paper's numbers: CC2.5M, README of upstream, 8 GPUs
    Claim("linear probe above CLIP, seen styles", "+5.81 IN", PROBE_ID, "protoclip", "clip", 1, 5.81),
    Claim("... and at equal time", None, PROBE_ID, "protoclip", "clip-equal-time"),
    Claim("linear probe above CLIP, unseen style", "+5.81 IN", PROBE_OOD, "protoclip", "clip", 1, 5.81),
    Claim("... and at equal time", None, PROBE_OOD, "protoclip", "clip-equal-time"),
    Claim("... light augmentation alone", None, PROBE_OOD, "clip-light-aug", "clip"),
    Claim("zero-shot above CLIP, seen styles", "+2.01 IN", NAMES_ID, "protoclip", "clip", 1, 2.01),
    Claim("zero-shot above CLIP, unseen style", "+2.01 IN", NAMES_OOD, "protoclip", "clip", 1, 2.01),
    Claim("... and at equal time", None, NAMES_OOD, "protoclip", "clip-equal-time"),
    Claim("... light augmentation alone", None, NAMES_OOD, "clip-light-aug", "clip"),
    Claim("back translation helps zero-shot", "claimed", NAMES_OOD, "proto-pbt", "proto-no-pbt"),
    Claim("back translation helps the probe", "claimed", PROBE_OOD, "proto-pbt", "proto-no-pbt"),
    Claim("external teacher helps zero-shot", "claimed", NAMES_OOD, "protoclip", "proto-pbt"),
    Claim("external teacher helps the probe", "claimed", PROBE_OOD, "protoclip", "proto-pbt"),
    Claim("image clusters closer to classes (AMI, 0-1)", "claimed", "subgroups_ood/ami", "protoclip", "clip"),
    Claim("retrieval slightly lower", "-0.79 COCO", "retrieval_ood/mean_recall", "protoclip", "clip", -1, -0.79),
)


def cost(method: list[dict], baseline: list[dict]) -> dict[str, str]:
    """Training seconds a sample, ProtoCLIP's over CLIP's, as upstream's README has them for one GPU."""
    ratios = [m["seconds"] / b["seconds"] for m, b in zip(method, baseline, strict=True)]
    claim = Claim("training time, ProtoCLIP / CLIP", "1.79x", "seconds", "", "", 1, 0.79)
    row, half = statistics.judge(claim, ratios, [1.0] * len(ratios)), statistics.interval(ratios)
    mean = statistics.spread(ratios)["mean"]
    return row | {"here": f"{mean:.2f}" + ("x" if half is None else f" ± {half:.2f}x")}


def more_rows(found: Comparison) -> list[dict[str, str]]:
    """The cost of the method, and what this scale cannot show."""
    rows, arms = [], found.arms
    if "clip-equal-time" in arms and "protoclip" in arms:  # its episodes were set beforehand: do the times agree?
        seconds = [sum(values["seconds"] for values in arms[arm]) for arm in ("clip-equal-time", "protoclip")]
        if abs(seconds[0] / seconds[1] - 1) > 0.1:
            print(f"note: clip-equal-time took {seconds[0] / seconds[1]:.2f} times ProtoCLIP's seconds")
    if {"clip", "protoclip"} <= set(arms):
        rows.append(cost(arms["protoclip"], arms["clip"]))
    rows.append(statistics.untestable("YFCC-15M: CLIP's accuracy in 33 % of its time", "claimed", "needs YFCC-15M"))
    numbers = "55.22 / 21.47 / 22.52"
    return [*rows, statistics.untestable("absolute ImageNet, COCO and 10-set numbers", numbers, "needs CC2.5M")]


def plot(found: Comparison, out: Path) -> None:
    """protoclip_curves.png, and protoclip_features.png where both arms of seed 0 were measured."""
    plot_curves(found.folders, out)
    files = [found.folders[arm][0] / "features.npz" for arm in ("clip", "protoclip") if arm in found.folders]
    if len(files) == 2 and all(file.is_file() for file in files):
        panels = []
        for arm, file in zip(("clip", "protoclip"), files, strict=True):
            kept = np.load(file, allow_pickle=False)
            x, y = torch.from_numpy(kept["x"]), torch.from_numpy(kept["y"])
            panels.append((STUDY.headings[arm], x, y, kept["names"].tolist()))
        evaluation.plot_features(panels, out / "protoclip_features.png")


def plot_curves(folders: dict[str, list[Path]], out: Path) -> None:
    """protoclip_curves.png: zero-shot accuracy over steps and over seconds, modality gap over steps; mean of seeds."""
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.2))
    for color, (arm, of_arm) in zip(plt.get_cmap("tab10").colors, folders.items(), strict=False):
        points = [read_metrics(folder, "zero_shot_top1") for folder in of_arm]
        gaps = [read_metrics(folder, "modality_gap") for folder in of_arm]
        style = {"color": color, "marker": "o", "ms": 3}
        axes[0].plot(*means(points, "step", "zero_shot_top1"), **style, label=STUDY.headings.get(arm, arm))
        axes[1].plot(*means(points, "seconds", "zero_shot_top1"), **style)
        axes[2].plot(*means(gaps, "step", "modality_gap"), color=color)
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


def means(runs: list[list[dict]], *keys: str) -> list[np.ndarray]:
    """Means over runs of what their lines of metrics have under each key."""
    return [np.mean([[line[key] for line in lines] for lines in runs], axis=0) for key in keys]


STUDY = Study(
    folder="protoclip",
    paper="ProtoCLIP (arXiv 2206.10996)",
    stands_for="CC2.5M",
    before=(Once("protoclip.teacher minilm"),),
    arms=ARMS,
    minutes={"core": 12, "all": 14},
    passes="episode",
    evaluate=lambda runs: evaluation.main(evaluation.Config(runs=tuple(runs))),
    metrics=evaluation.METRICS,
    claims=CLAIMS,
    more_rows=more_rows,
    plot=plot,
)

if __name__ == "__main__":
    runner.main(STUDY)
