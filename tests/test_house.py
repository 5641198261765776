"""The papers without their evidence, and the commands that the READMEs give."""

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
from scripts import ROOT, finished
from tiny import FOLDERS, PRELOAD, SCRIPTS, SHARDS, commands, small_corpus, small_set, stages  # noqa: F401

SCRIPT, SECONDS = "protoclip.train", 120
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
PAGES = ("README.md", *(f"{folder}/README.md" for folder in FOLDERS))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    if not (SHARDS / "00000.tar").is_file():
        pytest.fail(f"{SHARDS} is missing: `make data` makes it", pytrace=False)
    path = tmp_path_factory.mktemp("house")
    yield path
    shutil.rmtree(path)


def test_papers_run_without_their_studies(folder: Path):
    """Every training and evaluation script, in a copy without shared/study, shared/corpora and any study.py."""
    copy = folder / "copy"
    for package in ("shared", *FOLDERS):
        ignore = shutil.ignore_patterns("study", "corpora", "study.py", "__pycache__")
        shutil.copytree(ROOT / package, copy / package, ignore=ignore)
    (copy / "data").symlink_to(ROOT / "data")
    parts = folder / "parts"
    parts.mkdir()
    given = commands(small_corpus(folder / "corpus"), parts)
    lines = [[SCRIPTS[name], *given[name], "--out", str(folder / "runs" / name)] for name in SCRIPTS]
    endings = {"protoclip.teacher": ".npz", "lexvla.text": ".pt"}
    for stage, words in stages(folder / "corpus", parts).items():
        lines.append([stage, *words, "--out", str(folder / f"{stage}{endings.get(stage, '')}")])
    sets = [small_set(name, folder / "sets", every=40) for name in ("names_id", "retrieval_id")]
    more = {
        "attentive_mask_clip": ["--probe", "None", "--foreground", "None", "--sets", *sets],
        "concept_frequency": ["--eval-set", f"{ROOT}/data/emoji/eval/names_ood"],
        "flame": ["--sets", *sets],
        "lexvla": ["--sets", sets[1], "--patchdis", "None"],
        "protoclip": ["--probe", "--gap", "None", "--sets", *sets],
        "tinyclip": ["--sets", *sets, "--no-throughput"],
        "tldr_reduction": ["--rerank", "--sets", *sets],
    }
    made = {"tldr_reduction": folder / "runs/tldr_reduction-clip", "nmtune": folder / "nmtune.train"}
    for name in FOLDERS:
        lines.append([f"{name}.eval", str(made.get(name, folder / "runs" / name)), *more.get(name, [])])
    driver = """
        import importlib.util, json, runpy, sys
        sys.meta_path[:] = [finder for finder in sys.meta_path if "Editable" not in getattr(finder, "__name__", "")]
        assert importlib.util.find_spec("shared.study") is importlib.util.find_spec("protoclip.study") is None
        for module, *words in json.load(open(sys.argv[1])):
            sys.argv = [module, *words]
            print(module, flush=True)
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    """
    (copy / "driver.py").write_text(textwrap.dedent(driver))
    (copy / "lines.json").write_text(json.dumps(lines))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(copy)}
    command = [sys.executable, "driver.py", "lines.json"]
    result = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    assert all((folder / "runs" / name / "checkpoint.pt").is_file() for name in SCRIPTS)
    report = ["protoclip.eval", str(folder / "runs/protoclip"), *more["protoclip"], "--report", str(folder / "r.json")]
    (copy / "lines.json").write_text(json.dumps([report]))
    result = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=100)
    assert result.returncode == 2 and "protoclip/study.py says, which could not be imported" in result.stderr


@functools.cache
def said() -> list[list[str]]:
    """`python -m` and `torchrun -m` commands of the READMEs: the words from the module on."""
    found = []
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8").replace("\\\n", " ")
        for line in re.findall(r"(?:^ {4}|`)(?:torchrun [^`\n]*?|python )-m ([^`\n]+)", text, re.MULTILINE):
            words = shlex.split(line, comments=True)
            if words[0].split(".")[0] in (*FOLDERS, "shared", "tests") and words not in found:
                found.append(words)
    return found


def test_readmes_give_commands():
    assert {words[0].split(".")[0] for words in said()} >= set(FOLDERS) and len(said()) > 30


@pytest.mark.parametrize("words", said(), ids=lambda words: " ".join(words)[:60])
def test_commands_of_the_readmes_have_help(words: list[str], cli):
    """Each module, with the preset or subcommand that it is given, shows help that has every option of the command."""
    module, *rest = words
    first = [word for word in rest[:1] if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9-]*", word)]
    shown = finished(cli(*first, "--help", module=module)).out
    if not first and (presets := re.search(r"\{([^,}]+)[,}]", shown)):  # a script whose preset may be left out
        shown += finished(cli(presets[1], "--help", module=module)).out
    for option in [word for word in rest if word.startswith("--") and word != "--help"]:
        assert option in shown or option.replace("--no-", "--") in shown, f"{module} {first} has no {option}"
