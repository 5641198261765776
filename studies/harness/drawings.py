"""Plots of all papers: their claims of abstracts (forest.png), and the first of them seed by seed (effects.png)."""

import math
import textwrap
from pathlib import Path

import matplotlib.pyplot as plt

from studies.harness import protocol, report, verdicts
from studies.harness.runner import Study, study_of
from studies.harness.verdicts import Claim

COLOURS = {
    "reproduced": "#1b7837", "direction only": "#6aab66", "no difference above d": "#4575b4",
    "not reproduced": "#c51b7d", "open": "#888888", "has not learned": "#c9a227",
}  # fmt: skip
Summaries = dict[str, dict]  # {folder: results}


def scaled(row: dict) -> tuple[float, float, float] | None:
    """(difference, low, high) of a row, divided by the paper's difference or, where it has no number, by d, so that
    positive is the paper's side; None without an interval or either number."""
    unit = row.get("effect") or row.get("negligible") and row["negligible"] * row.get("sign", 1)
    if row["interval"] is None or not unit:
        return None
    return row["difference"] / unit, *sorted(end / unit for end in row["interval"])


def forest(found: Summaries, photographs: Summaries, path: Path) -> None:
    """Draw all claims of abstracts: those with a number in the paper's unit on its scale (above), others in units of d
    (below). Circles are emoji and scenes, squares photographs; hollow: the baseline has not learned."""
    panels: tuple[list, list] = ([], [])  # (claim, paper, [(row, marker)])
    for paper in sorted(found | photographs):
        ours, theirs = verdicts.primary(found.get(paper)), verdicts.primary(photographs.get(paper))
        for claim in dict.fromkeys([*ours, *theirs]):
            rows = [(of[claim], marker) for of, marker in ((ours, "o"), (theirs, "s")) if claim in of]
            for panel, numbers in zip(panels, (True, False), strict=True):
                if drawn := [each for each in rows if scaled(each[0]) and bool(each[0].get("effect")) == numbers]:
                    panel.append((claim, paper, drawn))
    limits, titles = ((-3, 4), (-12, 12)), ("difference / the paper's", "difference / d (positive: the paper's side)")
    heights = [max(len(panel), 1) for panel in panels]
    size = (12, 2 + 0.27 * sum(heights))
    figure, axes = plt.subplots(2, 1, figsize=size, gridspec_kw={"height_ratios": heights})
    for axis, panel, (low, high), title in zip(axes, panels, limits, titles, strict=True):
        for y, (_, paper, rows) in enumerate(panel):
            if y and paper != panel[y - 1][1]:
                axis.axhline(y - 0.5, color="0.85", lw=0.8)
            for (row, marker), at in zip(rows, (y,) if len(rows) == 1 else (y - 0.17, y + 0.17), strict=True):
                (centre, *interval), colour = scaled(row), COLOURS.get(row["verdict"], "black")
                ends = [min(max(end, low), high) for end in interval]
                axis.plot(ends, [at, at], color=colour, lw=1.6)
                face = "white" if row.get("baseline_learned") is False else colour
                if low < centre < high:
                    axis.plot(centre, at, marker, color=colour, mfc=face, ms=6)
                for end, beyond, arrow in zip((low, high), (interval[0] < low, interval[1] > high), "<>", strict=True):
                    if beyond:
                        axis.plot(end, at, arrow, color=colour, mfc=face, ms=7)
                if not low < centre < high:  # an arrow in place of the marker, with its number
                    where, side = ((low, "left"), (high, "right"))[centre > 0]
                    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # hides the interval's line
                    style = {"ha": side, "va": "center", "color": colour, "fontsize": 8, "bbox": box}
                    axis.text(where * 0.96, at, f"{centre:.1f}", **style)
        axis.axvline(0, color="black", lw=0.8)
        for x in (0.5, 1) if panel is panels[0] else (-1, 1):
            axis.axvline(x, color="0.6", lw=0.8, ls="--" if abs(x) == 1 else ":")
        names = [f"{claim}  [{paper}]" for claim, paper, _ in panel]
        axis.set(yticks=range(len(panel)), yticklabels=names, xlabel=title,
                 xlim=(low * 1.03, high * 1.03), ylim=(max(len(panel), 1) - 0.5, -0.5))  # fmt: skip
        axis.tick_params(labelsize=8.5)
    handles = [plt.Line2D([], [], color=colour, marker="o", label=word) for word, colour in COLOURS.items()]
    shapes = (
        ("o", "black", "emoji, scenes"),
        ("s", "black", "photographs"),
        ("o", "white", "baseline has not learned"),
    )
    handles += [plt.Line2D([], [], color="black", marker=shape, mfc=face, ls="", label=label)
                for shape, face, label in shapes]  # fmt: skip
    figure.legend(handles=handles, ncol=5, loc="upper center", fontsize=9, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.6 / figure.get_figheight()))
    figure.savefig(path, dpi=80)
    plt.close(figure)


def effects(found: Summaries, path: Path) -> None:
    """Draw the first claim of each paper's abstract that could be tested: baseline and method of every seed (grey),
    their means (in the colour of the verdict), and the floor (dashed)."""
    studies = {paper: study_of(paper).as_in(found[paper]) for paper in sorted(found)}
    panels = {paper: first for paper, study in studies.items() if (first := first_claim(study, found[paper]))}
    columns = max(min(len(panels), 4), 1)
    rows = max(math.ceil(len(panels) / columns), 1)
    figure, axes = plt.subplots(rows, columns, figsize=(2.6 * columns, 3.2 * rows), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, (paper, (claim, row, sides)) in zip(axes.flat, panels.items(), strict=False):
        study, summary, colour = studies[paper], found[paper], COLOURS.get(row["verdict"], "black")
        axis.plot([0, 1], sides, color="0.75", lw=0.8, marker=".", ms=3)
        axis.plot([0, 1], [sum(side) / len(side) for side in sides], color=colour, lw=2.5, marker="o", ms=7)
        if row["floor"] is not None and not claim.learned_by:
            axis.axhline(row["floor"], color="0.4", lw=0.9, ls="--")
        axis.set(xlim=(-0.35, 1.35), xticks=[0, 1], xticklabels=[claim.baseline, claim.method])
        name = claim.metric.rpartition("/")[2].replace("_", " ")
        axis.set_ylabel(study.metrics.get(claim.metric, name), fontsize=8)
        axis.tick_params(labelsize=8)
        axis.set_title(summary["paper"].partition(" (")[0], fontsize=8, fontweight="bold", pad=54)
        verdict = protocol.prefix(study, summary) + row["verdict"]
        lines = claim.claim, f"here {verdicts.number(row['difference'])}, paper {row['paper']}"
        about = "\n".join(part for line in lines for part in textwrap.wrap(line, 46))
        for text, y, style in ((about, 1.11, {"color": "0.25"}), (verdict, 1.03, {"color": colour, "weight": "bold"})):
            axis.text(0.5, y, text, transform=axis.transAxes, ha="center", fontsize=7, **style)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def first_claim(study: Study, summary: dict) -> tuple[Claim, dict, list[list[float]]] | None:
    """(claim, its row, values by seed of baseline and method) of the first primary claim with a difference; None if
    results and study have none in common."""
    claims, arms = {claim.claim: claim for claim in study.claims}, report.by_seed(summary)
    for row in verdicts.primary(summary).values():
        if (claim := claims.get(row["claim"])) and row["difference"] is not None:
            sides = [verdicts.side(arms, name, claim.metric) for name in (claim.baseline, claim.method)]
            if None not in sides:
                return claim, row, [side[: row["seeds"]] for side in sides]
    return None
