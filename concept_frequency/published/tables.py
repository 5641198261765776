"""Compute the paper's other tables from the authors' files: properties of counts, generated images, Let It Wag!

Sections 5 and 6, appendix C: tables 3, 4 and 9, figures 3, 5, 6 and 11 to 17. Each function returns (table rows, claims
rows), both empty if the clone lacks the files. curves.py has the curves of classification and retrieval.
"""

import itertools
from typing import NamedTuple

import numpy as np

from concept_frequency import statistics
from concept_frequency.concepts import fold
from concept_frequency.published.curves import Rows, as_printed, counted, largest_gap, number
from concept_frequency.published.files import (
    BINS,
    CORPORA,
    FINE_GRAINED,
    GENERATION,
    METHODS,
    SIZES,
    Results,
    plotted_bins,
    with_table9,
)
from concept_frequency.published.numbers import PEOPLE, SLOPES, TABLE3, TABLE4, TABLE9

# -------------------------------------------------------------------------------------------- properties of counts


def agreement(results: Results) -> tuple[Rows, Rows]:
    """Table 4: Spearman's rank correlation of counts of the same names, with the number of concepts in brackets."""
    rows, same, found = [], [], []
    for (a, b), printed in TABLE4.items():
        if results.has("image", a) and results.has("image", b):
            row = {"corpora": f"{CORPORA[a]}, {CORPORA[b]}", "table 4": number(printed, 2)}
            for search in METHODS:
                spearman, n = statistics.frequency_agreement(
                    results.all_counts(a, search), results.all_counts(b, search)
                )
                row[search] = f"{spearman:.3f} ({n:,})"
                found.append(spearman)
            rows.append(row)
            same.append(any(number(value, 2) == number(printed, 2) for value in found[-len(METHODS) :]))
    if not rows:
        return [], []
    claim = counted("agreement of counts between corpora (tab. 4)", " ".join(row["table 4"] for row in rows), same)
    claim["here"] += f", of any counts; aligned: {min(found):.2f} to {max(found):.2f}"
    return rows, [claim]


def tails(results: Results) -> tuple[Rows, Rows]:
    """Figure 5: how unevenly the classes of 17 data sets are distributed."""
    rows, few = [], {search: [] for search in METHODS}
    for (corpus, size), search in itertools.product(SIZES.items(), METHODS):
        if results.has(search, corpus):
            counts = results.tail_counts(corpus, search)
            tail = statistics.long_tail(counts)
            few[search].append(100 * statistics.negligible(counts, size))
            rows.append({
                "corpus": CORPORA[corpus], "counts": search, "below 1e-5 of the corpus": f"{few[search][-1]:.1f} %",
                "below 1e-6": f"{100 * statistics.negligible(counts, size, 1e-6):.1f} %",
                "below max/1000": f"{tail['frac_norm_below_1e-3']:.1%}", "never": f"{tail['n_zero'] / tail['n']:.1%}",
                "Gini": f"{tail['gini']:.3f}", "share of top 1 %": f"{tail['top1pct_share']:.1%}",
                "median": f"{tail['median']:,.0f}",
            })  # fmt: skip
    if not rows:
        return [], []
    shares = [f"{search} {min(values):.0f} to {max(values):.0f} %" for search, values in few.items() if values]
    return rows, [
        {
            "claim": "published files: concepts below 1e-5 of the corpus (no cut-off in the paper)",
            "paper": "more than 2/3 negligible",
            "here": ", ".join(shares),
            "verdict": "reproduced" if min(map(min, filter(None, few.values()))) > 200 / 3 else "direction only",
        }
    ]


def misalignments(results: Results) -> tuple[Rows, Rows]:
    """Table 3: misaligned pairs, and their share of each corpus (of its fixed size)."""
    rows, same = [], []
    for name, (pairs, degree) in TABLE3.items():
        if (found := results.misalignment(name)) is not None:
            rows.append(
                {
                    "corpus": CORPORA.get(name, "LAION-Aesthetics"),
                    "table 3": f"{pairs:,} ({degree} %)",
                    "here": f"{found[0]:,} ({100 * found[1]:.3f} %)",
                }
            )
            same.append(found[0] == pairs and as_printed(100 * found[1], degree))
    return rows, [counted("misaligned pairs and degree (tab. 3)", "5.31 to 36.48 %", same, "equal")] if rows else []


# ----------------------------------------------------------------------------------------------------- generated images


class Generation(NamedTuple):
    """The curve of a text-to-image model."""

    curve: statistics.Curve
    source: str  # "scores" or "saved curve"
    gap: float | None = None  # largest difference between bin means of the two, if the clone has both


def generation_curve(results: Results, setting: str, model: str) -> Generation | None:
    """The curve of a text-to-image model, from the scores if available, else as saved; None without both."""
    saved = results.saved_curve("generation", "integrated", f"{model}|laion_aesthetics", setting)
    if (pairs := results.generation_pairs(setting, model)) is not None:
        curve = statistics.log_linear_curve(*pairs, BINS["generation"])
        return Generation(curve, "scores", largest_gap(curve, saved))
    return None if saved is None else Generation(statistics.from_saved(saved), "saved curve")


def generation(results: Results) -> tuple[Rows, Rows]:
    """Figures 3 and 11 to 15: rho of the last 4 of 7 bins by text-to-image model and score.

    Numbers in brackets are from the saved curve, used if the clone lacks the scores. "bins differ by" is the largest
    difference between our curves and the saved ones, over the scores that the clone has.
    """
    rows, found = [], {setting: [] for setting in GENERATION}
    for model in results.generation_models():
        row, gaps = {"model": model}, []
        for setting, heading in GENERATION.items():
            row[heading] = "-"
            if (of := generation_curve(results, setting, model)) is not None:
                rho, _ = statistics.correlation(of.curve, plotted_bins("generation", ""))
                row[heading] = number(rho, 2) if of.source == "scores" else f"({number(rho, 2)})"
                found[setting] += [rho] if rho == rho else []
                gaps += [] if of.gap is None else [of.gap]
        rows.append(row | {"bins differ by": f"{max(gaps):.0e}" if gaps else "-"})
    claims = []
    for setting, heading in GENERATION.items():
        if rhos := found[setting]:
            paper = "linear rise" + ", inconsistent (app. C)" * setting.startswith("human")
            mean, above = float(np.mean(rhos)), [rho > 0 for rho in rhos]
            claim = counted(f"rho, text to image, {heading}", paper, above, "models above 0")
            if mean <= 0:
                claim["verdict"] = "not reproduced"
            claims.append(claim | {"here": f"{claim['here']}, mean {mean:+.2f}"})
    return rows, claims


def people(results: Results) -> tuple[Rows, Rows]:
    """Figure 17: accuracy of generated images of public figures, judged by people."""
    if (found := results.people()) is None:
        return [], []
    counts, judged = found
    x, y = statistics.people_points(counts, judged)
    curve = statistics.log_linear_curve(x, y, BINS["people"])
    rho, p = statistics.correlation(curve)
    row = {
        "buckets of names": str(len(statistics.frequency_buckets(counts))),
        "used": str(len(x)),
        "judgements": f"{sum(map(len, judged.values()))} (the text: 6 times 72)",
        "rho": f"{rho:.4f}",
        "p": f"{p:.4f}",
        "no bins": number(statistics.unbinned(x, y)["pearson"]),
    }
    same = [number(rho, 2) == number(PEOPLE, 2)]
    return [row], [counted("rho, people judge generated people (fig. 17)", number(PEOPLE, 2), same)]


# --------------------------------------------------------------------------------------------------------- Let It Wag!


def let_it_wag(results: Results) -> tuple[Rows, Rows]:
    """Table 9 and figure 6: accuracy on ImageNet, Let It Wag!, and its common and fine-grained classes."""
    in_files, tail = results.imagenet(), results.let_it_wag()
    imagenet = with_table9(in_files)
    names = [model for model in TABLE9 if model in tail]
    if not names:
        return [], []
    rows, same, split = [], [], common_and_fine(results)
    for model in names:
        here = (number(imagenet[model], 2), number(tail[model]["full"], 2))
        printed = tuple(number(value, 2) for value in TABLE9[model])
        rows.append(
            {
                "corpus": model.partition("|")[2],
                "model": model.partition("|")[0],
                "table 9": " ".join(printed),
                "ImageNet": here[0],
                "Let It Wag!": here[1],
                **{classes: number(accuracy[model], 2) for classes, accuracy in split.items() if model in accuracy},
                "points lost": number(imagenet[model] - tail[model]["full"], 1),
            }
        )
        same += [as_printed(in_files[model], printed[0])] if model in in_files else []
        same.append(as_printed(tail[model]["full"], printed[1]))
    x, y = (np.array(values) for values in zip(*((imagenet[n], tail[n]["full"]) for n in names), strict=True))
    numbers = counted("Let It Wag! and ImageNet (tab. 9)", f"{len(same)} numbers in the files", same)
    return rows, [numbers, *wag_claims(x, y)]


def common_and_fine(results: Results) -> dict[str, dict[str, float]]:
    """{"common (N)" or "fine-grained (N)", N classes of Let It Wag!: {model: mean accuracy in percent}}."""
    fine, found = fine_grained(results), {}
    for model, value in results.let_it_wag().items():
        classes = value.get("classwise", {})
        for kind, inside in (("common", False), ("fine-grained", True)):
            if percent := [value for name, value in classes.items() if (name in fine) is inside]:
                found.setdefault(f"{kind} ({len(percent)})", {})[model] = float(np.mean(percent))
    return found


def wag_claims(imagenet: statistics.Array, tail: statistics.Array) -> Rows:
    """Claims rows of section 6: two slopes, and the loss of accuracy from ImageNet to Let It Wag!."""
    found = statistics.two_slopes(imagenet, tail)
    slopes = [number(found["slope_below"], 2), number(found["slope_above"], 2)]
    printed = [number(slope, 2) for slope in SLOPES]
    models = f"{found['n_below']} models below 50 % and {found['n_above']} above"
    lost = imagenet - tail
    same = [a == b for a, b in zip(slopes, printed, strict=True)]
    return [
        counted(f"Let It Wag! slopes (fig. 6), {models}", " ".join(printed), same) | {"here": " ".join(slopes)},
        {
            "claim": "published files: points lost on Let It Wag! (sec. 6)",
            "paper": "up to 20",
            "here": f"{lost.min():.1f} to {lost.max():.1f}, mean {lost.mean():.1f}; {(lost > 20).sum()} of {len(lost)} "
            "lose more than 20",
            "verdict": "direction only" if (lost > 0).all() else "not reproduced",
        },
    ]


def fine_grained(results: Results) -> set[str]:
    """The classes of Let It Wag! that also occur in a fine-grained data set of birds, aircraft, flowers or dishes.

    The authors describe common and fine-grained classes without listing them. Their loader recognises the latter by
    folder names that end in `_bird`, `_aircraft`, `_flowers` or `_food` (U:src/downstream_dataloader.py:268).
    """
    files = (results.scores_file("classification", dataset, "class") for dataset in FINE_GRAINED)
    names = {fold(name) for path in files if path.is_file() for name in results.classes(path)}
    return {name for name in results.wag_classes() if fold(name) in names}


def tail_concepts(results: Results) -> Rows:
    """Counts of Let It Wag!'s classes in LAION-400M, in captions, images, and their sum (appendix H.1)."""
    if not results.has("text", "laion400m"):
        return []
    found = {search: {fold(n): c for n, c in results.all_counts("laion400m", search).items()} for search in METHODS}
    classes = [fold(name) for name in results.wag_classes()]
    known = [name for name in classes if all(name in counts for counts in found.values())]
    if not known:
        return []
    columns = {search: np.array([counts[name] for name in known]) for search, counts in found.items()}
    columns["text + image"] = columns["text"] + columns["image"]
    return [
        {
            "counts": kind,
            "classes found": f"{len(known)} of {len(classes)}",
            "never": str(int((x == 0).sum())),
            "median": f"{np.median(x):,.1f}",
            "mean": f"{x.mean():,.1f}",
            "max": f"{x.max():,}",
            "below 1,000": f"{(x < 1000).mean():.0%}",
        }
        for kind, x in columns.items()
    ]
