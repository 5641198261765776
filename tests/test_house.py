"""The papers run without studies and corpora, and the commands in the READMEs are valid."""

import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from graph import BUILDERS
from scripts import ROOT, finished
from short_runs import FOLDERS, small_corpus, small_set

SCRIPT, SECONDS = "protoclip.train", 120
PAGES = ("README.md", *(f"{folder}/README.md" for folder in FOLDERS))


@pytest.fixture(scope="module")
def folder(embedded_corpus: None, tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.mktemp("house")
    yield path
    shutil.rmtree(path)


def test_papers_run_without_their_studies(folder: Path):
    """In a copy without shared/study, shared/corpora and any study.py, all modules of the papers can be imported, and
    one paper trains and evaluates. (test_consistency.py tests that no function imports.)"""
    copy = folder / "copy"
    for package in ("shared", *FOLDERS):
        ignore = shutil.ignore_patterns("study", "corpora", "study.py", "photos_study.py", "__pycache__")
        shutil.copytree(ROOT / package, copy / package, ignore=ignore)
    (copy / "data").symlink_to(ROOT / "data")
    corpus, out = small_corpus(folder / "corpus"), folder / "runs/protoclip"
    tiny = "--image-size 16 --episodes 1 --episode-size 64 --batch-size 32 --k 8 --niter 5 --nredo 1 --warmup 2"
    more = f"--w-external 0 --hidden-dim 32 --projection-dim 16 --workers 0 --eval-every 0 --precision fp32 {tiny}"
    sets = ["--probe", "--gap", "None", "--sets", small_set("names_id", folder / "sets", every=40)]
    modules = [
        f"{package}.{path.stem}"
        for package in ("shared", *FOLDERS)
        for path in sorted((copy / package).glob("*.py"))
        if path.stem != "__init__" and f"{package}/{path.name}" not in BUILDERS
    ]
    lines = [
        ["protoclip.train", "emoji", "--data", str(corpus), *more.split(), "--out", str(out)],
        ["protoclip.eval", str(out), *sets],
        ["protoclip.eval", str(out), *sets, "--report", str(folder / "r.json")],
    ]
    driver = """
        import importlib, importlib.util, json, runpy, sys
        sys.meta_path[:] = [finder for finder in sys.meta_path if "Editable" not in getattr(finder, "__name__", "")]
        assert importlib.util.find_spec("shared.study") is importlib.util.find_spec("protoclip.study") is None
        modules, lines = json.load(open(sys.argv[1]))
        for module in modules:
            importlib.import_module(module)
        for module, *words in lines:
            sys.argv = [module, *words]
            print(module, flush=True)
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    """
    (copy / "driver.py").write_text(textwrap.dedent(driver))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(copy)}

    (copy / "lines.json").write_text(json.dumps([modules, lines]))
    command = [sys.executable, "-W", "ignore", "driver.py", "lines.json"]
    result = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=200)
    shown = result.stdout[-2000:] + result.stderr[-4000:]
    assert [module for module, *_ in lines] == [line for line in result.stdout.splitlines() if line in modules], shown
    assert (out / "checkpoint.pt").is_file() and (out / "results.json").is_file(), shown
    assert result.returncode == 2 and "protoclip/study.py, which could not be imported" in result.stderr, shown


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
    """Targets, and variables that the user may set; lines fit a terminal of 120 columns."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    shown = subprocess.run(["make", "--silent", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert max(map(len, shown.splitlines())) <= 120
    targets = set(re.search(r"^\.PHONY: (.+)", makefile, re.MULTILINE)[1].split()) - {"help"}
    variables = set(re.findall(r"\$\(([A-Z]+)\)", makefile))
    variables -= {"PY", "CORES", "FOLDERS", "NAMES", "EXTRAS", "OPTIONS"}  # set by the Makefile itself
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
