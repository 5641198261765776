"""The paper's curve from your own counts and scores: `python -m concept_frequency.curve --counts ... --scores ...`

    python -m concept_frequency.curve --counts runs/cc3m/counts.parquet --scores scores/wds_*_class_results.json
    python -m concept_frequency.curve --counts imagenet_laion400m_lemmatized_search_counts.json --scores log.txt

Counts are those of `concept_frequency.count` or the authors', scores those of `concept_frequency.evaluate`, of
CLIP-benchmark, or a table. Writes the curve as a figure, correlation, nulls and diagnostics, the pairs, and the names
that did not match. The statistics are in statistics.py, the joining of names is in concepts.py.
"""

import dataclasses
import re
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import tyro

from concept_frequency import statistics
from concept_frequency.concepts import join, load_json, numbered, scores_of, short
from concept_frequency.published import figures
from shared import checkpoints, cli, evaluation
from shared.errors import UserError

NAMES = ("concept", "class", "classname", "name")  # names of a table's column of concepts
COUNTS = ("integrated", "count", "counts", "frequency", "text")  # names of its column of counts, if none is given


@dataclasses.dataclass
class Config:
    """Compute the curve of each model from counts and scores of concepts."""

    counts: tuple[str, ...] = ()
    """Counts of concepts: JSON name -> number, counts.parquet, or CSV with a header. One file for all files of scores,
    or one per file."""
    scores: tuple[str, ...] = ()
    """Scores of concepts, one file per data set: JSON of `concept_frequency.evaluate` or the authors, JSON name ->
    number, CSV with a header, or the output of `clip_benchmark eval --dump_classnames` (.txt or .log)."""
    models: tuple[str, ...] = ()
    """Models in the files of scores, `ViT-B-32|laion400m`; if none is given, all."""
    count_column: str = ""
    """Column of the counts in parquet and CSV; empty: the first of integrated, count, counts, frequency, text."""
    score_column: str = "score"
    """Column of the scores in CSV; a column `model` names the model."""
    aliases: str = ""
    """JSON {name in the scores: name in the counts}, for names that differ in more than spelling."""
    num_bins: int = 12
    """Bins of log frequency: the paper's 12 for classification, 7 for retrieval."""
    bins: str = "1:-1"
    """Which bins are correlated, as a Python slice. The paper: 1:-1, LAION-400M 2:-1, SynthCI-30M 0:-4, retrieval 3:"""
    out: str = "runs/concept_frequency/curve"
    """Folder for curve.png, curve.json, results.md, pairs.csv and unjoined.json."""


class Scores(NamedTuple):
    """Scores of one model on one data set."""

    dataset: str
    model: str
    values: dict[str, float]


# ---------------------------------------------------------------------------------------------------------------- files


def read_table(path: Path) -> pd.DataFrame:
    """A parquet or CSV file; UserError if it does not exist."""
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    return pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path, dtype=str, keep_default_na=False)


def column(table: pd.DataFrame, wanted: tuple[str, ...], path: Path) -> pd.Series:
    """The first of the given columns that exists; UserError if none does."""
    if found := [name for name in wanted if name in table]:
        return table[found[0]]
    raise UserError(f"{path} has no column {' or '.join(wanted)}; it has {', '.join(table) or 'none'}")


def read_counts(path: str | Path, count_column: str = "") -> dict[str, int]:
    """{concept: count} from JSON, parquet or CSV."""
    path = Path(path)
    if path.suffix in (".parquet", ".csv"):
        table = read_table(path)
        names, values = column(table, NAMES, path), column(table, (count_column,) if count_column else COUNTS, path)
        if len(twice := names[names.duplicated()]):
            raise UserError(f"{path} has two counts of {twice.iloc[0]}")
        found = dict(zip(names, values, strict=True))
    else:
        found = load_json(path)
        if not isinstance(found, dict):
            raise UserError(f"{path} holds no counts, name -> number, but a {type(found).__name__}")
    try:
        counts = {name: int(float(value)) for name, value in found.items()}
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"{path} holds no counts: a value is no finite number") from None
    if negative := [name for name, count in counts.items() if count < 0]:
        raise UserError(f"{path} holds no counts: {negative[0]} has {counts[negative[0]]}")
    return counts


def read_scores(path: str | Path, score_column: str = "score") -> list[Scores]:
    """Scores of every model in a file, and of every data set in one of CLIP-benchmark's."""
    path = Path(path)
    if path.suffix in (".txt", ".log"):
        return clip_benchmark_scores(path)
    if path.suffix == ".csv":
        table = read_table(path)
        names, values = column(table, NAMES, path), column(table, (score_column,), path).astype(float)
        models = table["model"] if "model" in table else ["scores"] * len(table)
        found = values.groupby(models, sort=False)
        return [Scores(path.stem, model, dict(zip(names[of.index], of, strict=True))) for model, of in found]
    value = load_json(path)
    if not isinstance(value, dict) or not value:
        raise UserError(f"{path} holds no scores, name -> number, but a {type(value).__name__}")
    if "metrics" in value and "task" in value:
        raise UserError(
            f"{path} is a result of CLIP-benchmark for a whole set; save the recall by class that it prints "
            "(`clip_benchmark eval ... --dump_classnames | tee log.txt`) and name log.txt"
        )
    if all(isinstance(each, (int, float)) for each in value.values()):
        return [Scores(path.stem, "scores", {name: float(score) for name, score in value.items()})]
    return [Scores(path.stem.removesuffix("_results"), short(key), scores_of(value, key, path)) for key in value]


def clip_benchmark_scores(path: Path) -> list[Scores]:
    """Recall of each class in percent, from the output of `clip_benchmark eval` for one or more sets and models.

    It prints a report of classes by number, then the file that it writes, which contains their names
    (`--dump_classnames`), data set and model. Classes without images are left out.
    """
    parts = re.split(r"^Dump results to: (.+)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    found = []
    for printed, name in zip(parts[::2], parts[1::2], strict=False):
        rows = re.findall(r"^ +(\d+) +[\d.]+ +([\d.]+) +[\d.]+ +(\d+) *$", printed, flags=re.MULTILINE)
        if not rows:  # for example a retrieval set
            continue
        places = (Path(name.strip()), path.parent / Path(name.strip()).name)
        if (file := next((each for each in places if each.is_file()), None)) is None:
            raise UserError(f"{path} names {name.strip()}, but that file is neither there nor beside {path.name}")
        about = load_json(file)
        if not about.get("classnames"):
            raise UserError(f"{file} has no names of classes: run clip_benchmark with --dump_classnames")
        names = numbered(about["classnames"])
        if max(int(row[0]) for row in rows) >= len(names):
            raise UserError(f"{path} reports more classes than {file} names")
        values = {names[int(c)]: 100 * float(recall) for c, recall, images in rows if int(images)}
        found.append(Scores(about["dataset"], f"{about['model']}|{about['pretrained']}", values))
    if not found:
        raise UserError(f"{path} holds no report by class, which clip_benchmark prints unless --quiet is given")
    return found


# ---------------------------------------------------------------------------------------------------------------- pairs


def pair_up(cfg: Config) -> tuple[pd.DataFrame, dict[str, dict]]:
    """(pairs: columns model, dataset, concept, count, score; {data set: names that did not match}). UserError if no
    name of any file of scores has a count."""
    if not cfg.counts or not cfg.scores:
        raise UserError("--counts and --scores are both needed: files of counts, and of scores of the same concepts")
    if len(cfg.counts) not in (1, len(cfg.scores)):
        raise UserError(f"{len(cfg.counts)} files of counts, {len(cfg.scores)} of scores: name one, or one for each")
    one_for_all = len(cfg.counts) < len(cfg.scores)
    aliases = load_json(cfg.aliases) if cfg.aliases else {}
    if not isinstance(aliases, dict):
        raise UserError(f"--aliases {cfg.aliases} should be a dictionary, name in the scores -> name in the counts")
    rows, report = [], {}
    for counts_file, scores_file in zip(cfg.counts * (len(cfg.scores) if one_for_all else 1), cfg.scores, strict=True):
        counts = read_counts(counts_file, cfg.count_column)
        for scores in read_scores(scores_file, cfg.score_column):
            if cfg.models and scores.model not in cfg.models:
                continue
            joined = join(counts, scores.values, aliases)
            report[scores.dataset] = {
                "joined": len(joined.names), "other spelling": joined.respelled, "other name": joined.renamed,
                "scores without a count": joined.scores_left,
                "counts without a score": len(joined.counts_left) if one_for_all else joined.counts_left,
            }  # fmt: skip
            rows += [
                (scores.model, scores.dataset, name, counts[other], scores.values[name])
                for name, other in joined.names.items()
            ]
    pairs = pd.DataFrame(rows, columns=["model", "dataset", "concept", "count", "score"])
    if missing := set(cfg.models) - set(pairs.model):
        raise UserError(f"no file of scores has the model {missing.pop()}")
    if pairs.empty:
        raise UserError(f"no name in {', '.join(cfg.scores)} has a count in {', '.join(cfg.counts)}: use --aliases")
    return pairs, report


def check_pairs(pairs: pd.DataFrame) -> None:
    """UserError if one model's pairs have no curve, or if data sets have scores in different units."""
    if len(odd := pairs[~np.isfinite(pairs.score)]):
        raise UserError(f"{odd.dataset.iloc[0]} has a score of {odd.concept.iloc[0]} that is not finite")
    largest = pairs.groupby("dataset").score.max()
    fractions, percent = largest[(largest > 0) & (largest <= 1)], largest[largest > 1]
    if len(fractions) and len(percent):
        raise UserError(
            f"scores of {fractions.index[0]} are fractions (at most {fractions.iloc[0]:g}), those of "
            f"{percent.index[0]} are in percent (up to {percent.iloc[0]:g}): pool data sets with one unit"
        )
    if pairs["count"].clip(lower=1).nunique() < 2:
        raise UserError(f"all {len(pairs)} concepts have the count {pairs['count'].iloc[0]}: a curve needs others")


def parse_slice(text: str) -> slice:
    """`1:-1` -> slice(1, -1)."""
    if not re.fullmatch(r"-?\d*:-?\d*", text):
        raise UserError(f"--bins is a slice such as 1:-1 or 3:, not {text!r}")
    return slice(*(int(each) if each else None for each in text.split(":")))


# ----------------------------------------------------------------------------------------------------------- the script


def row_of(model: str, concepts: int, about: statistics.Diagnostics, slope: dict[str, float]) -> dict[str, str]:
    """A model's row in the table."""
    return {
        "model": model.replace("|", ", "), "concepts": str(concepts), "rho": f"{about.rho:.3f}", "p": f"{about.p:.0e}",
        "all bins": f"{about.all_bins:.3f}", "no bins": f"{about.pearson:.3f}", "rank": f"{about.spearman:.3f}",
        "bin 0": f"{about.bin0:.0%}", "shuffled": f"{about.across:.2f}", "... within data sets": f"{about.within:.2f}",
        "reach": f"{about.reached:.0%}",
        "score a decade": f"{slope['slope']:.2f} ({slope['low']:.2f} to {slope['high']:.2f})",
    }  # fmt: skip


def main(cfg: Config) -> list[dict[str, str]]:
    """Join, correlate, draw and write; returns the rows of the table, one per model."""
    bins, out = parse_slice(cfg.bins), Path(cfg.out)
    pairs, report = pair_up(cfg)
    models = pairs.groupby("model", sort=False)
    rows, written = [], {}
    figure, axis = plt.subplots(figsize=(6.4, 4.8))
    for i, (model, of) in enumerate(models):
        check_pairs(of)
        curve, about = statistics.diagnose(of["count"], of.score, of.dataset, cfg.num_bins, bins)
        slope = statistics.slope_per_decade(of["count"], of.score)
        rows.append(row_of(model, len(of), about, slope))
        places = {key: getattr(curve, key).tolist() for key in ("position", "mean", "std", "size")}
        written[model] = about._asdict() | {f"decade_{key}": value for key, value in slope.items()} | {"bins": places}
        figures.draw_curve(axis, curve, bins, figures.legend(model, about.rho, about.p), i, len(models), interval=True)
    figures.frame(axis, "score")
    out.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(out / "curve.png", dpi=150)
    plt.close(figure)
    pairs.to_csv(out / "pairs.csv", index=False)
    checkpoints.write_json(out / "curve.json", written)
    checkpoints.write_json(out / "unjoined.json", report)
    (out / "results.md").write_text(evaluation.table(rows) + "\n")
    for dataset, about in report.items():
        apart = about["scores without a count"]
        some = ", ".join(map(repr, apart[:5])) + ", ..." * (len(apart) > 5)
        print(f"{dataset}: {about['joined']} concepts" + (f"; no count of {len(apart)}: {some}" if apart else ""))
    print(f"\n{evaluation.table(rows)}\n\nwritten to {out}")
    return rows


if __name__ == "__main__":
    cli.command_line(lambda: main(tyro.cli(Config)))
