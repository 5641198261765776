"""All studies, one after the other: `python -m studies.harness` (`make reproduce-all`).

A paper is done when runs/FOLDER/results.json has the requested seeds and arms. Prints the remaining papers with the
minutes in studies/PAPER.py. Stopped runs resume. At the end writes runs/report.html.
"""

import importlib
import subprocess
import sys
from collections.abc import Container
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tyro

from shared import cli, presets, run
from shared.checkpoints import read_json
from shared.errors import UserError
from studies.harness.report import by_seed
from studies.harness.runner import Study, checked_seeds


@dataclass
class Options:
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of every arm."""
    arms: Literal["core", "all"] = "core"
    """Arms of each paper: the core ones, or all."""


def studies() -> dict[str, Study]:
    """{folder: study} of all papers."""
    return {folder: importlib.import_module(f"studies.{folder}").STUDY for folder in presets.folders()}


def done(file: Path, seeds: set[int], arms: set[str]) -> bool:
    """Whether a results file has all `seeds` and `arms`."""
    try:
        found = read_json(file)
        runs = by_seed(found)
        return all(seeds <= set(found["seeds"][: len(runs.get(arm, ()))]) for arm in arms)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # missing or damaged
        return False


def older(papers: list[str], left: Container[str], runs: Path = Path("runs")) -> list[str]:
    """A sentence for each paper that is done but was measured at another commit."""
    names = [name for name in papers if name not in left]
    then, now = {name: read_json(runs / name / "results.json").get("commit") for name in names}, run.commit()
    return [
        f"{name} was measured at commit {commit}, the code is at {now} now: delete runs/{name} to measure it again"
        for name, commit in then.items()
        if commit != now
    ]


def remaining(options: Options, papers: dict[str, Study], runs: Path = Path("runs")) -> dict[str, float]:
    """{folder: minutes on two cores} of the papers that are not done, in the given order."""
    return {
        folder: study.minutes[options.arms] * len(options.seeds)
        for folder, study in papers.items()
        if not done(
            runs / folder / "results.json", set(options.seeds), {arm.name for arm in study.chosen(options.arms)}
        )
    }


def sentence(left: dict[str, float], total: int) -> str:
    """The remaining papers and minutes, as a sentence."""
    if not left:
        return f"all {total} papers are done"
    names = ", ".join(f"{name} ({minutes:.0f} min)" for name, minutes in left.items())
    hours, minutes = divmod(round(sum(left.values())), 60)
    return f"{len(left)} of {total} papers left: {names}; about {hours} h {minutes:02d} min on two cores"


def main(options: Options) -> None:
    papers = studies()
    options = replace(options, seeds=checked_seeds(options.seeds))
    for remark in older(list(papers), remaining(options, papers)):
        print(remark)
    for folder in list(remaining(options, papers)):
        print(sentence(remaining(options, papers), len(papers)), flush=True)
        command = [
            sys.executable,
            "-m",
            f"studies.{folder}",
            "--seeds",
            *map(str, options.seeds),
            "--arms",
            options.arms,
        ]
        if subprocess.run(command).returncode:
            raise UserError(f"'python -m {' '.join(command[2:])}' failed; run this command again to resume")
    print(sentence(remaining(options, papers), len(papers)))
    subprocess.run([sys.executable, "-m", "studies.harness.overview", "runs"], check=True)


if __name__ == "__main__":
    cli.command_line(lambda: main(tyro.cli(Options, prog="python -m studies.harness", description=__doc__)))
