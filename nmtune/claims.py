"""What the paper claims, in the terms of the embedded corpus, and the comparison of its encoders.

Encoders are run folders KIND-GAMMA-seedN (sup-30-seed0) that make pre-trains and nmtune.study measures. A number
of an encoder is the mean over tasks and tuning seeds. Claims about noise compare encoders of one pre-training seed, so
that their interval is over pre-training seeds; claims about heads compare heads on one encoder: it is over encoders.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from nmtune.pretrain_config import NOISE
from shared import checkpoints, evaluation
from shared.study import report, statistics

KINDS = {"sup": "label", "clip": "caption"}
METHODS = {
    "lp": "LP",
    "lp-views": "LP, NMTune's views",
    "mlp": "MLP",
    "nmtune": "NMTune",
    "nmtune-lambda": "NMTune, one lambda",
}
ARMS = {f"{kind}-{level:02d}": f"{level} % {what} noise" for kind, what in KINDS.items() for level in NOISE}
METRICS = {
    "lp/id": "LP ID",
    "lp/ood": "LP OOD",
    "lp-views/id": "LP, two views, ID",
    "lp-views/ood": "LP, two views, OOD",
    "mlp/id": "MLP ID",
    "mlp/ood": "MLP OOD",
    "nmtune/id": "NMTune ID",
    "nmtune/ood": "NMTune OOD",
    "sve_id": "SVE ID (nats)",
    "sve_ood": "SVE OOD",
    "lsvr_id": "LSVR ID (nats)",
    "lsvr_ood": "LSVR OOD",
    "share_ood": "largest share OOD",
    "noise": "measured noise",
}

Studies = dict[str, dict[int, dict[str, float]]]  # arm -> pre-training seed -> metric -> number


def read_study(folder: Path) -> dict[str, float]:
    """An encoder's numbers: means over tasks and tuning seeds; spectra of the default centring by their bare names."""
    if not (folder / "study.json").is_file():
        raise FileNotFoundError(f"{folder} has no study.json: run python -m nmtune.study --encoder {folder}")
    study = checkpoints.read_json(folder / "study.json")
    tasks = list(study["tasks"].values())
    numbers = {metric: float(np.mean([np.mean(task[metric]) for task in tasks])) for metric in tasks[0]}
    numbers |= {
        metric.removesuffix("@sample"): value for metric, value in numbers.items() if metric.endswith("@sample")
    }
    seconds = {"pretrain_seconds": study["pretrain_seconds"], "study_seconds": study["study_seconds"]}
    return numbers | seconds | {"noise": 100 * study["noise"]}


def over_noise(studies: Studies, kind: str, metric: str, seed: int) -> dict[int, float]:
    """Noise level -> number, of one pre-training seed."""
    levels = [level for level in NOISE if f"{kind}-{level:02d}" in studies]
    return {level: studies[f"{kind}-{level:02d}"][seed][metric] for level in levels}


def noise_claims(studies: Studies, seeds: list[int]) -> list[dict[str, str]]:
    """C1 to C3: differences between encoders, paired by pre-training seed."""
    rows = []

    def row(text: str, paper: str, kind: str, metric: str, more: tuple[int, ...], less: tuple[int, ...], sign: int):
        series = [over_noise(studies, kind, metric, seed) for seed in seeds]
        if all(level in series[0] for level in (*more, *less)):
            means = [[np.mean([one[level] for level in levels]) for one in series] for levels in (more, less)]
            rows.append(statistics.judge(statistics.Claim(text, paper, metric, "", "", sign), *means))

    for kind, what in KINDS.items():
        said = f"{what}s: " if kind == "clip" else ""
        row(f"C1 {said}5-10 % noise raises LP ID over 0 %", "up", kind, "lp/id", (5, 10), (0,), 1)
        row(f"C1 {said}30 % lowers LP ID under 5-10 %", "down", kind, "lp/id", (30,), (5, 10), -1)
        row(f"C2 {said}any noise (mean of 5-30 %) lowers LP OOD", "down", kind, "lp/ood", NOISE[1:], (0,), -1)
        row(f"C2 {said}30 % noise lowers LP OOD", "down", kind, "lp/ood", (30,), (0,), -1)
        for metric in ("sve", "lsvr"):
            for part in ("id", "ood"):
                text = f"C3 {said}30 % noise raises {metric.upper()}, {part.upper()} features"
                row(text, "up", kind, f"{metric}_{part}", (30,), (0,), 1)
    levels = over_noise(studies, "sup", "noise", seeds[0])
    if len(levels) > 2:
        for x, y, sign, text in (
            ("sve_id", "lp/id", 1, "C3 higher SVE goes with higher LP ID (correlation over levels)"),
            ("lsvr_ood", "lp/ood", -1, "C3 higher LSVR goes with lower LP OOD (correlation over levels)"),
        ):
            pairs = [[list(over_noise(studies, "sup", metric, seed).values()) for metric in (x, y)] for seed in seeds]
            r = [float(np.corrcoef(*pair)[0, 1]) for pair in pairs]
            claim = statistics.Claim(text, "positive" if sign > 0 else "negative", "", "", "", sign)
            rows.append(statistics.judge(claim, r, [0.0] * len(r)))
    return rows


def head_claims(studies: Studies, seeds: list[int]) -> list[dict[str, str]]:
    """C4 and the mechanism: differences between heads on one encoder, over all encoders."""
    everywhere = [by_seed[seed] for by_seed in studies.values() for seed in seeds]
    noisiest = [by_seed[seed] for arm, by_seed in studies.items() if arm.endswith("-30") for seed in seeds]
    rows = []

    def row(
        text: str,
        paper: str | None,
        part: str,
        method: str,
        baseline: str,
        sign: int = 1,
        effect: float | None = None,
        encoders: list[dict[str, float]] = everywhere,
    ):
        if encoders and all(f"{name}/{part}" in one for one in encoders for name in (method, baseline)):
            values = [[one[f"{name}/{part}"] for one in encoders] for name in (method, baseline)]
            claim = statistics.Claim(f"{text} ({len(encoders)} encoders)", paper, part, method, baseline, sign, effect)
            rows.append(statistics.judge(claim, *values))

    for part in ("id", "ood"):
        row(f"C4 NMTune above MLP, {part.upper()}", "about +1", part, "nmtune", "mlp", effect=1)
        row(f"C4 the same at 30 % noise, {part.upper()}", "up", part, "nmtune", "mlp", encoders=noisiest)
        row(f"C4 NMTune above LP, {part.upper()}", "up", part, "nmtune", "lp")
        row(f"NMTune above LP on the same views, {part.upper()}", None, part, "nmtune", "lp-views")
        row(f"NMTune with one lambda = 0.01, k = 1, above MLP, {part.upper()}", None, part, "nmtune-lambda", "mlp")
    row("mechanism: NMTune's z has lower L_COV than MLP's, ID", "down", "cov_id", "nmtune", "mlp", -1)
    row("mechanism: NMTune's z has a higher top-5 share (%) than MLP's, ID", "up", "top5_id", "nmtune", "mlp")
    return rows


def compare(folders: list[Path], path: Path) -> None:
    """Group encoders by arm and seed, judge the claims, print the tables, write `path` and the plots beside it."""
    studies: Studies = {}
    commits: set[str] = set()
    for folder in folders:
        arm, _, seed = folder.name.rpartition("-seed")
        if arm not in ARMS or not seed.isdigit():
            raise ValueError(f"--report compares encoder folders such as sup-30-seed0, not {folder}")
        studies.setdefault(arm, {})[int(seed)] = read_study(folder)
        commits.add(checkpoints.read_json(folder / "study.json")["commit"])
    studies = {arm: studies[arm] for arm in ARMS if arm in studies}
    seeds = sorted(next(iter(studies.values())))
    for arm, by_seed in studies.items():
        if sorted(by_seed) != seeds:
            raise ValueError(f"arm {arm} has seeds {sorted(by_seed)}, but {next(iter(studies))} has {seeds}")
    rows = noise_claims(studies, seeds) + head_claims(studies, seeds)
    rows.append(statistics.untestable("averages over 14 ID sets, DomainNet, GLUE-X", "see paper", "needs those sets"))
    by_arm = {arm: [by_seed[seed] for seed in seeds] for arm, by_seed in studies.items()}
    summary = report.results("NMTune (arXiv 2309.17002)", seeds, by_arm, rows, commits)
    checkpoints.write_json(path, summary)
    plot_noise(studies, seeds, path.parent / "nmtune_noise.png")
    plot_spectra(folders, path.parent / "nmtune_spectra.png")
    named = {ARMS[arm]: metrics for arm, metrics in summary["arms"].items()}
    print(
        f"\nEmbedded emoji corpus, a stand-in; pre-training seeds {', '.join(map(str, seeds))}; percent; mean ± std\n"
    )
    print(report.arms_table(named, METRICS))
    print(f"\nDifferences, ± 95 % interval\n\n{evaluation.table(rows)}\n\nwritten to {path}")


# --------------------------------------------------------------------------------------------------------------- plots


def plot_noise(studies: Studies, seeds: list[int], path: Path) -> None:
    """Against the noise ratio, a row a kind: SVE, LSVR, accuracy ID and OOD a method; mean and spread over seeds."""
    kinds = [kind for kind in KINDS if any(arm.startswith(kind) for arm in studies)]
    figure, axes = plt.subplots(len(kinds), 4, figsize=(17, 3.8 * len(kinds)), squeeze=False)

    def line(axis, kind: str, metric: str, label: str, color: str | None = None) -> None:
        series = [over_noise(studies, kind, metric, seed) for seed in seeds]
        values = np.array([list(one.values()) for one in series])
        mean = values.mean(axis=0)
        (drawn,) = axis.plot(list(series[0]), mean, marker="o", ms=4, label=label, color=color)
        if len(seeds) > 1:
            spread = values.std(axis=0, ddof=1)
            axis.fill_between(list(series[0]), mean - spread, mean + spread, alpha=0.15, color=drawn.get_color())

    for row, kind in zip(axes, kinds, strict=True):
        for axis, metric in zip(row, ("sve", "lsvr"), strict=False):
            for part, name in (("id", "in domain"), ("ood", "out of domain")):
                line(axis, kind, f"{metric}_{part}", name)
            axis.set(title=f"{metric.upper()} of the encoder's features", ylabel=f"{metric.upper()} (nats)")
        known = next(iter(studies.values()))[seeds[0]]
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
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_spectrum(axis: plt.Axes, s: np.ndarray, label: str, **style) -> None:
    """Share of each singular value, but for those that centring makes 0."""
    share = s / s.sum()
    axis.plot(np.arange(1, len(s) + 1)[share > 1e-6], share[share > 1e-6], label=label, **style)


def finish_spectra(axis: plt.Axes, title: str) -> None:
    axis.set(title=title, xlabel="i", ylabel="$\\sigma_i$ / sum of all", xscale="log", yscale="log")
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=8)


def plot_spectra(folders: list[Path], path: Path) -> None:
    """Shares of the singular values of the OOD test features: F at every noise level, and F, MLP's z, NMTune's z at the
    highest; first seed, first task."""
    first = [folder for folder in folders if folder.name.endswith(folders[0].name.rpartition("-")[2])]
    kinds = [kind for kind in KINDS if any(folder.name.startswith(kind) for folder in first)]
    figure, axes = plt.subplots(len(kinds), 2, figsize=(11, 4 * len(kinds)), squeeze=False, sharey="row")
    for row, kind in zip(axes, kinds, strict=True):
        own = sorted(folder for folder in first if folder.name.startswith(kind))
        shades = plt.get_cmap("viridis")(np.linspace(0, 0.85, len(own)))
        for folder, shade in zip(own, shades, strict=True):
            with np.load(folder / "spectra.npz") as file:
                spectra = {key.partition("/")[2]: file[key] for key in reversed(file.files)}
            draw_spectrum(row[0], spectra["F/ood"], f"{int(folder.name.split('-')[1])} %", color=shade)
        for key, label in (("F/ood", "F, before tuning"), ("mlp/ood", "z of the MLP"), ("nmtune/ood", "z of NMTune")):
            if key in spectra:
                draw_spectrum(row[1], spectra[key], label)
        finish_spectra(row[0], f"OOD features F, {KINDS[kind]} noise in pre-training")
        finish_spectra(row[1], f"OOD features, encoder of {int(own[-1].name.split('-')[1])} % {KINDS[kind]} noise")
        row[1].set_ylabel("")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
