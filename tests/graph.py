"""The import graph of the project's modules: `python tests/graph.py` (`make readme`) draws it into CONTRIBUTING.md."""

import ast
import functools
from pathlib import Path

from shared.presets import folders

ROOT = Path(__file__).parent.parent
PACKAGES = ("shared", "shared.corpora", "shared.study", *folders())
EVIDENCE = ("study.py", "photos_study.py")  # files of a paper that may use shared.study and shared.corpora
BUILDERS = {  # of papers' corpora; like studies, they may use shared.corpora
    "flame/new_names.py",
    "lexvla/scenes.py",
    "tldr_reduction/pool.py",
}
BEGIN, END = "<!-- imports -->\n", "<!-- /imports -->"


@functools.cache
def files() -> tuple[Path, ...]:
    """All modules of the project except tests."""
    found = (path for package in PACKAGES for path in (ROOT / package.replace(".", "/")).glob("*.py"))
    return tuple(sorted(found))


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def nodes(path: Path) -> tuple[ast.AST, ...]:
    """All nodes of a file's syntax tree; parsing and walking take most of the time of tests that read the code."""
    return tuple(ast.walk(tree(path)))


@functools.cache
def imports(path: Path) -> set[str]:
    """Modules that a file imports; `from package import module` gives `package.module`, too."""
    found = set()
    for node in nodes(path):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def name_of(path: Path) -> str:
    """Module name of a file: shared/study/runner.py -> shared.study.runner."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def of_project(path: Path) -> set[str]:
    """Modules of the project that a file imports anywhere."""
    known = {name_of(file) for file in files()}
    return imports(path) & known


def reached(module: str, graph: dict[str, set[str]]) -> set[str]:
    """All modules that a module imports directly or indirectly."""
    found, new = set(), {module}
    while new:
        found |= new
        new = set().union(*(graph[name] for name in new)) - found
    return found - {module}


GRAPH = {name_of(path): of_project(path) for path in files()}


def node(module: str) -> str:
    """The module's node in the drawing: papers share one node, and so do their studies, shared.study, and
    shared.corpora."""
    root, _, rest = module.partition(".")
    if root != "shared":
        return "its study" if f"{rest}.py" in EVIDENCE or f"{root}/{rest}.py" in BUILDERS else "a paper"
    return rest.split(".")[0]


def drawn() -> set[tuple[str, str]]:
    """Edges (node, imported node), without those implied by a longer path."""
    graph: dict[str, set[str]] = {node(module): set() for module in GRAPH}
    for module, others in GRAPH.items():
        graph[node(module)] |= {node(other) for other in others} - {node(module)}
    below = {name: reached(name, graph) for name in graph}
    return {(a, b) for a, found in graph.items() for b in found if not any(b in below[c] for c in found - {b})}


def page() -> str:
    """CONTRIBUTING.md with the current graph."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    names = {name: name.replace(" ", "_") for edge in drawn() for name in edge}
    lines = [f"    {short}[{name}]" for name, short in sorted(names.items())]
    lines += [f"    {names[a]} --> {names[b]}" for a, b in sorted(drawn())]
    return f"{before}{BEGIN}```mermaid\ngraph TD\n" + "\n".join(lines) + f"\n```\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    (ROOT / "CONTRIBUTING.md").write_text(page(), encoding="utf-8")
