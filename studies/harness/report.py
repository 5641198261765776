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
from shared.pictures import SUFFIX
from shared.run import machine
from studies.harness import verdicts
from studies.harness.verdicts import VERDICTS, Arms, shown

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


def spreads(arms: Arms) -> dict[str, dict[str, dict]]:
    """{arm: {metric: its `spread`}} of the metrics that are numbers and that all runs of an arm have."""
    return {
        arm: {
            metric: spread([run[metric] for run in runs])
            for metric, value in runs[0].items()
            if isinstance(value, (int, float)) and all(metric in run for run in runs)
        }
        for arm, runs in arms.items()
    }


def judged(study: Any, arms: Arms, floors: dict[str, dict[str, float]]) -> list[dict]:
    """Rows of the study's claims about the metrics of arms by seed, with these measured floors."""
    bars = [(floor.arms, floors[floor.name]) for floor in study.floors if floor.name in floors and not floor.ceiling]
    return verdicts.judged(study.claims, arms, bars, study.small)


def by_picture(study: Any, arms: Arms) -> dict[str, dict[str, list[str]]]:
    """{arm: {"METRIC by picture": text of each seed}} of the arms of primary claims whose runs all have it."""
    found: dict[str, dict[str, list[str]]] = {}
    for claim in study.claims:
        key = claim.metric + SUFFIX
        for arm in {claim.method, claim.baseline} & arms.keys() if claim.primary else ():
            if all(key in run for run in arms[arm]):
                found.setdefault(arm, {})[key] = [run[key] for run in arms[arm]]
    return found


def rows_again(study: Any, summary: dict, arms: Arms) -> list[dict]:
    """Rows of the claims of results, judged from the metrics of arms by seed where these suffice, else as they are;
    primary claims first."""
    rows = judged(study, arms, summary["floors"])
    known = {row["claim"] for row in rows}
    rows += [row for row in summary["claims"] if row["claim"] not in known]
    return sorted(rows, key=lambda row: not row["primary"])


class Comparison(NamedTuple):
    arms: dict[str, list[dict]]  # arm -> metrics of each seed
    seeds: list[int]
    folders: dict[str, list[Path]]
    commits: set[str]  # of the code that trained the runs
    settings: dict[str, str] = {}  # arm -> hash of its settings
    configs: dict[str, dict] = {}  # arm -> its settings


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
        {arm: {key: value for key, value in states[each[0]]["config"].items() if key not in FREE}
         for arm, each in folders.items()},
    )  # fmt: skip


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
        "arms": spreads(found.arms),
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
        arms_table(summary["floors"] | summary["arms"], every, {})
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
    found = {}
    for arm, of_arm in summary["arms"].items():
        values = {metric: of["values"] for metric, of in of_arm.items()} | summary.get("by_picture", {}).get(arm, {})
        found[arm] = [dict(zip(values, run, strict=True)) for run in zip(*values.values(), strict=True)]
    return found


# --------------------------------------------------------------------------------------------------------------- tables


def arms_table(arms: dict[str, dict[str, dict]], metrics: dict[str, str], floors: dict[str, dict[str, float]]) -> str:
    """Markdown table of floors, then of arms, with mean ± std over seeds in a column per metric (key -> heading).

    Metrics that no arm has are left out, and so are floors without any of the others.
    """

    def cell(value: dict | float | None) -> str:
        if not isinstance(value, dict):
            return "-" if value is None else f"{value:.2f}"
        return f"{value['mean']:.2f}" + (f" ± {value['std']:.2f}" if len(value["values"]) > 1 else "")

    columns = {key: head for key, head in metrics.items() if any(key in values for values in arms.values())}
    rows = {name: values for name, values in (floors | arms).items() if columns.keys() & values.keys()}
    return table(
        [{"arm": arm} | {head: cell(of.get(key)) for key, head in columns.items()} for arm, of in rows.items()]
    )


def named_arms(study: Any, summary: dict) -> str:
    """`arms_table` of results, with the headings that arms had when they were measured."""
    headings = study.headings | summary.get("headings", {})  # rounds of timed steps have none
    named = {headings[arm]: values for arm, values in summary["arms"].items() if arm in headings}
    return arms_table(named, study.metrics, summary["floors"])


def claims_table(summary: dict, preview: bool = False, standing: str = "verdict") -> str:
    """Markdown table of claims; `preview` is that of `shown`. Words of another `standing` are not called verdicts."""
    rows = shown(summary["claims"], preview)
    named = [
        {("finding" if key == "verdict" != standing else key): value for key, value in row.items()} for row in rows
    ]
    return table(named) if rows else "No claim compares these arms."


def show(summary: dict, study: Any, path: Path) -> None:
    """Print the tables of arms and claims of a `results` dict saved in `path`, and what is missing for verdicts."""
    print(f"\n{summary['corpus']}, a stand-in for {study.stands_for}; {provenance(summary)} Percent; mean ± std\n")
    print(named_arms(study, summary))
    print(f"\nDifferences paired by seed, ± 95 % interval\n\n{claims_table(summary, preview=True)}\n")
    for claim, note in study.notes(summary).items():
        print(f"{claim}: {note}")
    print(f"written to {path}")
    print("(preview): the interval is wider than d, so these seeds cannot resolve it")
    if needed := [row for row in summary["claims"] if row["primary"] and row.get("seeds_needed")]:
        print("Seeds that would: " + "; ".join(f"{row['claim']}: {row['seeds_needed']}" for row in needed))


def seeds_of(summary: dict) -> str:
    """The seeds of results; where arms have different numbers of them, as before the protocol, both."""
    found = {len(runs) for arm, runs in by_seed(summary).items() if arm in summary["settings"]}
    runs = sorted(found or {len(summary["seeds"])})
    fewest, most = (", ".join(map(str, summary["seeds"][:n])) for n in (runs[0], runs[-1]))
    return fewest if len(runs) == 1 else f"{fewest} (some arms up to {most.rpartition(' ')[2]})"


def provenance(summary: dict) -> str:
    """Sentences with the seeds, date, commit and machine of results, and the seeds of floors that depend on seeds."""
    changed = " (+: with changes that were not committed)" if "+" in summary["commit"] else ""
    text = f"Seeds {seeds_of(summary)}; measured {summary['date']} at commit {summary['commit']}{changed}"
    text += f", protocol {summary['protocol']}" if "protocol" in summary else ", before a protocol"
    text += f", on {summary['machine']}."
    if of_floors := {", ".join(map(str, each)) for each in summary.get("floor_seeds", {}).values()}:
        text += f" Floors of what an arm is trained on are means over seeds {' or '.join(sorted(of_floors))}."
    return text
