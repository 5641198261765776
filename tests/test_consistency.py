"""All folders use the same names for the same things: modules, flags, their help, log keys, run files."""

import ast
import dataclasses
import importlib
import importlib.util
import inspect
import re
import subprocess
import sys
import typing
from collections import defaultdict
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import tyro
from graph import (
    BUILDERS,
    EVIDENCE,
    GRAPH,
    PACKAGES,
    drawn,
    files,
    imports,
    name_of,
    nodes,
    of_project,
    page,
    reached,
    tree,
)
from scripts import one_sentence

from shared.presets import folders

ROOT = Path(__file__).parent.parent
TOOLS = {  # modules of shared/ that make or pytest runs, or of which a paper may use a function alone
    "index",
    "memory",
    "presets",
    "pretrained",
    "pytest_options",
    "resnet",
}
TRAINING = [
    *((folder, "train") for folder in folders()),
    *(("nmtune", "pretrain"), ("nmtune", "finetune")),
    *(("tldr_reduction", script) for script in ("captioner", "finetune", "retrieval")),
]
FREE = {"out", "device", "save_every", "log_every", "dry_run", "strict"}  # every training script has these
HELP = {  # field: (type, start of its help)
    "out": (str, "Run folder: config.json,"),
    "data": (str, ""),
    "dataset_size": (int | None, "Number of samples to use, from the start of the data"),
    "cache": (str, "Folder for copies of remote shards"),
    "epochs": (int, "Passes over the "),
    "batch_size": (int, "(Pairs|Images) per step"),
    "lr": (float, "(Peak|AdamW's) learning rate"),
    "warmup": (int, "Steps of linear warm-up"),
    "weight_decay": (float, "(AdamW's|Decay)"),
    "crop_scale": (float, "Smallest share of "),
    "accumulate": (int, "Micro-batches a step"),
    "grad_checkpointing": (bool, "(Compute|Recompute) .* in the backward pass"),
    "seed": (int, "Seed of "),
    "device": (str, "auto, cpu, cuda, cuda:N or mps."),
    "workers": (int, "Loader processes"),
    "strict": (bool, "Stop at the first broken (sample|image) instead of counting"),
    "save_every": (int, "Steps between checkpoints; there is one at the end, too."),
    "log_every": (int, "Steps between lines of metrics.jsonl."),
    "eval_every": (int, "(Steps|Epochs|Episodes) between .*; 0: never during training."),
    "eval_set": (str, "(Classification|Retrieval) set "),
    "dry_run": (bool, "Print sizes"),
}
OTHER_NAMES = {  # what these fields are called elsewhere, and must not be called here
    "output", "output_dir", "save_dir", "train_data", "num_epochs", "bs", "learning_rate", "wd", "warmup_steps",
    "min_scale", "checkpointing", "gradient_checkpointing", "num_workers", "save_interval", "log_interval", "center",
    "lr_start", "lr_end", "length", "max_tokens", "context_length", "zero_shot_sets", "retrieval_sets", "datasets",
}  # fmt: skip
THINGS = {  # what a field's help says in any dataclass: what that field is called, so that no thing has two names
    "Loader processes": "workers",
    r"(Pairs|Images|Captions|Emoji)( or \w+)? (per|a) (step|forward pass)": "batch_size",
    "auto, cpu, cuda": "device",
    "Passes over": "epochs",
    "Number of samples to use": "dataset_size",
    "Smallest share of": "crop_scale",
    r"Image side( S)? (in|that)": "image_size",
    "Steps of linear warm-up": "warmup",
    "Learning rate of (step 0|the first step)": "warmup_lr",
    "(Floor of the learning rate|Learning rate towards which)": "min_lr",
    "(AdamW|Adam)'s beta1": "beta1",
    "(AdamW|Adam)'s beta2": "beta2",
    "(AdamW|Adam)'s epsilon": "eps",
    "Gradients of all parameters": "max_grad_norm",
    "K-means iterations": "niter",
    "K-means restarts": "nredo",
    "Token(s of a| positions)": "max_length",
    "(Centring|Subtract) ": "centre(_codebook)?",
    "(Evaluation|Classification|Retrieval)[a-z ]* sets? in the CLIP-benchmark": "sets|eval_set",
    "Folder for copies of": "cache",
    "Run folders": "runs",
    "Run folder of stage": "scorer|captioner|caption_model",
    "Run folder: ": "out",
    "Stop at the first broken": "strict",
    "Steps between checkpoints": "save_every",
    "Steps between lines": "log_every",
    "(Steps|Epochs|Episodes) between .* evaluations": "eval_every",
    "Micro-batches a step": "accumulate",
    "(Compute|Recompute) .* in the backward pass": "grad_checkpointing",
    "Print (sizes|what would be)": "dry_run",
}
EVALUATION = {
    "runs": "Run folders",
    "report": "(Also compare|Compare) all .* and write this file with claims and verdicts.",
    "export": "(Write .* as a folder that open_clip loads as `local-dir:DIR`|Refused: )",
    "device": "auto, cpu, cuda, cuda:N or mps.",
    "batch_size": "Images( or .*)? per forward pass.",
    "workers": "Loader processes.",
    "precision": "Autocast of the .*, as in training.",
}


def documented(path: Path, name: str) -> dict[str, str]:
    """{field: help} of a dataclass and of its bases in the same file."""
    classes = {node.name: node for node in tree(path).body if isinstance(node, ast.ClassDef)}
    found: dict[str, str] = {}
    for base in classes[name].bases:
        found |= documented(path, base.id) if getattr(base, "id", None) in classes else {}
    for field, text in zip(classes[name].body, classes[name].body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
            found[field.target.id] = " ".join(text.value.value.split())
    return found


def dataclasses_of(folder: str) -> list[tuple[Path, str]]:
    """(file, class) of all dataclasses of a folder with documented fields, which its command lines use."""
    found = []
    for path in sorted((ROOT / folder).glob("*.py")):
        for node in tree(path).body:
            if isinstance(node, ast.ClassDef) and any("dataclass" in ast.unparse(d) for d in node.decorator_list):
                found.append((path, node.name))
    return found


def used(path: Path, own: str | None = None, package: str = "shared") -> set[tuple[str, str]]:
    """(module, name) of everything that a file uses from a package; with `own`, also the file's own names, of that
    module."""
    alias, found = {}, set()
    for node in nodes(path):
        if isinstance(node, ast.ImportFrom) and node.module == package:
            alias |= {name.asname or name.name: name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{package}."):
            found |= {(node.module.removeprefix(f"{package}."), name.name) for name in node.names}
    for node in nodes(path):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in alias:
            found.add((alias[node.value.id], node.attr))
        elif own and isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            found.add((own, node.id))
    return found


def public(path: Path) -> set[str]:
    """Functions, classes and constants of a module."""
    names = set()
    for node in tree(path).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return {name for name in names if not name.startswith("_")}


def presets(folder: str, script: str) -> dict[str, tuple[str, object]]:
    """Presets of a script; all are of one dataclass."""
    table = re.search(r"preset_cli\((\w+)\)", (ROOT / folder / f"{script}.py").read_text())[1]
    found = getattr(importlib.import_module(f"{folder}.{script}"), table)
    assert len({type(cfg) for _, cfg in found.values()}) == 1
    return found


def config(folder: str, script: str) -> type:
    return type(next(iter(presets(folder, script).values()))[1])


@pytest.mark.parametrize("folder", folders())
def test_no_paper_imports_another(folder: str):
    for file in (ROOT / folder).glob("*.py"):
        roots = {name.split(".")[0] for name in imports(file)}
        assert not roots & (set(folders()) - {folder}), f"{file} imports another paper"
        assert "tests" not in roots, f"{file} imports tests"


@pytest.mark.parametrize("folder", folders())
def test_the_paper_knows_nothing_of_its_study(folder: str):
    """No file imports studies or builders of corpora except themselves: test_without_studies.py deletes them."""
    for file in (ROOT / folder).glob("*.py"):
        if file.name not in EVIDENCE and f"{folder}/{file.name}" not in BUILDERS:
            evidence = {
                name for name in reached(name_of(file), GRAPH) if name.startswith(("shared.study", "shared.corpora"))
            }
            studies = {f"{folder}.{name.removesuffix('.py')}" for name in EVIDENCE} & reached(name_of(file), GRAPH)
            assert not evidence and not studies, f"{file}: {evidence or studies}"


def test_imports_have_no_circles():
    for module in GRAPH:
        assert module not in set().union(*(GRAPH[name] | reached(name, GRAPH) for name in GRAPH[module])), module


def test_the_drawn_graph_is_the_graph():
    assert page() == (ROOT / "CONTRIBUTING.md").read_text(), "run `make readme`"
    assert {("a paper", "windows"), ("windows", "data"), ("its study", "study")} <= drawn()
    assert ("a paper", "data") not in drawn(), "implied by windows"


@pytest.mark.parametrize("file", files(), ids=name_of)
def test_no_import_of_the_project_inside_a_function(file: Path):
    for node in nodes(file):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            for inner in ast.walk(node):
                if isinstance(inner, ast.ImportFrom):
                    assert (inner.module or "").split(".")[0] not in PACKAGES, f"{file}:{inner.lineno}"


def test_shared_imports_no_paper():
    for file in (ROOT / "shared").rglob("*.py"):
        assert not {name.split(".")[0] for name in imports(file)} & set(folders()), file


def test_shared_imports_no_evidence():
    for file in (ROOT / "shared").glob("*.py"):
        assert not {name for name in of_project(file) if name.startswith(("shared.study", "shared.corpora"))}, file


def test_shared_holds_what_three_papers_use():
    users = defaultdict(set)
    for folder in folders():
        for name in set().union(*(imports(file) for file in (ROOT / folder).glob("*.py"))):
            if name.startswith("shared."):
                users[name.split(".")[1]].add(folder)
    for module in {file.stem for file in (ROOT / "shared").glob("*.py")} - {"__init__", "pytest_options"}:
        assert len(users[module]) >= 3, f"shared/{module}.py is used by {sorted(users[module])} alone"


@pytest.mark.parametrize("package", ["shared", "shared.study", "shared.corpora"])
def test_what_shared_offers_is_used_by_two_papers_or_within(package: str):
    home, users = ROOT / package.replace(".", "/"), defaultdict(set)
    for folder in folders():
        for name in set().union(*(used(file, package=package) for file in (ROOT / folder).glob("*.py"))):
            users[name].add(folder)
        for name in re.findall(r"^shared\.(\w+)\(", (ROOT / folder / "__init__.py").read_text(), re.MULTILINE):
            users["__init__", name].add(folder)
    own = {file: file.stem if file.parent == home else None for file in (ROOT / "shared").rglob("*.py")}
    within = set().union(*(used(file, name, package) for file, name in own.items()))
    for file in home.glob("*.py"):
        for name in public(file) if file.stem not in TOOLS else ():
            offered = (file.stem, name)
            assert offered in within or len(users[offered]) >= 2, f"{offered}: used by {sorted(users[offered])} alone"


def test_tools_of_shared_are_run():
    said = (ROOT / "Makefile").read_text() + (ROOT / "pyproject.toml").read_text()
    said += "".join(file.read_text() for file in ROOT.glob("*/study.py"))
    for tool in TOOLS - {"index", "memory", "resnet"} & {file.stem for file in (ROOT / "shared").glob("*.py")}:
        assert f"shared.{tool}" in said, tool


@pytest.mark.parametrize("folder", folders())
def test_files_of_a_folder(folder: str):
    for name in ("README.md", "config.py", "model.py", "train.py", "eval.py", "study.py"):
        assert (ROOT / folder / name).is_file(), name
    assert not (ROOT / folder / "reproduce.mk").exists() and not (ROOT / folder / "claims.py").exists()


@pytest.mark.parametrize(("folder", "script"), TRAINING)
def test_a_training_script_is_read_on_a_screen(folder: str, script: str):
    for node in tree(ROOT / folder / f"{script}.py").body:
        if isinstance(node, ast.FunctionDef) and node.name in ("main", "train", "dry_run"):
            assert node.end_lineno - node.lineno < 60, f"{node.name} has {node.end_lineno - node.lineno + 1} lines"


STUDIES = [(file.parent.name, file.stem) for name in EVIDENCE for file in sorted(ROOT.glob(f"*/{name}"))]


@pytest.mark.parametrize(("folder", "name"), STUDIES)
def test_studies_name_commands_that_are_there(folder: str, name: str):
    study = importlib.import_module(f"{folder}.{name}").STUDY
    assert study.on == ("photos" if name == "photos_study" else "emoji")
    assert study.folder == folder and set(study.minutes) == {"core", "all"} and study.floors
    assert len(set(study.metrics.values())) == len(study.metrics)  # columns of equal names would hide each other
    names = [job.name for job in (*study.stages, *study.arms)]
    assert len(names) == len(set(names)) and all(arm.heading for arm in study.arms)
    lines = [words for job in (*study.stages, *study.arms) for words in study.words(job, 7)]
    lines += [once.command.replace("{photos}", "photos").split() for once in study.before]
    for module, *words in lines:
        assert module.split(".")[0] in (folder, "shared") and importlib.util.find_spec(module), module
        assert not [word for word in words if "{" in word], words
    for job in (*study.stages, *study.arms):
        assert job.needs | set(job.after) <= set(names) and job in study.jobs([job]), job
        assert any(study.out(job.name, 7) in words for words in study.words(job, 7)), job


@pytest.mark.parametrize(("folder", "name"), STUDIES)
def test_presets_of_a_study_are_the_scripts(folder: str, name: str):
    study = importlib.import_module(f"{folder}.{name}").STUDY
    scripts = {script: presets(folder, script) for of, script in TRAINING if of == folder}
    for job in (*study.stages, *study.arms):
        for module, *words in study.words(job, 7):
            script = module.split(".")[1]
            if script in scripts:
                assert words[0] in scripts[script], words
                tyro.extras.overridable_config_cli(scripts[script], args=words)  # takes every option


@pytest.mark.parametrize(("folder", "script"), TRAINING)
def test_training_flags(folder: str, script: str):
    cls = config(folder, script)
    hints = typing.get_type_hints(cls)
    helps = documented(Path(inspect.getfile(cls)), cls.__name__)
    fields = {field.name for field in dataclasses.fields(cls)}
    assert fields == set(helps), "each field has its docstring"
    assert fields >= FREE | {"data", "seed", "precision", "batch_size", "lr", "weight_decay"}
    assert not fields & OTHER_NAMES
    for name in fields & set(HELP):
        kind, start = HELP[name]
        assert hints[name] == kind, (name, hints[name])
        assert re.match(start, helps[name]), (name, helps[name])
    assert set(hints["precision"].__args__) == {"auto", "bf16", "fp16", "fp32"}
    assert cls().out.startswith(f"runs/{folder}/") and cls().data == ""


@pytest.mark.parametrize("folder", folders())
def test_no_thing_has_two_names(folder: str):
    for path, name in dataclasses_of(folder):
        for field, text in documented(path, name).items():
            where = f"{path.relative_to(ROOT)}, {name}.{field}: {text}"
            assert field not in OTHER_NAMES and "center" not in field, where
            for start, called in THINGS.items():
                assert not re.match(start, text) or re.fullmatch(called, field), f"{where}; elsewhere {called}"


@pytest.mark.parametrize(("folder", "script"), TRAINING)
def test_help_says_what_each_field_is(folder: str, script: str, capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "300")
    offered = presets(folder, script)
    with pytest.raises(SystemExit) as stop:
        tyro.extras.overridable_config_cli(offered, args=[next(iter(offered)), "--help"])
    assert stop.value.code == 0
    shown = " ".join(re.sub(r"[^\x21-\x7e]+", " ", capsys.readouterr().out).split())
    cls = config(folder, script)
    for name, text in documented(Path(inspect.getfile(cls)), cls.__name__).items():
        assert f"--{name.replace('_', '-')}" in shown and text in shown, name


@pytest.mark.parametrize("folder", folders())
def test_wrong_flags(in_process, folder: str):
    first = next(iter(presets(folder, "train")))
    for flag in (["--lerning-rate", "1"], ["--lr", "fast"], ["--precision", "fp8"]):
        result = in_process(first, *flag, module=f"{folder}.train")
        assert result.code == 2 and flag[0] in result.err and "Traceback" not in result.err
    for words in (["imagenet"], []):  # no preset
        result = in_process(*words, module=f"{folder}.train")
        assert result.code == 2 and one_sentence(result.err)


def test_help_of_a_real_process():
    command = [sys.executable, "-m", "protoclip.train", "emoji", "--help"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0 and result.stderr == "" and "--external-teacher" in result.stdout


@pytest.mark.parametrize("folder", folders())
def test_evaluation_flags(folder: str):
    cls = importlib.import_module(f"{folder}.eval").Config
    helps = documented(ROOT / folder / "eval.py", "Config")
    assert set(EVALUATION) <= set(helps) == {field.name for field in dataclasses.fields(cls)}
    for name in set(helps) & set(EVALUATION):
        assert re.match(EVALUATION[name], helps[name]), (name, helps[name])


@pytest.mark.parametrize("folder", folders())
def test_a_report_replaces_nothing_but_results(folder: str, tmp_path: Path):
    evaluation = importlib.import_module(f"{folder}.eval")
    with pytest.raises(ValueError, match=r"notes\.md should end in \.json"):
        evaluation.main(evaluation.Config(runs=(str(tmp_path),), report=str(tmp_path / "notes.md"), device="cpu"))


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "RESULTS.md", *(f"{f}/README.md" for f in folders())])
def test_links_of_a_page_lead_somewhere(page: str):
    """Links have targets, except to plots of a folder without results in `results/`."""
    text, folder = (ROOT / page).read_text(encoding="utf-8"), Path(page).parent.name
    measured = not folder or (ROOT / f"results/{folder}.json").exists()
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if not target.startswith(("http:", "https:")) and (measured or f"results/{folder}_" not in target):
            assert (ROOT / page).parent.joinpath(target).exists(), target


def test_root_readme_and_packaging_know_all_papers():
    readme, project = (ROOT / "README.md").read_text(), (ROOT / "pyproject.toml").read_text()
    for folder in folders():
        assert f"[`{folder}/`]({folder}/README.md)" in readme
        assert f'"{folder}"' in project and re.search(rf"^{folder.replace('_', '-')} = \[", project, re.M)
    first_screen = readme.split("| folder |")[0]
    assert re.search(r"!\[.+\]\(results/\w+\.png\)", first_screen) and "make test" in first_screen


def test_the_citation_names_all_papers():
    citation, project = (ROOT / "CITATION.cff").read_text(), (ROOT / "pyproject.toml").read_text()
    papers = [
        re.search(r"\[arXiv (\d{4}\.\d{5})\]", (ROOT / folder / "README.md").read_text())[1] for folder in folders()
    ]
    assert sorted(re.findall(r"value: arXiv:(\S+)", citation)) == sorted(papers)
    assert re.search(r"^version: (.+)$", citation, re.M)[1] == re.search(r'^version = "(.+)"$', project, re.M)[1]


def test_every_package_has_a_lowest_version():
    """`make lowest test` installs and tests these."""
    project = (ROOT / "pyproject.toml").read_text()
    listed = re.search(r"^dependencies = .*?(?=^\[project\.entry-points)", project, re.M | re.S)[0]
    needs = [re.fullmatch(r"([\w-]+)(\[\w+\])?(.*)", need).group(1, 3) for need in re.findall(r'"([^"]+)"', listed)]
    assert len(needs) > 30 and not {name for name, _ in needs} - {name for name, at in needs if re.match(">=|==", at)}


def test_imported_packages_are_declared():
    """pyproject.toml lists what any file imports, in the base dependencies if a file of shared/ does so at its top."""

    def plain(package: str) -> str:
        return re.match(r"[\w-]+", package)[0].lower().replace("-", "_")

    project, packages_of = (ROOT / "pyproject.toml").read_text(), packages_distributions()
    listed = re.search(r"^dependencies = .*?(?=^\[project\.entry-points)", project, re.M | re.S)[0]
    anywhere, base = ({*map(plain, re.findall(r'"(\w[^"]*)"', text))} for text in (listed, listed.split("\n[")[0]))
    for path in files():
        first = [node for node in tree(path).body if isinstance(node, (ast.Import, ast.ImportFrom))]
        names = {node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in first}
        at_top = {name.split(".")[0] for name in names} if path.is_relative_to(ROOT / "shared") else set()
        own = {*folders(), "shared", "pytest", "grpc"}  # pytest is there where its plugin is, grpc where ray[client] is
        for module in {name.split(".")[0] for name in imports(path)} & packages_of.keys() - own:
            known = base if module in at_top else anywhere
            assert known & set(map(plain, packages_of[module])), f"{name_of(path)} imports {module}"


def test_tests_of_a_file_are_found_by_its_name():
    """Test files have the names of tested files: shared/study/runner.py -> tests/test_study_runner.py,
    protoclip/train.py -> tests/test_protoclip_train.py."""
    elsewhere = {"corpora_emoji_sources", "pytest_options"}  # tested by what is made of them
    names = {name_of(path).removeprefix("shared.").replace(".", "_") for path in files() if path.stem != "__init__"}
    names = {name.replace("___main__", "_main") for name in names} - elsewhere
    missing = sorted(name for name in names if not (ROOT / f"tests/test_{name}.py").is_file())
    assert not missing, missing
