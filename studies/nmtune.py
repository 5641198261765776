"""The small-scale study of NMTune: `python -m studies.nmtune` (`make reproduce-nmtune`).

Encoders are pre-trained on half of the embedded emoji, a stand-in for ImageNet-1K (labels) and YFCC15M (captions), with
0 to 30 % of wrong labels or swapped captions. Linear probes, and on encoders trained with labels also MLP and NMTune,
learn other labels of the other half, and are tested in the styles of pre-training (ID) and in an unseen style (OOD).
LP, MLP and NMTune are also tuned on features of a black box, EfficientNet-Lite0.

Why the effects can appear: an encoder that has to fit wrong labels uses directions of its features for them, so fewer
remain for other labels; and an MLP on 1,280 correlated features with few labels overfits, so that a regulariser can
help. The effects would vanish if pre-training were too short to tell correct from wrong labels, or if a
probe were near 100 %.

On photographs (`--corpus photos --photos DIR`): encoders are pre-trained on the 50,000 photographs of CIFAR-10 with 0
to 30 % wrong labels, a stand-in for ImageNet-1K. LP, MLP and NMTune are tuned on the photographs of PACS and tested on
held-out photographs (ID), and on paintings, cartoons and sketches of the same classes (OOD), a stand-in for DomainNet.
The same heads are also tuned and tested on features of these images from a black box, EfficientNet-Lite0.

Why the effects can appear: for the same reasons as above; PACS is a benchmark of the paper's kind of domain shift. The
effects would vanish where a probe is near 100 %, as on an ImageNet network's features of photographs.
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from nmtune import eval as evaluation
from nmtune import pretrain
from nmtune.config import EMOJI_SUPERVISED, LITE0, METHODS, NOISE
from nmtune.datasets import open_labelled
from nmtune.eval import accuracy, project_logits
from nmtune.features import Bank, encode_set, read_features, subset_per_class
from nmtune.model import create_model, timm_transforms
from nmtune.train import tuned_head
from shared import checkpoints, pictures, probes, run
from shared.errors import UserError
from shared.evaluation import measured
from studies.harness import floors, photos, runner, verdicts
from studies.harness.floors import Floor
from studies.harness.report import Comparison
from studies.harness.runner import Arm, Once, Study
from studies.harness.verdicts import Claim
from studies.nmtune_encoders import StudyConfig, encoder_metrics

KINDS = {"sup": "label", "clip": "caption"}
ENCODER_HEADS = {"sup": "lp mlp nmtune", "clip": "lp"}  # heads of each kind of encoder
HEADS = {"lp": "LP", "mlp": "MLP", "nmtune": "NMTune"}
BLACK_BOX = tuple(f"lite0-{head}" for head in HEADS)
SELECTED = "lite0-lp-select"
FEW, FEW_SAMPLES = 0.1, tuple(f"lite0-{head}-few" for head in HEADS)  # a share of the training samples; arms with it
ON_LITE0 = (*BLACK_BOX, SELECTED, *FEW_SAMPLES)
# Heads of a black-box arm for each seed of the study, whose mean is compared; seed 3 has the tuning seeds 30 to 39
TUNINGS = 10


def heads_arm(name: str, head: str, options: str = "", on: str = "", but: str = "", core: bool = True) -> Arm:
    """An arm of TUNINGS heads on the black box for each seed; `options` are for nmtune.train, `on` and `but` are parts
    of the heading."""
    command = f"train emoji-lite0-{head} {options} --seed {{seed}}0 --heads {TUNINGS} --out {{out}}"
    return Arm(name, (command,), heading=f"EfficientNet-Lite0{on}, {HEADS[head]}{but}", core=core)


ARMS = (
    *(
        Arm(
            f"{kind}-{level:02d}",
            (
                f"pretrain emoji-{kind}-{level:02d}",
                f"studies.nmtune_encoders --encoder {{out}} --methods {ENCODER_HEADS[kind]}",
            ),
            heading=f"{level} % {what} noise",
            core=kind == "sup" and level in (0, 10, 30),
        )
        for kind, what in KINDS.items()
        for level in NOISE
    ),
    *(heads_arm(arm, head) for arm, head in zip(BLACK_BOX, HEADS, strict=True)),
    heads_arm(SELECTED, "lp", "--select", but=", selected rate and decay", core=False),
    *(
        heads_arm(arm, head, f"--train-fraction {FEW}", ", a tenth of the samples", core=False)
        for arm, head in zip(FEW_SAMPLES, HEADS, strict=True)
    ),
)
SUBGROUPS = tuple(f"data/emoji/eval/subgroups_{split}" for split in ("id", "ood"))
ENCODE = Once(
    f"nmtune.extract images --encoder lite0:128 --data {SUBGROUPS[0]}:train --tests id={SUBGROUPS[0]}:test "
    f"ood={SUBGROUPS[1]}:test --batch-size 32 --out {LITE0['features']}",
    arms=ON_LITE0,
)

# -------------------------------------------------------------------------------------------------------------- metrics

METRICS = {  # headings in tables
    "lp/id": "LP ID",
    "lp/ood": "LP OOD",
    "mlp/id": "MLP ID",
    "mlp/ood": "MLP OOD",
    "nmtune/id": "NMTune ID",
    "nmtune/ood": "NMTune OOD",
    "nearest/id": "nearest neighbour ID",
    "nearest/ood": "nearest neighbour OOD",
    "sve_id": "SVE ID (nats)",
    "sve_ood": "SVE OOD",
    "lsvr_id": "LSVR ID (nats)",
    "lsvr_ood": "LSVR OOD",
    "blackbox/id": "black box ID",
    "blackbox/ood": "black box OOD",
    "noise": "measured noise",
}


def head_accuracies(folder: Path) -> dict[str, float]:
    """{"TEST/METRIC": per cent} of a tuned head, or means over the run's heads: the last line of the run's log."""
    return {key: value for key, value in run.read_metrics(folder, "id/top1")[-1].items() if "/" in key}


def compared_metrics(folder: Path) -> dict[str, float]:
    """The metrics of a run: of an encoder, or {"blackbox/TEST": top-1 in per cent} of heads on black-box features."""
    if (folder / "study.json").is_file():
        return encoder_metrics(folder)
    found = head_accuracies(folder)
    return pictures.renamed(found, "id/top1", "blackbox/id") | {"blackbox/ood": found["ood/top1"]}


# --------------------------------------------------------------------------------------------------------------- claims

# The paper's means at the noise levels NOISE, read off its figures: accuracy of LP, SVE and LSVR of LP's features.
# Sets: ResNet-50 on ImageNet-1K (sup), CLIP on YFCC15M (clip). Figure 5's LSVR is of one OOD set each.
FIGURES = {
    "sup": {
        "lp/id": ("fig. 1", (73.54, 74.12, 73.23, 72.61, 71.43)),
        "lp/ood": ("fig. 1", (31.32, 30.91, 29.93, 28.82, 29.20)),
        "sve_id": ("fig. 5", (6.92, 6.92, 6.93, 6.95, 6.96)),
        "lsvr_ood": ("fig. 5", (3.99, 4.20, 4.34, 4.38, 4.45)),
    },
    "clip": {
        "lp/id": ("fig. 1", (65.24, 66.08, 65.44, 64.59, 63.73)),
        "lp/ood": ("fig. 1", (22.12, 21.25, 20.30, 19.22, 18.30)),
        "sve_id": ("fig. 5", (5.32, 5.43, 5.47, 5.47, 5.47)),
        "lsvr_ood": ("fig. 5", (3.35, 3.58, 3.59, 3.65, 3.65)),
    },
}
# What the paper has of NMTune's gain over MLP and LP, in and out of domain: the mean over table 1's five public models;
# the mean over noise levels of ImageNet-1K (table 16: 0 to 10 %); at 30 % (figure 5 has F1, not accuracy). It has no
# number for a tenth of the samples.
GAINS = ("mlp/id", "mlp/ood", "lp/id", "lp/ood")
PUBLIC = dict(zip(GAINS, ("+1.11, table 1", "+1.11, table 1", "+1.28, table 1", "+2.56, table 1"), strict=True))
LEVELS = dict(zip(GAINS, ("+1.05, table 16", "F1 +.009, fig. 5", "+1.07, fig. 1", "+4.85, fig. 1"), strict=True))
AT_30 = dict(zip(GAINS, ("F1 +.006, fig. 5", "F1 +.009, fig. 5", "+0.95, fig. 1", "+4.54, fig. 1"), strict=True))
FEWER = dict.fromkeys(GAINS, "up")


def in_the_paper(kind: str, level: int, metric: str, sign: int) -> tuple[str, float | None]:
    """The paper's difference from no noise: with its source, and as a number; "up" or "down" and None where it shows
    none, or one on the other side."""
    word = "up" if sign > 0 else "down"
    if metric not in FIGURES[kind]:
        return word, None
    source, means = FIGURES[kind][metric]
    difference = round(means[NOISE.index(level)] - means[0], 4)
    shown = f"{difference:+.2f}, {source}"
    return (shown, difference) if difference * sign > 0.005 else (f"{word} ({shown})", None)


def claimed(text: str) -> float | None:
    """The number of points that a text starts with, as in "+1.11, table 1"; None for F1 and words."""
    return float(text.split(",")[0]) if text[:1] in "+-" else None


def at_most_half(d: float, effect: float | None) -> float:
    """d, or half of the paper's effect if this is smaller."""
    return d if effect is None else min(d, abs(effect) / 2)


ENCODERS = "encoders that see each image many times learn wrong labels; levels from none on"
BLACK_BOXES = "one small ImageNet network in place of the paper's five of up to 304M parameters"


def noise_claims(kind: str, level: int, primary: bool = False) -> tuple[Claim, ...]:
    """C1 to C3 for one noise level against no noise. Negligible: 0.5 points of accuracy, 0.01 nats of SVE and LSVR."""
    of, pair = f"{level} % {KINDS[kind]} noise", (f"{kind}-{level:02d}", f"{kind}-00")

    def claim(text: str, metric: str, sign: int, first: bool, d: float, learned_by: str | None = None) -> Claim:
        paper, effect = in_the_paper(kind, level, metric, sign)
        return Claim(text, paper, metric, *pair, sign, effect, first, at_most_half(d, effect), learned_by, ENCODERS)

    found = [claim(f"C2 {of} lowers LP OOD", "lp/ood", -1, primary, 0.5)]
    if level in (5, 10):
        found.append(claim(f"C1 {of} raises LP ID", "lp/id", 1, primary, 0.5))
    if level in (20, 30):
        found.append(claim(f"C1 {of} lowers LP ID", "lp/id", -1, False, 0.5))
    for name in ("SVE", "LSVR"):
        for split in ("id", "ood"):
            text, metric = f"C3 {of} raises {name}, {split.upper()} features", f"{name.lower()}_{split}"
            first = primary and level == 30 and metric in ("sve_id", "lsvr_ood")
            found.append(claim(text, metric, 1, first, 0.01, f"lp/{split}"))
    return tuple(found)


def head_claims(
    mlp: str, lp: str, nmtune: str, metric: str, on: str, in_paper: dict[str, str], primary: bool = False
) -> tuple[Claim, ...]:
    """C4: NMTune above MLP (by about one point in the paper's tables) and above LP, in and out of domain.

    in_paper: the paper's differences {HEAD/SPLIT}.
    """

    def claim(head: str, split: str, baseline: str) -> Claim:
        text, paper = f"C4 NMTune above {HEADS[head]}, {on}{split.upper()}", in_paper[f"{head}/{split}"]
        effect = claimed(paper)
        d = at_most_half(0.5, effect)
        return Claim(text, paper, metric + split, nmtune, baseline, 1, effect, primary, d, where=BLACK_BOXES)

    return tuple(each for split in ("id", "ood") for each in (claim("mlp", split, mlp), claim("lp", split, lp)))


def encoder_head_claims(on: str, arm: str, in_paper: dict[str, str], before: str = "") -> tuple[Claim, ...]:
    """Claims about two heads on the encoders of one arm: C4, and what the regularisers change in z.

    Metrics are named "{before}HEAD/METRIC"; NMTune's are compared with those of the MLP or of LP. in_paper: the paper's
    differences {HEAD/SPLIT}.
    """

    def claim(text: str, paper: str | None, head: str, metric: str, split: str, sign: int = 1, effect=None, d=None):
        names = f"{before}nmtune/{metric}", arm, f"{arm}:{before}{head}/{metric}"
        return Claim(f"{text}, {on}, {split.upper()}", paper, *names, sign, effect, False, d, f"lp/{split}")

    return (
        *(
            claim(
                f"C4 NMTune above {HEADS[head]}",
                text,
                head,
                split,
                split,
                1,
                (effect := claimed(text)),
                at_most_half(0.5, effect),
            )
            for head in ("mlp", "lp")
            for split in ("id", "ood")
            if (text := in_paper[f"{head}/{split}"])
        ),
        claim("L_COV of NMTune's z against MLP's", None, "mlp", "cov_id", "id", -1),
        claim("top-5 share of NMTune's z against MLP's", None, "mlp", "top5_id", "id"),
    )


SVE_LP, LSVR_LP = "r of SVE and LP, ID", "r of LSVR and LP, OOD"
CORRELATIONS = {SVE_LP: ("sve_id", "lp/id"), LSVR_LP: ("lsvr_ood", "lp/ood")}
OVER_LEVELS = (  # claims about metrics of all levels, which `over_levels` adds to sup-00
    Claim("C3 higher SVE goes with lower LP ID (correlation over levels)", "-0.95, fig. 1, 5", SVE_LP, "sup-00", "0",
          -1, learned_by="lp/id"),
    Claim("C3 higher LSVR goes with lower LP OOD (correlation over levels)", "-0.91, fig. 1, 5", LSVR_LP, "sup-00", "0",
          -1, learned_by="lp/ood"),
)  # fmt: skip
CLAIMS = (
    *noise_claims("sup", 10, primary=True),
    *noise_claims("sup", 30, primary=True),
    *head_claims("lite0-mlp", "lite0-lp", "lite0-nmtune", "blackbox/", "black box, ", PUBLIC, primary=True),
    *(
        Claim(f"NMTune above LP with a selected rate, black box, {split.upper()}", "up", f"blackbox/{split}",
              "lite0-nmtune", SELECTED, 1, None, False, 0.5)
        for split in ("id", "ood")
    ),
    *encoder_head_claims("encoders, mean over levels of label noise", "sup-00", LEVELS, "levels/"),
    *encoder_head_claims("encoders with 30 % label noise", "sup-30", AT_30),
    *head_claims(*(f"lite0-{head}-few" for head in ("mlp", "lp", "nmtune")), "few/",
                 "black box, a tenth of the samples, ", FEWER),
    *(claim for level in (5, 20) for claim in noise_claims("sup", level)),
    *(claim for level in NOISE[1:] for claim in noise_claims("clip", level)),
    *OVER_LEVELS,
)  # fmt: skip


def derive(found: Comparison) -> None:
    """Add the metrics of `over_levels`, and copy accuracies of heads tuned on few samples to "few/...", because they
    have another floor."""
    over_levels(found.arms)
    for arm in set(FEW_SAMPLES) & set(found.arms):
        for values in found.arms[arm]:
            values |= {f"few/{split}": values[f"blackbox/{split}"] for split in ("id", "ood")}


def over_levels(arms: dict[str, list[dict]]) -> None:
    """Add metrics of all levels of label noise together to `sup-00`, for each pre-training seed: correlations of
    spectrum and accuracy (of three levels or more), and means of the heads' metrics as "levels/HEAD/METRIC"."""
    levels, heads = [runs for arm, runs in arms.items() if arm.startswith("sup-")], tuple(f"{head}/" for head in HEADS)
    for clean, *runs in zip(arms.get("sup-00", ()), *levels, strict=False):  # one of each level, with the same seed
        for metric in [key for key, value in clean.items() if key.startswith(heads) and not isinstance(value, str)]:
            if all(metric in run for run in runs):
                clean[f"levels/{metric}"] = float(np.mean([run[metric] for run in runs]))
        for metric, (x, y) in CORRELATIONS.items():
            if len(levels) > 2:
                clean[metric] = float(np.corrcoef([[run[key] for run in runs] for key in (x, y)])[0, 1])


def more_rows(found: Comparison) -> list[dict]:
    """The claim that cannot be tested at this scale. UserError for an arm that is not in this study."""
    if unknown := set(found.arms) - set(STUDY.headings):
        raise UserError(f"the study compares folders such as sup-30-seed0, not {sorted(unknown)[0]}-seedN")
    return [verdicts.not_testable("averages over 14 ID sets, DomainNet, GLUE-X", "see paper", "needs those sets")]


# --------------------------------------------------------------------------------------------------------------- floors

TASKS = StudyConfig().tasks


def mean_over_tasks(measure) -> dict[str, float]:
    """{"lp/id", "lp/ood"}: means over tasks of measure(task) -> {"id", "ood"}, as for the arms."""
    found = [measure(task) for task in TASKS]
    return {f"lp/{split}": float(np.mean([each[split] for each in found])) for split in ("id", "ood")}


@functools.cache
def pixels(task: str, split: str) -> tuple[Tensor, Tensor]:
    """Raw pixels (N, D), mean 0, and labels (N,) of a split of the corpus."""
    images = open_labelled(f"data/emoji:{task}:{split}")
    x = torch.stack([floors.raw_pixels(images.read(row)[0]) for row in range(len(images))])
    return x, torch.from_numpy(images.labels)


def chance() -> dict[str, float]:
    """Top-1 of random answers."""
    classes = {task: open_labelled(f"data/emoji:{task}:tune").num_classes for task in TASKS}
    top1 = floors.chance(SUBGROUPS)
    few = {key.replace("blackbox", "few"): value for key, value in black_box(top1).items()}
    return mean_over_tasks(lambda task: dict.fromkeys(("id", "ood"), 100 / classes[task])) | black_box(top1) | few


def black_box(top1: dict[str, float]) -> dict[str, float]:
    """Rename metrics of the evaluation sets to the names of the arms' metrics."""
    return {f"blackbox/{key.split('/')[0].rpartition('_')[2]}": value for key, value in top1.items()}


def pixel_neighbour() -> dict[str, float]:
    """Nearest neighbours on raw pixels."""

    def measure(task: str) -> dict[str, float]:
        return {split: probes.nearest_neighbour(*pixels(task, "tune"), *pixels(task, split)) for split in ("id", "ood")}

    near = {key.replace("lp", "nearest"): value for key, value in mean_over_tasks(measure).items()}
    return near | black_box(floors.nearest_neighbour(SUBGROUPS))


def linear_probe(train: tuple[Tensor, Tensor], tests: dict[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
    """{test set: top-1 in percent} of the arms' linear probe on raw pixels / 255; sets are (pixels (N, D), labels)."""
    (x, labels), study = train, StudyConfig()
    lp = dataclasses.replace(METHODS["lp"][1], epochs=study.epochs, batch_size=study.batch_size, seed=0)
    head = tuned_head(lp, Bank(x[None] / 255, labels), int(labels.max()) + 1, 1, torch.device("cpu"))
    with torch.no_grad():
        return {name: 100 * accuracy(head(x / 255), labels) for name, (x, labels) in tests.items()}


def pixel_probe() -> dict[str, float]:
    """The arms' linear probe on raw pixels."""
    return mean_over_tasks(
        lambda task: linear_probe(pixels(task, "tune"), {split: pixels(task, split) for split in ("id", "ood")})
    )


def lite0_neighbour() -> dict[str, float]:
    """Nearest neighbours on the pretrained network's own features, among all training samples and the share FEW."""
    sets = read_features(LITE0["features"])
    features, labels = sets.train.features[0], sets.train.labels
    return {
        f"{kind}/{name}": probes.nearest_neighbour(features[rows], labels[rows], *test)
        for kind, rows in (("blackbox", slice(None)), ("few", few_samples(labels)))
        for name, test in sets.tests.items()
    }


def few_samples(labels: Tensor) -> np.ndarray:
    """Rows of the share FEW of every class."""
    return subset_per_class(labels.numpy(), FEW, np.random.RandomState(0))


def logistic_regression() -> dict[str, float]:
    """scikit-learn's logistic regression on the pretrained network's features, trained on all training samples and on
    the share FEW; C is chosen on a fifth of every class."""
    sets = read_features(LITE0["features"])
    features, labels = sets.train.features[0], sets.train.labels
    found = {}
    for kind, rows in (("blackbox", np.arange(len(labels))), ("few", few_samples(labels))):
        x, y = features[rows].numpy(), labels[rows].numpy()
        kept = subset_per_class(y, 0.8, np.random.RandomState(0))
        rest = np.setdiff1d(np.arange(len(y)), kept)

        def fitted(c: float, rows: np.ndarray, x=x, y=y) -> LogisticRegression:
            return LogisticRegression(C=c, max_iter=300, tol=1e-3).fit(x[rows], y[rows])

        best = max((0.03, 0.1, 0.3, 1.0), key=lambda c: fitted(c, kept).score(x[rest], y[rest]))
        model = fitted(best, np.arange(len(y)))
        found |= {f"{kind}/{name}": 100 * model.score(*test) for name, test in sets.tests.items()}
    return found


def on_labels() -> dict[str, float]:
    """The ceiling: the encoder trained on the tasks' own labels, on all training drawings."""
    process = run.setup(0, "auto")

    def measure(task: str) -> dict[str, float]:
        cfg = dataclasses.replace(EMOJI_SUPERVISED, data=f"data/emoji:{task}:known", out=f"runs/nmtune/ceiling-{task}")
        state = checkpoints.load_checkpoint(pretrain.main(cfg) / "checkpoint.pt")
        classes = {name: label for label, name in enumerate(open_labelled(cfg.data).classnames)}
        model, *_ = create_model(cfg, len(classes))
        model.load_state_dict(state["state_dict"])
        model.to(process.device).eval()
        view, found = timm_transforms(model.pretrained_cfg)[1], {}
        for split in ("id", "ood"):
            images = open_labelled(f"data/emoji:{task}:{split}")
            logits, labels = encode_set(model, images, view, process)
            found[split] = 100 * accuracy(project_logits(logits[0], [[classes[c]] for c in images.classnames]), labels)
        return found

    return mean_over_tasks(measure)


FLOORS = (
    Floor("chance", chance),
    Floor("nearest neighbour on raw pixels", pixel_neighbour),
    Floor("linear probe on raw pixels", pixel_probe),
    Floor("nearest neighbour on EfficientNet-Lite0", lite0_neighbour, arms=ON_LITE0),
    Floor("logistic regression on EfficientNet-Lite0", logistic_regression, ceiling=True, arms=ON_LITE0),
    Floor("encoder trained on the probes' labels", on_labels, ceiling=True),
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
    in and out of domain, SVE, LSVR); and differences of heads on the black box from LP. Bars: 95 % intervals."""
    kinds = [kind for kind in KINDS if f"{kind}-00" in arms]
    lite0 = set(BLACK_BOX) <= set(arms)
    if not (kinds or lite0):  # there is nothing to compare with
        return
    figure, axes = plt.subplots(len(kinds) + lite0, 4, figsize=(17, 3.8 * (len(kinds) + lite0)), squeeze=False)
    for row, kind in zip(axes, kinds, strict=False):
        for axis, split, where in zip(row, ("id", "ood"), ("in domain", "out of domain"), strict=False):
            for head, name in HEADS.items():
                if f"{head}/{split}" not in arms[f"{kind}-00"][0]:
                    continue
                line(axis, differences(arms, kind, f"{head}/{split}"), name)
            axis.set(title=f"accuracy {where}", ylabel="points above no noise")
        for axis, metric in zip(row[2:], ("sve", "lsvr"), strict=True):
            for split, where in (("id", "in domain"), ("ood", "out of domain")):
                line(axis, differences(arms, kind, f"{metric}_{split}"), where)
            axis.set(title=f"{metric.upper()} of the features", ylabel="nats above no noise")
        for axis in row:
            axis.axhline(0, color="black", lw=0.8)
            axis.set(xlabel=f"{KINDS[kind]} noise in pre-training (%)", xticks=NOISE)
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
    One panel has F at every noise level; the other has F, MLP's z and NMTune's z of the first task at the highest
    level, if the study has tuned these heads on such encoders."""
    kinds = [kind for kind in KINDS if f"{kind}-00" in folders]
    if not kinds:
        return
    figure, axes = plt.subplots(len(kinds), 2, figsize=(11, 4 * len(kinds)), squeeze=False, sharey="row")
    for row, kind in zip(axes, kinds, strict=True):
        levels = [level for level in NOISE if f"{kind}-{level:02d}" in folders]
        shades = plt.get_cmap("viridis")(np.linspace(0, 0.85, len(levels)))
        for level, shade in zip(levels, shades, strict=True):
            with np.load(folders[f"{kind}-{level:02d}"] / "spectra.npz") as file:
                spectra = {key.removeprefix(f"{TASKS[0]}/"): file[key] for key in file.files}
            evaluation.draw_spectrum(row[0], spectra["F/ood"], f"{level} %", color=shade)
        evaluation.finish_spectra(row[0], f"OOD features F, {KINDS[kind]} noise in pre-training")
        if not {"mlp/ood", "nmtune/ood"} <= set(spectra):
            row[1].set_axis_off()
            continue
        for key, label in (("F/ood", "F, before tuning"), ("mlp/ood", "z of the MLP"), ("nmtune/ood", "z of NMTune")):
            evaluation.draw_spectrum(row[1], spectra[key], label)
        evaluation.finish_spectra(row[1], f"OOD features, encoder of {levels[-1]} % {KINDS[kind]} noise, {TASKS[0]}s")
        row[1].set_ylabel("")
    figure.tight_layout()
    figure.savefig(out / "nmtune_spectra.png", dpi=110)
    plt.close(figure)


STUDY = Study(
    folder="nmtune",
    paper="NMTune (arXiv 2309.17002)",
    stands_for="ImageNet-1K and YFCC15M",
    before=(ENCODE,),
    arms=ARMS,
    corpus="Embedded emoji corpus; encoders from scratch on half of the emoji, probed on the other half; the black box "
    "is EfficientNet-Lite0, pretrained on ImageNet-1k, on subgroups of all emoji, each number the mean of "
    f"{TUNINGS} heads with different seeds",
    minutes={"core": 6, "all": 18},
    terms="C1 to C4 number the paper's claims. Label noise: share of wrong labels in pre-training. LP: linear probe; "
    "MLP: the same with a hidden layer; NMTune: an MLP with three regularisers. ID, OOD: in and out of domain. SVE: "
    "entropy of the features' singular values; LSVR: minus log of the largest one's share. Black box: frozen features "
    "of EfficientNet-Lite0. up (-0.31, fig. 1): the text says that 10 % helps, its figure shows a loss of 0.31.",
    changed="CLIP encoders train another small convolutional tower, and their text towers start as an average of word "
    "embeddings",
    changed_arms=tuple(arm.name for arm in ARMS if arm.name.startswith("clip-")),
    evaluate=lambda runs: [compared_metrics(Path(run)) for run in runs],
    derive=derive,
    small=("lp/ood", "blackbox/id", "lsvr_ood"),
    metrics=METRICS | {"few/id": "a tenth of the samples, ID", "few/ood": "... OOD"},
    sets=SUBGROUPS,
    floors=FLOORS,
    claims=CLAIMS,
    more_rows=more_rows,
    plot=plot,
)


# ---------------------------------------------------------------------------------------------------------- photographs

CIFAR10, PACS = "data/photos-cifar10/eval/cifar10", "data/photos-pacs/eval"
SHIFTED = ("art_painting", "cartoon", "sketch")
ON_PACS = f"--data {PACS}/photo:train"
TESTS = f"--tests id={PACS}/photo:test " + " ".join(f"{name}={PACS}/{name}_all:test" for name in SHIFTED)
TUNED = f"--encoder {{out}} {ON_PACS} {TESTS} --workers 0"
FEATURES = "runs/photos/nmtune/lite0.npz"

WITHOUT = {"mse": " without L_MSE", "cov": " without L_COV", "svd": " without L_SVD"}
PHOTOS_ARMS = (
    *(
        Arm(
            f"sup-{level:02d}",
            (
                f"pretrain small-sup --data {CIFAR10}:train --epochs 5 --noise {level / 100:g}",
                f"train lp {TUNED} --seed {{seed}} --out {{out}}/lp",
                *(f"train {head} {TUNED} --bank 4 --seed {{seed}} --out {{out}}/{head}" for head in ("mlp", "nmtune")),
            ),
            heading=f"{level} % label noise",
            core=level in (0, 10, 30),
        )
        for level in NOISE
    ),
    *(heads_arm(arm, head, f"--features {FEATURES}") for arm, head in zip(BLACK_BOX, HEADS, strict=True)),
    heads_arm(SELECTED, "lp", f"--select --features {FEATURES}", but=", selected rate and decay", core=False),
    *(
        heads_arm(f"lite0-nmtune-no-{term}", "nmtune", f"--features {FEATURES} --w-{term} 0", but=but, core=False)
        for term, but in WITHOUT.items()
    ),
)
VARIANTS = tuple(arm.name for arm in PHOTOS_ARMS if arm.name.startswith("lite0-") and not arm.core)
ENCODE_PACS = Once(
    f"nmtune.extract images --encoder lite0:128 {ON_PACS} {TESTS} --batch-size 32 --out {FEATURES}",
    BLACK_BOX + VARIANTS,
)


VARIANT_CLAIMS = tuple(  # which regulariser makes NMTune differ from the MLP
    Claim(
        f"NMTune{but} against MLP, black box, {split.upper()}",
        None,
        f"blackbox/{split}",
        f"lite0-nmtune-no-{term}",
        "lite0-mlp",
    )
    for term, but in WITHOUT.items()
    for split in ("id", "ood")
)


def averaged(found: dict[str, float], metric: str) -> float:
    """The mean of "SET/METRIC" over the out-of-domain sets."""
    return float(np.mean([found[f"{name}/{metric}"] for name in SHIFTED]))


def measure_probe(folder: Path) -> dict[str, float]:
    """Accuracies of the linear probe in `folder` and of the heads beside it (../mlp, ../nmtune), and spectra of the
    encoder's features, under the names of the claims' metrics."""
    found, _ = evaluation.evaluate_run(str(folder), evaluation.Config((str(folder),)), run.setup(0, "auto"))
    numbers = pictures.renamed(found, "id/top1", "lp/id") | {"lp/ood": averaged(found, "top1")}
    for name in ("sve", "lsvr"):
        numbers |= {f"{name}_id": found[f"id/{name}_F"], f"{name}_ood": averaged(found, f"{name}_F")}
    for head in ("mlp", "nmtune"):
        tuned = head_accuracies(folder.parent / head)
        numbers |= {f"{head}/id": tuned["id/top1"], f"{head}/ood": averaged(tuned, "top1")}
    return numbers | {f"lp/{name}": found[f"{name}/top1"] for name in SHIFTED}


def measure_run(path: str) -> dict[str, float]:
    """Metrics of a run: of an encoder, cached in its results.json, or of a head on black-box features."""
    folder = Path(path)
    if folder.name.startswith("lite0"):
        found = head_accuracies(folder)
        tops = {f"blackbox/{name}": found[f"{name}/top1"] for name in ("id", *SHIFTED)}
        return tops | pictures.renamed(found, "id/top1", "blackbox/id") | {"blackbox/ood": averaged(found, "top1")}
    probe = folder / "lp"
    weights = [folder / name / "checkpoint.pt" for name in ("", "lp", "mlp", "nmtune")]  # "": the encoder
    sources = [*weights, *Path(PACS).glob("*/*/*.tar")]
    return measured(
        "studies.nmtune", folder / "results.json", {"probe": TESTS}, sources, functools.partial(measure_probe, probe)
    )


# --------------------------------------------------------------------------------------------------------------- floors


Features = tuple[Tensor, Tensor]  # (N, D), labels (N,)


def pacs_pixels() -> tuple[Features, dict[str, Features]]:
    """Raw pixels of the photographs that probes are trained on, and of each test set."""
    tests = {"id": floors.read(f"{PACS}/photo", "test")}
    tests |= {name: floors.read(f"{PACS}/{name}_all", "test") for name in SHIFTED}
    return floors.read(f"{PACS}/photo", "train"), tests


def by_domain(name: str, tops: dict[str, float]) -> dict[str, float]:
    """Top-1 of each test set -> {"NAME/id", "NAME/ood"}."""
    return {f"{name}/id": tops["id"], f"{name}/ood": float(np.mean([tops[each] for each in SHIFTED]))}


def neighbours(train: Features, tests: dict[str, Features]) -> dict[str, float]:
    return {name: probes.nearest_neighbour(*train, *test) for name, test in tests.items()}


def pacs_chance() -> dict[str, float]:
    top1 = dict.fromkeys(("id", *SHIFTED), floors.chance([f"{PACS}/photo"])["photo/top1"])
    return by_domain("lp", top1) | by_domain("blackbox", top1)


def pacs_pixel_neighbour() -> dict[str, float]:
    found = neighbours(*pacs_pixels())
    return by_domain("lp", found) | by_domain("blackbox", found)


def pacs_lite0_neighbour() -> dict[str, float]:
    """Nearest neighbours on the pretrained network's own features."""
    sets = read_features(FEATURES)
    return by_domain("blackbox", neighbours((sets.train.features[0], sets.train.labels), sets.tests))


PHOTOS_FLOORS = (
    Floor("chance", pacs_chance),
    Floor("nearest neighbour on raw pixels", pacs_pixel_neighbour),
    Floor("linear probe on raw pixels", lambda: by_domain("lp", linear_probe(*pacs_pixels()))),
    Floor("nearest neighbour on EfficientNet-Lite0", pacs_lite0_neighbour, arms=BLACK_BOX + VARIANTS),
)


def more_rows_on_photos(found: Comparison) -> list[dict]:
    """Table rows of claims that cannot be tested on photographs either."""
    return [verdicts.not_testable("averages over 14 ID sets, DomainNet, GLUE-X", "see paper", "needs those sets")]


def evaluate_photos(runs: Sequence[str]) -> list[dict[str, float]]:
    return [measure_run(path) for path in runs]


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
    before=(photos.CIFAR10, photos.PACS, ENCODE_PACS),
    arms=PHOTOS_ARMS,
    corpus="Encoders from scratch on 50,000 photographs of CIFAR-10 (32 pixels), probed on PACS (in results/photos its "
    "pictures had a shorter side of 112 pixels); the black box is EfficientNet-Lite0, pretrained on ImageNet-1k, each "
    f"number the mean of {TUNINGS} heads with different seeds",
    minutes={"core": 5, "all": 8},
    evaluate=evaluate_photos,
    alone=True,
    metrics=METRICS | DOMAINS,
    small=("lp/id", "blackbox/id", "sve_id"),
    sets=(f"{PACS}/photo", *(f"{PACS}/{name}_all" for name in SHIFTED)),
    floors=PHOTOS_FLOORS,
    claims=(*CLAIMS, *VARIANT_CLAIMS),
    derive=lambda found: over_levels(found.arms),
    more_rows=more_rows_on_photos,
    plot=lambda found, out: plot_noise(found.arms, out),
)

if __name__ == "__main__":
    runner.main(STUDY)
