"""The schema of results/<folder>.json, and what is printed and put into READMEs of it."""

import importlib
from collections.abc import Iterable, Sequence
from datetime import date
from pathlib import Path
from typing import NamedTuple

from shared.checkpoints import load_checkpoint, read_json
from shared.evaluation import table
from shared.run import machine
from shared.study.statistics import spread


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
    claims = table(summary["claims"]) if summary["claims"] else "No claim compares these arms."
    print(f"\nDifferences paired by seed, ± 95 % interval\n\n{claims}\n\nwritten to {path}")
    if len(summary["seeds"]) == 1:
        print('One seed shows differences but no interval, hence no verdict: SEEDS="0 1 2" gives both.')


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


def results(
    paper: str, seeds: Sequence[int], arms: dict[str, list[dict[str, float]]], claims: Sequence[dict], commits: set[str]
) -> dict:
    """The schema of results/<folder>.json; `arms` has one {metric: number} a seed, `commits` trained them.

    Values that are no numbers, which plots may need, are left out.
    """
    return {
        "paper": paper,
        "seeds": list(seeds),
        "machine": machine(),
        "date": date.today().isoformat(),
        "commit": ", ".join(sorted(commits)),
        "arms": {
            arm: {
                metric: spread([run[metric] for run in runs])
                for metric, value in runs[0].items()
                if isinstance(value, (int, float))
            }
            for arm, runs in arms.items()
        },
        "claims": list(claims),
    }


def readme_block(folder: str) -> str:
    """The results section of a folder's README, made from results/<folder>.json alone."""
    summary = read_json(Path("results") / f"{folder}.json")
    study = importlib.import_module(f"{folder}.study").STUDY
    seeds = ", ".join(map(str, summary["seeds"]))
    named = {study.headings.get(arm, arm): metrics for arm, metrics in summary["arms"].items()}
    measured = f"Measured {summary['date']} at commit `{summary['commit']}` on {summary['machine']}."
    return (
        f"Seeds {seeds}; percent unless said otherwise; mean ± standard deviation over seeds. {measured}\n\n"
        f"{arms_table(named, study.metrics)}\n\n"
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
