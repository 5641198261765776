"""The golden tests of all papers with adapters (tests/adapters): ours against every file of their families."""

import pytest
from conftest import DEFAULT, Case, case_files, claims, family, measured

from shared import presets
from studies.harness import companion
from tests import adapters

FOLDERS = [folder for folder in presets.folders() if adapters.parts(folder)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "path" not in metafunc.fixturenames:
        return
    runs = []
    for folder in FOLDERS:
        found = [(path, family(path, claims()[folder])) for path in case_files(metafunc.config, folder)]
        for part in adapters.parts(folder):
            paths = [path for path, name in found if name in part.families]
            if metafunc.config.getoption("golden") == DEFAULT:
                assert {name for path, name in found} >= set(part.families), f"no file of {part.families}"
            names = [f"{folder}/{path.name}" for path in paths]
            runs += [pytest.param(part, path, id=name) for path, name in zip(paths, names, strict=True)]
    metafunc.parametrize("part, path", runs)


@pytest.mark.golden
def test_golden(request, part, path):
    case = Case(path)
    part.compare(case)
    if path.is_relative_to(DEFAULT):
        assert not part.left(case), f"{path} has arrays that were not compared"
    measured(request, case, part.functions.split(), test=f"{type(part).__name__}: {path.stem}", **part.about())


@pytest.mark.parametrize("folder", FOLDERS)
def test_functions_are_those_of_the_readme(folder):
    """So that PARITY.md joins what was measured with its row."""
    functions = [each for row in companion.read(folder).rows for each in row.functions]
    names = {f"{each.file.removesuffix('.py').replace('/', '.')}.{each.name}" for each in functions}
    for part in adapters.parts(folder):
        assert not set(part.functions.split()) - names, type(part).__name__
