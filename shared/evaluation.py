"""Measurements of run folders: kept beside the checkpoint, printed, handed to the paper's study on request."""

import dataclasses
import importlib
import inspect
import json
from collections.abc import Callable, Container, Iterable, Sequence
from pathlib import Path
from typing import Any

from shared.checkpoints import read_json, trained_by, write_json
from shared.run import commit, read_metrics


def table(rows: Sequence[dict[str, Any]], columns: Sequence[str] | None = None) -> str:
    """Rows as a Markdown table, columns padded so that it reads in a terminal, too."""
    columns = list(columns or rows[0])
    cells = [[str(row.get(column, "")) for column in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    lines = [
        " | ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) for line in [columns, *cells]
    ]
    lines.insert(1, " | ".join("-" * width for width in widths))
    return "\n".join(f"| {line} |" for line in lines)


def measured(file: Path, setting: dict, sources: Sequence[Path], measure: Callable[[], dict]) -> dict:
    """`measure()`, kept in `file`; not repeated while that is newer than `sources` and was made with the same `setting`
    and the same code."""
    setting = json.loads(json.dumps(setting | {"code": commit()}))
    if file.exists() and all(source.exists() and file.stat().st_mtime > source.stat().st_mtime for source in sources):
        kept = read_json(file)
        if kept.get("setting") == setting:
            return kept["metrics"]
    metrics = measure()
    write_json(file, {"setting": setting, "metrics": metrics})
    return metrics


def named(path: str | Path) -> bool:
    """Whether this is a model that open_clip knows, MODEL@TAG, and no file or folder."""
    return "@" in str(path) and not Path(path).exists()


def results_folder(path: str | Path, cfg: Any) -> Path:
    """Where results.json and results.md of a run folder, a checkpoint file or MODEL@TAG lie.

    In the run folder; in FILE.eval/ beside a file; in runs/PAPER/MODEL@TAG/, PAPER being the folder of `cfg`'s class,
    and so with `local-dir:DIR` and with another paper's run, which has results of its own.
    """
    paper = Path(inspect.getfile(type(cfg))).parent.name
    if named(path):
        return Path("runs", paper, str(path).replace("/", "-"))
    folder = Path(str(path).removeprefix("local-dir:"))
    if str(folder) != str(path) or trained_by(folder) not in (None, paper):
        return Path("runs", paper, folder.resolve().name)
    return Path(path) if Path(path).is_dir() else Path(path).with_suffix(".eval")


def measured_run(
    path: str | Path,
    cfg: Any,
    sets: Iterable[str | Path | None],
    measure: Callable[[Path], dict[str, float]],
    files: Iterable[Path] = (),
) -> dict[str, float]:
    """`measured` of a run folder, a checkpoint file or MODEL@TAG, kept in `results_folder` with a table, results.md.

    measure(folder) -> metrics; a run folder's training seconds join them. Anew if the checkpoint, the shards of an
    evaluation set, one of `files`, or a field of `cfg` has changed, other than those that change no number.
    """
    path, folder = Path(path), results_folder(path, cfg)
    inside = Path(str(path).removeprefix("local-dir:"))
    inside = [inside / name for name in ("checkpoint.pt", "open_clip_model.safetensors")]
    weights = [path] if path.is_file() else [file for file in inside if file.is_file()]
    unimportant = ("runs", "report", "export", "times", "curve", "workers", "device")
    setting = {key: value for key, value in dataclasses.asdict(cfg).items() if key not in unimportant}
    sources = [*weights, *(tar for each in sets if each for tar in Path(each).glob("*/*.tar")), *files]

    def measure_and_show() -> dict[str, float]:
        metrics = measure(folder)
        if (path / "metrics.jsonl").is_file():
            metrics["seconds"] = read_metrics(path, "seconds")[-1]["seconds"]
        folder.mkdir(parents=True, exist_ok=True)
        rows = [{"metric": key, "value": f"{value:.3f}"} for key, value in metrics.items()]
        (folder / "results.md").write_text(table(rows) + "\n")
        return metrics

    return measured(folder / "results.json", setting, sources, measure_and_show)


def tables(metrics: dict[str, Any], headings: dict[str, str], embedded: Container[str] = ()) -> str:
    """What was measured as Markdown tables: what has a heading, then the rest, sets with the same metrics side by side.

    Of sets in `embedded` only what has a heading is shown, of single languages nothing, since there is a mean of them.
    """
    numbers = {key: f"{value:.2f}" for key, value in metrics.items() if isinstance(value, (int, float))}
    rows = [{"metric": heading, "value": numbers[key]} for key, heading in headings.items() if key in numbers]
    of_sets: dict[str, dict[str, str]] = {}  # set -> metric -> number
    for key in (key for key in numbers if key not in headings):
        where, _, metric = key.rpartition("/")
        if not where:
            rows.append({"metric": key, "value": numbers[key]})
        elif not (where.startswith("language_") or any(part in embedded for part in where.split("/"))):
            of_sets.setdefault(where, {})[metric] = numbers[key]
    alike: dict[tuple[str, ...], dict[str, dict[str, str]]] = {}  # metrics -> the sets that have these
    for where, found in of_sets.items():
        alike.setdefault(tuple(found), {})[where] = found
    parts = [rows] if rows else []
    for names, sets in alike.items():
        if len(sets) > len(names):
            parts.append([{"set": where} | found for where, found in sets.items()])
        else:
            parts.append([{"metric": name} | {where: found[name] for where, found in sets.items()} for name in names])
    return "\n\n".join(map(table, parts))


def evaluated_sets(cfg: Any) -> tuple[set[str], bool]:
    """(names of the sets of the embedded corpus in `cfg`, whether there are others): folders that its fields name.

    Those of the embedded corpus are the defaults.
    """

    def flat(values: Iterable[Any]) -> set[str]:
        words = (word for value in values for word in (value if isinstance(value, tuple) else (value,)))
        return {word for word in words if isinstance(word, str) and Path(word.rpartition(":")[2]).is_dir()}

    fields = [field for field in dataclasses.fields(cfg) if field.name not in ("runs", "export")]
    ours, now = (flat(each) for each in zip(*((f.default, getattr(cfg, f.name)) for f in fields), strict=True))
    return {Path(folder).name for folder in ours & now}, bool(now - ours)


def check_report(path: str | None) -> None:
    """ValueError if --report names no .json: plots are drawn beside it, and it is replaced."""
    if path and Path(path).suffix != ".json":
        raise ValueError(f"--report {path} should end in .json")


def evaluate_runs(
    cfg: Any, measure: Callable[[str], dict], headings: dict[str, str], kinds: str = "run folder"
) -> list[dict]:
    """`measure(path)` of each of `cfg.runs`, printed with the place where all of it is kept.

    Printed are `tables`; of several runs on nothing but the embedded corpus a line each with what has a heading.
    ValueError if there are no runs, or `cfg.report` would overwrite something else than results.
    """
    if not cfg.runs:
        raise ValueError(f"name at least one {kinds}")
    check_report(cfg.report)
    embedded, others = evaluated_sets(cfg)
    results = []
    for path in cfg.runs:
        results.append(measure(path))
        found, kept = results[-1], results_folder(path, cfg) / "results.md"
        if others or len(cfg.runs) == 1:
            print(f"{path}:\n\n{tables(found, headings, embedded)}\n\nall of it: {kept}\n", flush=True)
        else:
            shown = ", ".join(f"{heading} {found[key]:.2f}" for key, heading in headings.items() if key in found)
            print(f"{path}: {shown}; all of it: {kept}", flush=True)
    return results


def compare(folder: str, runs: Sequence[str], results: Sequence[dict], path: str, **more: Any) -> None:
    """Hand what was measured of run folders ARM-seedN to FOLDER/study.py, which judges the paper's claims.

    ValueError where that file is not there: the papers run without their studies.
    """
    try:
        study = importlib.import_module(f"{folder}.study").STUDY
    except ModuleNotFoundError as error:
        raise ValueError(f"--report compares arms as {folder}/study.py says, which could not be imported") from error
    study.compare(runs, results, Path(path), **more)
