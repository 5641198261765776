"""Every golden case file is claimed by a test (see conftest.py)."""

from pathlib import Path

import conftest
import pytest
from conftest import case_files, claims, family

from shared import checkpoints, evaluation, run
from shared.presets import folders


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    files = [(folder, file) for folder in folders() for file in case_files(metafunc.config, folder)]
    if "file" in metafunc.fixturenames:
        metafunc.parametrize("folder, file", files, ids=[f"{folder}/{file.name}" for folder, file in files])


def test_a_test_claims_the_case(folder: str, file: Path):
    assert family(file, claims()[folder]), f"no test claims {file}: is its name that of a known family?"


def test_every_family_is_claimed_by_a_test_of_its_own_folder():
    assert set(claims()) == set(folders())


def helper():
    return checkpoints.State({})["a"]


def test_functions_that_a_test_uses_are_named_with_their_module():
    """Names include the module, because companion pages match them with the functions of a row and several files share
    bare names."""

    def sample():
        evaluation.table([{"a": run.Stopwatch()}])
        helper()

    used = {"shared.evaluation.table", "shared.run.Stopwatch", "shared.checkpoints.State"}
    assert conftest.functions_in(sample) == used
    names = ["run.Stopwatch.read", "table", "none", "none.such"]  # a module by its own name, a function as imported
    found = conftest.named_functions(names, {"table": evaluation.table}, "shared")
    assert found == {"shared.run.Stopwatch.read", "shared.evaluation.table"}
