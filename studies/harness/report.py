"""The schema of results/<folder>.json, and the tables made from it for the terminal and the READMEs."""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Sequence
from datetime import date
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, NamedTuple

from shared.checkpoints import FREE, load_checkpoint, read_json, write_text
from shared.errors import UserError
from shared.evaluation import table
from shared.run import machine
from studies.harness.verdicts import VERDICTS, shown

# ------------------------------------------------------------------------------------------------ runs of several seeds


def with_means(values: dict[str, float], means: dict[str, Sequence[str]]) -> dict[str, float]:
    """Metrics of a run or a floor, with the mean of each list of metrics that it has: `means` maps names to lists."""
    return values | {
        name: sum(values[key] for key in of) / len(of) for name, of in means.items() if set(of) <= set(values)
    }


def spread(values: Sequence[float]) -> dict[str, Any]:
    """{"mean", "std", "values"} over seeds; std is the sample standard deviation (n-1), 0 for one seed."""
    mean = math.fsum(values) / len(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / max(len(values) - 1, 1)
    return {"mean": mean, "std": math.sqrt(variance), "values": list(values)}


class Comparison(NamedTuple):
    arms: dict[str, list[dict]]  # arm -> metrics of each seed
    seeds: list[int]
    folders: dict[str, list[Path]]
    commits: set[str]  # of the code that trained the runs
    settings: dict[str, str] = {}  # arm -> hash of its settings


def setting_of(config: dict) -> str:
    """A short hash of a run's settings, without the seed and the fields that do not change results.

    Options that are off (None, False, 0, empty; one micro-batch per step) are left out, so that adding an option later
    does not change the hash.
    """
    off = (None, False, "", (), [], {})
    on = {name: value for name, value in config.items() if value not in off and (name, value) != ("accumulate", 1)}
    unimportant = FREE - {"eval_every", "eval_set"} | {"seed"}  # results include evaluations during training
    kept = {name: value for name, value in on.items() if name not in unimportant}
    text = re.sub(r"-seed\d+", "", json.dumps(kept, sort_keys=True, default=str))
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def compare_runs(runs: Sequence[str], results: Sequence[dict], order: Iterable[str]) -> Comparison:
    """Group the run folders ARM-seedN, all arms with the same seeds, by arm, in `order`, and by seed."""
    found = {Path(run): values for run, values in zip(runs, results, strict=True)}
    names = {folder: folder.name.rpartition("-seed") for folder in found}
    states = {folder: load_checkpoint(folder / "checkpoint.pt") for folder in found}
    seeds = sorted({int(seed) for _, _, seed in names.values()})
    folders = {
        arm: sorted((each for each in found if names[each][0] == arm), key=lambda each: int(names[each][2]))
        for arm in order
    }
    folders = {arm: each for arm, each in folders.items() if each}
    return Comparison(
        {arm: [found[folder] for folder in each] for arm, each in folders.items()},
        seeds,
        folders,
        {state.get("commit", "unknown") for state in states.values()},
        {arm: setting_of(states[each[0]]["config"]) for arm, each in folders.items()},
    )


# ---------------------------------------------------------------------------------------------------- files of results


def results(paper: str, found: Comparison, claims: Sequence[dict], **more: Any) -> dict:
    """The dict of results/<folder>.json. Values of arms that are not numbers (used by plots) are left out."""
    return {
        "paper": paper,
        "seeds": found.seeds,
        "machine": machine(),
        "date": date.today().isoformat(),
        "commit": ", ".join(sorted(found.commits)),
        **more,
        "arms": {
            arm: {
                metric: spread([run[metric] for run in runs])
                for metric, value in runs[0].items()
                if isinstance(value, (int, float)) and all(metric in run for run in runs)
            }
            for arm, runs in found.arms.items()
        },
        "claims": list(claims),
    }


def read_results(path: str | Path, paper: str | None = None) -> dict:
    """The results in a file. UserError if it holds none, damaged ones, or those of another title than `paper`."""
    advice = "name a results file that a study has written"
    summary = read_json(path, advice)
    try:  # whatever pages show
        whole = isinstance(summary["paper"], str) and isinstance(summary["settings"], dict) and bool(summary["arms"])
        whole &= all(row["verdict"] in VERDICTS and row["primary"] in (True, False) for row in summary["claims"])
        every = {metric: metric for of in [*summary["arms"].values(), *summary["floors"].values()] for metric in of}
        arms_table(summary["arms"], every, summary["floors"])
        claims_table(summary)
        provenance(summary)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        whole = False
    if not whole:
        raise UserError(f"{path} holds no results of a study, or damaged ones: {advice}")
    if paper not in (None, summary["paper"]):
        raise UserError(f"{path} holds results of {summary['paper']}, not of {paper}: {advice}")
    return summary


def write_packages(path: Path) -> None:
    """Write names and versions of all other packages that are installed, as `pip freeze` does."""
    found = {each.metadata["Name"].lower(): each.version for each in distributions() if each.metadata["Name"]}
    found.pop("paper-clips", None)  # this project; results name its commit
    write_text(path, "".join(sorted(f"{name}=={version}\n" for name, version in found.items())))


def by_seed(summary: dict) -> dict[str, list[dict]]:
    """{arm: metrics of each seed} of a results file. An arm with n runs has the first n of its `seeds`."""
    return {
        arm: [
            dict(zip(of_arm, run, strict=True)) for run in zip(*(of["values"] for of in of_arm.values()), strict=True)
        ]
        for arm, of_arm in summary["arms"].items()
    }


def earlier_arms(path: Path, found: Comparison) -> dict[str, list[dict]]:
    """Arms of the results in `path` if they have the settings and machine of `found` and more seeds, else {}."""
    try:
        earlier = read_json(path)
    except (OSError, ValueError):
        return {}
    same = all(earlier.get("settings", {}).get(arm) == setting for arm, setting in found.settings.items())
    if not same or earlier.get("machine") != machine() or len(earlier["seeds"]) <= len(found.seeds):
        return {}
    return by_seed(earlier)


# --------------------------------------------------------------------------------------------------------------- tables


def arms_table(arms: dict[str, dict[str, dict]], metrics: dict[str, str], floors: dict[str, dict[str, float]]) -> str:
    """Markdown table of floors, then of arms, with mean ± std over seeds in a column per metric (key -> heading).

    Metrics that no row has are left out.
    """

    def cell(value: dict | float | None) -> str:
        if not isinstance(value, dict):
            return "-" if value is None else f"{value:.2f}"
        return f"{value['mean']:.2f}" + (f" ± {value['std']:.2f}" if len(value["values"]) > 1 else "")

    rows = floors | arms
    columns = {key: head for key, head in metrics.items() if any(key in values for values in rows.values())}
    return table(
        [{"arm": arm} | {head: cell(of.get(key)) for key, head in columns.items()} for arm, of in rows.items()]
    )


def named_arms(study: Any, summary: dict) -> str:
    """`arms_table` of results, with the headings of the study's arms."""
    named = {study.headings.get(arm, arm): values for arm, values in summary["arms"].items()}
    return arms_table(named, study.metrics, summary["floors"])


def claims_table(summary: dict, other: dict | None = None) -> str:
    """Markdown table of claims; with `other` results, also the verdict of the same claim in them."""
    rows = shown(summary["claims"])
    if other is not None:
        known = {claim["claim"]: claim["verdict"] for claim in other["claims"]}
        for claim, row in zip(summary["claims"], rows, strict=True):
            row["on emoji or scenes"] = known.get(claim["claim"], "-")
    return table(rows) if rows else "No claim compares these arms."


def show(summary: dict, metrics: dict[str, str], stand_in_for: str, path: Path) -> None:
    """Print the tables of arms, with `metrics` (key -> heading), and of claims of a `results` dict saved in `path`."""
    print(f"\n{summary['corpus']}, a stand-in for {stand_in_for}; seeds {seeds_of(summary)}; percent; mean ± std\n")
    print(arms_table(summary["arms"], metrics, summary["floors"]))
    print(f"\nDifferences paired by seed, ± 95 % interval\n\n{claims_table(summary)}\n\nwritten to {path}")
    if needed := [row for row in summary["claims"] if row["primary"] and row.get("seeds_needed")]:
        seeds = "; ".join(f"{row['claim']}: {row['seeds_needed']}" for row in needed)
        print(f"Seeds needed to resolve half of the paper's effect, or a negligible difference: {seeds}")
    if len(summary["seeds"]) == 1 and not any(row["interval"] for row in summary["claims"]):
        print('One seed shows differences but no interval, hence no verdict: SEEDS="0 1 2" gives both.')


def seeds_of(summary: dict) -> str:
    """The seeds of results in words, with those that only some arms have."""
    runs = [len(each) for each in by_seed(summary).values()]
    first, *more = sorted(set(runs)) or [len(summary["seeds"])]
    text = ", ".join(map(str, summary["seeds"][:first]))
    for few, many in zip([first, *more], more, strict=False):
        added = ", ".join(map(str, summary["seeds"][few:many]))
        text += f" ({sum(n > few for n in runs)} of {len(runs)} arms also {added})"
    return text


def provenance(summary: dict) -> str:
    """Sentences with the seeds, date, commit and machine of results, and the seeds of floors that depend on seeds."""
    seeds = seeds_of(summary)
    changed = " (+: with changes that were not committed)" if "+" in summary["commit"] else ""
    text = f"Seeds {seeds}; measured {summary['date']} at commit {summary['commit']}{changed} on {summary['machine']}."
    if of_floors := {", ".join(map(str, each)) for each in summary.get("floor_seeds", {}).values()}:
        text += f" Floors of what an arm is trained on are means over seeds {' or '.join(sorted(of_floors))}."
    return text
