"""Writes PARITY.md: for each part of each paper, the largest differences between the authors' code and ours.

    python -m studies.harness.parity [--no-copy] [--repositories]

Test runs write the differences to runs/parity/PAPER.json, and the plots beside them. They are copied to results/parity,
which is committed, and joined with the parts that the maps of the READMEs name.
"""

import shutil
from pathlib import Path, PurePosixPath
from posixpath import normpath
from typing import Any

import tyro

from shared import cli, presets
from shared.checkpoints import write_text
from shared.errors import UserError
from studies.harness import companion, pages

RUNS, KEPT = Path("runs/parity"), Path("results/parity")
GOLDEN, TRAJECTORY = "golden data", "trajectory: "  # `against` of golden tests; how names of training runs begin
STEPS = ("10 steps, float32", "200 steps, float32", "10 steps, float64", "200 steps, float64")
HOW = ("whole", "in part", "200 steps only", "no code of theirs", "not compared")  # how a part is compared


def largest(tests: list[dict], kind: str) -> dict | None:
    """The test with the largest difference of a kind, "values" or "gradients"; None if none was measured."""
    return max((test for test in tests if test[kind] is not None), key=lambda test: test[kind], default=None)


def number(test: dict | None, kind: str = "values") -> str:
    """A test's difference, `0` if it is exactly zero, `-` if it was not measured."""
    found = None if test is None else test[kind]
    return "-" if found is None else f"{found:.1e}" if found else "0"


def numbers(tests: list[dict], others: list[dict]) -> list[str]:
    """[largest difference of values, of gradients]; the latter is `none` if neither these tests nor the others, of the
    same part, have one, and none leaves one out."""
    known = any(test["gradients"] is not None or test.get("gradient_left") for test in tests + others)
    gradients = number(largest(tests, "gradients"), "gradients") if known or not tests else "none"
    return [number(largest(tests, "values")), gradients]


def where(test: dict, kind: str) -> str:
    """The test, the array and its largest entry, to which a difference is relative."""
    array, entry = test.get("arrays", {}).get(kind, ("", 0.0))
    share = f"{test[kind] / entry:.0e} of its largest entry" if entry and test[kind] else ""
    return ", ".join(filter(None, (test["test"], array.replace("|", "\\|"), share)))


def compared(functions: list[companion.Function], tests: list[dict]) -> tuple[str, bool]:
    """(how many of a part's functions tests of values call, and what is left out; whether nothing is)."""
    left, only = [], []
    for function in functions:
        names = companion.names_of(function)
        found = companion.measured([function], tests)
        parts = [test.get("only", {}).get(name) for test in found for name in names & set(test["functions"])]
        if not found:
            left.append(f"`{function.name}`")
        elif all(parts):
            only.append(f"`{function.name}`: only {', '.join(dict.fromkeys(parts))}")
    called = f"{len(functions) - len(left)} of {len(functions)}"
    without = [f"without {', '.join(left)}"] if left and len(left) < len(functions) else []
    return "; ".join([called, *without, *only]), not left and not only


def split(tests: list[dict]) -> tuple[list[dict], list[dict], list[dict]]:
    """(tests against golden files, tests against a clone, training runs)."""
    steps = [test for test in tests if test["test"].startswith(TRAJECTORY)]
    others = [test for test in tests if test not in steps]
    return [t for t in others if t["against"] == GOLDEN], [t for t in others if t["against"] != GOLDEN], steps


def link(place: companion.Place, roots: dict[str, tuple[str, str, str]]) -> str:
    """Lines of the authors' code as [path:first-last@commit](address)."""
    _, commit, below = roots[place.letter]
    lines = str(place).removeprefix(f"{place.letter}:{place.path}")
    return f"[{normpath(PurePosixPath(below, place.path))}{lines}@{commit}]({companion.link_to(place, roots)})"


def shown(row: companion.Row, readme: companion.Readme, tests: list[dict]) -> dict[str, Any]:
    """What the template shows of a part. `live` is a word if only a training run has called its functions."""
    found = companion.measured(row.functions, tests)
    golden, live, steps = split(found)
    functions, whole = compared(row.functions, golden + live)
    states = (golden + live and whole, golden + live, steps, not row.places, True)
    return {
        "part": row.part,
        "theirs": "<br>".join(link(place, readme.roots) for place in row.places) or "-",
        "ours": row.ours,
        "details": ", ".join(map(str, row.details)),
        "compared": functions,
        "how": next(how for how, state in zip(HOW, states, strict=True) if state),
        "golden": numbers(golden, live),
        "live": numbers(live, golden) if golden + live or not steps else ["200 steps", "-"],
        "measured": "<br>".join(sorted({f"{test['date']} {test['commit']}" for test in found})) or "-",
        "tests": found,
    }  # fmt: skip


def about(folder: str, tests: list[dict]) -> dict[str, Any]:
    """What the template shows of a paper."""
    readme = companion.read(folder)
    rows = [shown(row, readme, tests) for row in readme.rows]
    golden, live, steps = split(tests)
    of_rows = [test for row in rows for test in row["tests"]]
    runs = {name: next((test for test in steps if test["test"] == TRAJECTORY + name), None) for name in STEPS}
    worst = {kind: largest(golden + live, kind) for kind in ("values", "gradients")}
    others: dict[str, list[str]] = {}  # test -> its differences
    for side, of_side in (("golden", golden), ("live", live)):
        for test in of_side:
            if test not in of_rows:
                others.setdefault(test["test"], []).append(f"{number(test)} ({side})")
    return {
        "folder": folder,
        "title": readme.title,
        "rows": rows,
        "counts": [sum(row["how"] == how for row in rows) for how in HOW],
        "largest": [f"{number(test, kind)} ({where(test, kind)})" if test else "-" for kind, test in worst.items()],
        "steps": {name: number(test) for name, test in runs.items()},
        "against": ", ".join(sorted({test["against"] for test in steps})),
        "plot": (KEPT / f"{folder}_trajectory.png").is_file(),
        "code": [f"[{name}@{commit}](https://github.com/{name}/tree/{commit})" for name, commit in clones(readme)],
        "date": max((test["date"] for test in tests), default="-"),
        "others": [f"{test}: {', '.join(found)}" for test, found in others.items()],
    }


def clones(readme: companion.Readme) -> list[tuple[str, str]]:
    """(repository, commit) that a README names, the authors' first."""
    return list(companion.commits(readme.roots).items())[::-1]


def page(home: Path = KEPT) -> str:
    """Text of PARITY.md, from the differences in home/PAPER.json. UserError if a file is damaged."""
    files = {folder: home / f"{folder}.json" for folder in presets.folders()}
    papers = [about(folder, companion.tests_in(path) if path.is_file() else []) for folder, path in files.items()]
    return pages.rendered("parity.md", papers=papers, steps=STEPS, how=HOW)


def main(copy: bool = True, repositories: bool = False) -> None:
    """Copy the measured differences to results/parity, and write PARITY.md.

    Args:
        copy: Copy runs/parity first, with its plots; with --no-copy, PARITY.md is written from results/parity as it is.
        repositories: Only print PAPER REPOSITORY COMMIT for each repository that a README names, the authors' first.
    """
    if repositories:
        for folder in presets.folders():
            for repository, commit in clones(companion.read(folder)):
                print(folder, repository, commit)
        return
    files = [path for folder in presets.folders() if (path := RUNS / f"{folder}.json").is_file()] if copy else []
    if copy and not files:
        raise UserError(f"{RUNS} holds no differences: run make test or make parity, or pass --no-copy")
    KEPT.mkdir(parents=True, exist_ok=True)
    for path in [*files, *(RUNS.glob("*_trajectory.png") if copy else ())]:
        shutil.copy(path, KEPT)
    write_text("PARITY.md", page())
    print(f"PARITY.md: {len(files)} files were copied from {RUNS} to {KEPT}")


if __name__ == "__main__":
    cli.command_line(lambda: tyro.cli(main))
