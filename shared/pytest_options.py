"""The test suite's options, as a pytest plugin that the installed package brings along.

`pytest --golden DIR` must be understood before any conftest is found: else DIR, which may lie outside the project, is
taken for a place to look for tests.
"""

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden", metavar="DIR", type=Path, help="folder of golden case folders (default: tests/golden)")
    parser.addoption("--upstream", metavar="PATH", type=Path, help="clone of the authors' repository, for tests/parity")
