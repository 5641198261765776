"""The three floors: studies -> papers -> shared. No circles, nothing for tests alone, maps that name what runs; and
test files that import no test files."""

import ast
import functools
from pathlib import Path

import pytest

from shared.presets import folders
from studies.harness import companion

ROOT = Path(__file__).parent.parent
PAPERS = tuple(folders())
STUDIES = ("studies", "studies.harness", "studies.corpora", "studies.bench")


@functools.cache
def files() -> dict[str, Path]:
    """{module: file} of the project, tests apart."""
    found = {}
    for package in ("shared", *PAPERS, "studies"):
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


@functools.cache
def tree(module: str) -> ast.Module:
    return ast.parse(files()[module].read_text(encoding="utf-8"))


@functools.cache
def imports(module: str) -> frozenset[str]:
    """Modules of the project that a module imports, at its top or within functions."""
    found = set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(name for name in found if name in files() and name not in STUDIES and name != "shared")


@functools.cache
def reached(module: str) -> frozenset[str]:
    """All modules that a module imports directly or indirectly."""
    seen, stack = set(), [module]
    while stack:
        for name in imports(stack.pop()) - seen:
            seen.add(name)
            stack.append(name)
    return frozenset(seen)


def floor(module: str) -> str:
    """shared, studies, or the paper's folder."""
    return module.partition(".")[0]


@pytest.mark.parametrize("module", files())
def test_a_module_imports_its_own_floor_and_those_below(module: str):
    below = {"shared": {"shared"}, "studies": {"shared", "studies", *PAPERS}}.get(
        floor(module), {"shared", floor(module)}
    )
    others = {name for name in imports(module) if floor(name) not in below}
    assert not others, f"{module} imports {sorted(others)}"


def test_imports_have_no_circles():
    assert not [module for module in files() if module in reached(module)]


@pytest.mark.parametrize("module", [name for name in files() if floor(name) != "studies"])
def test_no_paper_names_studies(module: str):
    """Nor by a string that an import machinery could use; help for users may name its commands."""
    calls = [node for node in ast.walk(tree(module)) if isinstance(node, ast.Call)]
    loaded = [ast.unparse(call) for call in calls if ast.unparse(call.func).split(".")[-1] == "import_module"]
    assert not [text for text in loaded if "studies" in text]


@pytest.mark.parametrize("module", files())
def test_no_import_of_the_project_inside_a_function(module: str):
    for node in ast.walk(tree(module)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            for inner in ast.walk(node):
                if isinstance(inner, ast.ImportFrom):
                    assert floor(inner.module or "") not in ("shared", "studies", *PAPERS), f"{module}:{inner.lineno}"


def test_no_file_imports_a_test_file():
    """What tests share stands in modules of its own."""
    for path in ROOT.glob("tests/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            named = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            named += [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
            found = [name for name in named if any(part.startswith("test_") for part in name.split("."))]
            assert not [name for name in found if list(ROOT.glob(f"tests/**/{name.split('.')[-1]}.py"))], path


def scripts() -> list[str]:
    """Modules that are started with `python -m`."""
    return [module for module, path in files().items() if '__name__ == "__main__"' in path.read_text()]


@functools.cache
def names_used(module: str) -> frozenset[str]:
    """Names and attributes that a module's code mentions, without those in its import statements."""
    found = set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            found.add(node.value)
    return frozenset(found)


@pytest.mark.parametrize("paper", PAPERS)
def test_a_function_of_the_map_is_reached_from_a_script(paper: str):
    """Every function that the README's map names is named by code that a script of the paper or of its study reaches:
    nothing there exists for tests alone."""
    defined = {
        node.name
        for module in files()
        if floor(module) in (paper, "shared")
        for node in tree(module).body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef))
    }
    starts = [module for module in scripts() if floor(module) in (paper, "shared") or f"studies.{paper}" in module]
    running = set(starts).union(*(reached(module) for module in starts))
    used = set().union(*(names_used(module) for module in running))
    rows = companion.read(str(ROOT / paper)).rows
    named = {function.name.partition(".")[0] for row in rows for function in row.functions} & defined
    assert named, f"{paper}/README.md has no map that names functions"
    assert not named - used, f"only tests use {sorted(named - used)}"
