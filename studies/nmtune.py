"""The small-scale study of NMTune: `python -m studies.nmtune` (`make reproduce-nmtune`).

Encoders are pre-trained on scenes of 50 emoji, 50 pictures a name, a stand-in for ImageNet-1K (labels) and YFCC15M
(captions), with the paper's 0 to 30 % of wrong labels or swapped captions. Linear probes, and on encoders trained with
labels also MLP and NMTune, learn 25 other emoji, and are tested on new scenes of the same drawings (ID) and on scenes
of an unseen style (OOD). The same heads are tuned on features of a black box, EfficientNet-Lite0. All heads have the
paper's settings, and NMTune is also tuned without each of its losses.

Why the effects can appear: names have enough pictures to be learned in spite of wrong labels, which an encoder that
sees each picture many times learns, too (how many is a column of the table), and needs directions of its features for.
An MLP of width 4D on 50 pictures a name overfits, so that a regulariser can help. The effects would vanish if the wrong
labels were not learned, or if a probe were near 100 %.

On photographs (`--corpus photos --photos DIR`): encoders are pre-trained on the 50,000 photographs of CIFAR-10 with 0
to 30 % wrong labels, a stand-in for ImageNet-1K. LP, MLP and NMTune are tuned on the photographs of PACS and tested on
held-out photographs (ID), and on paintings, cartoons and sketches of the same classes (OOD), a stand-in for DomainNet.
The same heads are also tuned and tested on features of these images from a black box, EfficientNet-Lite0.

Why the effects can appear: for the same reasons as above; PACS is a benchmark of the paper's kind of domain shift. The
effects would vanish where a probe is near 100 %, as on an ImageNet network's features of photographs.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor

from nmtune import eval as evaluation
from nmtune.config import NOISE, PAPER
from nmtune.datasets import open_labelled
from nmtune.eval import accuracy
from nmtune.features import Bank, read_features
from nmtune.train import tuned_head
from shared import pictures, probes, run
from shared.errors import UserError
from studies.harness import floors, photos, runner, verdicts
from studies.harness.floors import Floor
from studies.harness.report import Comparison
from studies.harness.runner import Arm, Once, Study
from studies.harness.verdicts import Claim
from studies.nmtune_encoders import HEADS as TUNED
from studies.nmtune_encoders import Task, measured

# ---------------------------------------------------------------------------------------------------------------- arms

SCENES = "data/scenes-nmtune"
DATA = {"sup": f"{SCENES}/pretrain:train", "clip": f"{SCENES}/shards"}  # of each kind of encoder
KINDS = {"sup": "label", "clip": "caption"}
TASK = Task(
    f"{SCENES}/tune:train", {"id": f"{SCENES}/tune:test", "ood": f"{SCENES}/ood:test"}, own=f"{SCENES}/pretrain:test"
)
FEATURES = "runs/nmtune/lite0.npz"  # EfficientNet-Lite0's of the task
HEADS = {"lp": "LP", "mlp": "MLP", "nmtune": "NMTune"}
WITHOUT = {"mse": "L_MSE", "cov": "L_COV", "svd": "L_SVD"}
BLACK_BOX = tuple(f"lite0-{head}" for head in HEADS)
SELECTED, LEFT_OUT = "lite0-lp-select", {term: f"lite0-no-{term}" for term in WITHOUT}
ON_LITE0 = (*BLACK_BOX, SELECTED, *LEFT_OUT.values())


def black_box_arms(features: str) -> tuple[Arm, ...]:
    """Heads with the paper's settings on features of the black box, one for each seed."""

    def arm(name: str, head: str, options: str = "", but: str = "", core: bool = True) -> Arm:
        command = f"train {head}-paper --features {features} --heads 1 --save-every 100000 {options}".rstrip()
        return Arm(name, command, heading=f"EfficientNet-Lite0, {HEADS[head]}{but}", core=core)

    return (
        *(arm(name, head) for name, head in zip(BLACK_BOX, HEADS, strict=True)),
        arm(SELECTED, "lp", "--select", ", selected rate and decay", core=False),
        *(
            arm(name, "nmtune", f"--w-{term} 0", f" without {WITHOUT[term]}", core=False)
            for term, name in LEFT_OUT.items()
        ),
    )


def extracted(task: Task, features: str) -> Once:
    """The command that writes the black box's features of a task."""
    return Once(
        f"nmtune.extract images --encoder lite0:128 {task.options} --batch-size 32 --out {features}", arms=ON_LITE0
    )


ARMS = (
    *(
        Arm(
            f"{kind}-{level:02d}",
            f"pretrain small-{kind} --data {DATA[kind]} --epochs 28 --noise {level / 100:g}",
            heading=f"{level} % {what} noise",
            core=kind == "sup" and level != 20,
        )
        for kind, what in KINDS.items()
        for level in NOISE
    ),
    *black_box_arms(FEATURES),
)

# -------------------------------------------------------------------------------------------------------------- metrics

METRICS = {  # headings in tables
    "fitted_wrong": "wrong labels learned",
    "true_instead": "true label instead",
    "own": "own names",
    "lp/id": "LP ID",
    "lp/ood": "LP OOD",
    "mlp/id": "MLP ID",
    "mlp/ood": "MLP OOD",
    "nmtune/id": "NMTune ID",
    "nmtune/ood": "NMTune OOD",
    **{
        f"no-{term}/{split}": f"... without {name} {split.upper()}"
        for term, name in WITHOUT.items()
        for split in ("id", "ood")
    },
    "sve_id": "SVE ID (nats)",
    "lsvr_ood": "LSVR OOD (nats)",
    "blackbox/id": "black box ID",
    "blackbox/ood": "black box OOD",
    "noise": "measured noise",
}


def measure_run(path: str, task: Task) -> dict[str, float]:
    """The metrics of a run: of an encoder, or of a head on the black box "blackbox/TEST", "blackbox/id" and
    "blackbox/ood", top-1 in per cent."""
    folder = Path(path)
    if not folder.name.startswith("lite0"):
        return measured(folder, task)
    last = run.read_metrics(folder, "id/top1")[-1]
    top1 = {name: last[f"{name}/top1"] for name in task.tests}
    found = {f"blackbox/{name}": value for name, value in top1.items()} | task.in_and_out("blackbox", top1)
    return found | pictures.renamed(last, "id/top1", "blackbox/id")


def evaluate(runs: Sequence[str]) -> list[dict[str, float]]:
    return [measure_run(path, TASK) for path in runs]


# --------------------------------------------------------------------------------------------------------------- claims

# The paper's means at the noise levels NOISE, read off its figures: accuracy of LP, SVE and LSVR of LP's features; and
# from table 3, top-1 on ImageNet's validation set. Sets: ResNet-50 on ImageNet-1K (sup), CLIP on YFCC15M (clip).
FIGURES = {
    "sup": {
        "lp/id": ("fig. 1", (73.54, 74.12, 73.23, 72.61, 71.43)),
        "lp/ood": ("fig. 1", (31.32, 30.91, 29.93, 28.82, 29.20)),
        "sve_id": ("fig. 5", (6.92, 6.92, 6.93, 6.95, 6.96)),
        "lsvr_ood": ("fig. 5", (3.99, 4.20, 4.34, 4.38, 4.45)),
        "own": ("table 3", (79.96, 79.18, 78.61, 76.27, 73.11)),
    },
    "clip": {
        "lp/id": ("fig. 1", (65.24, 66.08, 65.44, 64.59, 63.73)),
        "lp/ood": ("fig. 1", (22.12, 21.25, 20.30, 19.22, 18.30)),
        "sve_id": ("fig. 5", (5.32, 5.43, 5.47, 5.47, 5.47)),
        "lsvr_ood": ("fig. 5", (3.35, 3.58, 3.59, 3.65, 3.65)),
    },
}
# d: at most half of the paper's effect. Points, and nats: half of the figure's smallest LSVR, and of SVE at 30 %.
NEGLIGIBLE = {"lp/id": 0.5, "lp/ood": 0.5, "own": 0.5, "sve_id": 0.02, "lsvr_ood": 0.1}
PRIMARY = {("lp/id", 5), ("lp/ood", 10), ("lp/ood", 30), ("sve_id", 30), ("lsvr_ood", 30)}  # of label noise
# In pilots with 30 % noise (seed 100), 100 names seen 14 times: 4 % of the wrong labels were learned; 50 names seen 28
# times: 53 %.
ENCODERS = "50 pictures a name, seen 28 times: in a pilot an encoder learned 53 % of its wrong labels"
BLACK_BOXES = "one small ImageNet network in place of the paper's five of up to 304M parameters; 50 pictures a name"


def at_most_half(d: float, effect: float | None) -> float:
    """d, or half of the paper's effect if this is smaller."""
    return d if effect is None else min(d, abs(effect) / 2)


def noise_claim(kind: str, level: int, metric: str) -> Claim:
    """C1 to C3 for one noise level against no noise, with the paper's difference; "up" or "down" and no number where
    the paper's figure shows none, or one on the other side."""
    source, means = FIGURES[kind][metric]
    sign = -1 if metric in ("lp/ood", "own") or (metric == "lp/id" and level > 10) else 1
    what = {
        "lp/id": f"C1 {{}} {'raises' if sign > 0 else 'lowers'} LP ID",
        "lp/ood": "C2 {} lowers LP OOD",
        "sve_id": "C3 {} raises SVE, ID features",
        "lsvr_ood": "C3 {} raises LSVR, OOD features",
        "own": "{} lowers accuracy on the pre-training's own names",
    }[metric].format(f"{level} % {KINDS[kind]} noise")
    difference = round(means[NOISE.index(level)] - means[0], 4)
    shown, effect = f"{difference:+.2f}, {source}", difference
    if difference * sign <= 0.005:
        shown, effect = f"{'up' if sign > 0 else 'down'} ({shown})", None
    by = {"sve_id": "lp/id", "lsvr_ood": "lp/ood"}.get(metric)
    primary, d = kind == "sup" and (metric, level) in PRIMARY, at_most_half(NEGLIGIBLE[metric], effect)
    arms = f"{kind}-{level:02d}", f"{kind}-00"
    return Claim(what, shown, metric, *arms, sign, effect, primary, d, by, ENCODERS)


def black_box_claims() -> tuple[Claim, ...]:
    """C4 on the black box: NMTune above MLP and LP; the paper's means over the five public models of table 1."""
    paper = {"mlp/id": 1.11, "lp/id": 1.28, "mlp/ood": 1.11, "lp/ood": 2.56}
    return tuple(
        Claim(f"C4 NMTune above {HEADS[head]}, black box, {split.upper()}", f"{effect:+.2f}, table 1",
              f"blackbox/{split}", "lite0-nmtune", f"lite0-{head}", 1, effect, True, 0.5, where=BLACK_BOXES)
        for key, effect in paper.items() for head, _, split in (key.partition("/"),)
    )  # fmt: skip


# Of encoders trained with labels: (claim, paper, method's metric, baseline's metric, effect, d). The paper's are means
# over 0, 5 and 10 % (figure 5 has F1, not accuracy), then those at 30 %.
LEVELS = (0, 5, 10)
MEANS = (
    ("C4 NMTune above MLP, ID", "+1.05, table 16", "nmtune/id", "mlp/id", 1.05, 0.5),
    ("C4 NMTune above MLP, OOD", "F1 +.009, fig. 5", "nmtune/ood", "mlp/ood", None, 0.5),
    ("C4 NMTune above LP, ID", "+1.11, fig. 1", "nmtune/id", "lp/id", 1.11, 0.5),
    ("C4 NMTune above LP, OOD", "+4.87, fig. 1", "nmtune/ood", "lp/ood", 4.87, 0.5),
    ("L_MSE helps NMTune, ID", "+0.53, table 16", "nmtune/id", "no-mse/id", 0.53, 0.26),
    ("L_COV helps NMTune, ID", "+0.92, table 16", "nmtune/id", "no-cov/id", 0.92, 0.46),
    ("L_SVD helps NMTune, ID", "+0.41, table 16", "nmtune/id", "no-svd/id", 0.41, 0.2),
    ("SVE of NMTune's z above MLP's, ID", "+1.79, fig. 5", "z/nmtune/sve/id", "z/mlp/sve/id", 1.79, 0.02),
    ("LSVR of NMTune's z below MLP's, OOD", "-0.12, fig. 5", "z/nmtune/lsvr/ood", "z/mlp/lsvr/ood", -0.12, 0.06),
)
AT_30 = (
    ("C4 NMTune above MLP, ID", "F1 +.006, fig. 5", "nmtune/id", "mlp/id", None, 0.5),
    ("C4 NMTune above MLP, OOD", "F1 +.009, fig. 5", "nmtune/ood", "mlp/ood", None, 0.5),
    ("C4 NMTune above LP, ID", "+0.95, fig. 1", "nmtune/id", "lp/id", 0.95, 0.47),
    ("C4 NMTune above LP, OOD", "+4.54, fig. 1", "nmtune/ood", "lp/ood", 4.54, 0.5),
)


def encoder_claims(rows: Sequence[tuple], arm: str, on: str, before: str = "") -> tuple[Claim, ...]:
    """Claims about two metrics of the same encoders; `before` is prepended to the metrics' names."""
    return tuple(
        Claim(f"{text}, {on}", paper, f"{before}{method}", arm, f"{arm}:{before}{baseline}",
              -1 if (effect or 1) < 0 else 1, effect, False, d, f"lp/{method.rpartition('/')[2]}")
        for text, paper, method, baseline, effect, d in rows
    )  # fmt: skip


SVE_LP, LSVR_LP = "r of SVE and LP, ID", "r of LSVR and LP, OOD"
CORRELATIONS = {SVE_LP: ("sve_id", "lp/id"), LSVR_LP: ("lsvr_ood", "lp/ood")}
CLAIMS = (
    *(noise_claim(kind, level, metric) for kind in KINDS for level in NOISE[1:] for metric in FIGURES[kind]),
    *black_box_claims(),
    *encoder_claims(MEANS, "sup-00", "encoders, mean over 0, 5, 10 % label noise", "levels/"),
    *encoder_claims(AT_30, "sup-30", "encoders with 30 % label noise"),
    *(
        Claim(f"NMTune above LP with a selected rate, black box, {split.upper()}", "up", f"blackbox/{split}",
              "lite0-nmtune", SELECTED, 1, None, False, 0.5)
        for split in ("id", "ood")
    ),
    *(
        Claim(f"{WITHOUT[term]} helps NMTune, black box, {split.upper()}", None, f"blackbox/{split}", "lite0-nmtune",
              LEFT_OUT[term])
        for term in WITHOUT
        for split in ("id", "ood")
    ),
    Claim("C3 higher SVE goes with lower LP ID (correlation over levels)", "-0.95, fig. 1, 5", SVE_LP, "sup-00", "0",
          -1, learned_by="lp/id"),
    Claim("C3 higher LSVR goes with lower LP OOD (correlation over levels)", "-0.91, fig. 1, 5", LSVR_LP, "sup-00", "0",
          -1, learned_by="lp/ood"),
)  # fmt: skip


def over_levels(found: Comparison) -> None:
    """Add metrics of several levels of label noise to `sup-00`, for each seed: means of heads over LEVELS as
    "levels/METRIC", and correlations of spectrum and accuracy over all levels."""
    of = {level: found.arms[f"sup-{level:02d}"] for level in NOISE if f"sup-{level:02d}" in found.arms}
    of_heads = ("z/", *(f"{head}/" for head in TUNED))
    for seed, clean in enumerate(of.get(0, ())):
        runs = {level: arm[seed] for level, arm in of.items() if seed < len(arm)}
        if set(LEVELS) <= set(runs):
            for metric in [
                key for key, value in clean.items() if key.startswith(of_heads) and not isinstance(value, str)
            ]:
                clean[f"levels/{metric}"] = float(np.mean([runs[level][metric] for level in LEVELS]))
        if set(NOISE) <= set(runs):
            for metric, (x, y) in CORRELATIONS.items():
                clean[metric] = float(np.corrcoef([[run[key] for run in runs.values()] for key in (x, y)])[0, 1])


def more_rows(found: Comparison) -> list[dict]:
    """The claim that cannot be tested at this scale. UserError for an arm that is not in this study."""
    if unknown := set(found.arms) - set(STUDY.headings):
        raise UserError(f"the study compares folders such as sup-30-seed0, not {sorted(unknown)[0]}-seedN")
    return [verdicts.not_testable("averages over 14 ID sets, DomainNet, GLUE-X", "see paper", "needs those sets")]


# --------------------------------------------------------------------------------------------------------------- floors

Features = tuple[Tensor, Tensor]  # (N, D), labels (N,)


@functools.cache
def pixels(path: str) -> Features:
    """Raw pixels, mean 0, of a data set of nmtune.datasets."""
    images = open_labelled(path)
    x = torch.stack([floors.raw_pixels(images.read(row)[0]) for row in range(len(images))])
    return x, torch.from_numpy(images.labels)


def linear_probe(train: Features, tests: dict[str, Features]) -> dict[str, float]:
    """{test: top-1 in per cent} of the arms' linear probe on raw pixels / 255."""
    x, labels = train
    lp = dataclasses.replace(PAPER["lp"], seed=0)
    head = tuned_head(lp, Bank(x[None] / 255, labels), int(labels.max()) + 1, 1, torch.device("cpu"))
    with torch.no_grad():
        return {name: 100 * accuracy(head(x / 255), labels) for name, (x, labels) in tests.items()}


def neighbours(train: Features, tests: dict[str, Features]) -> dict[str, float]:
    return {name: probes.nearest_neighbour(*train, *test) for name, test in tests.items()}


def floors_of(task: Task, features: str) -> tuple[Floor, ...]:
    """Chance, raw pixels, and the black box's own features without training."""

    def on_pixels(probe: Callable[[Features, dict[str, Features]], dict[str, float]]) -> dict[str, float]:
        found = probe(pixels(task.train), {name: pixels(path) for name, path in task.tests.items()})
        return task.in_and_out("lp", found) | task.in_and_out("blackbox", found)

    def chance() -> dict[str, float]:
        top1 = dict.fromkeys(task.tests, 100 / open_labelled(task.train).num_classes)
        return task.in_and_out("lp", top1) | task.in_and_out("blackbox", top1)

    def on_lite0() -> dict[str, float]:
        sets = read_features(features)
        return task.in_and_out("blackbox", neighbours((sets.train.features[0], sets.train.labels), sets.tests))

    return (
        Floor("chance", chance),
        Floor("nearest neighbour on raw pixels", lambda: on_pixels(neighbours)),
        Floor("the paper's linear probe on raw pixels", lambda: on_pixels(linear_probe)),
        Floor("nearest neighbour on EfficientNet-Lite0", on_lite0, arms=ON_LITE0),
    )


# ---------------------------------------------------------------------------------------------------------------- plots


def plot(found: Comparison, out: Path) -> None:
    """Write nmtune_noise.png, and nmtune_spectra.png if there are encoders."""
    plot_noise(found.arms, out)
    plot_spectra({arm: folders[0] for arm, folders in found.folders.items()}, out)


def differences(arms: dict[str, list[dict]], kind: str, metric: str) -> dict[int, tuple[float, float]]:
    """{noise level: (mean difference from no noise, half of its 95 % interval)}, paired by seed."""
    of = {level: arms[f"{kind}-{level:02d}"] for level in NOISE if f"{kind}-{level:02d}" in arms}
    found = {0: (0.0, 0.0)}
    for level, runs in of.items():
        if level:
            each = [run[metric] - clean[metric] for run, clean in zip(runs, of[0], strict=False)]
            found[level] = float(np.mean(each)), half_of(each)
    return found


def half_of(differences: list[float]) -> float:
    """Half of the 95 % interval of a mean difference; 0 for one seed."""
    return float(verdicts.half_of(differences)) if len(differences) > 1 else 0.0


def plot_noise(arms: dict[str, list[dict]], out: Path) -> None:
    """nmtune_noise.png: differences between noise and no noise, one row of panels per kind of noise (accuracy of heads
    in and out of domain, SVE, LSVR), with the paper's for LP; and differences of heads on the black box from LP. Bars:
    95 % intervals."""
    kinds = [kind for kind in KINDS if f"{kind}-00" in arms]
    lite0 = set(BLACK_BOX) <= set(arms)
    if not (kinds or lite0):  # there is nothing to compare with
        return
    figure, axes = plt.subplots(len(kinds) + lite0, 4, figsize=(17, 3.8 * (len(kinds) + lite0)), squeeze=False)
    panels = {
        "lp/id": "accuracy in domain", "lp/ood": "accuracy out of domain", "sve_id": "SVE, in domain",
        "lsvr_ood": "LSVR, out of domain",
    }  # fmt: skip
    for row, kind in zip(axes, kinds, strict=False):
        for axis, (metric, title) in zip(row, panels.items(), strict=True):
            split, accuracies = metric.rpartition("/")[2], metric.startswith("lp/")
            ours = {name: f"{head}/{split}" for head, name in HEADS.items()} if accuracies else {"ours": metric}
            for name, key in ours.items():
                if key in arms[f"{kind}-00"][0]:
                    line(axis, differences(arms, kind, key), name)
            means = FIGURES[kind][metric][1]
            label = "LP in the paper" if accuracies else "the paper"
            axis.plot(NOISE, np.subtract(means, means[0]), "k--", lw=1, label=label)
            axis.axhline(0, color="black", lw=0.8)
            axis.set(title=title, ylabel=f"{'points' if accuracies else 'nats'} above no noise", xticks=NOISE,
                     xlabel=f"{KINDS[kind]} noise in pre-training (%)")  # fmt: skip
            axis.grid(alpha=0.3)
            axis.legend(fontsize=8)
    if lite0:
        plot_heads(arms, axes[-1])
    figure.tight_layout()
    figure.savefig(out / "nmtune_noise.png", dpi=110)
    plt.close(figure)


def plot_heads(arms: dict[str, list[dict]], axes: np.ndarray) -> None:
    """Bars of the black box's MLP and NMTune above LP, in and out of domain, on the first two of `axes`."""
    for axis in axes[2:]:
        axis.set_axis_off()
    for axis, split in zip(axes, ("id", "ood"), strict=False):
        metric = f"blackbox/{split}"
        for i, arm in enumerate(BLACK_BOX[1:]):
            each = [run[metric] - lp[metric] for run, lp in zip(arms[arm], arms[BLACK_BOX[0]], strict=False)]
            axis.bar(i, np.mean(each), yerr=half_of(each), capsize=6, width=0.6, color=f"C{i + 1}")
        axis.set(title=f"EfficientNet-Lite0, {split.upper()}", ylabel="points above LP", xlim=(-0.8, 1.8))
        axis.set_xticks((0, 1), list(HEADS.values())[1:])
        axis.axhline(0, color="black", lw=0.8)
        axis.grid(alpha=0.3, axis="y")


def line(axis: plt.Axes, found: dict[int, tuple[float, float]], label: str) -> None:
    """Plot means with error bars against noise levels."""
    means, halves = zip(*found.values(), strict=True)
    axis.errorbar(list(found), means, yerr=halves, marker="o", ms=4, capsize=4, label=label)


def plot_spectra(folders: dict[str, Path], out: Path) -> None:
    """nmtune_spectra.png: shares of the singular values of OOD test features, for one encoder per level {arm: folder}.
    One panel has F at every noise level; the other has F, MLP's z and NMTune's z at the highest level, if
    the study has tuned these heads on such encoders."""
    kinds = [kind for kind in KINDS if f"{kind}-00" in folders]
    if not kinds:
        return
    figure, axes = plt.subplots(len(kinds), 2, figsize=(11, 4 * len(kinds)), squeeze=False, sharey="row")
    for row, kind in zip(axes, kinds, strict=True):
        levels = [level for level in NOISE if f"{kind}-{level:02d}" in folders]
        shades = plt.get_cmap("viridis")(np.linspace(0, 0.85, len(levels)))
        for level, shade in zip(levels, shades, strict=True):
            with np.load(folders[f"{kind}-{level:02d}"] / "spectra.npz") as file:
                spectra = dict(file)
            evaluation.draw_spectrum(row[0], spectra["F/ood"], f"{level} %", color=shade)
        evaluation.finish_spectra(row[0], f"OOD features F, {KINDS[kind]} noise in pre-training")
        if not {"mlp/ood", "nmtune/ood"} <= set(spectra):
            row[1].set_axis_off()
            continue
        for key, label in (("F/ood", "F, before tuning"), ("mlp/ood", "z of the MLP"), ("nmtune/ood", "z of NMTune")):
            evaluation.draw_spectrum(row[1], spectra[key], label)
        evaluation.finish_spectra(row[1], f"OOD features, encoder of {levels[-1]} % {KINDS[kind]} noise")
        row[1].set_ylabel("")
    figure.tight_layout()
    figure.savefig(out / "nmtune_spectra.png", dpi=110)
    plt.close(figure)


STUDY = Study(
    folder="nmtune",
    paper="NMTune (arXiv 2309.17002)",
    stands_for="ImageNet-1K and YFCC15M",
    before=(Once(f"studies.nmtune_scenes --out {SCENES}"), extracted(TASK, FEATURES)),
    arms=ARMS,
    corpus="Scenes of one emoji each, 50 a name: encoders from scratch on 50 names, probed on 25 others; the black "
    "box is EfficientNet-Lite0, pretrained on ImageNet-1k",
    minutes={"core": 4, "all": 11},
    terms="C1 to C4 number the paper's claims. Label noise: share of wrong labels in pre-training. LP: linear probe; "
    "MLP: the same with a hidden layer; NMTune: an MLP with three regularisers. ID, OOD: in and out of domain. SVE: "
    "entropy of the features' singular values; LSVR: minus log of the largest one's share. Black box: frozen features "
    "of EfficientNet-Lite0.",
    evaluate=evaluate,
    alone=True,
    derive=over_levels,
    metrics=METRICS,
    sets=tuple(f"{SCENES}/{name}" for name in ("tune", "ood")),
    floors=floors_of(TASK, FEATURES),
    claims=CLAIMS,
    more_rows=more_rows,
    plot=plot,
)


# ---------------------------------------------------------------------------------------------------------- photographs

CIFAR10, PACS = "data/photos-cifar10/eval/cifar10", "data/photos-pacs/eval"
SHIFTED = ("art_painting", "cartoon", "sketch")
PHOTOS_TASK = Task(
    f"{PACS}/photo:train",
    {"id": f"{PACS}/photo:test"} | {name: f"{PACS}/{name}_all:test" for name in SHIFTED},
    own=f"{CIFAR10}:test",
)
PHOTOS_FEATURES = "runs/photos/nmtune/lite0.npz"
PHOTOS_ARMS = (
    *(
        Arm(
            f"sup-{level:02d}",
            f"pretrain small-sup --data {CIFAR10}:train --epochs 5 --noise {level / 100:g}",
            heading=f"{level} % label noise",
            core=level != 20,
        )
        for level in NOISE
    ),
    *black_box_arms(PHOTOS_FEATURES),
)


def evaluate_photos(runs: Sequence[str]) -> list[dict[str, float]]:
    return [measure_run(path, PHOTOS_TASK) for path in runs]


def more_rows_on_photos(found: Comparison) -> list[dict]:
    """Table rows of claims that cannot be tested on photographs either."""
    return [verdicts.not_testable("averages over 14 ID sets, DomainNet, GLUE-X", "see paper", "needs those sets")]


DOMAINS = {
    f"{kind}/{name}": f"{heading} {name.replace('_', ' ')}"
    for kind, heading in (("lp", "LP"), ("blackbox", "black box"))
    for name in SHIFTED
}
PHOTOS = Study(
    folder="nmtune",
    on="photos",
    paper="NMTune (arXiv 2309.17002)",
    stands_for="ImageNet-1K and DomainNet",
    before=(photos.CIFAR10, photos.PACS, extracted(PHOTOS_TASK, PHOTOS_FEATURES)),
    arms=PHOTOS_ARMS,
    corpus="Encoders from scratch on 50,000 photographs of CIFAR-10 (32 pixels), probed on PACS (in results/photos its "
    "pictures had a shorter side of 112 pixels); the black box is EfficientNet-Lite0, pretrained on ImageNet-1k",
    seeds=photos.FEW,
    minutes={"core": 9, "all": 14},
    small=("lp/id", "blackbox/id", "sve_id"),
    evaluate=evaluate_photos,
    alone=True,
    metrics=METRICS | DOMAINS,
    sets=(f"{PACS}/photo", *(f"{PACS}/{name}_all" for name in SHIFTED)),
    floors=floors_of(PHOTOS_TASK, PHOTOS_FEATURES),
    claims=CLAIMS,
    derive=over_levels,
    more_rows=more_rows_on_photos,
    plot=lambda found, out: plot_noise(found.arms, out),
)

if __name__ == "__main__":
    runner.main(STUDY)
