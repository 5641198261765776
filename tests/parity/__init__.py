"""What the parity tests share: importing the authors' modules beside ours, and the table that a test file prints."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from tests.adapters import difference, entry


@pytest.fixture(autouse=True)
def seeded():
    """Seed torch before each test, in the test files that import this fixture."""
    torch.manual_seed(0)


def clone_of(request: pytest.FixtureRequest, repository: str, commit: str) -> Path:
    """The folder of --upstream; without it the tests are skipped."""
    path = request.config.getoption("--upstream", default=None)
    if path is None:
        pytest.skip(f"needs --upstream PATH, a clone of {repository} at {commit}")
    check_commit(path, commit)
    return path


def printed(request: pytest.FixtureRequest, table: "Table", title: str) -> Iterator["Table"]:
    """The body of a test file's `table` fixture: prints the table after the last test, even if output is captured."""
    yield table
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\n\n{title} against ours\n\n{table}\n")


def unit(*shape: int) -> torch.Tensor:
    return F.normalize(torch.randn(*shape), dim=-1)


def with_gradients(function, *inputs):
    """(value, gradients of all inputs) of a scalar function."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    value = function(*inputs)
    return value.detach(), torch.autograd.grad(value, inputs)


def check_commit(path: Path, commit: str) -> None:
    """Warn if the clone at `path` is not at `commit`."""
    head = subprocess.run(["git", "-C", path, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    if not head.startswith(commit):
        warnings.warn(f"{path} is at {head[:7] or 'no commit'}, the line numbers are those of {commit}", stacklevel=2)


def import_beside(root: Path, names: list[str], stubs: dict[str, ModuleType]) -> dict[str, ModuleType]:
    """Import the modules `names` from the folder `root`; `stubs` replace modules that are not installed.

    Modules of the same names that were imported before are restored in `sys.modules` afterwards.
    """
    tops = {name.partition(".")[0] for name in names} | set(stubs)
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] in tops}
    for name in before:
        del sys.modules[name]
    sys.path.insert(0, str(root))
    sys.modules.update(stubs)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return {name: importlib.import_module(name) for name in names}
    finally:
        sys.path.remove(str(root))
        for name in [name for name in sys.modules if name.partition(".")[0] in tops]:
            del sys.modules[name]
        sys.modules.update(before)


def run_block(module: ModuleType, test: str, **names) -> dict:
    """Run the body of a module's first `if <test>:` or `for ... in <test>:` once -> its variables."""
    tree = ast.parse(inspect.getsource(module))
    heads = {ast.If: "test", ast.For: "iter"}
    blocks = (node for node in ast.walk(tree) if type(node) in heads)
    block = next(node for node in blocks if ast.unparse(getattr(node, heads[type(node)])) == test)
    scope = {**vars(module), **names}
    exec(compile(ast.Module(block.body, []), module.__file__, "exec"), scope)
    return scope


def run_line(module: ModuleType, target: str, **names) -> object:
    """Run a module's first assignment to `target` -> the assigned value, if `target` is a name."""
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == target:
            scope = {**vars(module), **names}
            exec(compile(ast.Module([node], []), module.__file__, "exec"), scope)
            return scope.get(target)
    raise LookupError(f"{module.__file__} assigns nothing to {target}")


def race(theirs, ours, repetitions: int = 5) -> tuple[tuple, tuple[float, float]]:
    """Call both functions in turns -> ((result of theirs, of ours), (seconds of their fastest call, of ours))."""
    best, results = [float("inf")] * 2, [None] * 2
    for _ in range(repetitions):
        for side, function in enumerate((theirs, ours)):
            start = time.perf_counter()
            results[side] = function()
            best[side] = min(best[side], time.perf_counter() - start)
    return tuple(results), tuple(best)


measured: list[dict] = []  # differences in the running test; tests/conftest.py collects and clears them


class Table:
    """One row per component; a difference above tolerance raises AssertionError after the row has been added."""

    def __init__(self, root: Path):
        self.root, self.rows = root, []

    def where(self, function) -> str:
        """file:line of one of their functions, relative to the clone's source folder; strings are not changed."""
        if isinstance(function, str):
            return function
        code = function.__code__
        return f"{Path(code.co_filename).relative_to(self.root)}:{code.co_firstlineno}"

    def compare(
        self,
        component,
        function,
        own_name,
        theirs,
        ours,
        *,
        gradients=None,
        rtol=1e-5,
        atol=1e-5,
        seconds=None,
        note="",
        gradient_left=False,
    ):
        """Add a row and check it. `gradients`: (theirs, ours); `seconds`: (theirs, ours) of the same work;
        `gradient_left`: whether there is a gradient that is not compared."""
        value, error = difference(theirs, ours, rtol, atol, component)
        gradient, of_gradients = difference(*gradients, rtol, atol, component) if gradients else (None, 0.0)
        tolerance = "exact" if rtol == atol == 0 else f"{atol:g} + {rtol:g}·\\|x\\|"
        ratio = "-" if seconds is None else f"{seconds[0] / seconds[1]:.2f}"
        shown = "-" if gradient is None else f"{gradient:.1e}"
        verdict = ("ok" if max(error, of_gradients) <= 1 else "**FAIL**") + (f" ({note})" if note else "")
        self.rows.append([component, self.where(function), own_name, f"{value:.1e}", shown, tolerance, ratio, verdict])
        differences: dict = {"values": value} | ({} if gradient is None else {"gradients": gradient})
        names = re.findall(r"\w[\w.]*", own_name)
        differences |= {"arrays": {"values": ("", entry(theirs))}} | ({"gradient_left": True} if gradient_left else {})
        measured.append({"test": component, "functions": names, "against": "the authors' code", **differences})
        assert error <= 1, f"{component}: values differ by {value:.3g}, tolerance {tolerance}"
        assert of_gradients <= 1, f"{component}: gradients differ by {gradient:.3g}, tolerance {tolerance}"

    def __str__(self) -> str:
        head = ["component", "upstream", "ours", "max diff", "max diff, gradients", "tolerance", "time theirs/ours", ""]
        lines = [head, ["---"] * len(head), *self.rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)
