"""The schema of results/<folder>.json, and the tables made from it for the terminal and the READMEs."""

import hashlib
import importlib
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

STARS = (
    " ★ marks claims of the paper's abstract; their intervals are widened by Holm's step-down rule, so that all their "
    "verdicts hold together at 95 %. Resolves: the smallest difference that these seeds can resolve. It comes "
    "from the standard deviation of the pair's differences, or from that pooled over the arms that the paper's claims "
    "connect with the pair, whichever has more degrees of freedom. d: the largest difference that counts as none."
)

PHOTOGRAPHS = "### On photographs"  # heading of the second corpus


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


def arms_rows(
    arms: dict[str, dict[str, dict]], metrics: dict[str, str], floors: dict[str, dict[str, float]]
) -> list[dict[str, str]]:
    """Rows of floors, then of arms, with mean ± std over seeds in a column per metric (key -> heading).

    Metrics that no row has are left out.
    """

    def cell(value: dict | None) -> str:
        if value is None:
            return "-"
        return f"{value['mean']:.2f}" + (f" ± {value['std']:.2f}" if len(value["values"]) > 1 else "")

    below = {
        name: {key: {"mean": value, "values": [value]} for key, value in values.items()}
        for name, values in floors.items()
    }
    rows = below | arms
    shown = {key: head for key, head in metrics.items() if any(key in values for values in rows.values())}
    return [{"arm": arm} | {head: cell(values.get(key)) for key, head in shown.items()} for arm, values in rows.items()]


def show(summary: dict, metrics: dict[str, str], stand_in_for: str, path: Path) -> None:
    """Print the tables of arms, with `metrics` (key -> heading), and of claims of a `results` dict saved in `path`."""
    print(f"\n{summary['corpus']}, a stand-in for {stand_in_for}; seeds {seeds_of(summary)}; percent; mean ± std\n")
    print(table(arms_rows(summary["arms"], metrics, summary["floors"])))
    claims = table(shown(summary["claims"])) if summary["claims"] else "No claim compares these arms."
    print(f"\nDifferences paired by seed, ± 95 % interval\n\n{claims}\n\nwritten to {path}")
    if needed := [row for row in summary["claims"] if row["primary"] and row.get("seeds_needed")]:
        seeds = "; ".join(f"{row['claim']}: {row['seeds_needed']}" for row in needed)
        print(f"Seeds needed to resolve half of the paper's effect, or a negligible difference: {seeds}")
    if len(summary["seeds"]) == 1 and not any(row["interval"] for row in summary["claims"]):
        print('One seed shows differences but no interval, hence no verdict: SEEDS="0 1 2" gives both.')


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


def compare_runs(
    runs: Sequence[str], results: Sequence[dict], order: Iterable[str], passes: str = "epoch"
) -> Comparison:
    """Group run folders by arm, in `order`, and by seed. UserError if one is misnamed, unfinished or missing.

    A run is finished when its checkpoint's `passes` (epoch, episode or step) has reached the total in its settings.
    """
    arms: dict[str, dict[int, dict]] = {}
    folders: dict[str, dict[int, Path]] = {}
    commits, settings = set(), {}
    for folder, values in zip(map(Path, runs), results, strict=True):
        arm, _, seed = folder.name.rpartition("-seed")
        if not arm or not seed.isdigit():
            raise UserError(f"--report compares run folders named ARM-seedN, not {folder}")
        state = load_checkpoint(folder / "checkpoint.pt")
        done, total = state[passes], state["config"][f"{passes}s"]
        if done < total:
            raise UserError(f"{folder} is not finished: {done} of {total} {passes}s")
        commits.add(state.get("commit", "unknown"))
        settings[arm] = setting_of(state["config"])
        arms.setdefault(arm, {})[int(seed)] = values
        folders.setdefault(arm, {})[int(seed)] = folder
    names = [arm for arm in order if arm in arms] + sorted(set(arms) - set(order))
    seeds = sorted(arms[names[0]])
    for arm in names:
        if sorted(arms[arm]) != seeds:
            raise UserError(f"arm {arm} has seeds {sorted(arms[arm])}, but {names[0]} has {seeds}")
    return Comparison(
        {arm: [arms[arm][seed] for seed in seeds] for arm in names},
        seeds,
        {arm: [folders[arm][seed] for seed in seeds] for arm in names},
        commits,
        settings,
    )


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


RESULTS = {"paper": str, "seeds": list, "machine": str, "date": str, "commit": str, "corpus": str} | {
    "floors": dict, "settings": dict, "arms": dict, "claims": list
}  # fmt: skip
NUMBER = int | float
CLAIM = {"claim": str, "paper": str, "metric": str | None, "difference": NUMBER | None, "interval": list | None} | {
    "resolves": NUMBER | None, "verdict": str, "primary": bool
}  # fmt: skip
OPTIONAL = dict.fromkeys(("negligible", "floor", "method", "baseline"), NUMBER | None)  # further keys of a claim


def read_results(path: str | Path, paper: str | None = None) -> dict:
    """The results in a file. UserError if it holds none or damaged ones, or those of another title than `paper`."""
    advice = "name a results file that a study has written"
    summary = read_json(path, advice)
    odd = [name for name, kind in RESULTS.items() if not isinstance(summary.get(name), kind)]
    if not odd:
        odd = [arm for arm, metrics in summary["arms"].items() if not is_measured(metrics, len(summary["seeds"]))]
        checks = {
            "arms": bool(summary["arms"]),
            "claims": all(map(is_judged, summary["claims"])),
            "floors": has_numbers(summary, "floors", dict),
            "floor_seeds": has_numbers(summary, "floor_seeds", list),
        }
        odd += [name for name, right in checks.items() if not right]
    if odd:
        raise UserError(f"{path} holds no results of a study ({odd[0]} is missing or damaged): {advice}")
    if paper not in (None, summary["paper"]):
        raise UserError(f"{path} holds results of {summary['paper']}, not of {paper}: {advice}")
    return summary


def is_measured(metrics: Any, seeds: int) -> bool:
    """Whether an arm's metrics in results are dicts as from `spread`, of equally many runs, at most `seeds`."""
    found = list(metrics.values()) if isinstance(metrics, dict) else [None]
    lists = [each.get("values") if isinstance(each, dict) else None for each in found]
    return (
        all(isinstance(values, list) and 0 < len(values) <= seeds for values in lists)
        and all(isinstance(value, NUMBER) for values in lists for value in values)
        and len(set(map(len, lists))) <= 1
        and all(isinstance(each.get(key), NUMBER) for each in found for key in ("mean", "std"))
    )


def is_judged(row: Any) -> bool:
    """Whether a row of claims has the keys and types of those from `verdicts.judged`, and a known verdict."""
    return (
        isinstance(row, dict)
        and CLAIM.keys() <= row.keys()
        and all(isinstance(row.get(key), kind) for key, kind in (CLAIM | OPTIONAL).items())
        and row["verdict"] in VERDICTS
    )


def has_numbers(summary: dict, name: str, kind: type) -> bool:
    """Whether `name` of results, if it is there, holds dicts or lists (`kind`) of numbers, by floor."""
    of_floor = summary.get(name, {})
    return isinstance(of_floor, dict) and all(
        isinstance(each, kind) and all(isinstance(value, NUMBER) for value in (each.values() if kind is dict else each))
        for each in of_floor.values()
    )


def write_packages(path: Path, keep: bool = False) -> None:
    """Write names and versions of all other packages that are installed, as `pip freeze` does.

    keep: leave the lines that the file has, so that a package has a line for each version.
    """
    found = {each.metadata["Name"].lower(): each.version for each in distributions() if each.metadata["Name"]}
    found.pop("paper-clips", None)  # this project; results name its commit
    lines = {f"{name}=={version}\n" for name, version in found.items()}
    if keep and path.is_file():
        lines |= set(path.read_text(encoding="utf-8").splitlines(keepends=True))
    write_text(path, "".join(sorted(lines)))


def by_seed(summary: dict) -> dict[str, list[dict]]:
    """{arm: metrics of each seed} of a results file. An arm with n runs has the first n of its `seeds`."""
    return {
        arm: [
            dict(zip(of_arm, run, strict=True)) for run in zip(*(of["values"] for of in of_arm.values()), strict=True)
        ]
        for arm, of_arm in summary["arms"].items()
    }


def extended_seeds(earlier: dict, arms: Iterable[str], seeds: Sequence[int]) -> list[int]:
    """The seeds of results after runs of these `arms` with these `seeds` are added to them.

    UserError if an arm would then have seeds that are not the first ones, since claims compare the seeds that both
    arms have.
    """
    known, before = earlier["seeds"], by_seed(earlier)
    merged = [*known, *(seed for seed in seeds if seed not in known)]
    for arm in arms:
        of_arm = {*known[: len(before.get(arm, ()))], *seeds}
        if of_arm != set(merged[: len(of_arm)]):
            lacks = [seed for seed in merged[: len(of_arm)] if seed not in of_arm]
            raise UserError(
                f"arm {arm} would have seeds {sorted(of_arm)} without {lacks}, which other arms have: add them"
            )
    return merged


def joined(earlier: dict, found: Comparison, order: Iterable[str]) -> Comparison:
    """`found` with earlier results added: more seeds of all or some of their arms, or more arms.

    A run that both have is taken from the earlier results. Arms are in `order`, and seeds too if all arms have all of
    them; `folders` are those of `found`. UserError if an arm has other settings or metrics there.
    """
    before, known = by_seed(earlier), earlier["seeds"]
    seeds = extended_seeds(earlier, found.arms, found.seeds)
    arms = dict(before)
    for arm, runs in found.arms.items():
        if earlier["settings"].get(arm, found.settings.get(arm)) != found.settings.get(arm):
            raise UserError(f"arm {arm} of the earlier results has other settings: train all seeds again")
        if missing := {metric for run in before.get(arm, ())[:1] for metric in run} - set(runs[0]):
            raise UserError(f"arm {arm} has no {sorted(missing)[0]}, which it has in the earlier results")
        of_seed = dict(zip(found.seeds, runs, strict=True)) | dict(zip(known, before.get(arm, ()), strict=False))
        arms[arm] = [of_seed[seed] for seed in seeds if seed in of_seed]
    if all(len(runs) == len(seeds) for runs in arms.values()):
        places = sorted(range(len(seeds)), key=seeds.__getitem__)
        seeds, arms = sorted(seeds), {arm: [runs[i] for i in places] for arm, runs in arms.items()}
    return found._replace(
        arms={arm: arms[arm] for arm in order if arm in arms},
        seeds=seeds,
        commits=found.commits | set(earlier["commit"].split(", ")),
        settings=earlier["settings"] | found.settings,
    )


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


def claim_rows(summary: dict, other: dict | None = None) -> list[dict[str, str]]:
    """Rows of the table of claims; with `other` results, also the verdict of the same claim in them."""
    rows = shown(summary["claims"])
    if other is None:
        return rows
    verdicts = {claim["claim"]: claim["verdict"] for claim in other["claims"]}
    both = zip(summary["claims"], rows, strict=True)
    return [row | {"on emoji or scenes": verdicts.get(claim["claim"], "-")} for claim, row in both]


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


def block(summary: dict, study: Any, other: dict | None = None) -> str:
    """The text for one results file in a README."""
    named = {study.headings.get(arm, arm): metrics for arm, metrics in summary["arms"].items()}
    minutes = summary.get("core_minutes")
    took = "" if minutes is None else f" A seed took {minutes:.0f} minutes of one core."
    return (
        f"{summary['corpus']}. {provenance(summary)}{took} "
        "Percent unless said otherwise; mean ± standard deviation over seeds.\n\n"
        f"{table(arms_rows(named, study.metrics, summary['floors']))}\n\n"
        "Differences are paired by seed, unless the row names another unit; ± is half the 95 % interval."
        f"{STARS}\n\n{table(claim_rows(summary, other))}\n"
    )


def readme_block(folder: str) -> str:
    """The results section of a folder's README, from results/<folder>.json and results/photos/<folder>.json."""
    paths = {folder: Path(f"results/{folder}.json"), f"{folder}_photos": Path(f"results/photos/{folder}.json")}
    found = {name: read_results(path) for name, path in paths.items() if path.is_file()}
    studies = {name: importlib.import_module(f"studies.{name}").STUDY for name in found}
    blocks, photos = [block(found[folder], studies[folder])] if folder in found else [], f"{folder}_photos"
    if photos in found:
        blocks += [f"{PHOTOGRAPHS}\n\n{block(found[photos], studies[photos], found.get(folder))}"]
    return "\n".join(blocks)


def update_readme(folder: str, write: bool = True) -> bool:
    """Put `readme_block`, and results/bench/<folder>.md if it exists, between their comments in <folder>/README.md.

    Returns whether the README was up to date already.
    """
    path, bench = Path(folder) / "README.md", Path(f"results/bench/{folder}.md")
    blocks = {"results": readme_block(folder)}
    if bench.is_file():
        blocks["bench"] = bench.read_text(encoding="utf-8")
    page = fresh = path.read_text(encoding="utf-8")
    for mark, block in blocks.items():
        begin, end = f"<!-- {mark} -->\n", f"<!-- /{mark} -->"
        head, rest = fresh.split(begin, 1)
        fresh = head + begin + block + end + rest.split(end, 1)[1]
    if write and fresh != page:
        write_text(path, fresh)
    return fresh == page
