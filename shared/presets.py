"""All presets of all papers in one table: `python -m shared.presets [FOLDER] [--json]` (`make presets`).

PAPER_ROWS in each `<folder>/config.py`, {script: {preset: Row}}, gives the paper's table row of each preset;
`python -m FOLDER.SCRIPT PRESET` runs it. The numbers are the authors'; ours are in RESULTS.md. LEFT_OUT beside it,
{row: reason}, lists the paper's table rows without a preset.
"""

import importlib
import json
from typing import Annotated, NamedTuple

import tyro

from shared import cli
from shared.checkpoints import ROOT
from shared.errors import UserError
from shared.evaluation import table

NOT_STATED = "not stated"
NOTE = f"""

{{}} presets. Run one with `python -m FOLDER.PRESET`, with both names as in the table; `--dry-run` shows its sizes,
schedule, memory and disk space.
"{NOT_STATED}": found neither on the authors' pages nor in those parts of the paper that could be read."""


class Row(NamedTuple):
    """The paper's setting of a preset."""

    source: str  # table or figure of the paper or of the authors' page, and its row
    data: str = NOT_STATED
    gpus: str = NOT_STATED
    number: str = NOT_STATED  # the authors' result, metric first


EMBEDDED = Row("ours", "embedded corpus", "none: CPU", "none: other data")
OWN = Row("ours", "your own", "none: CPU", "none: other data")


def folders() -> list[str]:
    """Sorted names of the papers' folders: those with model.py, train.py and eval.py."""
    files = ("model.py", "train.py", "eval.py")
    found = ROOT.glob("*/model.py")
    return sorted(path.parent.name for path in found if all((path.parent / file).is_file() for file in files))


def rows(folder: str) -> list[dict[str, str]]:
    """A folder's presets as rows of the table."""
    scripts: dict[str, dict[str, Row]] = importlib.import_module(f"{folder}.config").PAPER_ROWS
    return [
        {
            "folder": folder,
            "paper's table and row": row.source,
            "preset": f"{script} {preset}",
            "data": row.data,
            "GPUs": row.gpus,
            "the authors' number": row.number,
        }
        for script, presets in scripts.items()
        for preset, row in presets.items()
    ]


def left_out(folder: str) -> list[dict[str, str]]:
    """Rows of the paper's tables without a preset, and why."""
    reasons: dict[str, str] = importlib.import_module(f"{folder}.config").LEFT_OUT
    return [{"folder": folder, "paper's table and row": row, "no preset": why} for row, why in reasons.items()]


def main(
    folder: Annotated[str | None, tyro.conf.Positional] = None,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Every preset with its row of the paper's tables, and the rows without a preset.

    Args:
        folder: Only the presets of this paper.
        as_json: Print a JSON list of rows.
    """
    name = folder and folder.replace("-", "_")
    if name not in (None, *folders()):
        raise UserError(f"{folder} is not a paper's folder; those are {', '.join(folders())}")
    chosen = [each for each in folders() if name in (None, each)]
    found = [row for each in chosen for row in rows(each)]
    if as_json:
        return print(json.dumps(found, indent=2, ensure_ascii=False))
    missing = [row for each in chosen for row in left_out(each)]
    print(table(found) + NOTE.format(len(found)) + "\n\n" + table(missing))


if __name__ == "__main__":
    cli.command_line(lambda: tyro.cli(main, prog="python -m shared.presets"))
