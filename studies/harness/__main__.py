"""All studies, one after the other: `python -m studies.harness` (`make reproduce-all`). Stopped runs resume.

`python -m studies.harness protocol` prints what is fixed before runs that count; `... recompute` makes the committed
tables and verdicts again from the logs of their runs.
"""

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

import tyro

from shared import cli, presets
from shared.errors import UserError
from studies.harness import logs, protocol, report
from studies.harness.runner import Study, checked_seeds, run_script, study_of


def done(study: Study, seeds: tuple[int, ...], arms: str) -> bool:
    """Whether runs/PAPER/results.json has these seeds of these arms."""
    try:
        found = report.read_results(f"runs/{study.home}/results.json")
    except (OSError, UserError):  # missing or damaged
        return False
    runs = {arm: found["seeds"][: len(each)] for arm, each in report.by_seed(found).items()}
    return all(set(seeds) <= set(runs.get(arm.name, ())) for arm in study.chosen(arms))


def both(paper: str) -> list[Study]:
    """A paper's study, and its study on photographs if there is one."""
    found = [study_of(paper)]
    with contextlib.suppress(UserError):
        found.append(study_of(paper, "photos"))
    return found


def recompute(studies: Iterable[Study]) -> None:
    """Print the tables of all committed results that have logs, made from these. UserError if a table differs."""
    for study in studies:
        file = Path(f"results/{study.home}.json")
        if file.is_file() and logs.beside(file).is_dir():
            print(f"## {study.home}\n\n{logs.recompute(study, file)}\n")
        elif file.is_file():
            print(f"{study.home}: its runs left no logs, since it was measured before the protocol was fixed")


def main(
    what: Annotated[Literal["run", "protocol", "recompute"], tyro.conf.Positional] = "run",
    seeds: tuple[int, ...] = (0, 1, 2),
    arms: Literal["core", "all"] = "core",
) -> None:
    """Run the studies that are not done, with these seeds and arms, and write runs/report.html.

    Args:
        what: run; or print the protocol; or recompute the committed tables from their logs.
        seeds: Seeds of every arm.
        arms: Which arms.
    """
    if what != "run":
        studies = [study for paper in presets.folders() for study in both(paper)]
        print(protocol.page(studies)) if what == "protocol" else recompute(studies)
        return
    seeds, studies = checked_seeds(seeds), {paper: study_of(paper) for paper in presets.folders()}
    left = {name: study for name, study in studies.items() if not done(study, seeds, arms)}
    for name in sorted(studies.keys() - left.keys()):
        print(f"{name} is done: delete runs/{name}/results.json to run it again")
    for n, name in enumerate(list(left)):
        minutes = {each: left[each].minutes[arms] * len(seeds) for each in list(left)[n:]}
        names = ", ".join(f"{each} ({time:.0f})" for each, time in minutes.items())
        total = f"{sum(minutes.values()):.0f} minutes on two cores"
        print(f"{len(minutes)} of {len(studies)} papers left, {total}: {names}", flush=True)
        run_script([f"studies.{name}", "--seeds", *map(str, seeds), "--arms", arms], os.environ)
    run_script(["studies.harness.overview", "runs"], os.environ)


if __name__ == "__main__":
    cli.command_line(lambda: tyro.cli(main))
