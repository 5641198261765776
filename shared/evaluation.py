"""Measurements of run folders: kept beside the checkpoint, printed, handed to the paper's study on request."""

import dataclasses
import importlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from shared.checkpoints import read_json, write_json
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


def measured_run(
    path: str | Path,
    cfg: Any,
    sets: Iterable[str | Path | None],
    measure: Callable[[Path], dict[str, float]],
    files: Iterable[Path] = (),
) -> dict[str, float]:
    """`measured` of a run folder or a checkpoint file, kept beside it (FILE.eval/ for a file) with a table, results.md.

    measure(folder) -> metrics; a run folder's training seconds join them. Anew if the checkpoint, the shards of an
    evaluation set, one of `files`, or a field of `cfg` has changed, other than those that change no number.
    """
    path = Path(path)
    checkpoint = path / "checkpoint.pt" if path.is_dir() else path
    folder = path if path.is_dir() else path.with_suffix(".eval")
    unimportant = ("runs", "report", "export", "times", "curve", "workers", "device")
    setting = {key: value for key, value in dataclasses.asdict(cfg).items() if key not in unimportant}
    sources = [checkpoint, *(tar for each in sets if each for tar in Path(each).glob("*/*.tar")), *files]

    def measure_and_show() -> dict[str, float]:
        metrics = measure(folder)
        if path.is_dir():
            metrics["seconds"] = read_metrics(folder, "seconds")[-1]["seconds"]
        folder.mkdir(exist_ok=True)
        rows = [{"metric": key, "value": f"{value:.3f}"} for key, value in metrics.items()]
        (folder / "results.md").write_text(table(rows) + "\n")
        return metrics

    return measured(folder / "results.json", setting, sources, measure_and_show)


def check_report(path: str | None) -> None:
    """ValueError if --report names no .json: plots are drawn beside it, and it is replaced."""
    if path and Path(path).suffix != ".json":
        raise ValueError(f"--report {path} should end in .json")


def evaluate_runs(
    cfg: Any, measure: Callable[[str], dict], headings: dict[str, str], kinds: str = "run folder"
) -> list[dict]:
    """`measure(path)` of each of `cfg.runs`, printed as far as it has a heading.

    ValueError if there are no runs, or `cfg.report` would overwrite something else than results.
    """
    if not cfg.runs:
        raise ValueError(f"name at least one {kinds}")
    check_report(cfg.report)
    results = []
    for path in cfg.runs:
        results.append(measure(path))
        shown = ", ".join(
            f"{heading} {results[-1][key]:.2f}" for key, heading in headings.items() if key in results[-1]
        )
        print(f"{path}: {shown}", flush=True)
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
