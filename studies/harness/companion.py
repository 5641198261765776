"""Writes an HTML page, which opens offline, with equations, our source and the authors' source side by side.

    python -m studies.harness.companion protoclip [--upstream CLONE] [--out companion]

The page is made from the README: its map names the parts of the paper. For each part it shows the README's sentence and
equation, the source of our functions, the authors' lines beside them if a clone is given, the numbered details, and the
largest differences that tests have measured (`runs/parity/FOLDER.json`, written by every test run). The parts with the
functions that the README recommends come first.
"""

import ast
import html
import itertools
import json
import re
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import tostring

import tyro
from markupsafe import Markup

import shared
from shared import cli, presets
from shared.checkpoints import read_json
from shared.errors import UserError
from studies.harness import pages

try:
    import latex2mathml.converter
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import PythonLexer
except ModuleNotFoundError:
    shared.tell_missing_packages("companion")
    raise

COLUMNS = ("part of the paper", "paper", "ours", "authors' code", "detail")  # of the map's table
HEADER = re.compile(r"^\*\*(.+?)\*\* · (.+)$", re.MULTILINE)  # of a part with an equation: the same cells, between dots
REPOSITORY = re.compile(r"\[([\w.-]+/[\w.-]+)@([0-9a-f]{7,40})\]\([^)]*\)")
LETTER = re.compile(r"`(\w+):` is its (?:`([\w./-]+)`|root)")
LONG, WIDE = 80, 200  # most lines shown of a function or file; most characters shown of a line


@dataclass(frozen=True)
class Function:
    """One of our functions, classes or methods, and its file."""

    file: str
    name: str


@dataclass(frozen=True)
class Place:
    """Lines of one of the authors' files, and the definition around them; the whole file if `first` is None."""

    letter: str
    path: str
    first: int | None = None
    last: int | None = None
    name: str | None = None

    def __str__(self) -> str:
        lines = "" if self.first is None else f":{self.first}" + f"-{self.last}" * (self.last != self.first)
        return f"{self.letter}:{self.path}{lines}"


@dataclass
class Row:
    """A part of the paper: a row of the map, or the line above an equation, with the README's text on it."""

    part: str
    paper: str
    ours: str
    code: str
    functions: list[Function]
    places: list[Place]
    details: list[int]
    text: str = ""  # Markdown: a sentence, equations


@dataclass
class Readme:
    """The parts of a README that a page shows."""

    folder: str
    title: str
    opening: str
    method: str
    first: list[Function]  # those of "Read these three functions", or as many as it names
    rows: list[Row]
    details: dict[int, str]
    roots: dict[str, tuple[str, str, str]] = field(default_factory=dict)  # letter -> repository, commit, folder in it


# ----------------------------------------------------------------------------------------------------- the README read


def section(page: str, heading: str) -> str:
    """The text under a second-level heading; empty if there is none."""
    found = re.search(rf"^## {re.escape(heading)}.*?\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    return found[1] if found else ""


def split_row(line: str) -> list[str]:
    """Cells of a line of a Markdown table."""
    return [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))]


def functions_of(cell: str, folder: str) -> list[Function]:
    """Functions named in a cell: `file.py` in backticks, then names in this file in backticks."""
    found, file = [], None
    for word in re.findall(r"`([^`]+)`", cell):
        if word.endswith(".py"):
            file = word if "/" in word else f"{folder}/{word}"
        elif file is not None and re.fullmatch(r"[\w.]+", word):
            found.append(Function(file, word))
    return found


def places_of(cell: str) -> list[Place]:
    """Places named in a cell, as U:a/loss.py:61, 84-90 `Loss`, data.py:24. A bare file name is in the last folder."""
    found: list[Place] = []
    letter, path = "", ""
    for entry in re.split(r", *", re.sub(r"\([^)]*\)", "", cell)):
        match = re.fullmatch(
            r"(?:([A-Z]\d?):)?(?:([\w./-]+?(?:\.\w+|/))(?::(\d+)(?:-(\d+))?)?|(\d+)(?:-(\d+))?)(?: `([\w.]+)`)?",
            entry.strip(),
        )
        if match is None:
            continue
        if match[1]:
            letter = match[1]
        if match[2]:
            beside = not match[1] and "/" not in match[2] and "/" in path
            path = f"{path.rpartition('/')[0]}/{match[2]}" if beside else match[2]
        first, last = match[3] or match[5], match[4] or match[6]
        if letter and path:
            lines = (int(first), int(last or first)) if first else (None, None)
            found.append(Place(letter, path, *lines, match[7]))
    return found


def numbers_of(cell: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", cell)]


def row_of(cells: list[str], folder: str, text: str = "") -> Row:
    """A part of the paper. UserError if the number of cells is not that of `COLUMNS`."""
    if len(cells) != len(COLUMNS):
        raise UserError(f"{folder}/README.md: {cells[0]} has {len(cells)} cells, not {len(COLUMNS)}: {cells}")
    part, paper, ours, code, detail = cells
    return Row(part, paper, ours, code, functions_of(ours, folder), places_of(code), numbers_of(detail), text)


def read(folder: str) -> Readme:
    """Parse the README of a folder. UserError if it names no parts of the paper."""
    page = (Path(folder) / "README.md").read_text(encoding="utf-8")
    blocks, _, table = section(page, "The method").partition("| part of the paper |")
    method, *blocks = HEADER.split(blocks)  # then name, cells, text in turn
    rows = []
    for part, line, text in zip(blocks[::3], blocks[1::3], blocks[2::3], strict=True):
        cells = [part, *line.split(" · ")]
        cells += [""] * (not cells[-1].startswith("detail"))
        rows.append(row_of(cells, folder, text.partition("\n\nParts without")[0].strip()))
    lines = table.splitlines()[2:]
    rows += [row_of(split_row(line), folder) for line in itertools.takewhile(lambda line: line[:1] == "|", lines)]
    if not rows:
        raise UserError(f"{folder}/README.md names no part of the paper under 'The method'")
    first = functions_of(section(page, "Read these"), folder)
    items = re.split(r"^(\d+)\. ", section(page, "Implementation details"), flags=re.MULTILINE)
    details = {int(n): text.strip() for n, text in zip(items[1::2], items[2::2], strict=True)}
    title, _, opening = page.removeprefix("# ").partition("\n")
    opening = re.split(r"\n## |<!-- claims -->", opening)[0]  # without results
    roots: dict[str, tuple[str, str, str]] = {}
    parts = REPOSITORY.split(" ".join(opening.split()))
    for repository, commit, text in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
        roots |= {letter: (repository, commit, below) for letter, below in LETTER.findall(text)}
    return Readme(folder, title, opening, method, first, rows, details, roots)


# ------------------------------------------------------------------------------------------------------------- sources


def definitions(text: str) -> Iterator[tuple[str, int, int]]:
    """(name, first line, last line) of all functions, classes and methods, and of names assigned outside functions."""

    def walk(nodes: Iterable[ast.AST], prefix: str, local: bool) -> Iterator[tuple[str, int, int]]:
        for node in nodes:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                first = min([node.lineno, *(each.lineno for each in node.decorator_list)])
                yield prefix + node.name, first, node.end_lineno
                yield from walk(node.body, f"{prefix}{node.name}.", local or not isinstance(node, ast.ClassDef))
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    if isinstance(target, ast.Name) and not local:
                        yield prefix + target.id, node.lineno, node.end_lineno
            elif isinstance(node, (ast.If, ast.For, ast.While, ast.With, ast.Try, ast.ExceptHandler)):
                yield from walk(ast.iter_child_nodes(node), prefix, local)

    yield from walk(ast.parse(text).body, "", False)


def source(function: Function) -> tuple[int, str]:
    """(first line, source) of one of our functions. UserError if there is no such file or it does not define it."""
    if not Path(function.file).is_file():
        raise UserError(f"there is no {function.file}: correct the map in the README")
    text = Path(function.file).read_text(encoding="utf-8")
    for name, first, last in definitions(text):
        if name == function.name:
            return first, "\n".join(text.splitlines()[first - 1 : last])
    raise UserError(f"{function.file} has no {function.name}: correct the map in the README")


def commits(roots: dict[str, tuple[str, str, str]]) -> dict[str, str]:
    """{repository: commit that its clone should be at}; if the README names several, the first."""
    return {repository: commit for repository, commit, _ in reversed(roots.values())}


def authors_path(place: Place, roots: dict[str, tuple[str, str, str]], clones: dict[str, Path]) -> Path | None:
    """Path of a place in its repository's clone (the file may be missing); None if there is no clone for its commit."""
    repository, commit, below = roots[place.letter]
    if repository not in clones or commit != commits(roots)[repository]:
        return None
    return clones[repository] / below / place.path


def enclosing(text: str, first: int, last: int | None = None) -> list[tuple[str, int, int]]:
    """The `definitions` that contain lines of Python, smallest first; empty if the text does not parse."""
    try:
        around = [each for each in definitions(text) if each[1] <= first and (last or first) <= each[2]]
    except SyntaxError:
        return []
    return sorted(around, key=lambda each: each[2] - each[1])


def code_cells(text: str) -> str:
    """The code cells of a notebook, each after a comment with its number."""
    cells = json.loads(text)["cells"]
    sources = {number: "".join(cell["source"]) for number, cell in enumerate(cells, 1) if cell["cell_type"] == "code"}
    return "\n\n".join(f"# cell {number}\n{source}" for number, source in sources.items() if source.strip())


@dataclass(frozen=True)
class Excerpt:
    """Lines of a file from `first` on, the range that the README names (`marked`), and a note on omitted lines."""

    first: int
    text: str
    marked: range
    cut: str


def authors_lines(file: Path, place: Place) -> Excerpt:
    """Lines of a place. For a single line of Python, up to `LONG` lines of the function around it."""
    text = file.read_text(encoding="utf-8", errors="replace")
    what = file.name
    if file.suffix == ".ipynb":
        text, what = code_cells(text), f"the code cells of {file.name}"
    lines = text.splitlines()
    first, last = (place.first, min(place.last, len(lines))) if place.first is not None else (1, len(lines))
    if place.first is not None and first == last and file.suffix == ".py":
        around = enclosing(text, first)[:1]
        what, first, last = around[0] if around else (what, first, last)
    whole, marked = (first, last), range(0)
    if place.first is not None and whole != (place.first, place.last):
        marked = range(place.first, place.last + 1)
    if last - first >= LONG and (place.first is None or marked):
        first = max(first, min((place.first or first) - LONG // 2, last - LONG + 1))
        last = first + LONG - 1
    cut = [f"lines {first}-{last} of {what}, {whole[0]}-{whole[1]}"] * ((first, last) != whole)
    shown = lines[first - 1 : last]
    if any(len(line) > WIDE for line in shown):
        shown = [line if len(line) <= WIDE else f"{line[:WIDE]} ..." for line in shown]
        cut.append(f"lines of more than {WIDE} characters are cut")
    return Excerpt(first, "\n".join(shown), marked, "; ".join(cut))


# ----------------------------------------------------------------------------------------------------------------- HTML


def code(text: str, first: int, marked: range = range(0)) -> Markup:
    """Python as highlighted HTML with line numbers; the lines `marked` are emphasised."""
    lines = [line - first + 1 for line in marked]
    formatter = HtmlFormatter(linenos="inline", linenostart=first, nobackground=True, hl_lines=lines)
    return Markup(highlight(text, PythonLexer(stripnl=False), formatter))


def equation(latex: str) -> Markup:
    """LaTeX as MathML, in which text is escaped. UserError if it is invalid."""
    try:
        plain = re.sub(r"\\tag\{(.+?)\}", r"\\qquad (\1)", latex.strip())  # MathML has no tags
        math = latex2mathml.converter.convert_to_element(plain, display="block")
    except Exception as error:  # of any type
        raise UserError(f"an equation could not be read ({type(error).__name__}): {latex.strip()}") from error
    for node in math.iter():  # symbols are entities such as &#x02211;
        node.text = html.unescape(node.text or "")
        node.attrib.pop("href", None)
    return Markup('<div class="equation">{}</div>\n').format(Markup(tostring(math, encoding="unicode")))


def prose(text: str) -> Markup:
    """Markdown with $$ equations -> HTML with MathML."""
    parts = re.split(r"^\$\$\n(.*?)\n\$\$$", text, flags=re.MULTILINE | re.DOTALL)  # equations at odd places
    return Markup().join(equation(part) if i % 2 else pages.to_html(part) for i, part in enumerate(parts))


def anchor(part: str) -> str:
    return re.sub(r"\W+", "-", part.lower()).strip("-")


def link_to(place: Place, roots: dict[str, tuple[str, str, str]]) -> str:
    """Address of a place on GitHub."""
    repository, commit, below = roots[place.letter]
    path = f"{below.rstrip('/')}/{place.path}".lstrip("/")
    lines = "" if place.first is None else f"#L{place.first}-L{place.last}"
    return f"https://github.com/{repository}/blob/{commit}/{path}{lines}"


def measured(functions: list[Function], tests: list[dict]) -> list[dict]:
    """The tests of these functions, which have the largest differences that were measured, a date and a commit.

    Tests name functions with their module, as `paper.model.loss`, and a `forward` by its class.
    """
    names = set().union(*map(names_of, functions))
    return [test for test in tests if names & set(test["functions"])]


def names_of(function: Function) -> set[str]:
    """Names of a function in tests."""
    name = f"{function.file.removesuffix('.py').replace('/', '.')}.{function.name}"
    return {name, name.removesuffix(".forward")}


def shown(row: Row, readme: Readme, clones: dict[str, Path], tests: list[dict]) -> dict[str, Any]:
    """What the template shows of a row of the map: text, both sources, details, differences."""
    theirs, seen = [], set()
    for place in row.places:
        label, file = f"{place} {place.name or ''}", authors_path(place, readme.roots, clones)
        found = authors_lines(file, place) if file is not None and file.is_file() else None
        lines = {(file, found.first + i) for i in range(found.text.count("\n") + 1)} if found else set()
        twice = lines <= seen  # in a class that is shown already
        seen |= lines
        source_of = code(found.text, found.first, found.marked) if found and not twice else ""
        theirs.append((label, link_to(place, readme.roots), found.cut if source_of else "", source_of))
    classes = {(each.file, each.name) for each in row.functions}
    functions = [each for each in row.functions if (each.file, each.name.rpartition(".")[0]) not in classes]
    ours = [(function.file, *source(function)) for function in functions]
    return {
        "row": row,
        "anchor": anchor(row.part),
        "text": prose(row.text),
        "ours": [(f"{file}:{first}", code(text, first)) for file, first, text in ours],
        "ours_named": prose(row.ours),
        "theirs": theirs,
        "beside": any(source_of for *_, source_of in theirs),
        "theirs_named": prose(row.code),
        "details": [(n, prose(readme.details[n])) for n in row.details if n in readme.details],
        "tests": measured(row.functions, tests),
    }


def page(readme: Readme, clones: dict[str, Path], tests: list[dict]) -> str:
    """HTML of the whole page."""
    recommended = [row for row in readme.rows if any(function in row.functions for function in readme.first)]
    others = [row for row in readme.rows if row not in recommended]
    return pages.rendered(
        "companion.html",
        readme=readme,
        colours=Markup(HtmlFormatter(nobackground=True).get_style_defs(".highlight")),
        opening=prose(readme.opening),
        method=prose(readme.method),
        rows=[shown(row, readme, clones, tests) for row in [*recommended, *others]],
        recommended=len(recommended),
        measured=bool(tests),
    )


# --------------------------------------------------------------------------------------------------------------- script


def is_clone(folder: Path, repository: str, readme: Readme) -> bool:
    """Whether a folder holds all of a repository's files that the README names."""
    places = [place for row in readme.rows for place in row.places]
    found = [authors_path(place, readme.roots, {repository: folder}) for place in places]
    return any(found) and all(path is None or path.exists() for path in found)


def clones_of(readme: Readme, upstream: Path | None, clones: Path | None) -> dict[str, Path]:
    """Repository -> folder of its clone.

    clones: a folder that contains clones, named like their repositories. upstream: one clone, recognised by its name
    or its files, with others beside it; or also a folder that contains clones.
    """
    names = {each: each.partition("/")[2] for each in dict.fromkeys(root[0] for root in readme.roots.values())}
    found = {} if clones is None else {each: clones / name for each, name in names.items()}
    if upstream is not None:
        own = [each for each, name in names.items() if name == upstream.name]
        own += [each for each in names if is_clone(upstream, each, readme)]
        beside = upstream.parent if own else upstream
        found |= {each: beside / name for each, name in names.items() if (beside / name).is_dir()}
        found |= {each: upstream for each in own[:1]}
    return {repository: path for repository, path in found.items() if path.is_dir()}


def check_clones(readme: Readme, clones: dict[str, Path]) -> None:
    """Print which clones are missing, and which are not at the README's commit."""
    for repository, commit in commits(readme.roots).items():
        if repository not in clones:
            print(f"note: no clone of {repository} was found: its lines are shown as links only")
            continue
        git = ["git", "-C", str(clones[repository]), "rev-parse", "HEAD"]
        head = subprocess.run(git, capture_output=True, text=True).stdout.strip()
        if head and not head.startswith(commit):
            print(f"note: {clones[repository]} is at {head[:7]}, the README's lines are those of {commit}")


def tests_in(file: Path) -> list[dict]:
    """The tests in runs/parity/FOLDER.json. UserError if the file is damaged."""
    advice = "remove it; the next test run writes it again"
    tests = read_json(file, advice).get("tests")
    if not isinstance(tests, list) or not all(isinstance(test, dict) and "functions" in test for test in tests):
        raise UserError(f"{file} holds no measured differences: {advice}")
    return tests


def main(
    folders: tyro.conf.Positional[tuple[str, ...]] = (),
    upstream: Path | None = None,
    clones: Path | None = None,
    out: Path = Path("companion"),
) -> None:
    """Write companion pages: each part of a paper with our source, the authors' source, and measured differences.

    Args:
        folders: Folders of the papers; all if none is given.
        upstream: Clone of the authors' repository, for a single folder. Clones of other repositories that the README
            names are expected beside it, under their names; or this is the folder that contains all clones.
        clones: Folder that contains clones named like their repositories, for several folders.
        out: Output folder for FOLDER.html.
    """
    names = [folder.replace("-", "_") for folder in folders] or presets.folders()
    for name in names:
        if name not in presets.folders():
            raise UserError(f"{name} is not a paper's folder; those are {', '.join(presets.folders())}")
    if upstream is not None and len(names) != 1:
        raise UserError("--upstream needs exactly one folder: name it, or pass --clones for several")
    upstream, clones = (path and path.expanduser().resolve() for path in (upstream, clones))
    for flag, path in (("--upstream", upstream), ("--clones", clones)):
        if path is not None and not path.is_dir():
            raise UserError(f"{flag} {path} is no folder")
    out.mkdir(parents=True, exist_ok=True)
    for name in names:
        readme, file, path = read(name), Path(f"runs/parity/{name}.json"), out / f"{name}.html"
        tests = tests_in(file) if file.is_file() else []
        beside = clones_of(readme, upstream, clones)
        if upstream is not None or clones is not None:
            check_clones(readme, beside)
        path.write_text(page(readme, beside, tests), encoding="utf-8")
        functions = sum(len(row.functions) for row in readme.rows)
        print(f"{path}: {len(readme.rows)} parts, {functions} functions of ours, {len(tests)} measured differences")


if __name__ == "__main__":
    cli.command_line(lambda: tyro.cli(main))
