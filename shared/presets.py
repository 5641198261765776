"""All presets of all papers in one table: `python -m shared.presets [FOLDER]` (`make presets`).

`<folder>/config.py` has SCRIPTS, {script: {preset: (the row of the paper that it stands for, settings)}}. Run a preset
with `python -m FOLDER.SCRIPT PRESET`. The numbers in a row are the authors'; ours are in RESULTS.md.
"""

import importlib
from typing import Annotated, Any

import tyro

from shared import cli
from shared.checkpoints import ROOT
from shared.errors import UserError
from shared.evaluation import table


def folders() -> list[str]:
    """Sorted names of the papers' folders: those with model.py, train.py and eval.py."""
    files = ("model.py", "train.py", "eval.py")
    found = ROOT.glob("*/model.py")
    return sorted(path.parent.name for path in found if all((path.parent / file).is_file() for file in files))


def scripts(folder: str) -> dict[str, dict[str, tuple[str, Any]]]:
    """{script: {preset: (row of the paper, settings)}} of a paper."""
    return importlib.import_module(f"{folder}.config").SCRIPTS


def rows(folder: str) -> list[dict[str, str]]:
    """A folder's presets as rows of the table."""
    return [
        {"preset": f"{folder}.{script} {preset}", "row of the paper: the authors' numbers": row}
        for script, presets in scripts(folder).items()
        for preset, (row, _) in presets.items()
    ]


def main(folder: Annotated[str | None, tyro.conf.Positional] = None) -> None:
    """Every preset with its row of the paper's tables.

    Args:
        folder: Only the presets of this paper.
    """
    name = folder and folder.replace("-", "_")
    if name not in (None, *folders()):
        raise UserError(f"{folder} is not a paper's folder; those are {', '.join(folders())}")
    found = [row for each in folders() if name in (None, each) for row in rows(each)]
    print(table(found))
    print(f"\n{len(found)} presets. Run one with `python -m PRESET`; --dry-run shows its schedule and memory.")


if __name__ == "__main__":
    cli.command_line(lambda: tyro.cli(main))
