"""The test suite's command-line options, as a pytest plugin of the installed package.

They cannot be in conftest.py: before reading it, pytest would take DIR of `pytest --golden DIR` for a folder of tests.
"""

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden", metavar="DIR", type=Path, help="folder of golden case folders (default: tests/golden)")
    parser.addoption("--upstream", metavar="PATH", type=Path, help="clone of the authors' repository, for tests/parity")
    parser.addoption(
        "--write-golden", metavar="DIR", type=Path, help="with --upstream: write the authors' outputs to DIR"
    )
