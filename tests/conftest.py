"""Golden tests of all paper folders are driven by case files: `pytest [--golden DIR]`, by default tests/golden.

    @pytest.mark.golden("protoclip", "clip_loss")
    def test_clip_loss(case): ...

runs once per file of that family in DIR/protoclip/. The family of a file is the longest prefix of its name that a test
of the folder, in any module, claims as a family. tests/test_golden.py fails for a case file that no test claims. A
.json beside an .npz of the same stem is not a case, but the `json` of that case.
A family without a file in DIR gives no tests; the default DIR must have files of all families.

A test of a file of the default DIR that passes without reading or comparing all of its arrays fails. Arrays that a test
leaves alone are named, or matched by a pattern, with the reason in a comment:
`golden("flame", "x", unused=("ids", "log/5/*"))`. The families of papers with adapters (tests/adapters) run there.
"""

import ast
import functools
import os
import sys
import types
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from shared import checkpoints, presets, pytest_options, run
from tests import adapters
from tests.adapters import Case, convert, leaf  # noqa: F401

pytest.register_assert_rewrite("scripts", *(path.stem for path in Path(__file__).parent.glob("*_runs.py")))
import vocabulary  # noqa: E402
from scripts import cli, embedded_corpus, folder, forked_exports, in_process, no_initial_values, start  # noqa: E402, F401  (fixtures)

vocabulary.share()
os.fsync = lambda descriptor: None  # the files that tests write need not survive a power cut
ROOT = Path(__file__).resolve().parent.parent
DEFAULT = ROOT / "tests/golden"
deviations: dict[str, tuple[float, str]] = {}  # "folder/file" -> (largest error, in units of its tolerance; the array)


# ------------------------------------------------------------------------------------------- which file runs where


def case_files(config: pytest.Config, folder: str) -> list[Path]:
    """Case files of DIR/folder, without README.md and the .json files that accompany an .npz."""
    files = sorted((config.getoption("golden") / folder).glob("*"))
    arrays = [file for file in files if file.suffix == ".npz"]
    return arrays + [file for file in files if file.suffix == ".json" and file.with_suffix(".npz") not in arrays]


@functools.cache
def claims() -> dict[str, set[str]]:
    """{folder: families that its adapters or tests claim}, read from the arguments of `golden` decorators."""
    families = defaultdict(set)
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        tree, names = ast.parse(path.read_text(encoding="utf-8")), {}
        for node in tree.body:  # FOLDER = "flame"
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
                names |= {target.id: node.value.value for target in node.targets if isinstance(target, ast.Name)}
        for node in ast.walk(tree):
            for mark in getattr(node, "decorator_list", ()):
                if isinstance(mark, ast.Call) and ast.unparse(mark.func).split(".")[-1] == "golden":
                    words = [names[word.id] if isinstance(word, ast.Name) else word.value for word in mark.args]
                    families[words[0]].update(words[1:])
    for paper in presets.folders():
        for part in adapters.parts(paper):
            families[paper].update(part.families)
    return families


def family(file: Path, families: set[str]) -> str | None:
    return max((name for name in families if file.name.startswith(name)), key=len, default=None)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    mark = metafunc.definition.get_closest_marker("golden")
    if mark is not None and mark.args:
        folder, *families = mark.args
        known = claims()[folder]
        files = [file for file in case_files(metafunc.config, folder) if family(file, known) in families]
        metafunc.parametrize("case", files or [None], ids=[file.name for file in files] or ["none"], indirect=True)


@pytest.fixture
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    assert request.param is not None, f"{DEFAULT} has no case of this family"
    found = Case(request.param)
    yield found
    test = f"{request.function.__name__.removeprefix('test_')}: {found.path.stem}"
    measured(request, found, functions_in(request.function), test=test)


def measured(request: pytest.FixtureRequest, case: Case, functions: set[str], **more) -> None:
    """Add a case's largest differences to the report, and those of a committed file to the summary."""
    if case.largest and (case.fresh or case.path.is_relative_to(DEFAULT)):
        about = {"folder": case.path.parent.name, "functions": sorted(functions), "arrays": case.arrays}
        about |= case.largest | more
        request.node.user_properties.append(("measured", about))
    if not case.fresh and case.compared:
        key = f"{case.path.parent.name}/{case.path.name}"
        deviations[key] = max(deviations.get(key, (0.0, "")), case.error)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """Fail a golden test that has passed without reading or comparing all arrays of its case."""
    result = yield
    mark, found = pyfuncitem.get_closest_marker("golden"), pyfuncitem.funcargs.get("case")
    if mark is not None and mark.args:
        left = found.left(mark.kwargs.get("unused", ())) if found.path.is_relative_to(DEFAULT) else []
        assert not left, f"{found.path.parent.name}/{found.path.name}: the test did not read {', '.join(left)}"
    return result


def functions_in(function: Any, depth: int = 2) -> set[str]:
    """Names, as `paper.model.loss`, of our functions that a test uses, directly or through functions of its module.

    A class gives `paper.model.Model`, and `paper.model.Model.encode` if the test names the method.
    """
    codes, words = [function.__code__], set()
    while codes:
        code = codes.pop()
        words |= set(code.co_names)
        codes += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    found = set()
    for value in [function.__globals__[word] for word in words & function.__globals__.keys()]:
        found.add(own_name(value))
        if isinstance(value, (type, types.ModuleType)):
            found |= {own_name(vars(value)[word]) for word in words & vars(value).keys()}
        elif isinstance(value, types.FunctionType) and value.__module__ == function.__module__ and depth > 1:
            found |= functions_in(value, depth - 1)
    return found - {""}


def own_name(value: Any) -> str:
    """`paper.model.loss` for a function or class of the project; "" for anything else."""
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    return f"{module}.{name}" if name and str(module).partition(".")[0] in ("shared", *presets.folders()) else ""


class GoldenModule(pytest.Module):
    """A test module without the golden tests that have no case in DIR."""

    def collect(self):
        default = self.config.getoption("golden") == DEFAULT
        for item in super().collect():
            if default or not hasattr(item, "callspec") or item.callspec.params.get("case", item) is not None:
                yield item


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module:
    return GoldenModule.from_parent(parent, path=module_path)


# ------------------------------------------------------------------------------------------------ options, summary


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    if not pluginmanager.is_registered(pytest_options):  # the installed package has registered it already
        pytest_options.pytest_addoption(parser)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "golden(folder, *families, unused=()): run on every case file of these families")
    config.addinivalue_line("markers", "slow: starts processes or trains for seconds; not in `make test-fast`")
    config.addinivalue_line("markers", "gpu: compares a GPU with the CPU; skipped without a GPU")
    config.option.golden = config.option.golden or DEFAULT
    for option in ("golden", "upstream"):
        path = config.getoption(option)
        if path is not None:
            path = path.expanduser().resolve()
            if not path.is_dir():
                raise pytest.UsageError(f"--{option} {path} is not a folder")
            setattr(config.option, option, path)


SLOW = {  # fixtures and functions whose users start processes, or train
    *("cli", "start", "forked_exports", "arms", "runs", "chain", "trained"),
    *("in_ranks", "multiprocessing", "subprocess", "look", "looked_at"),
}


def pytest_itemcollected(item: pytest.Item) -> None:
    if (set(item.fixturenames) | set(item.function.__code__.co_names)) & SLOW:
        item.add_marker("slow")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with the most slow tests start first."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: (-slow[item.path], str(item.path)))


@pytest.fixture
def upstream(request: pytest.FixtureRequest) -> Path:
    """The authors' clone; tests that take it are skipped without --upstream."""
    return request.config.getoption("upstream") or pytest.skip("needs --upstream PATH")


class Watch(TorchFunctionMode):
    """In functions wrapped by `within`, tensors claim to be on a GPU, and operations that would wait for it fail."""

    ASKED = (
        *("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__"),
        *("bincount", "multinomial"),
    )

    def __init__(self):
        super().__init__()
        self.on = False

    def __torch_function__(self, function, types, arguments=(), options=None):
        if self.on:
            if function == torch.Tensor.is_cuda.__get__:
                return True
            name, index = function.__name__, ()
            if name in ("__getitem__", "__setitem__"):
                index = arguments[1] if isinstance(arguments[1], tuple) else arguments[1:2]
            mask = any(isinstance(each, torch.Tensor) and each.dtype == torch.bool for each in index)
            assert name not in self.ASKED and not mask, f"{name} would wait for a GPU"
        return function(*arguments, **(options or {}))

    def within(self, function: Callable, on: bool = True) -> Callable:
        """`function`, wrapped so that it must not wait for the GPU; with on=False it may."""

        @functools.wraps(function)
        def watched(*arguments, **options):
            before, self.on = self.on, on
            try:
                with self:
                    return function(*arguments, **options)
            finally:
                self.on = before

        return watched


@pytest.fixture
def watch() -> Watch:
    return Watch()


def named_functions(names: list[str], scope: dict[str, Any], folder: str) -> set[str]:
    """Full names of our functions in a parity test's table: `loss` or `model.Model.encode` ->
    `paper.model.Model.encode`."""
    found = set()
    for name in names:
        first, *rest = name.split(".")
        modules = (sys.modules.get(f"{package}.{first}") for package in (folder, "shared"))
        value = scope.get(first) or next(filter(None, modules), None)
        for part in rest:
            value = getattr(value, part, None)
        found.add(own_name(value))
    return found - {""}


found_by: dict[str, dict[tuple[str, str], dict]] = defaultdict(dict)  # folder -> (test, against what) -> differences


def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Attach the comparisons of a parity test's table to its report."""
    if item.path.parent.name == "parity":
        compared = sys.modules[item.module.__package__].measured
        folder = item.path.stem.removeprefix("test_")
        for about in compared:
            about["functions"] = sorted(named_functions(about["functions"], vars(item.module), folder))
            item.user_properties.append(("measured", {"folder": folder, **about}))
        compared.clear()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Collect the measurements of golden and parity tests; processes of pytest-xdist send them in their reports."""
    for kind, about in report.user_properties if report.when == "teardown" else ():
        if kind == "measured":
            test = about.get("test") or report.nodeid.split("::")[-1].split("[")[0].removeprefix("test_")
            row = {"test": test, "functions": about["functions"], "against": about.get("against", "golden data")}
            row |= {side: about.get(side) for side in ("values", "gradients")} | {"arrays": about.get("arrays", {})}
            row |= {name: about[name] for name in ("only", "gradient_left") if name in about}
            rows, key = found_by[about["folder"]], (test, row["against"])
            for side in ("values", "gradients"):  # of several runs of a test, the largest
                before = rows.get(key, {}).get(side)
                if before is not None and (row[side] is None or before > row[side]):
                    row[side] = before
                    row["arrays"] = row["arrays"] | {k: v for k, v in rows[key]["arrays"].items() if k == side}
            rows[key] = row


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Add the measured differences to those of earlier runs in runs/parity/FOLDER.json, for the companion pages."""
    if hasattr(session.config, "workerinput"):
        return
    for paper, rows in found_by.items():
        path, stamp = ROOT / f"runs/parity/{paper}.json", {"date": date.today().isoformat(), "commit": run.commit()}
        earlier = checkpoints.read_json(path)["tests"] if path.is_file() else []
        kept = {(row["test"], row["against"]): row for row in earlier}
        kept |= {key: row | stamp for key, row in rows.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        checkpoints.write_json(path, {"tests": sorted(kept.values(), key=lambda row: (row["test"], row["against"]))})


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if deviations and terminalreporter.verbosity > 0:
        terminalreporter.section("golden cases: largest error, in units of its tolerance")
        for file, (error, name) in sorted(deviations.items()):
            terminalreporter.write_line(f"{error:10.5f}  {file}  {name}")
