"""Evaluates run folders: saves metrics beside the checkpoint and prints them."""

import ast
import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from shared.checkpoints import ROOT, read_json, trained_by, write_json, write_text
from shared.data import TSV, Shards
from shared.errors import UserError
from shared.evalsets import EvalSet, set_names
from shared.run import own_set, paper_of, read_metrics


def table(rows: Sequence[dict[str, Any]], columns: Sequence[str] | None = None) -> str:
    """Rows as a Markdown table, with padded columns so that it is readable in a terminal."""
    columns = list(columns or rows[0])
    cells = [[str(row.get(column, "")) for column in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    lines = [
        " | ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) for line in [columns, *cells]
    ]
    lines.insert(1, " | ".join("-" * width for width in widths))
    return "\n".join(f"| {line} |" for line in lines)


def code_of(name: str) -> str:
    """Digest of the code that metrics depend on: comments, docstrings and layout do not count.

    name: a module, or a paper, for its eval.py and model.py. Modules of this project that these import, directly or
    indirectly, belong to it.
    """
    digests: dict[Path, str] = {}
    waiting = ["shared.__init__", name, f"{name}.eval", f"{name}.model"]
    while waiting:
        module = waiting.pop()
        file = (ROOT / module.replace(".", "/")).with_suffix(".py")
        if is_own(module) and file.is_file() and file not in digests:
            digests[file], imported = syntax(file.read_text(encoding="utf-8"))
            waiting += imported
    lines = sorted(f"{file.relative_to(ROOT)} {digest}" for file, digest in digests.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def is_own(module: str) -> bool:
    """Whether a module is of this project. Installed, it stands beside the packages that it imports."""
    folder = module.partition(".")[0]
    return folder in ("shared", "studies") or (ROOT / folder / "eval.py").is_file()


@functools.cache
def syntax(source: str) -> tuple[str, list[str]]:
    """(digest of a module's syntax tree without docstrings, names that may be modules that it imports)."""
    tree, imported = ast.parse(source), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported += [each.name for each in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            imported += [node.module, *(f"{node.module}.{each.name}" for each in node.names)]
        elif isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            del node.body[0]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest(), imported


def stamp(files: Iterable[Path]) -> str:
    """Digest of the paths, sizes and times of files, in any order. A missing file has neither size nor time."""
    digest = hashlib.sha256()
    for file in sorted(files):
        about = file.stat() if file.exists() else None
        digest.update(f"{file} {about and (about.st_size, about.st_mtime_ns)}\n".encode())
    return digest.hexdigest()[:16]


def images_of(pairs: Shards | TSV) -> str:
    """Digest of training pairs for caches of what is computed from their images: `fingerprint`, and of a .tsv, which
    only names its image files, also their `stamp`."""
    return f"{pairs.fingerprint}-{stamp(map(Path, pairs.keys))}" if isinstance(pairs, TSV) else pairs.fingerprint


def measured(code: str, file: Path, setting: dict, sources: Sequence[Path], measure: Callable[[], dict]) -> dict:
    """Metrics from `measure()`, cached in `file`.

    The cache is used if it was written with the same `setting`, `code_of` the paper (or of the module that `code`
    names), and `stamp` of the sources. So a source that was replaced, even by an older file, is measured again.
    """
    setting = json.loads(json.dumps(setting | {"code": code_of(code), "sources": stamp(sources)}))
    if file.exists():
        kept = read_json(file)
        if kept.get("setting") == setting:
            return kept["metrics"]
    metrics = measure()
    write_json(file, {"setting": setting, "metrics": metrics})
    return metrics


def named(path: str | Path) -> bool:
    """Whether `path` has the form MODEL@TAG of open_clip's models and is no file or folder."""
    return "@" in str(path) and not Path(path).exists()


def open_sets(
    option: str, folders: Iterable[str | Path], transform: Callable, *kinds: str, split: str = "test"
) -> list[EvalSet]:
    """Open all evaluation sets of an option, so that errors come early, with the names of `set_names`. UserError if a
    set is named twice, or if it is of another kind than `kinds`."""
    folders = list(folders)
    names = set_names(folders)
    sets = [EvalSet(folder, transform, split) for folder in folders]
    for eval_set, name in zip(sets, names, strict=True):
        eval_set.name = name
    if odd := next((each for each in sets if each.kind not in kinds), None):
        raise UserError(f"--{option} {odd.folder} is a {odd.kind} set: it must be a {' or '.join(kinds)} set")
    return sets


def sets_of(path: str | Path, sets: Sequence[str] = ()) -> tuple[str, ...]:
    """`sets`; without any, `own_set` of the run in the folder `path`."""
    file = Path(path) / "config.json"
    own = None if sets or not file.is_file() else own_set(read_json(file))
    return (own,) if own else tuple(sets)


def needed(path: str | Path, sets: Sequence[str], option: str = "--sets") -> tuple[str, ...]:
    """`sets_of`. UserError if there are none, or no file or folder `path`."""
    if not (named(path) or Path(str(path).removeprefix("local-dir:")).exists()):
        raise UserError(f"there is no checkpoint at {path}")
    if not (found := sets_of(path, sets)):
        raise UserError(f"{path} names no evaluation set of its own: pass {option} FOLDER...")
    return found


def check_own(path: str | Path, cfg: Any) -> None:
    """UserError if `path` is a run of another paper than `cfg`."""
    if (paper := trained_by(path)) not in (None, paper_of(cfg)):
        raise UserError(f"{path} is a run of {paper}: use 'python -m {paper}.eval {path}'")


def results_folder(path: str | Path, cfg: Any) -> Path:
    """Folder of results.json and results.md for a run folder, a checkpoint file or MODEL@TAG.

    For a run folder: itself. For a file STEM.pt: STEM.eval/ beside it. For MODEL@TAG: runs/PAPER/MODEL@TAG/, where
    PAPER is the folder of `cfg`'s class. For `local-dir:DIR`: runs/PAPER/NAME/, where NAME is DIR's last part. For
    another paper's run, whose results must not be overwritten: runs/PAPER/OTHERPAPER-NAME/. With other prompts than
    the set's: the folder PROMPTS-prompts/ in it.
    """
    paper, folder = paper_of(cfg), Path(str(path).removeprefix("local-dir:"))
    if named(path):
        found = Path("runs", paper, str(path).replace("/", "-"))
    elif (other := trained_by(folder)) not in (None, paper):
        found = Path("runs", paper, f"{other}-{folder.resolve().name}")
    elif str(folder) != str(path):
        found = Path("runs", paper, folder.resolve().name)
    else:
        found = folder if folder.is_dir() else folder.with_suffix(".eval")
    prompts = getattr(cfg, "prompts", "set")
    return found if prompts == "set" else found / f"{prompts}-prompts"


def files_of(folder: str | Path) -> list[Path]:
    """Shards, class names and templates of an evaluation set."""
    return [*Path(folder).glob("*/*.tar"), *Path(folder).glob("*.txt")]


def measured_run(
    path: str | Path,
    cfg: Any,
    sets: Iterable[str | Path | None],
    measure: Callable[[Path], dict[str, float]],
    files: Iterable[Path] = (),
    **more: Any,
) -> dict[str, float]:
    """`measured` of a run folder, a checkpoint file or MODEL@TAG, cached in `results_folder` with a table, results.md.

    measure(folder) -> metrics; the run's training seconds are added. Measured again if the code, the checkpoint, a
    file of an evaluation set, one of `files`, a value in `more`, or a field of `cfg` that can change metrics has
    changed.
    """
    path, folder = Path(path), results_folder(path, cfg)
    inside = Path(str(path).removeprefix("local-dir:"))
    inside = [inside / name for name in ("checkpoint.pt", "open_clip_model.safetensors")]
    weights = [path] if path.is_file() else [file for file in inside if file.is_file()]
    unimportant = ("runs", "export", "layout", "times", "curve", "workers", "device")
    setting = {key: value for key, value in dataclasses.asdict(cfg).items() if key not in unimportant} | more
    if "model" in setting and (path / "config.json").is_file():  # --model is for files that do not contain it
        setting["model"] = read_json(path / "config.json").get("model", setting["model"])
    sources = [*weights, *(file for each in sets if each for file in files_of(each)), *files]

    def measure_and_show() -> dict[str, float]:
        lines = read_metrics(path, "seconds") if (path / "metrics.jsonl").is_file() else []  # first: one may be damaged
        metrics = measure(folder)
        if lines:
            metrics["seconds"] = lines[-1]["seconds"]
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "results.md", all_numbers(metrics) + "\n")
        return metrics

    return measured(paper_of(cfg), folder / "results.json", setting, sources, measure_and_show)


def all_numbers(metrics: dict[str, Any]) -> str:
    """Markdown table of all metrics that are numbers."""
    numbers = {key: value for key, value in metrics.items() if not isinstance(value, str)}
    return table([{"metric": key, "value": f"{value:.3f}"} for key, value in numbers.items()])


def without_nan(metrics: dict[str, Any]) -> dict[str, Any]:
    """Metrics without those that are not defined, such as top-5 of four classes."""
    return {key: value for key, value in metrics.items() if isinstance(value, str) or not math.isnan(value)}


def others(metrics: Iterable[str], headings: dict[str, str]) -> list[str]:
    """Metrics without a heading, except of single languages and of sets that have another metric with a heading."""
    known = {heading.split("/")[-2] for heading in headings if "/" in heading}
    free = (key for key in metrics if key not in headings and not key.startswith("language_"))
    return [key for key in free if known.isdisjoint(key.split("/")[:-1])]


def tables(metrics: dict[str, Any], headings: dict[str, str]) -> str:
    """Metrics as a Markdown table: those with a heading, then `others`."""
    named_as = headings | {key: key for key in others(metrics, headings)}
    return table([
        {"metric": heading, "value": f"{metrics[key]:.2f}"}
        for key, heading in named_as.items()
        if isinstance(metrics.get(key), (int, float))
    ])  # fmt: skip


def evaluate_runs(
    cfg: Any, measure: Callable[[str], dict], headings: dict[str, str], kinds: str = "run folder", foreign: bool = False
) -> list[dict]:
    """Metrics `measure(path)` of each of `cfg.runs`; prints them and the path of the full results.

    Prints `tables`; for several runs on no other sets than `headings` names, one line per run with these metrics.
    UserError if there are no runs, or if a run is another paper's and `foreign` is False.
    """
    if not cfg.runs:
        raise UserError(f"name at least one {kinds}")
    for path in () if foreign else cfg.runs:
        check_own(path, cfg)
    results = []
    for path in cfg.runs:
        results.append(measure(path))
        found, kept = results[-1], results_folder(path, cfg) / "results.md"
        if len(cfg.runs) == 1 or any("/" in key for key in others(found, headings)):
            print(f"{path}:\n\n{tables(found, headings)}\n\nall metrics: {kept}\n", flush=True)
        else:
            shown = ", ".join(f"{heading} {found[key]:.2f}" for key, heading in headings.items() if key in found)
            print(f"{path}: {shown}; all metrics: {kept}", flush=True)
    return results
