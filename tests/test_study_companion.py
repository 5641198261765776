"""Companion pages: what READMEs' maps say is there, in our files and in the authors'."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from scripts import ROOT

from shared import presets
from shared.study import companion
from shared.study.companion import Function, Place

README = """# A paper

Authors' code:
[them/Code@abcdef1](https://github.com/them/Code/tree/abcdef1) (MIT); `U:` is its `src/` and `V:` is its root.

## The method in one page
Text.

| part of the paper | paper | ours | authors' code | detail |
| --- | --- | --- | --- | --- |
| loss | eq. 1 | `model.py` `loss`, `Model.forward` | U:a/loss.py:2, 5-6, other.py:1 | 1, 2 |
| plumbing | - | `shared/run.py` `gather` | - | |

## Equations
**loss.** Sums the squares.

$$
L = \\sum_i x_i^2 < y
$$

**plumbing.** Gathers.

## Implementation details
1. **First** thing.
2. Second
   thing.

## Results here
"""


@pytest.fixture
def paper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "paper"
    folder.mkdir()
    (folder / "README.md").write_text(README)
    (folder / "model.py").write_text(
        "def loss(x):\n    return x\n\n\nclass Model:\n    @staticmethod\n    def forward():\n        ...\n"
    )
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared/run.py").write_text("def gather(): ...\n")
    monkeypatch.chdir(tmp_path)
    return folder


def test_a_readme_is_read(paper: Path):
    readme = companion.read("paper")
    loss, plumbing = readme.rows
    assert loss.functions == [Function("paper/model.py", "loss"), Function("paper/model.py", "Model.forward")]
    assert loss.places == [Place("U", "a/loss.py", 2, 2), Place("U", "a/loss.py", 5, 6), Place("U", "a/other.py", 1, 1)]
    assert loss.details == [1, 2] and readme.details == {1: "**First** thing.", 2: "Second\n   thing."}
    assert loss.text.startswith("Sums the squares.") and plumbing.text == "Gathers."
    assert plumbing.places == [] and plumbing.functions == [Function("shared/run.py", "gather")]
    assert readme.roots == {"U": ("them/Code", "abcdef1", "src/"), "V": ("them/Code", "abcdef1", "")}


def test_a_page_shows_both_sides(paper: Path, tmp_path: Path):
    clone = tmp_path / "Code/src/a"
    clone.mkdir(parents=True)
    (clone / "loss.py").write_text("def theirs(x):\n    return x ** 2\n\n\ndef more():\n    pass\n")
    readme = companion.read("paper")
    page = companion.page(readme, companion.clones_of(readme, tmp_path / "Code", None), [])
    text = re.sub(r"<[^>]+>", "", page)
    assert "def theirs(x)" in text and "def more()" in text and "class Model" not in text and "@staticmethod" in text
    assert "https://github.com/them/Code/blob/abcdef1/src/a/loss.py#L5-L6" in page
    assert page.count("<math") == 1 and "Second" in text and "No differences have been measured" in text
    alone = companion.page(readme, {}, [])
    assert "def theirs" not in re.sub(r"<[^>]+>", "", alone)


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ("`loss`, ", "`lost`, ", "paper/model.py has no lost: mend the README's map"),
        ("| loss | eq. 1 |", "| loss |", "a row of the map has 4 cells, not 5"),
        ("| part of the paper |", "| part |", "has no map"),
        ("< y", "\\left( y", "an equation could not be read"),
    ],
)
def test_what_a_readme_says_wrongly_is_said(paper: Path, old: str, new: str, error: str):
    file = paper / "README.md"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))
    with pytest.raises(ValueError, match=re.escape(error)):
        companion.page(companion.read("paper"), {}, [])


@pytest.mark.parametrize("folder", presets.folders())
def test_every_row_of_a_map_is_there(folder: str, monkeypatch: pytest.MonkeyPatch):
    """Functions, letters, details; a sentence to each row, and no block of equations without a row."""
    monkeypatch.chdir(ROOT)
    readme = companion.read(folder)
    text = companion.section((ROOT / folder / "README.md").read_text(), "Equations")
    assert re.findall(r"^\*\*(.+?)\.\*\* ", text, re.MULTILINE) == [row.part for row in readme.rows]
    for row in readme.rows:
        assert row.functions and row.text and row.paper, row.part
        assert row.code == "-" or row.places, f"{row.part}: {row.code}"
        assert {place.letter for place in row.places} <= set(readme.roots), row.part
        assert set(row.details) <= set(readme.details), row.part
        for function in row.functions:
            companion.source(function)
        companion.prose(row.text)


def test_authors_lines_lie_in_definitions(upstream: Path, monkeypatch: pytest.MonkeyPatch):
    """With --upstream CLONE: files exist, and lines of Python lie within a function or class, or in a script's body."""
    monkeypatch.chdir(ROOT)
    checked = 0
    for folder in presets.folders():
        readme = companion.read(folder)
        clones = companion.clones_of(readme, None, upstream.parent)
        for row in readme.rows:
            for place in row.places:
                repository, commit, below = readme.roots[place.letter]
                if clones.get(repository, Path()).resolve() != upstream or commit != readme.roots["U"][1]:
                    continue  # of another clone, or of another commit than what is checked out
                path = upstream / below / place.path
                assert path.exists(), f"{folder}: {place}"
                if place.first is not None and path.suffix == ".py":
                    lines = path.read_text(errors="replace").splitlines()
                    assert place.last <= len(lines) and lines[place.first - 1].strip(), f"{folder}: {place}"
                    checked += 1
    assert checked, f"no README names {upstream.name}"


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.chdir(ROOT)
    companion.main(("lexvla",), out=tmp_path)
    assert f"{tmp_path}/lexvla.html: " in capsys.readouterr().out and (tmp_path / "lexvla.html").is_file()
    with pytest.raises(ValueError, match="--upstream is a clone for one folder"):
        companion.main(("lexvla", "flame"), upstream=tmp_path)
    with pytest.raises(ValueError, match="--clones .* is no folder"):
        companion.main(clones=tmp_path / "none")
    command = [sys.executable, "-m", "shared.study.companion", "lexvlo"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and "lexvlo is no paper's folder; those are" in result.stderr
