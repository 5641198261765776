"""Claims, verdicts and tables: what `make reproduce-<folder>` ends with, and the schema of results/<folder>.json.

A verdict is computed from per-seed numbers, never typed.
"""

import dataclasses
import importlib
import json
import math
import os
import platform
import sys
from collections.abc import Callable, Iterable, Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch
from scipy.stats import t as student_t

from shared.run import commit, load_checkpoint, read_metrics, write_json


class Claim(NamedTuple):
    """`method` minus `baseline` in `metric`, paired by seed; the paper reports `paper` with this sign."""

    claim: str
    paper: str | None  # the paper's number or word; None: it claims nothing, the difference is only shown
    metric: str
    method: str
    baseline: str
    sign: int = 1  # +1: the paper says higher, -1: lower
    effect: float | None = None  # the paper's difference in the same unit, where it is one


def spread(values: Sequence[float]) -> dict[str, Any]:
    """{"mean", "std", "values"} over seeds; std is the sample's (n-1), 0 for one seed."""
    mean = math.fsum(values) / len(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / max(len(values) - 1, 1)
    return {"mean": mean, "std": math.sqrt(variance), "values": list(values)}


def interval(differences: Sequence[float]) -> float | None:
    """Half width of the 95 % Student interval of the mean, or None for fewer than two seeds."""
    n = len(differences)
    return None if n < 2 else float(student_t.ppf(0.975, n - 1)) * spread(differences)["std"] / math.sqrt(n)


def judge(claim: Claim, method: Sequence[float], baseline: Sequence[float]) -> dict[str, str]:
    """One row of the claims table.

    reproduced: the interval excludes 0 on the paper's side, and reaches the paper's effect where `effect` says one;
    same direction: on the paper's side, but short of its effect; not reproduced: on the other side;
    not resolved at this scale: the interval holds 0, or there is one seed. Where the paper claims nothing: no claim.
    """
    differences = [m - b for m, b in zip(method, baseline, strict=True)]
    mean, half = spread(differences)["mean"], interval(differences)
    here = f"{mean:+.2f}"
    if half is not None:  # two digits of the interval, or it may seem to hold zero where it does not
        digits = 3 if 0.0005 < half < 0.0995 else 2
        here = f"{mean:+.{digits}f} ± {half:.{digits}f}"
    if claim.paper is None:
        verdict = "no claim"
    elif half is None or abs(mean) <= half:
        verdict = "not resolved at this scale"
    elif mean * claim.sign <= 0:
        verdict = "not reproduced"
    elif claim.effect is not None and abs(mean) + half < abs(claim.effect):
        verdict = "same direction"
    else:
        verdict = "reproduced"
    return {"claim": claim.claim, "paper": claim.paper or "-", "here": here, "verdict": verdict}


def untestable(claim: str, paper: str, why: str) -> dict[str, str]:
    """A row for what this scale cannot show."""
    return {"claim": claim, "paper": paper, "here": why, "verdict": "not testable at this scale"}


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


def arms_rows(arms: dict[str, dict[str, dict]], metrics: dict[str, str]) -> list[dict[str, str]]:
    """One row an arm, one column a metric (key -> heading): mean ± std over seeds."""

    def cell(value: dict | None) -> str:
        if value is None:
            return "-"
        return f"{value['mean']:.2f}" + (f" ± {value['std']:.2f}" if len(value["values"]) > 1 else "")

    return [
        {"arm": arm} | {head: cell(values.get(key)) for key, head in metrics.items()} for arm, values in arms.items()
    ]


def arms_table(arms: dict[str, dict[str, dict]], metrics: dict[str, str]) -> str:
    """`arms_rows` as a Markdown table."""
    return table(arms_rows(arms, metrics))


def show(summary: dict, metrics: dict[str, str], stand_in_for: str, path: Path) -> None:
    """Print what `results` gave and `path` holds: arms by `metrics` (key -> heading), then claims."""
    seeds = ", ".join(map(str, summary["seeds"]))
    print(f"\nEmbedded emoji corpus, a stand-in for {stand_in_for}; seeds {seeds}; percent; mean ± std\n")
    print(arms_table(summary["arms"], metrics))
    print(f"\nDifferences paired by seed, ± 95 % interval\n\n{table(summary['claims'])}\n\nwritten to {path}")
    if len(summary["seeds"]) == 1:
        print('One seed shows differences but no interval, hence no verdict: SEEDS="0 1 2" gives both.')


# ------------------------------------------------------------------------------------------- run folders ARM-seedN


def measured(file: Path, setting: dict, sources: Sequence[Path], measure: Callable[[], dict]) -> dict:
    """`measure()`, kept in `file`; not repeated while that is newer than `sources` and was made with the same `setting`
    and the same code."""
    setting = json.loads(json.dumps(setting | {"code": commit()}))
    if file.exists() and all(source.exists() and file.stat().st_mtime > source.stat().st_mtime for source in sources):
        kept = load(file)
        if kept.get("setting") == setting:
            return kept["metrics"]
    metrics = measure()
    save(file, {"setting": setting, "metrics": metrics})
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
    unimportant = ("runs", "report", "export", "times", "workers", "device")
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


class Comparison(NamedTuple):
    arms: dict[str, list[dict]]  # by arm, the measurements of each seed
    seeds: list[int]
    folders: dict[str, list[Path]]
    commits: set[str]  # of the code that trained them


def compare_runs(
    runs: Sequence[str], results: Sequence[dict], order: Iterable[str], passes: str = "epoch"
) -> Comparison:
    """Group run folders by arm, in `order`, and by seed. ValueError if one is misnamed, unfinished or missing.

    A run is finished when its checkpoint has reached `<passes>s` of its configuration.
    """
    arms: dict[str, dict[int, dict]] = {}
    folders: dict[str, dict[int, Path]] = {}
    commits = set()
    for folder, values in zip(map(Path, runs), results, strict=True):
        arm, _, seed = folder.name.rpartition("-seed")
        if not arm or not seed.isdigit():
            raise ValueError(f"--report compares run folders named ARM-seedN, not {folder}")
        state = load_checkpoint(folder / "checkpoint.pt")
        done, total = state[passes], state["config"][f"{passes}s"]
        if done < total:
            raise ValueError(f"{folder} is not finished: {done} of {total} {passes}s")
        commits.add(state.get("commit", "unknown"))
        arms.setdefault(arm, {})[int(seed)] = values
        folders.setdefault(arm, {})[int(seed)] = folder
    names = [arm for arm in order if arm in arms] + sorted(set(arms) - set(order))
    seeds = sorted(arms[names[0]])
    for arm in names:
        if sorted(arms[arm]) != seeds:
            raise ValueError(f"arm {arm} has seeds {sorted(arms[arm])}, but {names[0]} has {seeds}")
    return Comparison(
        {arm: [arms[arm][seed] for seed in seeds] for arm in names},
        seeds,
        {arm: [folders[arm][seed] for seed in seeds] for arm in names},
        commits,
    )


def judge_all(claims: Iterable[Claim], arms: dict[str, list[dict]]) -> list[dict[str, str]]:
    """A row for each claim whose two arms were run."""
    return [
        judge(claim, *([values[claim.metric] for values in arms[arm]] for arm in (claim.method, claim.baseline)))
        for claim in claims
        if claim.method in arms and claim.baseline in arms
    ]


def machine() -> str:
    """Processor and cores, as the results were measured on."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        name = next(
            (line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line), name
        )
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{name}, {os.cpu_count()} cores{gpu}, torch {torch.__version__}"


def results(
    paper: str, seeds: Sequence[int], arms: dict[str, list[dict[str, float]]], claims: Sequence[dict], commits: set[str]
) -> dict:
    """The schema of results/<folder>.json; `arms` has one {metric: number} a seed, `commits` trained them."""
    return {
        "paper": paper,
        "seeds": list(seeds),
        "machine": machine(),
        "date": date.today().isoformat(),
        "commit": ", ".join(sorted(commits)),
        "arms": {
            arm: {metric: spread([run[metric] for run in runs]) for metric in runs[0]} for arm, runs in arms.items()
        },
        "claims": list(claims),
    }


def save(path: Path, value: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, value)


def load(path: Path) -> dict:
    return json.loads(Path(path).read_text())


def readme_block(folder: str) -> str:
    """The results section of a folder's README, made from results/<folder>.json alone."""
    summary = load(Path("results") / f"{folder}.json")
    evaluation = importlib.import_module(f"{folder}.eval")
    seeds = ", ".join(map(str, summary["seeds"]))
    named = {evaluation.ARMS.get(arm, arm): metrics for arm, metrics in summary["arms"].items()}
    measured = f"Measured {summary['date']} at commit `{summary['commit']}` on {summary['machine']}."
    return (
        f"Seeds {seeds}; percent unless said otherwise; mean ± standard deviation over seeds. {measured}\n\n"
        f"{arms_table(named, evaluation.METRICS)}\n\n"
        "Differences are paired by seed, unless the row says by what, ± half the 95 % interval."
        f"\n\n{table(summary['claims'])}\n"
    )


def update_readme(folder: str, write: bool = True) -> bool:
    """Put `readme_block` between the results marks of <folder>/README.md; True if the page agreed already."""
    path, begin, end = Path(folder) / "README.md", "<!-- results -->\n", "<!-- /results -->"
    page = path.read_text()
    head, rest = page.split(begin, 1)
    fresh = head + begin + readme_block(folder) + end + rest.split(end, 1)[1]
    if write and fresh != page:
        path.write_text(fresh)
    return fresh == page


if __name__ == "__main__":
    for name in sys.argv[1:]:
        update_readme(name)
