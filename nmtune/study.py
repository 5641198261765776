"""The small-scale study of NMTune: `python -m nmtune.study` (`make reproduce-nmtune`).

Encoders are pre-trained on the embedded emoji corpus, a stand-in for ImageNet-1K and YFCC15M, at five ratios of label
noise and of caption noise; every head is tuned on the frozen features of each, from five seeds. A number of an encoder
is the mean over tuning seeds. Claims about noise compare encoders of the same pre-training seed: their intervals are
over pre-training seeds. Claims about heads compare two heads on the same encoder: their intervals are over encoders.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from nmtune import eval as evaluation
from nmtune.config import NOISE
from shared.study import runner, statistics
from shared.study.report import Comparison
from shared.study.runner import Arm, Study
from shared.study.statistics import Claim

KINDS = {"sup": "label", "clip": "caption"}
METHODS = {
    "lp": "LP",
    "lp-views": "LP, NMTune's views",
    "mlp": "MLP",
    "nmtune": "NMTune",
    "nmtune-lambda": "NMTune, one lambda",
}
ARMS = tuple(
    Arm(
        f"{kind}-{level:02d}",
        (f"pretrain emoji-{kind}-{level:02d}", "encoder_study --encoder {out}"),
        heading=f"{level} % {what} noise",
        core=kind == "sup" or level in (0, 30),
    )
    for kind, what in KINDS.items()
    for level in NOISE
)

Arms = dict[str, list[dict[str, float]]]  # by arm, the numbers of the encoder of each pre-training seed

# --------------------------------------------------------------------------------------------------------------- claims


def over_noise(arms: Arms, kind: str, metric: str) -> dict[int, list[float]]:
    """{noise level: numbers by pre-training seed}, of the levels that were run."""
    levels = [level for level in NOISE if f"{kind}-{level:02d}" in arms]
    return {level: [run[metric] for run in arms[f"{kind}-{level:02d}"]] for level in levels}


def noise_claims(arms: Arms) -> list[dict[str, str]]:
    """C1 to C3: differences between encoders, paired by pre-training seed."""
    rows = []
    for kind, what in KINDS.items():
        of = f"{what}s: " if kind == "clip" else ""
        for text, paper, metric, more, less, sign in (  # mean of levels `more` minus mean of levels `less`
            (f"C1 {of}5-10 % noise raises LP ID over 0 %", "up", "lp/id", (5, 10), (0,), 1),
            (f"C1 {of}30 % lowers LP ID under 5-10 %", "down", "lp/id", (30,), (5, 10), -1),
            (f"C2 {of}any noise (mean of 5-30 %) lowers LP OOD", "down", "lp/ood", NOISE[1:], (0,), -1),
            (f"C2 {of}30 % noise lowers LP OOD", "down", "lp/ood", (30,), (0,), -1),
            (f"C3 {of}30 % noise raises SVE, ID features", "up", "sve_id", (30,), (0,), 1),
            (f"C3 {of}30 % noise raises SVE, OOD features", "up", "sve_ood", (30,), (0,), 1),
            (f"C3 {of}30 % noise raises LSVR, ID features", "up", "lsvr_id", (30,), (0,), 1),
            (f"C3 {of}30 % noise raises LSVR, OOD features", "up", "lsvr_ood", (30,), (0,), 1),
        ):
            numbers = over_noise(arms, kind, metric)
            if {*more, *less} <= set(numbers):
                means = [np.mean([numbers[level] for level in levels], axis=0).tolist() for levels in (more, less)]
                rows.append(statistics.judge(Claim(text, paper, metric, "", "", sign), *means))
    return rows


def correlation_claims(arms: Arms) -> list[dict[str, str]]:
    """C3: correlations of spectrum and accuracy over the levels of label noise, one for each pre-training seed."""
    rows = []
    for x, y, sign, text in (
        ("sve_id", "lp/id", 1, "C3 higher SVE goes with higher LP ID (correlation over levels)"),
        ("lsvr_ood", "lp/ood", -1, "C3 higher LSVR goes with lower LP OOD (correlation over levels)"),
    ):
        by_level = [list(over_noise(arms, "sup", metric).values()) for metric in (x, y)]
        if len(by_level[0]) > 2:
            by_seed = zip(*(zip(*numbers, strict=True) for numbers in by_level), strict=True)
            r = [float(np.corrcoef(*pair)[0, 1]) for pair in by_seed]
            claim = Claim(text, "positive" if sign > 0 else "negative", "", "", "", sign)
            rows.append(statistics.judge(claim, r, [0.0] * len(r)))
    return rows


def head_claims(arms: Arms) -> list[dict[str, str]]:
    """C4 and the mechanism: differences between two heads on one encoder, over all encoders."""
    every = [run for runs in arms.values() for run in runs]
    noisiest = [run for arm, runs in arms.items() if arm.endswith("-30") for run in runs]
    claims = []  # (encoders, claim)
    for part in ("id", "ood"):
        name, one_lambda = part.upper(), "NMTune with one lambda = 0.01, k = 1, above MLP"
        claims += [
            (every, Claim(f"C4 NMTune above MLP, {name}", "about +1", part, "nmtune", "mlp", 1, 1)),
            (noisiest, Claim(f"C4 the same at 30 % noise, {name}", "up", part, "nmtune", "mlp")),
            (every, Claim(f"C4 NMTune above LP, {name}", "up", part, "nmtune", "lp")),
            (every, Claim(f"NMTune above LP on the same views, {name}", None, part, "nmtune", "lp-views")),
            (every, Claim(f"{one_lambda}, {name}", None, part, "nmtune-lambda", "mlp")),
        ]
    covariance = "mechanism: NMTune's z has lower L_COV than MLP's, ID"
    share = "mechanism: NMTune's z has a higher top-5 share (%) than MLP's, ID"
    claims += [
        (every, Claim(covariance, "down", "cov_id", "nmtune", "mlp", -1)),
        (every, Claim(share, "up", "top5_id", "nmtune", "mlp")),
    ]
    rows = []
    for encoders, claim in claims:
        metrics = [f"{head}/{claim.metric}" for head in (claim.method, claim.baseline)]
        if encoders and all(metric in run for run in encoders for metric in metrics):
            claim = claim._replace(claim=f"{claim.claim} ({len(encoders)} encoders)")
            rows.append(statistics.judge(claim, *([run[metric] for run in encoders] for metric in metrics)))
    return rows


def more_rows(found: Comparison) -> list[dict[str, str]]:
    """All claims: none of them is a difference between two arms in one metric alone.

    ValueError for an arm that is not of this study.
    """
    if unknown := set(found.arms) - set(STUDY.headings):
        raise ValueError(f"--report compares encoder folders such as sup-30-seed0, not {sorted(unknown)[0]}-seedN")
    absolute = statistics.untestable("averages over 14 ID sets, DomainNet, GLUE-X", "see paper", "needs those sets")
    noise = noise_claims(found.arms) + correlation_claims(found.arms)
    return [*noise, *head_claims(found.arms), absolute]


# ---------------------------------------------------------------------------------------------------------------- plots


def plot(found: Comparison, out: Path) -> None:
    """nmtune_noise.png and nmtune_spectra.png."""
    plot_noise(found.arms, out)
    plot_spectra({arm: folders[0] for arm, folders in found.folders.items()}, out)


def plot_noise(arms: Arms, out: Path) -> None:
    """nmtune_noise.png: against the noise ratio SVE, LSVR, and accuracy ID and OOD of each head, a row of panels for
    each kind of noise; mean and standard deviation over seeds."""
    kinds = [kind for kind in KINDS if any(arm.startswith(kind) for arm in arms)]
    figure, axes = plt.subplots(len(kinds), 4, figsize=(17, 3.8 * len(kinds)), squeeze=False)

    def line(axis: plt.Axes, kind: str, metric: str, label: str) -> None:
        numbers = over_noise(arms, kind, metric)
        spreads = [statistics.spread(values) for values in numbers.values()]
        mean, std = (np.array([spread[key] for spread in spreads]) for key in ("mean", "std"))
        (drawn,) = axis.plot(list(numbers), mean, marker="o", ms=4, label=label)
        if len(next(iter(numbers.values()))) > 1:
            axis.fill_between(list(numbers), mean - std, mean + std, alpha=0.15, color=drawn.get_color())

    known = next(iter(arms.values()))[0]
    for row, kind in zip(axes, kinds, strict=True):
        for axis, metric in zip(row, ("sve", "lsvr"), strict=False):
            for part, name in (("id", "in domain"), ("ood", "out of domain")):
                line(axis, kind, f"{metric}_{part}", name)
            axis.set(title=f"{metric.upper()} of the encoder's features", ylabel=f"{metric.upper()} (nats)")
        for axis, part, where in zip(row[2:], ("id", "ood"), ("in domain", "out of domain"), strict=True):
            for method, name in METHODS.items():
                if f"{method}/{part}" in known:
                    line(axis, kind, f"{method}/{part}", name)
            axis.set(title=f"accuracy {where}", ylabel="top-1 (%)")
        for axis in row:
            axis.set(xlabel=f"{KINDS[kind]} noise in pre-training (%)", xticks=NOISE)
            axis.grid(alpha=0.3)
            axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(out / "nmtune_noise.png", dpi=110)
    plt.close(figure)


def plot_spectra(folders: dict[str, Path], out: Path) -> None:
    """nmtune_spectra.png: shares of the singular values of the OOD test features of the first task, for one encoder
    {arm: folder} a level: F at every noise level, and F, MLP's z, NMTune's z at the highest."""
    kinds = [kind for kind in KINDS if any(arm.startswith(kind) for arm in folders)]
    figure, axes = plt.subplots(len(kinds), 2, figsize=(11, 4 * len(kinds)), squeeze=False, sharey="row")
    for row, kind in zip(axes, kinds, strict=True):
        levels = [level for level in NOISE if f"{kind}-{level:02d}" in folders]
        shades = plt.get_cmap("viridis")(np.linspace(0, 0.85, len(levels)))
        for level, shade in zip(levels, shades, strict=True):
            with np.load(folders[f"{kind}-{level:02d}"] / "spectra.npz") as file:
                spectra = {key.partition("/")[2]: file[key] for key in reversed(file.files)}  # the first task's remain
            evaluation.draw_spectrum(row[0], spectra["F/ood"], f"{level} %", color=shade)
        for key, label in (("F/ood", "F, before tuning"), ("mlp/ood", "z of the MLP"), ("nmtune/ood", "z of NMTune")):
            if key in spectra:
                evaluation.draw_spectrum(row[1], spectra[key], label)
        evaluation.finish_spectra(row[0], f"OOD features F, {KINDS[kind]} noise in pre-training")
        evaluation.finish_spectra(row[1], f"OOD features, encoder of {levels[-1]} % {KINDS[kind]} noise")
        row[1].set_ylabel("")
    figure.tight_layout()
    figure.savefig(out / "nmtune_spectra.png", dpi=110)
    plt.close(figure)


STUDY = Study(
    folder="nmtune",
    paper="NMTune (arXiv 2309.17002)",
    stands_for="ImageNet-1K and YFCC15M",
    arms=ARMS,
    minutes={"core": 13, "all": 20},
    evaluate=lambda runs: [evaluation.encoder_metrics(run) for run in runs],
    metrics=evaluation.METRICS,
    more_rows=more_rows,
    plot=plot,
)

if __name__ == "__main__":
    runner.main(STUDY)
