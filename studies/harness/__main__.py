"""All studies, one after the other: `python -m studies.harness` (`make reproduce-all`). Stopped runs resume."""

import os
from typing import Literal

import tyro

from shared import cli, presets
from shared.errors import UserError
from studies.harness import report
from studies.harness.runner import Study, checked_seeds, run_script, study_of


def done(study: Study, seeds: tuple[int, ...], arms: str) -> bool:
    """Whether runs/PAPER/results.json has these seeds of these arms."""
    try:
        found = report.read_results(f"runs/{study.home}/results.json")
    except (OSError, UserError):  # missing or damaged
        return False
    runs = {arm: found["seeds"][: len(each)] for arm, each in report.by_seed(found).items()}
    return all(set(seeds) <= set(runs.get(arm.name, ())) for arm in study.chosen(arms))


def main(seeds: tuple[int, ...] = (0, 1, 2), arms: Literal["core", "all"] = "core") -> None:
    """Run the studies that are not done, with these seeds and arms, and write runs/report.html."""
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
    cli.command_line(lambda: tyro.cli(main, prog="python -m studies.harness"))
