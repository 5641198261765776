"""Re-derive the paper's figures from the authors' published counts and scores.

    python -m concept_frequency.replay CLONE [--out runs/concept_frequency/replay]

CLONE is a clone of bethgelab/frequency_determines_performance@11ef009 (`U:`), its folders search_counts,
zero_shot_evaluations, retrieval_evaluations, misalignment_metrics, let_it_wag_datasets. None of its files are in this
project; values that are printed in the authors' figures and notebooks are. Nothing is counted or trained here: this
shows that curve, bins and correlation are the authors', and how much of each correlation is left in the diagnostics
that the paper lacks: all bins, no bins, scores shuffled across everything and within each dataset.
"""

import dataclasses
import itertools
from functools import cache
from pathlib import Path
from typing import Annotated, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import tyro

from concept_frequency import curves
from concept_frequency.concepts import load_counts, load_json, load_results, mean_scores
from shared import checkpoints, cli, evaluation

Rows = list[dict[str, str]]  # of a table

# --------------------------------------------------------------------------------------------------- the authors' files

CLASSIFICATION = (  # 17 datasets; ImageNet-Sketch is the 18th, without text counts
    "imagenet cifar10 cifar100 caltech101 caltech256 sun397 birdsnap country211 cub dtd eurosat fgvcaircraft "
    "flowers102 food101 oxfordpets stanfordcars ucf101"
).split()
RETRIEVAL = ["coco", "flickr"]
METHODS = {"integrated": "integrated_tlemmatized_i0.7", "image": "rampp0.7", "text": "lemmatized"}
BINS = {"classification": 12, "retrieval": 7, "generation": 7}
CORPORA = {
    "cc3m": "CC-3M",
    "cc12m": "CC-12M",
    "yfcc15m": "YFCC-15M",
    "laion400m": "LAION-400M",
    "synthci30m": "SynthCI-30M",
    "laion200m_train_test_sim_normalized": "LAION-200M",
}
MODELS = (
    ("RN50|cc3m", "ViT-B-16|cc3m", "RN50|cc12m", "ViT-B-16|cc12m", "RN50|yfcc15m", "RN101|yfcc15m", "ViT-B-16|yfcc15m")
    + ("ViT-B-32|laion400m", "ViT-B-16|laion400m", "ViT-L-14|laion400m", "ViT-B-16|synthci30m")
    + ("ViT-B-32|laion200m_train_test_sim_normalized",)
)

# Values printed in the legends of the authors' figures, in the order of MODELS; None: no such figure.
PRINTED = {
    ("classification", "integrated"): (0.97, 0.93, 0.93, 0.83, 0.96, 0.95, 0.96, None, None, None, 0.82, None),
    ("classification", "image"): (0.98, 0.97, 0.97, 0.95, 0.82, 0.89, 0.92, 0.95, 0.91, 0.87, 0.93, 0.97),
    ("classification", "text"): (0.92, 0.91, 0.95, 0.94, 0.85, 0.89, 0.88, 0.92, 0.85, 0.83, 0.89, None),
    ("retrieval", "integrated"): (1.00, 1.00, 0.98, 0.98, 1.00, 1.00, 0.99, 0.97, 0.97, 0.96, None, None),
    ("retrieval", "image"): (None,) * 11 + (0.99,),
}
DERIVED = {  # LAION-400M in the main figure, whose file the repository lacks: recomputed, three digits
    "ViT-B-32|laion400m": 0.957,
    "ViT-B-16|laion400m": 0.916,
    "ViT-L-14|laion400m": 0.855,
}
MISALIGNED = {"cc3m": 16.81, "cc12m": 17.26, "yfcc15m": 36.49, "laion_aesthetics": 14.34, "laion400m": 5.31}  # percent
AGREEMENT = {  # Spearman, as U:notebooks/correlations_between_pretraining_frequencies.ipynb shows it
    ("cc3m", "cc12m"): 0.79, ("cc12m", "yfcc15m"): 0.96, ("cc3m", "laion400m"): 0.63, ("cc12m", "laion400m"): 0.74,
    ("yfcc15m", "laion400m"): 0.76,
}  # fmt: skip
IMAGENET = {  # percent, of open_clip's table, as U:notebooks/let_it_wag_eval.ipynb cell 5 has them
    "RN50|openai": 59.82, "RN101|openai": 62.28, "ViT-B-32|openai": 63.32, "ViT-B-16|siglip": 78.49,
    "ViT-B-16|openai": 68.34, "ViT-L-14|openai": 75.54, "SO400M|siglip": 83.44, "ViT-L-16|siglip": 82.07,
    "ViT-B-32|metaclip400m": 65.58, "ViT-B-32|commonpool": 23.04, "ViT-B-16|dfn": 76.24, "ViT-B-16|commonpool": 57.77,
    "ViT-L-14|commonpool": 76.37, "ViT-H-14|dfn": 83.44, "ViT-B-32|metaclip2.5b": 67.66,
    "ViT-B-16|metaclip400m": 70.80, "ViT-B-16|metaclip2.5b": 72.12, "ViT-L-14|metaclip400m": 76.20,
    "ViT-L-14|metaclip2.5b": 79.17, "ViT-H-14|metaclip2.5b": 80.51,
}  # fmt: skip


def plotted_bins(task: str, pretraining: str) -> slice:
    """The bins that the paper plots and correlates: they differ from panel to panel."""
    if task == "retrieval":
        return slice(3, None)
    if task == "generation":
        return slice(-4, None)
    return {"laion400m": slice(2, -1), "synthci30m": slice(0, -4)}.get(pretraining, slice(1, -1))


def short(model: str) -> str:
    """`backboneRN50_pretrainedcc3m` -> `RN50|cc3m`."""
    return model.removeprefix("backbone").replace("_pretrained", "|", 1)


class Results:
    """The authors' published files."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        for name in ("search_counts", "zero_shot_evaluations", "retrieval_evaluations"):
            if not (self.folder / name).is_dir():
                raise FileNotFoundError(
                    f"{self.folder} has no folder {name}: name a clone of bethgelab/frequency_determines_performance"
                )

    def counts_file(self, dataset: str, pretraining: str, method: str) -> Path:
        return self.folder / "search_counts" / f"{dataset}_{pretraining}_{method}_search_counts.json"

    def has(self, search: str, pretraining: str, task: str = "classification") -> bool:
        dataset = CLASSIFICATION[0] if task == "classification" else RETRIEVAL[0]
        return self.counts_file(dataset, pretraining, METHODS[search]).is_file()

    @cache  # noqa: B019 - one object a run
    def pairs(self, task: str, search: str, model: str, prompts: str = "class", method: str | None = None):
        """(counts (P,), scores (P,), dataset (P,)) of a panel: pooled over its datasets, not averaged.

        `prompts` is class, simple, ensemble, or t2i_k=10 and the like for retrieval. COCO's empty concept is in the
        image counts alone, as published.
        """
        pretraining = model.partition("|")[2]
        datasets = RETRIEVAL if task == "retrieval" else CLASSIFICATION + ["imagenet-sketch"] * (search != "text")
        place = "retrieval_evaluations" if task == "retrieval" else "zero_shot_evaluations"
        method = method or METHODS[search]
        counts = [load_counts(self.counts_file(dataset, pretraining, method)) for dataset in datasets]
        scores = [load_results(self.folder / place / f"{d}_{prompts}_results.json", model) for d in datasets]
        return curves.pooled(counts, scores)

    def tail_counts(self, pretraining: str, search: str) -> list[int]:
        """Counts of the 3,469 classes of 17 datasets."""
        files = (load_counts(self.counts_file(dataset, pretraining, METHODS[search])) for dataset in CLASSIFICATION)
        return [count for counts in files for count in counts.values()]

    def all_counts(self, pretraining: str, search: str) -> dict[str, int]:
        """Counts of all concepts of a corpus; of a name that several files have, the first in order of names."""
        found: dict[str, int] = {}
        for path in sorted(
            (self.folder / "search_counts").glob(f"*_{pretraining}_{METHODS[search]}_search_counts.json")
        ):
            found = load_counts(path) | found
        return found

    def let_it_wag(self) -> dict[str, float]:
        """Percent on Let It Wag! of each model, by its short name."""
        name = "let_it_wag_ensemble_results.json"
        places = [self.folder / "let_it_wag_datasets/evaluations" / name, self.folder / "let_it_wag" / name]
        path = next((path for path in places if path.is_file()), places[0])
        return {short(model): value["full"] for model, value in load_json(path).items()}

    def imagenet(self) -> dict[str, float]:
        """Percent on ImageNet with the ensemble of prompts: from the files, else as the authors' notebook has it."""
        files = load_json(self.folder / "zero_shot_evaluations/imagenet_ensemble_results.json")
        return IMAGENET | {short(model): value["full"] for model, value in files.items()}


# --------------------------------------------------------------------------------------------------------- correlations


class Panel(NamedTuple):
    """One model in one panel of a figure."""

    model: str
    printed: float | None
    rho: float
    p: float
    all_bins: float
    inner: float  # 1:-1
    pearson: float
    spearman: float
    bin0: float  # share of pairs in bin 0, which most panels leave out
    across: float  # mean rho of shuffles across everything
    within: float  # ... within each dataset
    reached: float  # share of the latter that reach rho


def panel(results: Results, task: str, search: str, model: str, prompts: str, printed: float | None) -> Panel:
    """Correlation of one model and its diagnostics."""
    counts, scores, dataset = results.pairs(task, search, model, prompts)
    bins, num_bins = plotted_bins(task, model.partition("|")[2]), BINS[task]
    curve = curves.log_linear_curve(counts, scores, num_bins)
    rho, p = curves.correlation(curve, bins)
    flat = curves.unbinned(counts, scores)
    across = curves.permutation_null(counts, scores, None, num_bins, bins)
    within = curves.permutation_null(counts, scores, dataset, num_bins, bins)
    return Panel(
        model, printed, rho, p, curves.correlation(curve)[0], curves.correlation(curve, slice(1, -1))[0],
        flat["pearson"], flat["spearman"], curve.size[0] / len(counts),
        float(across.mean()), float(within.mean()), float((within >= rho).mean()),
    )  # fmt: skip


def figure(results: Results, task: str, search: str, prompts: str) -> list[Panel]:
    """All panels whose counts are among the files."""
    printed = PRINTED.get((task, search), (None,) * len(MODELS))
    return [
        panel(results, task, search, model, prompts, value)
        for model, value in zip(MODELS, printed, strict=True)
        if results.has(search, model.partition("|")[2], task)
    ]


def panel_rows(panels: list[Panel]) -> Rows:
    """One table row a panel."""
    return [
        {
            "corpus": CORPORA[p.model.partition("|")[2]],
            "model": p.model.partition("|")[0],
            "printed": "-" if p.printed is None else f"{p.printed:.2f}",
            "here": f"{p.rho:.3f}",
            "p": f"{p.p:.0e}",
            "all bins": f"{p.all_bins:.3f}",
            "1:-1": f"{p.inner:.3f}",
            "no bins": f"{p.pearson:.3f}",
            "rank": f"{p.spearman:.3f}",
            "bin 0": f"{p.bin0:.0%}",
            "shuffled": f"{p.across:.2f}",
            "... within": f"{p.within:.2f}",
            "reach": f"{p.reached:.0%}",
        }
        for p in panels
    ]


def equal_to_printed(name: str, panels: list[Panel]) -> dict[str, str]:
    """A claims row: how many correlations agree with the printed two digits."""
    shown = [p for p in panels if p.printed is not None]
    same = sum(f"{p.rho:.2f}" == f"{p.printed:.2f}" for p in shown)
    values = " ".join(f"{p.printed:.2f}" for p in shown)
    verdict = "reproduced" if same == len(shown) else "not reproduced" if same == 0 else "same direction"
    return {"claim": name, "paper": values, "here": f"{same} of {len(shown)} equal to the digit", "verdict": verdict}


def figures_of(results: Results) -> dict[str, list[Panel]]:
    """{"task, search": its panels}, with bare class names as prompts, or recall at 10 of images for texts."""
    return {
        f"{task}, {search}": figure(results, task, search, "class" if task == "classification" else "t2i_k=10")
        for task in ("classification", "retrieval")
        for search in METHODS
    }


def rho_tables(results: Results, figures: dict[str, list[Panel]]) -> dict[str, Rows]:
    """{heading: rows} of the correlations, and of the main figure with other prompts."""
    tables = {f"rho, {name} counts": panel_rows(panels) for name, panels in figures.items()}
    for prompts in ("simple", "ensemble"):
        panels = [
            panel(results, "classification", "integrated", p.model, prompts, None)
            for p in figures["classification, integrated"]
        ]
        tables[f"rho, classification, integrated counts, {prompts} prompts"] = panel_rows(panels)
    return tables


def rho_claims(figures: dict[str, list[Panel]]) -> Rows:
    """Claims rows: which correlations agree with those of the authors' figures."""
    claims = [
        equal_to_printed(f"published files: rho, {name} counts", panels)
        for name, panels in figures.items()
        if any(p.printed is not None for p in panels)
    ]
    main = [p for p in figures["classification, integrated"] if p.model in DERIVED]
    if main:
        same = sum(f"{p.rho:.3f}" == f"{DERIVED[p.model]:.3f}" for p in main)
        claims.insert(1, {
            "claim": "published files: rho, LAION-400M, main figure", "paper": ".957 .916 .855 (no figure file)",
            "here": f"{same} of {len(main)} equal", "verdict": "reproduced" if same == len(main) else "not reproduced",
        })  # fmt: skip
    return claims


# --------------------------------------------------------------------------------------------------- the other measures


def thresholds(results: Results) -> Rows:
    """rho (image counts) by RAM++ threshold."""
    rows = []
    for model in MODELS[:10]:
        pretraining, cells = model.partition("|")[2], {}
        for threshold in (0.5, 0.55, 0.6, 0.65, 0.7):
            if results.counts_file("imagenet-sketch", pretraining, f"rampp{threshold}").is_file():
                counts, scores, _ = results.pairs("classification", "image", model, "class", f"rampp{threshold}")
                curve = curves.log_linear_curve(counts, scores, BINS["classification"])
                cells[str(threshold)] = (
                    f"{curves.correlation(curve, plotted_bins('classification', pretraining))[0]:.2f}"
                )
        if cells:
            rows.append({"corpus": CORPORA[pretraining], "model": model.partition("|")[0]} | cells)
    return rows


def agreement(results: Results) -> Rows:
    """Spearman's rank correlation of counts, names aligned; number of concepts in brackets."""
    names = [name for name in list(CORPORA)[:4] if results.has("image", name)]
    rows = []
    for a, b in itertools.combinations(names, 2):
        printed = AGREEMENT.get((a, b))
        row = {"corpora": f"{CORPORA[a]}, {CORPORA[b]}", "printed": "-" if printed is None else f"{printed:.2f}"}
        for search in METHODS:
            spearman, n = curves.frequency_agreement(results.all_counts(a, search), results.all_counts(b, search))
            row[search] = f"{spearman:.3f} ({n:,})"
        rows.append(row)
    return rows


def agreement_claim(rows: Rows) -> dict[str, str]:
    """A claims row: which printed agreements are among the aligned ones. The notebook does not say of which search."""
    shown = [row for row in rows if row["printed"] != "-"]
    found = [[float(row[search].split()[0]) for search in METHODS] for row in shown]
    same = sum(any(f"{v:.2f}" == row["printed"] for v in values) for row, values in zip(shown, found, strict=True))
    lowest, highest = min(map(min, found), default=float("nan")), max(map(max, found), default=float("nan"))
    if same == len(shown) > 0:
        verdict = "reproduced"
    else:
        verdict = "same direction" if lowest > 0 else "not reproduced"
    return {
        "claim": "published files: agreement of counts between corpora", "paper": " ".join(r["printed"] for r in shown),
        "here": f"{same} of {len(shown)} equal; aligned: {lowest:.2f} to {highest:.2f}", "verdict": verdict,
    }  # fmt: skip


def tails(results: Results) -> Rows:
    """How unevenly concepts occur, by corpus and search."""
    rows = []
    for name in list(CORPORA)[:4]:
        for search in METHODS:
            if results.has(search, name):
                tail = curves.long_tail(results.tail_counts(name, search))
                rows.append({
                    "corpus": CORPORA[name], "search": search, "below max/1000": f"{tail['frac_norm_below_1e-3']:.1%}",
                    "never": f"{tail['n_zero'] / tail['n']:.1%}", "Gini": f"{tail['gini']:.3f}",
                    "share of top 1 %": f"{tail['top1pct_share']:.1%}", "median": f"{tail['median']:,.0f}",
                })  # fmt: skip
    return rows


def tail_claim(rows: Rows) -> dict[str, str]:
    """A claims row: the share of concepts of negligible frequency."""
    few = [float(row["below max/1000"].rstrip("%")) for row in rows]
    return {
        "claim": "published files: concepts of negligible frequency", "paper": "more than 2/3",
        "here": f"{min(few):.0f} to {max(few):.0f} %",
        "verdict": "reproduced" if min(few) > 200 / 3 else "same direction",
    }  # fmt: skip


def misalignments(results: Results) -> Rows:
    """The published degrees, percent of the fixed dataset sizes."""
    rows = []
    for name, printed in MISALIGNED.items():
        path = results.folder / "misalignment_metrics" / f"{name}_misalignment_degree.json"
        if path.is_file():
            degree = 100 * load_json(path)["misalignment_degree (percent); fixed conservative dataset size"]
            rows.append(
                {"corpus": CORPORA.get(name, "LAION-Aesthetics"), "paper": f"{printed:.2f}", "here": f"{degree:.2f}"}
            )
    return rows


def misalignment_claim(rows: Rows) -> dict[str, str]:
    """A claims row: which degrees are the paper's."""
    same = [row["paper"] == row["here"] for row in rows]
    return {
        "claim": "published files: misalignment degree", "paper": "5.31 to 36.49 %",
        "here": f"{sum(same)} of {len(same)} equal",
        "verdict": "reproduced" if same and all(same) else "not reproduced",
    }  # fmt: skip


def generation(results: Results) -> Rows:
    """Mean rho of the text-to-image models, last 4 of 7 bins, against counts in LAION-Aesthetics."""
    counts_file = results.counts_file("t2i", "laion_aesthetics", METHODS["integrated"])
    rows = []
    for path in sorted((results.folder / "t2i_evaluations").glob("t2i_*.json")) if counts_file.is_file() else ():
        counts, rhos = load_counts(counts_file), []
        for model in load_json(path).values():
            scores = mean_scores(model["classwise"], -1 if "human" in path.stem else 5)
            names = sorted(counts.keys() & scores.keys())
            if len(names) > 10:
                curve = curves.log_linear_curve(
                    [counts[n] for n in names], [scores[n] for n in names], BINS["generation"]
                )
                rhos.append(curves.correlation(curve, plotted_bins("generation", ""))[0])
        if rhos:
            rows.append(
                {"score": path.stem.removeprefix("t2i_"), "models": len(rhos), "mean rho": f"{np.nanmean(rhos):+.2f}"}
            )
    return rows


def let_it_wag(results: Results) -> tuple[Rows, Rows]:
    """(table rows, claims rows) of accuracies on Let It Wag! against those on ImageNet, over models."""
    imagenet, tail = results.imagenet(), results.let_it_wag()
    names = sorted(imagenet.keys() & tail.keys())
    slopes = curves.two_slopes([imagenet[n] for n in names], [tail[n] for n in names])
    gaps = [imagenet[n] - tail[n] for n in names]
    rows = [
        {"models": f"{slopes[f'n_{side}']} {side} 50 %", "paper": paper, "slope here": f"{slopes[f'slope_{side}']:.3f}"}
        for side, paper in (("below", "0.603"), ("above", "1.578"))
    ]
    good = f"{slopes['slope_below']:.3f} {slopes['slope_above']:.3f}"
    return rows, [
        {
            "claim": "published files: Let It Wag! slopes below and above 50 %", "paper": "0.603 1.578", "here": good,
            "verdict": "reproduced" if good == "0.603 1.578" else "not reproduced",
        },
        {
            "claim": "published files: points lost on Let It Wag!", "paper": "22.7 (11.5 to 36.8)",
            "here": f"{np.mean(gaps):.1f} ({min(gaps):.1f} to {max(gaps):.1f})",
            "verdict": "reproduced" if f"{np.mean(gaps):.1f}" == "22.7" else "not reproduced",
        },
    ]  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- the script


@dataclasses.dataclass
class Config:
    results: Annotated[str, tyro.conf.Positional]
    """Clone of the authors' repository."""
    out: str = "runs/concept_frequency/replay"
    """Folder for results.json, results.md and plots."""


def derive(results: Results) -> tuple[dict[str, Rows], Rows, dict[str, list[Panel]]]:
    """({heading: table rows}, claims rows, {figure: panels})."""
    figures = figures_of(results)
    degrees, shares, agreements = misalignments(results), tails(results), agreement(results)
    wag_rows, wag_claims = let_it_wag(results)
    tables = rho_tables(results, figures) | {
        "rho by RAM++ threshold, image counts": thresholds(results),
        "agreement of counts (Spearman, concepts)": agreements,
        "long tail, 17 datasets": shares,
        "misalignment degree, percent": degrees,
        "text to image, mean rho": generation(results),
        "Let It Wag! against ImageNet": wag_rows,
    }
    claims = [misalignment_claim(degrees), agreement_claim(agreements), tail_claim(shares)]
    return tables, [*rho_claims(figures), *claims, *wag_claims], figures


def plot(results: Results, figures: dict[str, list[Panel]], path: Path) -> None:
    """The main figure, a panel a corpus; bins that the paper leaves out are hollow. `within` is a null of ours."""
    panels = figures["classification, integrated"]
    names = list(dict.fromkeys(p.model.partition("|")[2] for p in panels))
    drawn, axes = plt.subplots(1, len(names), figsize=(4 * len(names), 3.6), squeeze=False, sharey=True)
    for axis, name in zip(axes[0], names, strict=True):
        for color, p in zip(
            plt.get_cmap("tab10").colors, (p for p in panels if p.model.endswith(f"|{name}")), strict=False
        ):
            counts, scores, _ = results.pairs("classification", "integrated", p.model)
            curve = curves.log_linear_curve(counts, scores, BINS["classification"])
            bins = plotted_bins("classification", name)
            axis.plot(curve.position, curve.mean, "o", mfc="none", color=color, alpha=0.5)
            label = f"{p.model.partition('|')[0]}: ρ {p.rho:.3f}, shuffled {p.within:.2f}"
            axis.plot(curve.position[bins], curve.mean[bins], "o-", color=color, label=label)
        axis.set(xscale="log", title=CORPORA[name], xlabel="concept frequency")
        axis.legend(fontsize=7)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("zero-shot accuracy (%)")
    note = "Hollow: bins that the paper leaves out. Shuffled: mean ρ with accuracies shuffled within each dataset."
    drawn.suptitle(note, y=0.02, va="bottom", fontsize=9)
    drawn.tight_layout(rect=(0, 0.05, 1, 1))
    drawn.savefig(path, dpi=110)
    plt.close(drawn)


def main(cfg: Config) -> Rows:
    """Write and print the tables, draw the main figure; returns the claims rows."""
    results, out = Results(cfg.results), Path(cfg.out)
    tables, claims, figures = derive(results)
    out.mkdir(parents=True, exist_ok=True)
    sections = [f"## {heading}\n\n{evaluation.table(rows)}\n" for heading, rows in tables.items() if rows]
    (out / "results.md").write_text("\n".join(sections))
    checkpoints.write_json(out / "results.json", {"tables": tables, "claims": claims})
    plot(results, figures, out / "main_figure.png")
    print("\n".join(sections))
    print(f"{evaluation.table(claims)}\n\nwritten to {out}")
    return claims


if __name__ == "__main__":
    cli.command_line(lambda: main(tyro.cli(Config)))
