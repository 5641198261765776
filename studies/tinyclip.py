"""The small-scale study of TinyCLIP: `python -m studies.tinyclip` (`make reproduce-tinyclip`).

A teacher and its students, ViTs of a quarter of its size, are trained on scenes of few emoji, a stand-in for
LAION-400M, and compared seed by seed, as in the paper's tables 2, 3, 4 and 6: contrastive loss or affinity mimicking;
random weights, weights inherited by hand or by learned masks; one stage or two.

Why the effects can appear: the teacher classifies more images correctly than nearest neighbours on raw pixels do, and
trains five times as long as its students, which therefore stay well below it (its lead is a row of the table): its
weights and similarities contain what a student lacks. The effects would vanish with a teacher no better than raw
pixels, and with students trained until they equal the teacher. A batch of scenes holds each caption several times,
which would mislead the contrastive loss only; both losses leave equal captions out.

On photographs (`--corpus photos --photos DIR`): a small convolutional teacher and its students of half the size are
trained from scratch on the 30,000 English captions of Flickr8k, at 32 pixels, and compared by retrieval of the usual
1,000 test photographs. The teacher has the size of a convolutional student of the presets, and the students have half
of that, so that a seed takes some twenty minutes of one core.

Why the effects can appear: for the same reasons as above; the teacher trains three times as long. But the teacher is
small and has few pairs. If it retrieves little better than raw pixels, students can gain little from it.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from shared.checkpoints import load_checkpoint
from shared.run import read_metrics
from studies.harness import ceiling, floors, photos, runner, verdicts
from studies.harness.floors import Floor
from studies.harness.report import Comparison, spread, with_means
from studies.harness.runner import Arm, Once, Study
from studies.harness.verdicts import Claim
from tinyclip import eval as evaluation
from tinyclip.geometry import CONFIGS
from tinyclip.model import create_model

# ---------------------------------------------------------------------------------------------------------------- arms

SCENES = "data/scenes-near"
MAKE_SCENES = f"studies.corpora.scenes --out {SCENES} --image-size 40 --captioned-size 0.5 0.7 --concepts 30"
STEPS = 150  # of a stage of a student; the teacher has 750
STAGE = f"--steps {STEPS} --warmup 15"
STUDENT, TEACHER = f"--model emoji-25 {STAGE}", "--teacher {vit-teacher}"
# Rates of the gates with which learned masks end at the size of a cut by hand
MASKS = "--target-sparsity 0.745 --prune-step 60 --sparsity-warmup 30 --mask-lr 1.0 --lambda-lr -1.0"
RC, RA, IC, IA = (f"{weights}-{loss}" for weights in ("random", "inherited") for loss in ("contrastive", "affinity"))
AUTO, HALF, STAGES, LONG = "auto-affinity", "half-affinity", ("two-stages", "one-stage"), "random-contrastive-long"
ARMS = (
    Arm("vit-teacher", "train emoji-teacher --steps 750 --warmup 56", heading="teacher (100 %)"),
    Arm(RC, f"train emoji-contrastive {STUDENT} --init None", heading="25 %: random weights, contrastive"),
    Arm(RA, f"train emoji {STUDENT} {TEACHER} --init None", heading="25 %: random weights, affinity", core=False),
    Arm(
        IC,
        f"train emoji-contrastive {STUDENT} --init {{vit-teacher}} --eval-every 15",
        heading="25 %: inherited by hand, contrastive",
    ),
    Arm(
        IA,
        f"train emoji {STUDENT} {TEACHER} --init {{vit-teacher}} --eval-every 15",
        heading="25 %: inherited by hand, affinity",
    ),
    Arm(
        AUTO,
        f"train emoji-auto {STAGE} {TEACHER} --init {{vit-teacher}} {MASKS}",
        heading="25 %: inherited by learned masks, affinity",
    ),
    Arm(
        HALF,
        f"train emoji {STAGE} {TEACHER} --init {{vit-teacher}}",
        heading="50 %: inherited by hand, affinity = the first of two stages",
        core=False,
    ),
    Arm(
        "two-stages",
        f"train emoji {STUDENT} {TEACHER} --init {{{HALF}}}",
        heading="25 %: the second of two stages by hand, affinity",
        core=False,
    ),
    Arm(
        "one-stage",
        f"train emoji --model emoji-25 --steps {2 * STEPS} {TEACHER} --init {{vit-teacher}}",
        heading="25 %: inherited by hand, affinity, as many steps as two stages",
        core=False,
    ),
    Arm(
        LONG,
        f"train emoji-contrastive --model emoji-25 --steps {3 * STEPS} --warmup 45 --init None",
        heading="25 %: random weights, contrastive, three times the steps",
        core=False,
    ),
    Arm(
        "random-channels",
        f"train emoji {STUDENT} {TEACHER} --init {{vit-teacher}} --inherit random",
        heading="25 %: random channels and layers, affinity",
        core=False,
    ),
    Arm(
        "image-inherited",
        f"train emoji {STUDENT} {TEACHER} --init {{vit-teacher}} --inherit-only image",
        heading="25 %: image tower inherited by hand, affinity",
        core=False,
    ),
)

# -------------------------------------------------------------------------------------------------------------- claims

SCENE_SETS = [f"{SCENES}/eval/names_{style}" for style in ("ood", "id")]
TOP1 = "scenes/top1"  # mean of two accuracies: on held-out drawings in seen styles (ID), on the unseen style (OOD)
STYLES = {TOP1: ("names_ood/top1", "names_id/top1")}
SAVED, SIZE = "steps_to_scratch", "block_parameters_m"
METRICS = {
    TOP1: "scenes",
    "names_ood/top1": "scenes OOD",
    "names_id/top1": "scenes ID",
    SAVED: "steps to from scratch",
    "parameters_m": "parameters (M)",
    SIZE: "in blocks (M)",
    "macs_m": "MACs (M)",
    "seconds": "training seconds",
}
# The paper's numbers are zero-shot top-1 on ImageNet (IN): of students of half the size after one epoch of LAION-400M
# (tables 2 to 4), of a quarter of the size after two (table 6), of the teacher (section 4.1).
BELOW = "students train a fifth of their teacher's steps and stay below it, so that it has what they lack"
CLAIMS = (
    Claim("affinity above contrastive, inherited", "53.4 to 55.5 IN (table 2)", TOP1, IA, IC, 1, 2.1, True, 1.0,
          where=BELOW),
    Claim("affinity above contrastive, random weights", "36.2 to 37.8 IN (tables 4, 3)", TOP1, RA, RC, 1, 1.6, True,
          0.8, where=BELOW),
    Claim("inherited above random weights, contrastive", "36.2 to 53.5 IN (table 4)", TOP1, IC, RC, 1, 17.3,
          True, 1.0, where=BELOW),
    Claim("inherited above random weights, affinity", "37.8 to 54.0 IN (table 3)", TOP1, IA, RA, 1, 16.2, True,
          1.0, where=BELOW),
    Claim("learned masks above by hand, affinity", "54.0 to 54.9 IN (table 3)", TOP1, AUTO, IA, 1, 0.9, True, 0.45,
          where=BELOW),
    Claim("two stages above one, by hand, affinity", "47.0 to 49.0 IN (table 6)", TOP1, *STAGES, 1, 2.0, True, 1.0,
          where=BELOW),
    Claim("steps to the from-scratch student's score / its steps - 1, inherited by hand", "1.4-7.8x fewer", SAVED, IC,
          LONG, -1, -0.29, True, 0.14, TOP1, "three times the students' steps from scratch, not the paper's 32 epochs"),
    Claim("learned masks above random weights, affinity", "37.8 to 54.9 IN (table 3)", TOP1, AUTO, RA, 1, 17.1, False,
          1.0),
    Claim("both together", "36.2 to 54.0 IN (tables 4, 3)", TOP1, IA, RC, 1, 17.8, False, 1.0),
    Claim("the teacher above its student by hand, affinity", "54.0 to 65.6 IN (table 3, 4.1)", TOP1, "vit-teacher", IA,
          1, 11.6, False, 1.0),
    Claim("the teacher above its student by learned masks", "54.9 to 65.6 IN (table 3, 4.1)", TOP1, "vit-teacher", AUTO,
          1, 10.7, False, 1.0),
    Claim("steps to the from-scratch student's score / its steps - 1, by hand, affinity", "1.4-7.8x fewer", SAVED, IA,
          LONG, -1, -0.29, False, 0.14, TOP1),
    Claim("front channels above random ones", None, TOP1, IA, "random-channels"),
    Claim("both towers inherited above the image tower alone", None, TOP1, IA, "image-inherited"),
    Claim("size (M in blocks), learned masks - by hand", None, SIZE, AUTO, IA),
    Claim("share of parameters removed, reached - asked", None, "sparsity_reached", AUTO, f"{AUTO}:target_sparsity"),
)  # fmt: skip


def macs_in_millions(found: Comparison) -> None:
    """Add macs_m, since two digits of macs_g do not tell small networks apart."""
    for runs in found.arms.values():
        for values in (values for values in runs if "macs_g" in values):
            values["macs_m"] = 1000 * values["macs_g"]


def derive(found: Comparison) -> None:
    """Add macs_m, the mean over styles, and steps_to_scratch to the students.

    The baseline is the student of the same seed, random weights, the contrastive loss and three times the steps.
    The metric is the number of steps until the baseline's final score on the unseen style is reached / the baseline's
    steps, minus 1. A student that never reaches it saves nothing (0).
    """
    macs_in_millions(found)
    for runs in found.arms.values():
        runs[:] = [with_means(values, STYLES) for values in runs]
    for arm in (arm.name for arm in ARMS if {arm.name, LONG} <= set(found.arms)):
        for values, folder, other in zip(found.arms[arm], found.folders[arm], found.folders[LONG], strict=True):
            curve, baseline = learning_curve(folder), learning_curve(other)
            if curve and baseline:
                steps, goal = baseline[-1]
                values[SAVED] = (steps if arm == LONG else reached(curve, goal) or steps) / steps - 1


def learning_curve(folder: Path) -> list[tuple[int, float]]:
    """(step, top-1 with plain names on the unseen style) of a run."""
    return [(line["step"], line["zero_shot_top1"]) for line in read_metrics(folder, "zero_shot_top1")]


def reached(curve: Sequence[tuple[int, float]], goal: float) -> float | None:
    """The step at which a learning curve (linear between points, starting at 0) reaches `goal`; None: never."""
    before, low = 0, 0.0
    for step, value in curve:
        if value >= goal:
            return before + (step - before) * ((goal - low) / (value - low) if value > low else 1.0)
        before, low = step, value
    return None


def more_rows(found: Comparison) -> list[dict]:
    """Rows for results that this scale cannot show."""
    needs, claim = "needs LAION-400M, YFCC-15M", "8.9 % of ViT-B/16's parameters, +3.5 over it"
    return [
        verdicts.not_testable("ImageNet zero-shot of the model zoo", "41.1 to 64.5", needs),
        verdicts.not_testable(
            "half the size comparable to its teacher", "61.4 against a whole ViT-B/32's 62.9 (figure 1)",
            "needs 22 epochs of LAION-400M; students here train too little to reach their teacher", primary=True,
        ),
        verdicts.not_testable(claim, "41.1 against 37.6", "needs YFCC-15M", primary=True),
    ]  # fmt: skip


# ----------------------------------------------------------------------------------------------- measurements and plots


def evaluate(runs: Sequence[str]) -> list[dict]:
    return evaluation.main(evaluation.Config(tuple(runs), sets=tuple(SCENE_SETS), throughput=False))


def tower() -> ceiling.Tower:
    """The teacher's image tower, with random weights."""
    shape = CONFIGS["emoji-100"]
    return ceiling.Tower(create_model("emoji-100").visual, shape["embed_dim"], shape["vision"]["image_size"])


def on_labels() -> dict[str, float]:
    """The ceiling: the teacher's image tower, trained on names as labels for more steps than the teacher."""
    options = dict(epochs=30, lr=2e-3, weight_decay=0.1, crop=(0.9, 1.0), shards=f"{SCENES}/train", stored=1)
    return with_means(ceiling.trained_on_labels(tower, SCENE_SETS, **options), STYLES)


FLOORS = (
    Floor("chance", lambda: with_means(floors.chance(SCENE_SETS), STYLES)),
    Floor("nearest neighbour on raw pixels", lambda: with_means(floors.nearest_neighbour(SCENE_SETS), STYLES)),
    Floor("image tower trained on labels", on_labels, ceiling=True),
)


def plot(found: Comparison, out: Path) -> None:
    """Write tinyclip_curves.png, and tinyclip_masks.png if the first seed of an arm has cut masks."""
    plot_curves(found, out / "tinyclip_curves.png")
    files = {arm: folders[0] / "masks.pt" for arm, folders in found.folders.items()}
    if masks := {arm: load_checkpoint(file) for arm, file in files.items() if file.exists()}:
        plot_masks(masks, out / "tinyclip_masks.png")


def plot_curves(found: Comparison, path: Path) -> None:
    """Accuracy over steps and against parameters; means over seeds. Arms that the default run leaves out are dashed."""
    figure, (steps, size, legend) = plt.subplots(1, 3, figsize=(17, 4.5), width_ratios=[1, 1, 0.7])
    trained = [arm for arm in ARMS if arm.name in found.arms]
    for color, arm in zip(itertools.cycle(plt.get_cmap("tab20").colors), trained, strict=False):
        style = dict(color=color, ls="-" if arm.core else "--", marker="o")
        curves = np.array([learning_curve(folder) for folder in found.folders[arm.name]])  # (seeds, points, 2)
        if curves.size:
            steps.plot(*curves.mean(axis=0).T, ms=3, label=arm.heading, **style)
        runs = found.arms[arm.name]
        if {"parameters_m", TOP1} <= runs[0].keys():
            x, y = (spread([values[key] for values in runs]) for key in ("parameters_m", TOP1))
            size.errorbar(x["mean"], y["mean"], y["std"], capsize=3, **style)
    for axis, x, metric in (  # runs are evaluated on the unseen style
        (steps, "step", STYLES[TOP1][0]),
        (size, "parameters without token embedding (M)", TOP1),
    ):
        axis.set(xlabel=x, ylabel=f"{METRICS[metric]}, top-1 (%)")
        axis.grid(alpha=0.3)
    legend.legend(*steps.get_legend_handles_labels(), fontsize=8, loc="center left")
    legend.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_masks(masks: dict[str, dict], path: Path) -> None:
    """Plot the heads, neurons and hidden dimensions that are kept after the cut, one row of panels per tower."""
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
            axis.imshow(order.numpy(), aspect="auto", cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
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
    corpus="Scenes of 30 emoji; ViTs, the teacher from scratch",
    before=(Once(MAKE_SCENES),),
    arms=ARMS,
    minutes={"core": 4.1, "all": 8.4},
    terms="Students have a quarter of the teacher's size. Inherited: they start from weights cut out of the teacher's, "
    "by hand or by learned masks, not from random ones. Affinity: they learn the teacher's similarities of images and "
    "texts; contrastive: CLIP's loss. Two stages: cut to a half, trained, cut to a quarter. Steps - 1: -0.9 is a "
    "tenth of the steps, the paper's 1.4 and 7.8 times fewer are -0.29 and -0.87.",
    evaluate=evaluate,
    alone=True,
    derive=derive,
    metrics=METRICS,
    sets=tuple(SCENE_SETS),
    floors=FLOORS,
    claims=CLAIMS,
    more_rows=more_rows,
    plot=plot,
)


# ---------------------------------------------------------------------------------------------------------- photographs

# Unlike on emoji, crops stay within the image; equal captions are too rare to be kept apart. Photographs are
# decoded once and kept in memory. The teacher sees the crops, so its features are computed in each step.
PHOTOS_DATA = f"--data {photos.SINGLE} --eval-every 0 --augmentation crop --no-distinct-captions"
STUDENT = f"{PHOTOS_DATA} --model emoji-convnet-25 --steps 232"  # four epochs
AFFINITY = f"train emoji-convnet {STUDENT} --teacher {{teacher}}"
CONTRASTIVE = f"train emoji-convnet-contrastive {STUDENT}"
PHOTOS_ARMS = (
    Arm(
        "teacher",
        f"train emoji-convnet-teacher {PHOTOS_DATA} --model emoji-convnet-50 --steps 696",
        heading="teacher (100 %)",
    ),
    Arm("random-contrastive", f"{CONTRASTIVE} --init None", heading="50 %: random weights, contrastive"),
    Arm("random-affinity", f"{AFFINITY} --init None", heading="50 %: random weights, affinity"),
    Arm("inherited-contrastive", f"{CONTRASTIVE} --init {{teacher}}", heading="50 %: inherited, contrastive"),
    Arm("inherited-affinity", f"{AFFINITY} --init {{teacher}}", heading="50 %: inherited, affinity = TinyCLIP by hand"),
)
PHOTOS_RECALL, RECALL_AT_10 = "retrieval_en/mean_recall", "retrieval_en/text_to_image_R@10"
WEAK = "30,000 captions: teacher and students are barely above raw pixels; recall, where the paper has accuracy"
PHOTOS_CLAIMS = (  # worded as in CLAIMS, which has the same claims on ViTs
    Claim("inherited above random weights, contrastive", "36.2 to 53.5 IN (table 4)", PHOTOS_RECALL, IC, RC, 1, None,
          True, 0.3, where=WEAK),
    Claim("affinity above contrastive, inherited", "53.4 to 55.5 IN (table 2)", PHOTOS_RECALL, IA, IC, 1, None, True,
          0.3, where=WEAK),
    Claim("affinity above contrastive, random weights", "claimed", PHOTOS_RECALL, RA, RC, 1, None, True, 0.3,
          where=WEAK),
    Claim("both together", "claimed", PHOTOS_RECALL, IA, RC, 1, None, True, 0.3, where=WEAK),
    Claim("inherited above random weights, affinity", "37.8 to 54.0 IN (table 3)", PHOTOS_RECALL, IA, RA,
          negligible=0.3),
    Claim("half the size above the teacher, by hand", None, PHOTOS_RECALL, IA, "teacher"),
)  # fmt: skip


def more_rows_on_photos(found: Comparison) -> list[dict]:
    """Rows for results that this scale cannot show."""
    why = {
        LONG: "accuracy is measured after training only", "one-stage": "its towers are too small",
        IA: "masks act on ViTs, which learn too little from 30,000 pairs",
    }  # fmt: skip
    tested = {claim.claim for claim in PHOTOS_CLAIMS}
    rows = [
        verdicts.not_testable(claim.claim, claim.paper, why[claim.baseline], primary=True)
        for claim in CLAIMS
        if claim.primary and claim.claim not in tested
    ]
    needs = "needs LAION-400M, YFCC-15M"
    return [*rows, verdicts.not_testable("ImageNet zero-shot of the model zoo", "41.1 to 64.5", needs)]


def evaluate_photos(runs: Sequence[str]) -> list[dict]:
    return evaluation.main(evaluation.Config(tuple(runs), sets=(photos.RETRIEVAL,), throughput=False))


PHOTOS = Study(
    folder="tinyclip",
    on="photos",
    paper="TinyCLIP (arXiv 2309.12314)",
    stands_for="LAION-400M",
    before=(photos.FLICKR8K, photos.CAPTIONS),
    arms=PHOTOS_ARMS,
    corpus=f"Flickr8k, {photos.RESIZED}, seen at 32 pixels, a sample for each English caption; all towers from scratch",
    seeds=photos.FEW,
    minutes={"core": 12, "all": 12},
    evaluate=evaluate_photos,
    alone=True,
    derive=macs_in_millions,
    metrics={
        PHOTOS_RECALL: "mean recall",
        RECALL_AT_10: "T2I R@10",
        "retrieval_en/image_to_text_R@10": "I2T R@10",
        "parameters_m": "parameters (M)",
        "macs_m": "MACs (M)",
        "seconds": "training seconds",
    },
    sets=(photos.RETRIEVAL,),
    floors=(
        *photos.floors_on(photos.RETRIEVAL, of="raw pixels", pixels=True),
        Floor(
            "canonical correlation of EfficientNet-Lite0, pretrained, with words",
            lambda: photos.by_correlation([photos.RETRIEVAL]),
            ceiling=True,
        ),
    ),
    claims=PHOTOS_CLAIMS,
    more_rows=more_rows_on_photos,
)

if __name__ == "__main__":
    runner.main(STUDY)
