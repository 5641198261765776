"""The paper presets against the authors' parsers, scripts and READMEs: `pytest tests/test_preset_sources.py`.

tests/presets/FOLDER.json says what the authors have and where. Without a clone the presets are compared with it; with
`--upstream CLONE` the table is compared with its sources, too, and the comparison is printed. Clones of other
repositories of the table are found beside it, or all in the folder CLONE, by their names.

    "presets": {SCRIPT: {PRESETS: {FIELD: [THEIRS, SOURCE, MORE]}}}

PRESETS: names or patterns, apart by spaces; what a later one says replaces what an earlier one does. Beside fields they
    have "command": where their command is; "unused": fields that have no effect there; "unstated": [NUMBER, WORD], the
    README's implementation detail, with a word of it, that says that the rest is published nowhere.
FIELD: in parentheses if it is no option here; the table then says what our code does.
SOURCE: REPOSITORY/PATH:LINE and one of the following, or several such with " * " or " / " between them. Other sources,
    such as sections of the paper, cannot be read here.
        --flag    its default in a parser (.py), or its value in the command of which the line is a part
        NAME      what follows NAME and "=" or ":" in the line
        'TEXT'    the number in TEXT if it has one, else TEXT itself; it is in the line
        no TEXT   nothing (null): the file has no such text
MORE: {"means": OURS} if we say the same in other words, {"ours": OURS, "detail": [NUMBER, WORD]} if we differ.

"ours" are fields that the authors do not have, "aside" flags of their commands that have no field.
"""

import ast
import dataclasses
import functools
import importlib
import json
import re
import shlex
from collections import Counter, defaultdict
from fnmatch import fnmatchcase
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from parity import check_commit
from short_runs import offered

from shared import evaluation, presets
from studies.harness import companion

ROOT = Path(__file__).parent.parent
RUNS = set(  # where a run is, what it prints and how much memory it takes, not what it computes
    (
        "out data cache window_shards device workers strict save_every keep_every keep_best log_every eval_every "
        "eval_set dry_run accumulate grad_checkpointing keep_in_memory distinct_captions stream"
    ).split()
)
NUMBER = r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:e-?\d+)?"
VALUE = r"\([^)]*\)|\[[^]]*\]|\"[^\"]*\"|'[^']*'|[^\s,#)}\]]+"


class Fact(NamedTuple):
    theirs: Any
    source: str
    ours: Any  # what our field has to be
    detail: tuple[int, str] | None  # that explains the difference


class Preset(NamedTuple):
    name: str  # SCRIPT PRESET
    cfg: Any
    facts: dict[str, Fact]
    command: str | None
    unused: set[str]
    unstated: tuple[int, str] | None


def table(folder: str) -> dict:
    return json.loads((ROOT / f"tests/presets/{folder}.json").read_text(encoding="utf-8"))


def configurations(folder: str) -> dict[str, Any]:
    """{`SCRIPT PRESET`: configuration} of the presets that correspond to a setting of the authors."""
    known, found = offered(folder), {}
    listed = {
        f"{script} {name}": row for script, of in presets.scripts(folder).items() for name, (row, _) in of.items()
    }
    for name, row in listed.items():
        if row.startswith(("ours", "not in the paper")):
            continue
        if name.startswith("evaluate "):  # a table of models
            models = importlib.import_module(f"{folder}.config").MODELS
            found |= {f"evaluate {model}": SimpleNamespace(weights=weights) for model, weights in models.items()}
        elif name.startswith("reduce "):  # a recipe: what it sets
            config = importlib.import_module(f"{folder}.config")
            found[name] = dataclasses.replace(config.ReduceConfig(data="", out=""), **known[name])
        else:
            found[name] = known[name]
    return found


def fact(theirs: Any, source: str, more: dict | None = None) -> Fact:
    more = more or {}
    assert set(more) in (set(), {"means"}, {"ours", "detail"}), f"{source}: {more}"
    ours = more.get("means", more.get("ours", theirs))
    return Fact(theirs, source, ours, tuple(more["detail"]) if more.get("detail") else None)


def paper_presets(folder: str) -> list[Preset]:
    """The paper presets, each with its entries in the table."""
    known, found, used = table(folder)["presets"], [], set()
    for name, cfg in configurations(folder).items():
        script, preset = name.rsplit(" ", 1)
        entries = {}
        for pattern, more in known.get(script, {}).items():
            if any(fnmatchcase(preset, word) for word in pattern.split()):
                entries |= more
                used.add((script, pattern))
        command, unused = entries.pop("command", None), set(entries.pop("unused", ()))
        unstated = tuple(entries.pop("unstated", ())) or None
        facts = {field: fact(*entry) for field, entry in entries.items() if field not in unused}
        found.append(Preset(name, cfg, facts, command, unused, unstated))
    assert used == {(script, pattern) for script in known for pattern in known[script]}, "a pattern fits no preset"
    return found


def details(folder: str) -> dict[int, str]:
    """Numbered implementation details of the README."""
    return companion.read(str(ROOT / folder)).details


def plain(value: Any) -> Any:
    return [plain(each) for each in value] if isinstance(value, (list, tuple)) else value


# ----------------------------------------------------------------------------------------------- against the table


@pytest.mark.parametrize("folder", presets.folders())
def test_every_field_of_the_paper_presets_is_in_the_table(folder: str):
    ours, seen = set(table(folder)["ours"]), set()
    for preset in paper_presets(folder):
        fields = set(vars(preset.cfg))
        seen |= fields
        strangers = {field for field in preset.unused | set(preset.facts) if not field.startswith("(")} - fields
        assert not strangers, f"{preset.name} has no {sorted(strangers)}"
        left = fields - RUNS - ours - preset.unused - set(preset.facts)
        assert preset.facts and (preset.unstated or not left), f"{preset.name}: nothing is said of {sorted(left)}"
    assert ours <= seen


@pytest.mark.parametrize("folder", presets.folders())
def test_presets_are_the_authors_or_a_detail_says_why_not(folder: str):
    page, explained = (ROOT / folder / "README.md").read_text(encoding="utf-8"), details(folder)
    for repository, commit in table(folder)["commits"].items():
        assert f"{repository}@{commit}" in page
    for preset in paper_presets(folder):
        for field, found in preset.facts.items():
            where = f"{preset.name}, {field}: {found.theirs} ({found.source})"
            if not field.startswith("("):
                assert plain(getattr(preset.cfg, field)) == found.ours, where
            assert found.detail is None or found.ours != found.theirs, f"no difference: {where}"
        for number, word in {preset.unstated, *(found.detail for found in preset.facts.values())} - {None}:
            assert word in " ".join(explained.get(number, "").split()), f"detail {number} does not mention {word}"


# ----------------------------------------------------------------------------------------------- against a clone


def literal(text: str) -> Any:
    try:
        return plain(ast.literal_eval({"true": "True", "false": "False", "null": "None"}.get(text.lower(), text)))
    except (SyntaxError, ValueError):
        return text


def parser_default(path: Path, line: int, flag: str) -> Any:
    """Default of an argparse flag that is added at this line, read from the source."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument":
            names = [word.value for word in node.args if isinstance(word, ast.Constant)]
            if flag in names and node.lineno <= line <= node.end_lineno:
                given = {word.arg: ast.unparse(word.value) for word in node.keywords}
                return literal(given.get("default", "False" if given.get("action") == "'store_true'" else "None"))
    return f"no {flag} is added there"


def command_flags(path: Path, line: int) -> dict[str, Any]:
    """Flags and values of the shell command that this line is part of."""
    lines = path.read_text(encoding="utf-8").splitlines()
    first = last = line - 1
    while first and lines[first - 1].rstrip().endswith("\\"):
        first -= 1
    while lines[last].rstrip().endswith("\\"):
        last += 1
    words = shlex.split(" ".join(each.rstrip().removesuffix("\\") for each in lines[first : last + 1]))
    words, flags = [part for word in words for part in (word.split("=", 1) if word[:2] == "--" else [word])], {}
    for word, after in zip(words, [*words[1:], "--"], strict=True):
        if word.startswith("--"):
            flags[word] = True if after.startswith("--") else literal(after)
    return flags


def place(clone: Path, where: str) -> tuple[Path, int]:
    path, _, line = where.partition("/")[2].partition(":")
    return clone / path, int(line or 1)


@functools.cache
def said(clone: Path, source: str) -> Any:
    """The value in the authors' files at a source."""
    if parts := re.match(r"(.*) ([*/]) (\S+/\S+:\d+ .*)$", source):  # from the left
        a, b = said(clone, parts[1]), said(clone, parts[3])
        if isinstance(a, str) or isinstance(b, str):
            return f"{a} {parts[2]} {b}"
        return a * b if parts[2] == "*" else a / b
    (path, line), what = place(clone, source.split(" ", 1)[0]), source.split(" ", 1)[1]
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if what.startswith("no "):
        return f"has {what[3:]}" if what[3:] in text else None
    text = text.splitlines()[line - 1] if line <= text.count("\n") + 1 and text else "no such line"
    if what.startswith("--") and path.suffix == ".py":
        return parser_default(path, line, what)
    if what.startswith("--"):
        return command_flags(path, line).get(what) if what in text else f"no {what}: {text}"
    if what.startswith("'"):
        numbers = re.findall(NUMBER, what)
        value = literal(numbers[0].replace(",", "")) if len(numbers) == 1 else what[1:-1]
        return value if what[1:-1] in text else text
    value = re.search(rf"{re.escape(what)}[\"']?\s*[:=]\s*({VALUE})", text)
    return literal(value[1]) if value else text


def clones(folder: str, upstream: Path) -> dict[str, Path]:
    """{repository: clone} of the table's repositories that exist: `upstream`, or in or beside it, by name."""
    readme, names = companion.read(str(ROOT / folder)), table(folder)["commits"]
    found = companion.clones_of(readme, upstream, None)
    at_hand = {each.partition("/")[2]: path for each, path in found.items() if each.partition("/")[2] in names}
    return at_hand or pytest.skip(f"{upstream} is no clone of {' or '.join(names) or 'code of this paper'}")


def together(names: list[str], total: Counter) -> str:
    """`SCRIPT PRESET` names, each script once."""
    scripts = defaultdict(list)
    for name in names:
        script, preset = name.rsplit(" ", 1)
        scripts[script].append(preset)
    short = {script: "(all)" if len(found) == total[script] else ", ".join(found) for script, found in scripts.items()}
    return "; ".join(f"{script} {found}" for script, found in short.items())


@pytest.mark.parametrize("folder", presets.folders())
def test_the_table_is_what_a_clone_says(folder: str, upstream: Path, capsys):
    at_hand, aside = clones(folder, upstream), set(table(folder)["aside"])
    for name, path in at_hand.items():
        check_commit(path, table(folder)["commits"][name])
    rows, wrong = {}, []
    for preset in paper_presets(folder):
        flags = {}
        if preset.command and (path := at_hand.get(preset.command.partition("/")[0])):
            flags = command_flags(*place(path, preset.command))
            assert flags, f"{preset.command} is no command"
            sources = " ".join(found.source for found in preset.facts.values())
            if left := set(flags) - aside - set(re.findall(r"--[\w-]+", sources)):
                wrong.append(f"{preset.name}: the command has {sorted(left)}")
        for field, found in preset.facts.items():
            about = field, str(found.ours), str(found.theirs), found.source
            rows.setdefault((*about, found.detail), []).append(preset.name)
            if (path := at_hand.get(found.source.partition("/")[0])) is None:
                continue
            if (says := plain(said(path, found.source))) != found.theirs:
                wrong.append(f"{preset.name}, {field}: the table has {found.theirs}, {found.source} says {says}")
            passed = set(re.findall(r"\.py:\d+ (--[\w-]+)", found.source)) & set(flags)
            if passed and found.source.partition("/")[0] == preset.command.partition("/")[0]:
                wrong.append(f"{preset.name}, {field}: the command passes {passed}, the table has its default")
    total = Counter(preset.name.rsplit(" ", 1)[0] for preset in paper_presets(folder))
    printed = [
        {"folder": folder, "presets": together(names, total), "field": field, "ours": ours, "theirs": theirs,
         "source": source, "": f"detail {detail[0]}" if detail else "same"}
        for (field, ours, theirs, source, detail), names in rows.items()
    ]  # fmt: skip
    with capsys.disabled():
        print(f"\n\n{evaluation.table(printed)}\n")
    assert not wrong, "\n".join(wrong)
