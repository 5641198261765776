"""The small-scale study of TL;DR: `python -m tldr_reduction.study` (`make reproduce-tldr-reduction`).

The embedded emoji corpus, a stand-in for CC3M, with captions made noisy (corpus.py). For each seed a codebook
captioner, a captioner fine-tuned on clean captions and an ITM scorer; then reductions of the pool; then the arms, a
small CLIP or BLIP trained on the pool or on one of the reductions.
"""

import csv
import json
import textwrap
from collections.abc import Iterator
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from shared import data
from shared.run import read_metrics
from shared.study import runner, statistics
from shared.study.report import Comparison
from shared.study.runner import Arm, Once, Stage, Study
from shared.study.statistics import Claim
from tldr_reduction import eval as evaluation
from tldr_reduction.config import POOL
from tldr_reduction.datasets import open_pairs

# --------------------------------------------------------------------------------------------------------------- stages

SHARES = (10, 30, 50, 70)  # percent that are dropped, by ITM score or at random
AS_MANY = "--match {reduced/tldr}"  # keep as many pairs as reduction `tldr` does
REDUCTIONS = {  # what tells a reduction from `tldr`: a quarter of each cluster of codes, captions "T_o; T_g"
    "tldr": "",
    "random": f"--select random {AS_MANY} --captions original",
    "random-refined": f"--select random {AS_MANY}",
    "codes": "--captions original",
    "full-refined": "--select all",
    "generated": "--captions generated",
    "first": f"--select first {AS_MANY}",
    "itm": f"--select itm {AS_MANY}",
    "image": "--features image",
    "text": "--features text",
    "farthest": "--select farthest",
    "tldr10": "--keep 0.1",
    "tldr50": "--keep 0.5",
    **{f"drop-random{p}": f"--select random --captions original --keep 0.{100 - p}" for p in SHARES},
    **{f"drop-itm{p}": f"--select itm --captions original --keep 0.{100 - p}" for p in SHARES},
}
REDUCE = (
    f"reduce {POOL} --keep 0.25 --captioner {{captioner}} --caption-model {{finetune}} --scorer {{scorer}}"
    " --work runs/tldr_reduction/work-seed{seed} --seed {seed} --out {out}"
)


def reductions() -> Iterator[Stage]:
    """One after the other: those of a seed share codes, scores and captions, and each adds what it lacks."""
    before: tuple[str, ...] = ()
    for name, flags in REDUCTIONS.items():
        yield Stage(f"reduced/{name}", f"{REDUCE} {flags}", after=before)
        before += (f"reduced/{name}",)


STAGES = (
    Stage("captioner", "train emoji-captioner"),
    Stage("finetune", "train emoji-finetune --init {captioner}"),
    Stage("scorer", "train emoji-scorer --init {captioner}"),
    *reductions(),
)

# ----------------------------------------------------------------------------------------------------------------- arms

EPOCHS = ""  # as many epochs as the pool, the preset's: the paper's comparison, a quarter has a quarter of the steps
# as many steps as the pool, with the same decay in all: the fair comparison
STEPS = "--epochs 27 --lr-decay-rate 0.876 --eval-every 7"
STEPS_OF_10 = "--epochs 68 --lr-decay-rate 0.949"
STEPS_OF_50 = "--epochs 14 --lr-decay-rate 0.775"
BLIP_STEPS = "--epochs 80 --lr-decay-rate 0.956 --batch-size 64 --eval-every 20"  # 2,400; no BLIP has the pool
CURVES = ("full", "random-steps", "random-refined-steps", "codes-steps", "tldr-steps", "full-refined")  # are plotted
EVALUATED = (*CURVES, "blip-tldr-steps")  # while they train


def trained(name: str, preset: str, reduction: str, length: str, heading: str, core: bool) -> Arm:
    """A model trained on a reduction. The losses of the first epochs are compared, so they are logged often."""
    evaluation = "" if name in EVALUATED else "--eval-every 0"
    command = f"train {preset} --data {{reduced/{reduction}}}/shards {length} {evaluation} --log-every 5"
    return Arm(name, command, heading=heading, core=core)


def clip(reduction: str, length: str, heading: str, core: bool = False) -> Arm:
    """Arm REDUCTION or REDUCTION-steps: a CLIP for as many epochs, or as many steps, as on the pool."""
    name = reduction if length == EPOCHS else f"{reduction}-steps"
    return trained(name, "emoji-clip", reduction, length, heading, core)


def blip(reduction: str, heading: str) -> Arm:
    """Arm blip-REDUCTION-steps."""
    return trained(f"blip-{reduction}-steps", "emoji-blip", reduction, BLIP_STEPS, heading, core=False)


ARMS = (  # T_o: original captions, T_g: generated ones
    Arm("full", "train emoji-clip --log-every 5", heading="full, T_o"),
    clip("random", EPOCHS, "25 % at random, T_o", core=True),
    clip("codes", EPOCHS, "25 % by codes, T_o"),
    clip("random-refined", EPOCHS, "25 % at random, T_o; T_g", core=True),
    clip("tldr", EPOCHS, "25 % by codes, T_o; T_g = TL;DR", core=True),
    clip("random", STEPS, "25 % at random, T_o, equal steps", core=True),
    clip("codes", STEPS, "25 % by codes, T_o, equal steps"),
    clip("random-refined", STEPS, "25 % at random, T_o; T_g, equal steps", core=True),
    clip("tldr", STEPS, "TL;DR, equal steps", core=True),
    clip("full-refined", EPOCHS, "full, T_o; T_g"),
    clip("generated", STEPS, "25 % by codes, T_g only, equal steps"),
    clip("first", STEPS, "first quarter of the file, T_o; T_g, equal steps"),
    clip("itm", STEPS, "25 % of highest ITM, T_o; T_g, equal steps"),
    clip("image", STEPS, "25 % by image-embedding clusters, T_o; T_g, equal steps"),
    clip("text", STEPS, "25 % by text-embedding clusters, T_o; T_g, equal steps"),
    clip("farthest", STEPS, "farthest 25 % of each cluster, T_o; T_g, equal steps"),
    clip("tldr10", STEPS_OF_10, "TL;DR 10 %, equal steps"),
    clip("tldr50", STEPS_OF_50, "TL;DR 50 %, equal steps"),
    *(clip(f"drop-random{p}", EPOCHS, f"{p} % dropped at random, T_o") for p in SHARES),
    *(clip(f"drop-itm{p}", EPOCHS, f"{p} % of lowest ITM dropped, T_o") for p in SHARES),
    blip("random-refined", "BLIP: 25 % at random, T_o; T_g"),
    blip("tldr", "BLIP: TL;DR"),
)

# --------------------------------------------------------------------------------------------------------------- claims

SCORE = "names_ood/top5"  # what verdicts are about: top-1 at this scale counts a few dozen images of 1,500


def better(claim: str, paper: str | None, method: str, baseline: str) -> Claim:
    """A difference in `SCORE`. The paper's numbers are BLIP's COCO TR@1 on CC3M, another unit, so only signs count."""
    return Claim(claim, paper, SCORE, method, baseline, -1 if (paper or "").startswith("-") else 1)


def main_claims(when: str, suffix: str) -> tuple[Claim, ...]:
    """The components of the method, for arms with that suffix."""
    return (
        better(f"codes above random, T_o ({when})", "+3.2", f"codes{suffix}", f"random{suffix}"),
        better(f"refining above T_o, random sample ({when})", "+4.1", f"random-refined{suffix}", f"random{suffix}"),
        better(f"TL;DR above random, T_o ({when})", "+7.5", f"tldr{suffix}", f"random{suffix}"),
        better(f"TL;DR above random, refined ({when})", "+3.4", f"tldr{suffix}", f"random-refined{suffix}"),
        better(f"TL;DR above full data, T_o ({when})", "+1.9", f"tldr{suffix}", "full"),
    )


CLAIMS = (
    *main_claims("equal steps", "-steps"),
    *main_claims("equal epochs", ""),
    better("refining above T_o, full data", "+4.5", "full-refined", "full"),
    better("TL;DR below full data, refined (equal steps)", "-2.3", "tldr-steps", "full-refined"),
    better("codes above image embeddings (equal steps)", "+2.2", "tldr-steps", "image-steps"),
    better("codes above text embeddings (equal steps)", "+3.8", "tldr-steps", "text-steps"),
    better("stride above largest distance (equal steps)", "+0.5", "tldr-steps", "farthest-steps"),
    better("10 % below 25 % (equal steps)", "-3.9", "tldr10-steps", "tldr-steps"),
    better("50 % above 25 % (equal steps)", "+2.0", "tldr50-steps", "tldr-steps"),
    better("TL;DR above the first quarter (equal steps)", None, "tldr-steps", "first-steps"),
    better("TL;DR above highest ITM (equal steps)", None, "tldr-steps", "itm-steps"),
    better("BLIP: TL;DR above random, refined", "+3.4", "blip-tldr-steps", "blip-random-refined-steps"),
    *(
        better(f"{p} % dropped: lowest ITM above random", paper, f"drop-itm{p}", f"drop-random{p}")
        for p, paper in zip(SHARES, ("+1.3", "+3.2", "+4.4", "+2.4"), strict=True)
    ),
    Claim("T_g alone below T_o; T_g", "collapses", SCORE, "generated-steps", "tldr-steps", -1),
    Claim("T_g alone: lower ITC loss at first", "shown", "early_loss_ita", "generated-steps", "tldr-steps", -1),
    Claim("distinct emoji kept, codes above random", None, "data/emoji", "tldr", "random"),
)


def more_rows(found: Comparison) -> list[dict[str, str]]:
    """ITM before (the pool) and after reduction and refinement, by one scorer; and what this scale cannot show."""
    rows = []
    arm = next((arm for arm in ("tldr-steps", "tldr") if arm in found.arms), None)
    if arm is not None and "itm/after_mean" in found.arms[arm][0]:
        claim = Claim("share of ITM scores below 0.5, after - before", "-21 (37 to 16)", "", "", "", -1, -21.0)
        after, before = ([run[f"itm/{when}_below_half"] for run in found.arms[arm]] for when in ("after", "before"))
        rows.append(statistics.judge(claim, after, before))
    absolute = "absolute COCO, Flickr30K and ImageNet numbers", "72.8 TR@1", "needs CC3M and COCO"
    cost = "training time at 25 %", "19 h to 4.7 h", "follows from the number of steps"
    return [*rows, statistics.untestable(*absolute), statistics.untestable(*cost)]


# ---------------------------------------------------------------------------------------------------------------- plots


def plot(found: Comparison, out: Path) -> None:
    """Four plots, tldr_reduction_*.png: those of a reduction are of arm tldr (or tldr-steps) and the first seed."""
    plot_fractions(found.arms, out)
    plot_curves(found.folders, out)
    reduced = next((found.folders[arm][0] for arm in ("tldr", "tldr-steps") if arm in found.folders), None)
    if reduced is not None:
        reduction = Path(json.loads((reduced / "config.json").read_text())["data"]).parent
        if (reduction / "report.json").is_file():
            plot_itm(reduction, out)
            plot_clusters(reduction, out)


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


def plot_fractions(arms: dict[str, list[dict]], out: Path) -> None:
    """tldr_reduction_fractions.png: accuracy against the kept share, by selection and by what is dropped."""
    curves = {
        "TL;DR, equal steps": {10: "tldr10-steps", 25: "tldr-steps", 50: "tldr50-steps", 100: "full-refined"},
        "random, T_o, equal steps": {25: "random-steps", 100: "full"},
        "lowest ITM dropped, equal epochs": {100 - p: f"drop-itm{p}" for p in SHARES} | {100: "full"},
        "dropped at random, equal epochs": {100 - p: f"drop-random{p}" for p in SHARES} | {100: "full"},
    }
    figure, axis = plt.subplots(figsize=(6.5, 4))
    for label, points in curves.items():
        shares = [share for share in sorted(points) if points[share] in arms]
        if len(shares) > 1:
            spreads = [statistics.spread([run[SCORE] for run in arms[points[share]]]) for share in shares]
            means, deviations = ([spread[key] for spread in spreads] for key in ("mean", "std"))
            axis.errorbar(shares, means, deviations, marker="o", capsize=3, label=label)
    axis.set(xlabel="share of the pool (%)", ylabel=f"{evaluation.METRICS[SCORE]} (%)")
    axis.grid(alpha=0.3)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(out / "tldr_reduction_fractions.png", dpi=110)
    plt.close(figure)


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
            axis.plot(steps, accuracy, marker="o", label=STUDY.headings[arm])
    axis.set(xlabel="step", ylabel="names OOD, top-1 (%)")
    axis.grid(alpha=0.3)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(out / "tldr_reduction_curves.png", dpi=110)
    plt.close(figure)


STUDY = Study(
    folder="tldr_reduction",
    paper="TL;DR (arXiv 2305.20087)",
    stands_for="CC3M",
    before=(Once("tldr_reduction.corpus"),),
    stages=STAGES,
    arms=ARMS,
    minutes={"core": 12, "all": 25},
    evaluate=lambda runs: evaluation.main(evaluation.Config(runs=tuple(runs))),
    metrics=evaluation.METRICS,
    claims=CLAIMS,
    more_rows=more_rows,
    plot=plot,
)

if __name__ == "__main__":
    runner.main(STUDY)
