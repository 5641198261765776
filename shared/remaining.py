"""What is left of `make reproduce-all`, and for how long: `python -m shared.remaining SEEDS FOLDER:ARMS:MINUTES ...`

A paper is done when runs/FOLDER/results.json holds the seeds and arms that are asked for; what is not is printed with
the minutes that reproduce.mk says, on stderr, and named on stdout for the Makefile. Single runs resume by themselves.
"""

import sys
from collections.abc import Container
from pathlib import Path

from shared import report, run


def done(file: Path, seeds: set[int], arms: set[str]) -> bool:
    """Whether a results file has all of these seeds and arms."""
    try:
        found = report.load(file)
        return seeds <= set(found["seeds"]) and arms <= set(found["arms"])
    except (OSError, ValueError, KeyError, TypeError):  # not there, or damaged
        return False


def older(papers: list[str], left: Container[str], runs: Path = Path("runs")) -> list[str]:
    """A sentence for each paper that is done, but with other code than there is now."""
    names = [name for name in (paper.partition(":")[0] for paper in papers) if name not in left]
    then, now = {name: report.load(runs / name / "results.json").get("commit") for name in names}, run.commit()
    return [
        f"{name} was measured at commit {commit}, the code is at {now} now: without runs/{name} it is measured again"
        for name, commit in then.items()
        if commit != now
    ]


def remaining(seeds: set[int], papers: list[str], runs: Path = Path("runs")) -> dict[str, float | None]:
    """{folder: minutes on two cores, None if it was never measured} of what is not done, in the order given."""
    left = {}
    for folder, arms, minutes in (paper.split(":") for paper in papers):
        if not done(runs / folder / "results.json", seeds, set(arms.split(","))):
            left[folder] = float(minutes) * len(seeds) if minutes else None
    return left


def sentence(left: dict[str, float | None], total: int) -> str:
    """What is left, in words."""
    if not left:
        return f"all {total} papers are done"
    names = ", ".join(f"{name} ({'?' if m is None else f'{m:.0f}'} min)" for name, m in left.items())
    known = [minutes for minutes in left.values() if minutes is not None]
    hours, minutes = divmod(round(sum(known)), 60)
    unknown = "" if len(known) == len(left) else f", and {len(left) - len(known)} whose time was not measured"
    return f"{len(left)} of {total} papers left: {names}; about {hours} h {minutes:02d} min on two cores{unknown}"


if __name__ == "__main__":
    left = remaining({int(seed) for seed in sys.argv[1].split()}, sys.argv[2:])
    print(*older(sys.argv[2:], left), sentence(left, len(sys.argv) - 2), sep="\n", file=sys.stderr)
    print(*left)
