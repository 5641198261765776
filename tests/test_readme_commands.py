"""The commands in the READMEs and in `make help` are valid."""

import functools
import re
import shlex
import subprocess

import pytest
from scripts import ROOT, finished
from short_runs import FOLDERS

PAGES = ("README.md", "docs/data.md", "docs/scale.md", "docs/export.md", "docs/corpora.md", "docs/parity.md",
         *(f"{folder}/README.md" for folder in FOLDERS))  # fmt: skip


def texts() -> list[str]:
    """The pages, with every command on one line."""
    return [(ROOT / page).read_text(encoding="utf-8").replace("\\\n", " ") for page in PAGES]


@functools.cache
def said() -> list[list[str]]:
    """`python -m` and `torchrun -m` commands of the READMEs, as words from the module name on."""
    found = []
    for text in texts():
        for line in re.findall(r"(?:^ {4}|`)(?:torchrun [^`\n]*?|python )-m ([^`\n]+)", text, re.MULTILINE):
            words = shlex.split(line, comments=True)
            if words[0].split(".")[0] in (*FOLDERS, "shared", "tests") and words not in found:
                found.append(words)
    return found


def test_readmes_give_commands():
    assert {words[0].split(".")[0] for words in said()} >= set(FOLDERS) and len(said()) > 30


def test_make_help_names_what_there_is():
    """Targets, and variables that the user may set."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    shown = subprocess.run(["make", "--silent", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    targets = set(re.search(r"^\.PHONY: (.+)", makefile, re.MULTILINE)[1].split()) - {"help"}
    variables = set(re.findall(r"\$\(([A-Z]+)\)", makefile))
    variables -= {
        "PY",
        "CORES",
        "FOLDERS",
        "NAMES",
        "EXTRAS",
        "GROUPS",
        "PIP",
        "LOCKS",
        "OPTIONS",
        "HOME",
        "MAKE",
    }  # set by make or the shell
    assert not [target for target in targets if f"make {target} " not in shown]
    assert {"SEEDS", "JOBS", "FLAGS"} <= variables
    assert not [name for name in variables if not re.search(rf"\b{name}\b", shown)]


HELP: dict[tuple[str, ...], str] = {}  # what (module, preset) has shown


@pytest.fixture
def help_of(in_process):
    """help_of(module, *preset) -> its help, shown once."""

    def show(*words: str) -> str:
        if words not in HELP:
            HELP[words] = finished(in_process(*words[1:], "--help", module=words[0])).out
        return HELP[words]

    return show


@pytest.mark.parametrize("words", said(), ids=lambda words: " ".join(words)[:60])
def test_commands_of_the_readmes_have_help(words: list[str], help_of):
    """The help of each module, with the preset or subcommand of the command, has all of the command's options."""
    module, *rest = words
    first = [word for word in rest[:1] if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9-]*", word)]
    shown = help_of(module, *first)
    if not first and (presets := re.search(r"\{([^,}]+)[,}]", shown)):  # a script whose preset may be left out
        shown += help_of(module, presets[1])
    for option in [word for word in rest if word.startswith("--") and word != "--help"]:
        assert option in shown or option.replace("--no-", "--") in shown, f"{module} {first} has no {option}"


def spread() -> list[tuple[int, list[str]]]:
    """(processes, words from the module name on) of the READMEs' torchrun commands."""
    found = []
    for text in texts():
        for nodes, each, words in re.findall(
            r"^ {4}torchrun (?:--nnodes (\d+) )?--nproc-per-node (\d+) -m (.+)", text, re.MULTILINE
        ):
            found.append((int(nodes or 1) * int(each), shlex.split(words, comments=True)))
    return found


@pytest.mark.parametrize("processes, words", spread())
def test_batches_of_the_readmes_can_be_divided_among_their_processes(processes: int, words: list[str], help_of):
    module, first, *rest = words
    shown = help_of(module, first)
    named = rest[rest.index("--batch-size") + 1] if "--batch-size" in rest else None
    default = re.search(r"--batch-size INT.*?default:\W*(\d+)", shown, re.DOTALL)
    assert int(named or default[1]) % processes == 0
