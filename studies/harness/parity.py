"""Writes PARITY.md: for each part of each paper, the largest differences between the authors' code and ours.

    python -m studies.harness.parity [--no-copy] [--repositories]

Test runs write the differences to runs/parity/PAPER.json. They are copied to results/parity, which is committed, and
joined with the parts that the maps of the READMEs name.
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
STEPS = ("10 steps, float32", "200 steps, float32", "200 steps, float64")


def largest(tests: list[dict], kind: str) -> dict | None:
    """The test with the largest difference of a kind, "values" or "gradients"; None if none was measured."""
    return max((test for test in tests if test[kind] is not None), key=lambda test: test[kind], default=None)


def number(test: dict | None, kind: str = "values") -> str:
    """A test's difference, `0` if it is exactly zero, `-` if it was not measured."""
    found = None if test is None else test[kind]
    return "-" if found is None else f"{found:.1e}" if found else "0"


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
    return {
        "part": row.part,
        "theirs": "<br>".join(link(place, readme.roots) for place in row.places) or "-",
        "ours": row.ours,
        "golden": [number(largest(golden, kind), kind) for kind in ("values", "gradients")],
        "live": [number(largest(live, kind), kind) for kind in ("values", "gradients")] if live or not steps else
                ["200 steps", "-"],
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
    return {
        "folder": folder,
        "title": readme.title,
        "rows": rows,
        "measured": sum(bool(row["tests"]) for row in rows),
        "without_code": sum(not row["tests"] and row["theirs"] == "-" for row in rows),
        "largest": [f"{number(test, kind)} ({test['test']})" if test else "-" for kind, test in worst.items()],
        "steps": {name: number(test) for name, test in runs.items()},
        "against": ", ".join(sorted({test["against"] for test in steps})),
        "plot": (KEPT / f"{folder}_trajectory.png").is_file(),
        "code": [f"[{name}@{commit}](https://github.com/{name}/tree/{commit})" for name, commit in clones(readme)],
        "date": max((test["date"] for test in tests), default="-"),
        "others": [f"{test['test']}: {number(test)}" for test in golden + live if test not in of_rows],
    }


def clones(readme: companion.Readme) -> list[tuple[str, str]]:
    """(repository, commit) that a README names, the authors' first."""
    return list(companion.commits(readme.roots).items())[::-1]


def page(home: Path = KEPT) -> str:
    """Text of PARITY.md, from the differences in home/PAPER.json. UserError if a file is damaged."""
    files = {folder: home / f"{folder}.json" for folder in presets.folders()}
    papers = [about(folder, companion.tests_in(path) if path.is_file() else []) for folder, path in files.items()]
    return pages.rendered("parity.md", papers=papers, steps=STEPS)


def main(copy: bool = True, repositories: bool = False) -> None:
    """Copy the measured differences to results/parity, and write PARITY.md.

    Args:
        copy: Copy runs/parity first; with --no-copy, PARITY.md is written from results/parity as it is.
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
    for path in files:
        shutil.copy(path, KEPT)
    write_text("PARITY.md", page())
    print(f"PARITY.md: {len(files)} files were copied from {RUNS} to {KEPT}")


if __name__ == "__main__":
    cli.command_line(lambda: tyro.cli(main, prog="python -m studies.harness.parity"))
