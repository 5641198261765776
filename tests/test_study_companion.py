"""Companion pages: everything named in the READMEs' maps exists in our files and the authors'."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from scripts import ROOT, one_sentence

from shared import presets
from studies.harness import companion
from studies.harness.companion import Function, Place

README = """# A paper

Authors' code:
[them/Code@abcdef1](https://github.com/them/Code/tree/abcdef1) (MIT); `U:` is its `src/` and `V:` is its root.

## Read these three functions
1. `shared/run.py` `gather`: gathers.

## The method, part by part
Text.

**loss** · eq. 1 · `model.py` `loss`, `Model`, `Model.forward` · U:a/loss.py:2 `theirs`, 5-6, other.py:1 · detail 1, 2

Sums the squares.

$$
L = \\sum_i x_i^2 < y \\tag{1}
$$

Parts without an equation:

| part of the paper | paper | ours | authors' code | detail |
| --- | --- | --- | --- | --- |
| plumbing | - | `shared/run.py` `gather` | - | |

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
    assert loss.functions == [Function("paper/model.py", name) for name in ("loss", "Model", "Model.forward")]
    assert readme.method.strip() == "Text." and readme.first == [Function("shared/run.py", "gather")]
    assert loss.places == [
        Place("U", "a/loss.py", 2, 2, "theirs"), Place("U", "a/loss.py", 5, 6), Place("U", "a/other.py", 1, 1),
    ]  # fmt: skip
    assert loss.details == [1, 2] and readme.details == {1: "**First** thing.", 2: "Second\n   thing."}
    assert loss.text.startswith("Sums the squares.") and loss.text.endswith("$$") and plumbing.text == ""
    assert plumbing.places == [] and plumbing.functions == [Function("shared/run.py", "gather")]
    assert readme.roots == {"U": ("them/Code", "abcdef1", "src/"), "V": ("them/Code", "abcdef1", "")}


def test_a_page_shows_both_sides(paper: Path, tmp_path: Path):
    clone = tmp_path / "Code/src/a"
    clone.mkdir(parents=True)
    (clone / "loss.py").write_text("def theirs(x):\n    return x ** 2\n\n\ndef more():\n    pass\n")
    readme = companion.read("paper")
    page = companion.page(readme, companion.clones_of(readme, tmp_path / "Code", None), [])
    text = re.sub(r"<[^>]+>", "", page)
    assert "def theirs(x)" in text and "def more()" in text
    assert text.count("@staticmethod") == 1  # in its class, and not again
    assert text.index("def gather") < text.index("def loss")  # the recommended functions come first
    assert "https://github.com/them/Code/blob/abcdef1/src/a/loss.py#L5-L6" in page and "U:a/loss.py:2 theirs" in page
    assert page.count('class="hll"') == 1  # the line that the map names, within the function
    assert page.count("<math") == 1 and "Second" in text
    alone = companion.page(readme, {}, [])
    assert "def theirs" not in re.sub(r"<[^>]+>", "", alone)


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ("`loss`, ", "`lost`, ", "paper/model.py has no lost"),
        ("**loss** · eq. 1 · `model.py`", "**loss** · `model.py`", "loss has 4 cells, not 5"),
        ("| plumbing | - |", "| plumbing |", "plumbing has 4 cells, not 5"),
        ("## The method, part by part", "## A method", "names no part of the paper"),
        ("< y", "\\left( y", "equation"),
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
    """Functions, letters and details exist; a part stands once; the functions to read are in the map."""
    monkeypatch.chdir(ROOT)
    readme = companion.read(folder)
    assert len({row.part for row in readme.rows}) == len(readme.rows)
    assert 3 <= len(readme.first) and set(readme.first) <= {each for row in readme.rows for each in row.functions}
    for row in readme.rows:
        assert row.functions and row.paper, row.part
        assert row.code == "-" or row.places, f"{row.part}: {row.code}"
        assert {place.letter for place in row.places} <= set(readme.roots), row.part
        assert set(row.details) <= set(readme.details), row.part
        for function in row.functions:
            companion.source(function)
        companion.prose(row.text)


class Tags(HTMLParser):
    """The tags of a page, and all values of their attributes."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.values, self.names = set(), [], set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.names |= {name for name, _ in attrs}
        self.values += [value or "" for _, value in attrs]


def test_html_of_a_readme_is_text(paper: Path):
    """In its title, prose, map, equations and details, and in what tests have written; comments are left out."""
    evil, file = "<img src=x onerror=alert(1)>", paper / "README.md"
    page = (
        file.read_text()
        .replace("# A paper", f"# A {evil}")
        .replace("## Read", f"{evil}\n\n<script>a()</script>\n\n## Read", 1)
    )
    page = page.replace("Text.", f"Text {evil} [link](javascript:alert(1)).<!-- results -->\n\n<!-- /results -->")
    page = page.replace("· eq. 1 ·", f"· {evil} ·").replace("Sums", f"{evil} Sums")
    page = page.replace("shared/run.py` `gather` | - |", f"shared/run.py` `gather` | {evil} |")
    page = page.replace("< y", "< y \\text{<img src=x onerror=alert(1)>}").replace(
        "**First** thing.", f"**First** {evil}"
    )
    file.write_text(page)
    test = dict.fromkeys(("test", "against", "date", "commit"), evil) | {"functions": ["paper.model.loss"]}
    page = companion.page(companion.read("paper"), {}, [test | {"values": 1e-7, "gradients": None}])
    found = Tags(page)
    assert not {"img", "script"} & found.tags and "onerror" not in found.names
    assert not any(value.startswith("javascript") for value in found.values)
    assert page.count("&lt;img src=x onerror=alert(1)&gt;") >= 10 and "results --" not in page
    assert "&lt;script&gt;" in page and "1.0e-07" in page and page.count("<math") == 1


def test_long_functions_notebooks_and_lines_are_cut_and_said(tmp_path: Path):
    long = ["def long(x):", *(f"    x = {i}" for i in range(300)), "    return x"]
    (tmp_path / "a.py").write_text("\n".join([*long, "", "def short(): ...", f"y = {10**250}"]))

    def shown(name: str, *place) -> companion.Excerpt:
        return companion.authors_lines(tmp_path / name, Place("U", name, *place))

    found = shown("a.py", 200, 200)
    assert found.text.splitlines()[200 - found.first] == "    x = 198" and found.marked == range(200, 201)
    assert len(found.text.splitlines()) == companion.LONG and "160-239" in found.cut
    assert shown("a.py", 302, 302).text.endswith("return x") and shown("a.py", 1, 1).first == 1
    assert shown("a.py", 304, 304) == companion.Excerpt(304, "def short(): ...", range(0), "")
    assert len(shown("a.py", 2, 200).text.splitlines()) == 199 and not shown("a.py", 2, 200).cut
    assert "1-80" in shown("a.py").cut
    assert "200 characters" in shown("a.py", 305, 305).cut
    cells = [
        {"cell_type": "code", "source": ["import a\n", "a.b()"]}, {"cell_type": "markdown", "source": "words"},
        {"cell_type": "code", "source": "c = 1"}, {"cell_type": "code", "source": []},
    ]  # fmt: skip
    (tmp_path / "a.ipynb").write_text(json.dumps({"cells": cells}))
    assert shown("a.ipynb").text == "# cell 1\nimport a\na.b()\n\n# cell 3\nc = 1"


def test_definitions_around_lines():
    text = "A = 1\nif A:\n  class B:\n    C = 2\n    def d(self):\n      e = 3\n      def f(): ...\n"
    names = [[name for name, *_ in companion.enclosing(text, line)] for line in range(1, 8)]
    assert names == [["A"], [], ["B"], ["B.C", "B"], ["B.d", "B"], ["B.d", "B"], ["B.d.f", "B.d", "B"]]
    assert [name for name, *_ in companion.enclosing(text, 4, 6)] == ["B"] and companion.enclosing("(", 1) == []


def test_clones_are_found_by_name_and_by_files(paper: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    """One clone with others beside it, a clone with another name, a folder of clones, and a folder that is not a
    clone."""
    other = "[her/Tools@1234567](https://github.com/her/Tools); `T:` is its root."
    text = (paper / "README.md").read_text().replace("is its root.", f"is its root. {other}", 1)
    (paper / "README.md").write_text(text.replace("`gather` | - |", "`gather` | T:x.py:1 |"))
    readme, up = companion.read("paper"), tmp_path / "up"
    for name in ("Code/src/a", "Tools", "other"):
        (up / name).mkdir(parents=True)
    for name in ("Code/src/a/loss.py", "Code/src/a/other.py", "Tools/x.py"):
        (up / name).write_text("x = 1\n")
    both = {"them/Code": up / "Code", "her/Tools": up / "Tools"}
    for upstream in ("Code", "Tools", ""):
        assert companion.clones_of(readme, up / upstream, None) == companion.clones_of(readme, None, up) == both
    assert companion.clones_of(readme, up / "other", None) == {}
    (up / "Code").rename(tmp_path / "mine")
    found = companion.clones_of(readme, tmp_path / "mine", None)
    assert found == {"them/Code": tmp_path / "mine"}
    companion.check_clones(readme, found)
    assert "her/Tools" in capsys.readouterr().out


def test_tests_are_named_with_their_module():
    test = {"test": "loss", "functions": ["paper.model.loss", "paper.model.Model"], "values": 1e-7, "gradients": None,
            "against": "golden data", "date": "2026-01-01", "commit": "abc"}  # fmt: skip
    for file, name, known in (
        ("paper/model.py", "loss", True), ("paper/eval.py", "loss", False), ("paper/model.py", "Model.forward", True),
        ("paper/model.py", "Model.encode", False), ("paper/model.py", "Model", True),
    ):  # fmt: skip
        assert bool(companion.measured([Function(file, name)], [test])) == known, (file, name)


@pytest.mark.parametrize("folder", presets.folders())
def test_authors_lines_lie_in_definitions(folder: str, upstream: Path, monkeypatch: pytest.MonkeyPatch):
    """With --upstream, a clone or a folder of clones: files exist, and each line of Python lies in the definition that
    the row names, or outside of definitions if it names none."""
    monkeypatch.chdir(ROOT)
    readme, checked = companion.read(folder), 0
    clones = companion.clones_of(readme, upstream, None)
    for place in (place for row in readme.rows for place in row.places):
        path = companion.authors_path(place, readme.roots, clones)
        if path is None:
            continue
        checked += 1
        assert path.exists(), place
        if place.first is not None and path.suffix == ".py":
            text = path.read_text(errors="replace")
            lines = text.splitlines()
            assert place.last <= len(lines) and lines[place.first - 1].strip(), place
            around = [name for name, *_ in companion.enclosing(text, place.first, place.last)]
            assert place.name in around if around else place.name is None, f"{place} {place.name}: it lies in {around}"
    if not checked:
        pytest.skip(f"{upstream} is no clone that {folder}/README.md names, nor a folder of such")


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, in_process):
    monkeypatch.chdir(ROOT)
    companion.main(("lexvla",), out=tmp_path)
    assert f"{tmp_path}/lexvla.html: " in capsys.readouterr().out and (tmp_path / "lexvla.html").is_file()
    with pytest.raises(ValueError, match="--upstream"):
        companion.main(("lexvla", "flame"), upstream=tmp_path)
    with pytest.raises(ValueError, match="--clones"):
        companion.main(clones=tmp_path / "none")
    monkeypatch.setenv("HOME", str(tmp_path))
    companion.main(("lexvla",), upstream=Path("~"), out=tmp_path)
    printed = capsys.readouterr().out
    assert "jzhoubu/VDR" in printed and "naver/splade" in printed
    result = in_process("lexvlo", module="studies.harness.companion")
    assert result.code == 2 and "lexvlo is not a paper's folder" in result.err


def test_damaged_differences_are_refused(tmp_path: Path):
    for text in ("{", "{}", '{"tests": 3}', '{"tests": [1]}', '{"tests": [{"test": "a"}]}'):
        (tmp_path / "nmtune.json").write_text(text)
        with pytest.raises(ValueError, match="nmtune.json holds no .*remove it"):
            companion.tests_in(tmp_path / "nmtune.json")


def test_the_command_without_its_extra():
    run = "runpy.run_module('studies.harness.companion', run_name='__main__')"
    command = [sys.executable, "-c", f"import runpy, sys; sys.modules['pygments'] = None; {run}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2 and one_sentence(result.stderr)
    assert "pygments" in result.stderr and "pip install '.[companion]'" in result.stderr
