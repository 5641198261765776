"""The study of NMTune on photographs: `python -m studies.nmtune --corpus photos --photos DIR`.

Encoders are pre-trained on the 50,000 photographs of CIFAR-10 with 0 to 30 % wrong labels, a stand-in for ImageNet-1K.
LP, MLP and NMTune are tuned on the photographs of PACS and tested on held-out photographs (ID), and on paintings,
cartoons and sketches of the same classes (OOD), a stand-in for DomainNet. The same heads are also tuned and tested on
features of these images from a black box, EfficientNet-Lite0.

Why the effects can appear: for the same reasons as in study.py; PACS is a benchmark of the paper's kind of domain
shift. The effects would vanish where a probe is near 100 %, as on an ImageNet network's features of photographs.
"""

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from nmtune import eval as evaluation
from nmtune.config import NOISE
from nmtune.features import read_features
from shared import probes, run
from shared.evaluation import measured
from studies.harness import floors, photos, verdicts
from studies.harness.floors import Floor
from studies.harness.report import Comparison
from studies.harness.runner import Arm, Once, Study
from studies.harness.verdicts import Claim
from studies.nmtune import BLACK_BOX, CLAIMS, HEADS, SELECTED, TUNINGS, heads_arm, linear_probe, over_levels, plot_noise

CIFAR10, PACS = "data/photos-cifar10/eval/cifar10", "data/photos-pacs/eval"
SHIFTED = ("art_painting", "cartoon", "sketch")
TRAIN = f"--data {PACS}/photo:train"
TESTS = f"--tests id={PACS}/photo:test " + " ".join(f"{name}={PACS}/{name}_all:test" for name in SHIFTED)
TUNED = f"--encoder {{out}} {TRAIN} {TESTS} --workers 0"
FEATURES = "runs/photos/nmtune/lite0.npz"

WITHOUT = {"mse": " without L_MSE", "cov": " without L_COV", "svd": " without L_SVD"}
ARMS = (
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
VARIANTS = tuple(arm.name for arm in ARMS if arm.name.startswith("lite0-") and not arm.core)
ENCODE = Once(
    f"nmtune.extract images --encoder lite0:128 {TRAIN} {TESTS} --batch-size 32 --out {FEATURES}", BLACK_BOX + VARIANTS
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
    numbers = {"lp/id": found["id/top1"], "lp/ood": averaged(found, "top1")}
    for name in ("sve", "lsvr"):
        numbers |= {f"{name}_id": found[f"id/{name}_F"], f"{name}_ood": averaged(found, f"{name}_F")}
    for head in ("mlp", "nmtune"):
        tuned = evaluation.head_accuracies(folder.parent / head)
        numbers |= {f"{head}/id": tuned["id/top1"], f"{head}/ood": averaged(tuned, "top1")}
    return numbers | {f"lp/{name}": found[f"{name}/top1"] for name in SHIFTED}


def measure_run(path: str) -> dict[str, float]:
    """Metrics of a run: of an encoder, cached in its results.json, or of a head on black-box features."""
    folder = Path(path)
    if folder.name.startswith("lite0"):
        found = evaluation.head_accuracies(folder)
        tops = {f"blackbox/{name}": found[f"{name}/top1"] for name in ("id", *SHIFTED)}
        return tops | {"blackbox/ood": averaged(found, "top1")}
    probe = folder / "lp"
    weights = [folder / name / "checkpoint.pt" for name in ("", "lp", "mlp", "nmtune")]  # "": the encoder
    sources = [*weights, *Path(PACS).glob("*/*/*.tar")]
    return measured(
        "nmtune", folder / "results.json", {"probe": TESTS}, sources, functools.partial(measure_probe, probe)
    )


# --------------------------------------------------------------------------------------------------------------- floors


Features = tuple[Tensor, Tensor]  # (N, D), labels (N,)


def pixels() -> tuple[Features, dict[str, Features]]:
    """Raw pixels of the photographs that probes are trained on, and of each test set."""
    tests = {"id": floors.read(f"{PACS}/photo", "test")}
    tests |= {name: floors.read(f"{PACS}/{name}_all", "test") for name in SHIFTED}
    return floors.read(f"{PACS}/photo", "train"), tests


def by_domain(name: str, tops: dict[str, float]) -> dict[str, float]:
    """Top-1 of each test set -> {"NAME/id", "NAME/ood"}."""
    return {f"{name}/id": tops["id"], f"{name}/ood": float(np.mean([tops[each] for each in SHIFTED]))}


def neighbours(train: Features, tests: dict[str, Features]) -> dict[str, float]:
    return {name: probes.nearest_neighbour(*train, *test) for name, test in tests.items()}


def chance() -> dict[str, float]:
    top1 = dict.fromkeys(("id", *SHIFTED), floors.chance([f"{PACS}/photo"])["photo/top1"])
    return by_domain("lp", top1) | by_domain("blackbox", top1)


def pixel_neighbour() -> dict[str, float]:
    found = neighbours(*pixels())
    return by_domain("lp", found) | by_domain("blackbox", found)


def lite0_neighbour() -> dict[str, float]:
    """Nearest neighbours on the pretrained network's own features."""
    sets = read_features(FEATURES)
    return by_domain("blackbox", neighbours((sets.train.features[0], sets.train.labels), sets.tests))


FLOORS = (
    Floor("chance", chance),
    Floor("nearest neighbour on raw pixels", pixel_neighbour),
    Floor("linear probe on raw pixels", lambda: by_domain("lp", linear_probe(*pixels()))),
    Floor("nearest neighbour on EfficientNet-Lite0", lite0_neighbour, arms=BLACK_BOX + VARIANTS),
)


def more_rows(found: Comparison) -> list[dict]:
    """Table rows of claims that cannot be tested on photographs either."""
    return [verdicts.not_testable("averages over 14 ID sets, DomainNet, GLUE-X", "see paper", "needs those sets")]


def evaluate(runs: Sequence[str]) -> list[dict[str, float]]:
    return [measure_run(path) for path in runs]


DOMAINS = {
    f"{kind}/{name}": f"{heading} {name.replace('_', ' ')}"
    for kind, heading in (("lp", "LP"), ("blackbox", "black box"))
    for name in SHIFTED
}
STUDY = Study(
    folder="nmtune",
    on="photos",
    paper="NMTune (arXiv 2309.17002)",
    stands_for="ImageNet-1K and DomainNet",
    before=(photos.CIFAR10, photos.PACS, ENCODE),
    arms=ARMS,
    corpus="Encoders from scratch on 50,000 photographs of CIFAR-10 (32 pixels), probed on PACS (in results/photos its "
    "pictures had a shorter side of 112 pixels); the black box is EfficientNet-Lite0, pretrained on ImageNet-1k, each "
    f"number the mean of {TUNINGS} heads with different seeds",
    minutes={"core": 5, "all": 8},
    evaluate=evaluate,
    alone=True,
    metrics=evaluation.METRICS | DOMAINS,
    sets=(f"{PACS}/photo", *(f"{PACS}/{name}_all" for name in SHIFTED)),
    floors=FLOORS,
    claims=(*CLAIMS, *VARIANT_CLAIMS),
    derive=lambda found: over_levels(found.arms),
    derived_from={"sup-00": tuple(arm.name for arm in ARMS if arm.name.startswith("sup-"))},
    more_rows=more_rows,
    plot_arms=plot_noise,
)
