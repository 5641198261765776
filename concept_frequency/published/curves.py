"""Curves from the authors' published counts and scores: figures 2, 4, 8 to 10, 18, 19, 24, 25 and table 6.

A panel is one model with one kind of counts (captions, images, both) and one score (class prompts or recall). Its table
row has our correlation, the legend of the authors' figure, the correlation of the curve that they saved, and
diagnostics that the paper lacks: all bins, no bins, and scores shuffled over all data sets or within each.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from concept_frequency import statistics
from concept_frequency.published.files import BINS, CORPORA, MAIN, METHODS, SETTINGS, Results, plotted_bins
from concept_frequency.published.numbers import CURVE_MODELS, DERIVED, FIGURE24, PRINTED, TABLE6
from concept_frequency.statistics import Curve, Diagnostics

Rows = list[dict[str, str]]  # rows of a table
Key = tuple[str, str, str]  # task, counts, prompts or recall
THRESHOLDS = (0.5, 0.55, 0.6, 0.65, 0.7)  # of RAM++
TEN = CURVE_MODELS[:10]  # of figure 2
CLAIMS: tuple[tuple[str, tuple[Key, ...]], ...] = (  # groups of legends, one claim each
    ("classification, matched counts (fig. 2)", (("classification", "integrated", "class"),)),
    ("classification, image counts (fig. 18)",
     tuple(("classification", "image", prompts) for prompts in SETTINGS["classification"])),
    ("classification, text counts (fig. 19)",
     tuple(("classification", "text", prompts) for prompts in SETTINGS["classification"])),
    ("classification, other prompts (fig. 8)",
     tuple(("classification", "integrated", prompts) for prompts in ("simple", "ensemble"))),
    ("retrieval, matched counts (fig. 2)", (("retrieval", "integrated", "t2i_k=10"),)),
    ("retrieval, other recalls (figs. 9, 10)",
     tuple(("retrieval", "integrated", recall) for recall in SETTINGS["retrieval"][:-1])),
    ("retrieval, image counts (fig. 18)", tuple(("retrieval", "image", recall) for recall in SETTINGS["retrieval"])),
    ("retrieval, text counts (fig. 19)", tuple(("retrieval", "text", recall) for recall in SETTINGS["retrieval"])),
)  # fmt: skip


class Panel(NamedTuple):
    """One model in one panel of a figure."""

    model: str
    bins: slice  # bins that the paper plots
    curve: Curve
    about: Diagnostics
    printed: float | None  # rho in the legend of the authors' figure
    saved: float | None  # rho of the curve that the authors saved
    gap: float | None  # largest difference between bin means of our curve and theirs


def panel(results: Results, key: Key, model: str, printed: float | None = None) -> Panel:
    """Curve, correlation and diagnostics of one model."""
    task, search, setting = key
    bins = plotted_bins(task, model.partition("|")[2])
    curve, about = statistics.diagnose(*results.pairs(task, search, model, setting), BINS[task], bins)
    theirs = results.saved_curve(task, search, model, setting)
    gap = largest_gap(curve, theirs)
    saved = None if gap is None else statistics.correlation(statistics.from_saved(theirs), bins)[0]
    return Panel(model, bins, curve, about, printed, saved, gap)


class Plotted(NamedTuple):
    """A curve of classification, and its correlation on the bins that the paper plots."""

    curve: Curve
    counts: NDArray[np.int64]  # (P,) of its pairs
    bins: slice
    rho: float
    p: float


def plotted(
    results: Results, model: str, search: str = "integrated", bins: slice | None = None, **which: Any
) -> Plotted:
    """The curve of a model with class names as prompts; `bins`: others than the paper's; `which`: `Results.pairs`."""
    counts, scores, _ = results.pairs("classification", search, model, **which)
    curve = statistics.log_linear_curve(counts, scores, BINS["classification"])
    bins = bins or plotted_bins("classification", model.partition("|")[2])
    return Plotted(curve, counts, bins, *statistics.correlation(curve, bins))


def largest_gap(curve: Curve, saved: dict[str, NDArray] | None) -> float | None:
    """Largest difference between bin means of our curve and the authors' saved one.

    None if there is no saved curve, or it has another number of bins.
    """
    if saved is None or len(saved["cum_means"]) != len(curve.mean):
        return None
    return float(np.abs(np.nan_to_num(curve.mean) - saved["cum_means"]).max())


def figure_panels(results: Results, key: Key) -> list[Panel]:
    """Panels of all models with published counts."""
    task, search, _ = key
    legends = PRINTED.get(key, (None,) * len(CURVE_MODELS))
    return [
        panel(results, key, model, printed)
        for model, printed in zip(CURVE_MODELS, legends, strict=True)
        if results.has(search, model.partition("|")[2], task)
    ]


def keys() -> list[Key]:
    """Keys of all figures: each task, kind of counts, and prompts or recall; figure 2 comes first."""
    found = [(task, search, setting) for task in SETTINGS for search in METHODS for setting in SETTINGS[task]]
    return sorted(found, key=lambda key: key[2] != MAIN[key[0]])


def title(key: Key) -> str:
    """A figure's name in tables."""
    task, search, setting = key
    counts = {"integrated": "matched", "image": "image", "text": "text"}[search]
    score = f"{setting} prompts" if task == "classification" else setting.replace("_k=", " recall at ")
    return f"{task}, {counts} counts, {score}"


# --------------------------------------------------------------------------------------------------- tables and claims


def number(value: float | None, digits: int = 3) -> str:
    """A number as text; "-" for None and NaN."""
    return "-" if value is None or value != value else f"{value:.{digits}f}"


def as_printed(value: float, printed: str) -> bool:
    """Whether `value` is the printed number of two decimals, rounded or truncated (the paper's tables do both)."""
    return printed in (f"{value:.2f}", f"{math.floor(100 * value + 1e-9) / 100:.2f}")


def panel_rows(panels: Iterable[Panel]) -> Rows:
    """One table row per panel."""
    return [
        {
            "corpus": CORPORA[p.model.partition("|")[2]],
            "model": p.model.partition("|")[0],
            "legend": number(p.printed, 2),
            "saved curve": number(p.saved),
            "here": number(p.about.rho),
            "p": f"{p.about.p:.0e}",
            "bins differ by": "-" if p.gap is None else f"{p.gap:.0e}",
            "all bins": number(p.about.all_bins),
            "1:-1": number(p.about.inner),
            "no bins": number(p.about.pearson),
            "rank": number(p.about.spearman),
            "bin 0": f"{p.about.bin0:.0%}",
            "shuffled": number(p.about.across, 2),
            "... within": number(p.about.within, 2),
            "reach": f"{p.about.reached:.0%}",
        }
        for p in panels
    ]


def counted(claim: str, paper: str, same: Sequence[bool], what: str = "equal to the digit") -> dict[str, str]:
    """A claims row that counts how many numbers agree with the paper's."""
    verdict = "reproduced" if same and all(same) else "direction only" if any(same) else "not reproduced"
    return {
        "claim": f"published files: {claim}", "paper": paper, "here": f"{sum(same)} of {len(same)} {what}",
        "verdict": verdict,
    }  # fmt: skip


def listed(values: Sequence[float]) -> str:
    """All numbers, or their range if there are many."""
    if len(values) <= len(CURVE_MODELS):
        return " ".join(f"{value:.2f}" for value in values)
    return f"{len(values)} values, {min(values):.2f} to {max(values):.2f}"


def legend_claims(figures: dict[Key, list[Panel]]) -> Rows:
    """Claims rows: correlations that agree with the legends of figures, and curves that agree with the saved ones."""
    rows = []
    for name, of in CLAIMS:
        shown = [p for key in of for p in figures.get(key, ()) if p.printed is not None]
        if shown:
            same = [f"{p.about.rho:.2f}" == f"{p.printed:.2f}" for p in shown]
            rows.append(counted(f"rho, {name}", listed([p.printed for p in shown]), same))
    main = [p for p in figures.get(("classification", "integrated", "class"), ()) if p.model in DERIVED]
    if main:
        same = [f"{p.about.rho:.3f}" == f"{DERIVED[p.model]:.3f}" for p in main]
        rows.insert(1, counted("rho, LAION-400M, main figure", ".957 .916 .855 (no figure file)", same, "equal"))
    saved = [p for panels in figures.values() for p in panels if p.gap is not None]
    if saved:
        same = [p.gap < 1e-6 for p in saved]
        claim = counted("bins of the curves that the authors saved", "their files", same, "equal to 1e-6")
        others = {CORPORA[p.model.partition("|")[2]] for p, equal in zip(saved, same, strict=True) if not equal}
        claim["here"] += f", not of {', '.join(sorted(others))}" if others else ""
        rows.append(claim)
    return rows


# ------------------------------------------------------------------------------------ what the paper leaves out or adds


def of_corpus(model: str) -> dict[str, str]:
    """The first cells of a model's table row: corpus and backbone."""
    return {"corpus": CORPORA[model.partition("|")[2]], "model": model.partition("|")[0]}


def models_with_counts(results: Results, models: Sequence[str] = TEN) -> list[str]:
    """The models with published counts of their corpus."""
    return [model for model in models if results.has("integrated", model.partition("|")[2])]


def data_sets(results: Results) -> Rows:
    """rho of the main figure over 18 data sets, which reproduce its legends, and over the 17 of the paper's text."""
    rows = []
    for model in models_with_counts(results, CURVE_MODELS):
        cells = {}
        for heading, sketch in (("18, with ImageNet-Sketch", True), ("17, without", False)):
            found = plotted(results, model, sketch=sketch)
            cells |= {heading: number(found.rho), "p, " + heading.partition(",")[0]: f"{found.p:.0e}"}
        rows.append(of_corpus(model) | cells)
    return rows


def left_out(results: Results) -> Rows:
    """Pairs per bin of the main figure, the bins that it shows, and the bins that an IQR rule would leave out."""
    rows = []
    of = {model.partition("|")[2]: model for model in models_with_counts(results, CURVE_MODELS)}  # one per corpus
    for corpus, model in of.items():
        curve, _, bins, *_ = plotted(results, model)
        rows.append({
            "corpus": CORPORA[corpus], "bins shown": f"{bins.start}:{bins.stop}",
            "pairs in bins 0 to 11": " ".join(map(str, curve.size)),
            "too few by 1.5 IQR": " ".join(map(str, statistics.small_bins(curve.size))) or "none",
            "... of log sizes": " ".join(map(str, statistics.small_bins(np.log(np.maximum(curve.size, 1))))) or "none",
        })  # fmt: skip
    return rows


def with_zeros(results: Results) -> tuple[Rows, Rows]:
    """(table rows, claims rows) of figure 25: includes bin 0, which has the concepts that were never counted."""
    rows, found = [], []
    for model in models_with_counts(results):
        curve, counts, _, rho, p = plotted(results, model, bins=slice(0, -1))
        zeros = (counts[curve.index == 0] == 0).mean()
        rows.append(of_corpus(model) | {"bins 0:-1": number(rho), "p": f"{p:.0e}", "zeros in bin 0": f"{zeros:.0%}"})
        found.append(rho > 0 and p < 0.05)
    claim = counted("rho with concepts never counted (fig. 25)", "trend retained", found, "positive, p < 0.05")
    return rows, [claim] if rows else []


def table6(results: Results) -> tuple[Rows, Rows]:
    """(table rows, claims rows) of table 6: mean accuracy of concepts by their count.

    The paper's numbers are reproduced by the ensemble of prompts over 18 data sets; "frequency 0" includes counts of 1,
    like the first bin of the curves.
    """
    rows, equal = [], []
    for model in models_with_counts(results, tuple(TABLE6)):
        found = statistics.frequency_bands(
            *results.pairs("classification", "integrated", model, "ensemble")[:2], statistics.TABLE6_BANDS
        )
        row = of_corpus(model)
        for (band, (_, mean)), printed in zip(found.items(), TABLE6[model], strict=False):
            row[band] = f"{mean:.2f} ({printed:.2f})"
            equal.append(as_printed(mean, f"{printed:.2f}"))
        rows.append(row)
    return rows, [counted("accuracy by frequency (tab. 6)", "50 numbers", equal)] if rows else []


def by_count(results: Results) -> tuple[Rows, Rows]:
    """(table rows, claims rows): mean accuracy of the main figure's pairs by decade of the count, zeros separate."""
    rows, lowest = [], []
    for model in models_with_counts(results):
        found = statistics.frequency_bands(*results.pairs("classification", "integrated", model)[:2])
        rows.append(of_corpus(model) | {band: f"{mean:.1f} ({n:,})" for band, (n, mean) in found.items()})
        means = [mean for _, mean in found.values()]
        lowest.append(means[0] == min(means))
    printed = sum(values[0] == min(values) for values in TABLE6.values())
    paper = f"all (app. J); {printed} of {len(TABLE6)} in table 6"
    return rows, [counted("concepts never counted score lowest", paper, lowest, "models")] if rows else []


def thresholds(results: Results) -> tuple[Rows, Rows]:
    """(table rows, claims rows) of figure 24: rho of image counts by RAM++ threshold."""
    rows, found, same = [], [], []
    for i, model in enumerate(TEN):
        pretraining, cells = model.partition("|")[2], {}
        for threshold in THRESHOLDS:
            method = f"rampp{threshold}"
            if results.counts_file("imagenet-sketch", pretraining, method).is_file():
                *_, rho, p = plotted(results, model, "image", method=method)
                cells[str(threshold)] = number(rho, 2) + "**" * bool(p < 0.05)
                if threshold in FIGURE24:
                    found.append(rho > 0 and p < 0.05)
                    same.append(number(rho, 2) == number(FIGURE24[threshold][i], 2))
        if cells:
            legends = {f"legend, {t}": number(values[i], 2) for t, values in FIGURE24.items()}
            rows.append(of_corpus(model) | {str(t): cells.get(str(t), "-") for t in THRESHOLDS} | legends)
    if not rows:
        return [], []
    return rows, [
        counted("rho at RAM++ thresholds (fig. 24)", "0.07 to 0.98", same),
        counted("significance at RAM++ thresholds (fig. 24)", "all (caption)", found, "positive, p < 0.05"),
    ]
