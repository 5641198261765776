"""Golden case files: each is claimed by a test (conftest.py says how)."""

from pathlib import Path

import pytest
from conftest import case_files, claims, family

from shared.presets import folders


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    files = [(folder, file) for folder in folders() for file in case_files(metafunc.config, folder)]
    if "file" in metafunc.fixturenames:
        metafunc.parametrize("folder, file", files, ids=[f"{folder}/{file.name}" for folder, file in files])


def test_a_test_claims_the_case(folder: str, file: Path):
    assert family(file, claims()[folder]), f"no test claims {file}: is its name that of a known family?"


def test_every_family_is_claimed_by_a_test_of_its_own_folder():
    assert set(claims()) == set(folders())
