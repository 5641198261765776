"""Recompute the paper's figures and tables from the authors' published counts and scores.

    python -m concept_frequency.published.replay CLONE [--out runs/concept_frequency/replay]

CLONE is a clone of bethgelab/frequency_determines_performance@11ef009 (`U:`); files.py reads it, numbers.py
has the paper's numbers, curves.py computes the curves of classification and retrieval, tables.py
the other results; this script draws the figures and writes the tables. It counts and trains nothing. It shows which of
our curves, bins and correlations equal the authors', and how much of each correlation remains in diagnostics that the
paper lacks. Figures have the authors' style, with their own figures below.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import matplotlib.pyplot as plt
import numpy as np
import tyro
from matplotlib.axes import Axes
from tqdm import tqdm

from concept_frequency import statistics
from concept_frequency.published import curves, figures, tables
from concept_frequency.published.curves import Key, Panel, Rows
from concept_frequency.published.figures import Column
from concept_frequency.published.files import (
    BINS,
    CORPORA,
    GENERATION,
    GENERATION_MODELS,
    METHODS,
    SIZES,
    Results,
    plotted_bins,
    with_table9,
)
from shared import checkpoints, cli, evaluation

# -------------------------------------------------------------------------------------------------------------- figures


def panel_columns(results: Results, key: Key, found: list[Panel], interval: bool = False) -> list[Column]:
    """One column per corpus with one line per model; `interval` adds 95 % intervals of the means, like in figure 27."""
    task, search, setting = key
    columns = []
    for corpus in dict.fromkeys(p.model.partition("|")[2] for p in found):
        lines = [p for p in found if p.model.endswith(f"|{corpus}")]

        def draw(axis: Axes, lines: list[Panel] = lines) -> None:
            for i, p in enumerate(lines):
                label = figures.legend(p.model.partition("|")[0], p.about.rho, p.about.p)
                figures.draw_curve(axis, p.curve, p.bins, label, i, len(lines), interval)
            figures.frame(axis, "accuracy (%)" if task == "classification" else setting.replace("_k=", " recall at "))

        theirs = None if interval else results.panel_image(task, search, corpus, setting)
        columns.append(Column(CORPORA[corpus], draw, theirs))
    return columns


def threshold_columns(results: Results, threshold: float) -> list[Column]:
    """Columns of figure 24 at one threshold of RAM++."""
    method, columns = f"rampp{threshold}", []
    for corpus in list(CORPORA)[:4]:
        if not results.counts_file("imagenet-sketch", corpus, method).is_file():
            continue
        models = [model for model in curves.TEN if model.endswith(f"|{corpus}")]

        def draw(axis: Axes, models: list[str] = models) -> None:
            for i, model in enumerate(models):
                curve, _, bins, rho, p = curves.plotted(results, model, "image", method=method)
                figures.draw_curve(axis, curve, bins, figures.legend(model.partition("|")[0], rho, p), i, len(models))
            figures.frame(axis, "accuracy (%)")

        plot = f"log-linear-plot-image-queried-search-rampp-threshold-{method}"
        theirs = results.figure(f"eccv-paper-{corpus}-zero-shot-{plot}", f"eccv-paper-zero-shot-{corpus}-{plot}")
        columns.append(Column(CORPORA[corpus], draw, theirs))
    return columns


def generation_columns(results: Results, setting: str) -> list[Column]:
    """Columns of figures 3 and 11 to 15 for one score: three text-to-image models per panel, in the authors' order."""
    columns, bins = [], plotted_bins("generation", "")
    groups = [GENERATION_MODELS[i : i + 3] for i in range(0, len(GENERATION_MODELS), 3)]
    groups.append(tuple(model for model in results.generation_models() if model not in GENERATION_MODELS))
    for number, group in enumerate(groups, start=1):
        found = {model: tables.generation_curve(results, setting, model) for model in group}
        if not any(found.values()):
            continue

        def draw(axis: Axes, found: dict[str, tables.Generation | None] = found) -> None:
            for i, (model, of) in enumerate(found.items()):
                if of is not None:
                    label = figures.legend(model.partition("_")[2], *statistics.correlation(of.curve, bins))
                    figures.draw_curve(axis, of.curve, bins, label, i, len(found))
            figures.frame(axis, GENERATION[setting])

        sources = " and ".join(sorted({f"their {of.source}" for of in found.values() if of}))
        theirs = results.figure(
            f"eccv-paper-laion400m-t2i-log-linear-plot-integrated-queried-search_{number}-{setting}"
        )
        columns.append(Column(sources, draw, theirs))
    return columns


def people_columns(results: Results) -> list[Column]:
    """The column of figure 17."""
    if (found := results.people()) is None:
        return []
    x, y = statistics.people_points(*found)
    curve = statistics.log_linear_curve(x, y, BINS["people"])

    def draw(axis: Axes) -> None:
        axis.plot(x, y, ".", color="grey", alpha=0.5, label="a bucket of names")
        figures.draw_curve(axis, curve, slice(None), figures.legend("SD v1.4", *statistics.correlation(curve)))
        figures.frame(axis, "accuracy judged by people")

    theirs = results.study / "clip_count_v1all_hsof.png"
    return [Column("public figures", draw, theirs if theirs.is_file() else None)]


def wag_columns(results: Results) -> list[Column]:
    """Columns of figure 6: all classes, with the authors' figure, and the common and fine-grained ones."""
    imagenet, columns = with_table9(results.imagenet()), []
    every = {model: found["full"] for model, found in results.let_it_wag().items()}
    for title, tail in ({"all classes": every} | tables.common_and_fine(results)).items():
        names = sorted(imagenet.keys() & tail.keys())

        def draw(axis: Axes, names: list[str] = names, tail: dict[str, float] = tail) -> None:
            x, y = (np.array([values[name] for name in names]) for values in (imagenet, tail))
            axis.plot([0, 100], [0, 100], "--", color="grey", linewidth=1)
            for color, rows in (("indianred", x < 50), ("royalblue", x > 50)):
                axis.plot(x[rows], y[rows], "o", color=color, alpha=0.6)
                if rows.sum() > 1:
                    slope, intercept = np.polyfit(x[rows], y[rows], 1)
                    ends = np.array([x[rows].min(), x[rows].max()])
                    axis.plot(ends, slope * ends + intercept, color=color, label=f"slope {slope:.2f}")
            figures.frame(axis, "Let It Wag! (%)", logx=False)
            axis.set_xlabel("ImageNet (%)")

        theirs = results.figure("eccv-paper-let-it-wag-eval") if tail is every else None
        columns.append(Column(f"{title}, {len(names)} models", draw, theirs))
    return columns


def tail_columns(results: Results) -> list[Column]:
    """Columns of figure 5: counts divided by the largest, in descending order, without zeros."""
    columns = []
    for search in METHODS:
        corpora = [corpus for corpus in SIZES if results.has(search, corpus)]

        def draw(axis: Axes, search: str = search, corpora: list[str] = corpora) -> None:
            for corpus in corpora:
                counts = np.sort(results.tail_counts(corpus, search))[::-1]
                axis.plot(counts[counts > 0] / counts.max(), label=CORPORA[corpus])
            axis.set_yscale("log")
            figures.frame(axis, "count / largest count", logx=False)
            axis.set_xlabel("concepts, most frequent first")

        columns.append(Column(f"{search} counts", draw, results.figure(f"dpfm-paper-{search}-search-long-tailed")))
    return columns


def drawn(results: Results, found: dict[Key, list[Panel]]) -> Iterator[tuple[str, str, list[Column]]]:
    """Yield (file name, title, columns) of all figures for which the clone has files."""
    for key, of in found.items():
        yield "_".join(key).replace("=", ""), curves.title(key), panel_columns(results, key, of)
    main = ("classification", "integrated", "class")
    if main in found:
        ten = [p for p in found[main] if p.model in curves.TEN]
        zeros = [p._replace(bins=slice(0, -1), about=with_bins(p, slice(0, -1))) for p in ten]
        yield "zeros", "figure 25: concepts that were never counted included", panel_columns(results, main, zeros)
        yield "intervals", "figure 27: 95 % intervals of the means", panel_columns(results, main, ten, interval=True)
    for threshold in curves.THRESHOLDS:
        yield f"threshold_{threshold}", f"RAM++ at {threshold}, image counts", threshold_columns(results, threshold)
    for setting, heading in GENERATION.items():
        yield f"generation_{setting}", f"text to image, {heading}", generation_columns(results, setting)
    yield "people", "figure 17: public figures", people_columns(results)
    yield "let_it_wag", "figure 6: Let It Wag! against ImageNet", wag_columns(results)
    yield "long_tail", "figure 5: 3,469 classes of 17 data sets", tail_columns(results)


def with_bins(p: Panel, bins: slice) -> statistics.Diagnostics:
    """The diagnostics of a panel, with the correlation of another slice of bins."""
    rho, p_value = statistics.correlation(p.curve, bins)
    return p.about._replace(rho=rho, p=p_value)


# ----------------------------------------------------------------------------------------------------------- the script


@dataclasses.dataclass
class Config:
    """Recompute the paper's figures and tables from the authors' published files."""

    results: Annotated[str, tyro.conf.Positional]
    """Clone of the authors' repository."""
    out: str = "runs/concept_frequency/replay"
    """Folder for results.json, results.md and figures/."""
    figures: bool = True
    """Also draw the figures."""


def derive(results: Results) -> tuple[dict[str, Rows], Rows, dict[Key, list[Panel]]]:
    """Compute ({heading: table rows}, claims rows, {figure: its panels})."""
    found = {
        key: curves.figure_panels(results, key)
        for key in tqdm(curves.keys(), "curves", unit="figure", disable=None)
        if results.has_scores(key)
    }
    shown = {f"rho, {curves.title(key)}": curves.panel_rows(of) for key, of in found.items()}
    shown |= {
        "main figure, 18 data sets and 17": curves.data_sets(results),
        "main figure, bins that are left out": curves.left_out(results),
        "Let It Wag! classes in LAION-400M": tables.tail_concepts(results),
    }
    claims = curves.legend_claims(found)
    for heading, derived in (
        ("main figure with concepts never counted", curves.with_zeros),
        ("table 6: accuracy by count (as printed)", curves.table6),
        ("accuracy by count (concepts)", curves.by_count),
        ("rho by RAM++ threshold, image counts", curves.thresholds),
        ("text to image, rho of the last 4 bins", tables.generation),
        ("people study", tables.people),
        ("misaligned pairs", tables.misalignments),
        ("agreement of counts (Spearman, concepts)", tables.agreement),
        ("long tail, 17 data sets", tables.tails),
        ("Let It Wag! against ImageNet", tables.let_it_wag),
    ):
        rows, more = derived(results)
        shown[heading] = rows
        claims += more
    return {heading: rows for heading, rows in shown.items() if rows}, claims, found


def main(cfg: Config) -> Rows:
    """Write and print the tables and draw the figures. Returns the claims rows."""
    results, out = Results(cfg.results), Path(cfg.out)
    shown, claims, found = derive(results)
    (out / "figures").mkdir(parents=True, exist_ok=True)
    sections = [f"## {heading}\n\n{evaluation.table(rows)}\n" for heading, rows in shown.items()]
    (out / "results.md").write_text("\n".join(sections) + f"\n## claims\n\n{evaluation.table(claims)}\n")
    checkpoints.write_json(out / "results.json", {"tables": shown, "claims": claims})
    print("\n".join(sections))
    print(f"{evaluation.table(claims)}\n\nwritten to {out}")
    if cfg.figures:
        with plt.rc_context({"font.family": "serif"}):
            for name, title, columns in tqdm(drawn(results, found), "figures", unit="figure", disable=None):
                if columns:
                    figures.save(columns, out / f"figures/{name}.png", title)
    return claims


if __name__ == "__main__":
    cli.command_line(lambda: main(tyro.cli(Config)))
