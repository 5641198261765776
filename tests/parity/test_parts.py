"""The parts of all papers with adapters, ours against the authors' code: `pytest -s tests/parity --upstream CLONE`.

Both sides get the same seeded inputs. With `--write-golden DIR`, inputs and the authors' outputs are written to DIR as
case files of the names in tests/golden.
"""

import pytest
from conftest import DEFAULT, Case, measured

from shared import presets
from tests import adapters

from . import Table, check_commit, printed

CASES = [
    pytest.param(part, stem, id=f"{folder}/{type(part).__name__}: {stem}")
    for folder in presets.folders()
    for part in adapters.parts(folder)
    for stem in part.files | part.more
]


@pytest.fixture(scope="module")
def table(request):
    yield from printed(request, Table(None), "Parts")


@pytest.mark.parametrize("part, stem", CASES)
def test_part(request, part, stem, table):
    adapter, upstream = adapters.module(part.folder), request.config.getoption("upstream")
    repository, commit, file = adapter.CLONE
    if upstream is None or not (upstream / file).is_file():
        pytest.skip(f"needs --upstream PATH, a clone of {repository} at {commit}")
    check_commit(upstream, commit)
    with adapter.authors(upstream) as up:
        case, values = part.against(up, stem)
    kept = DEFAULT / part.folder / case.path.name
    if kept.is_file():
        assert values.keys() >= set(Case(kept)), f"{kept} has more names: {sorted(set(Case(kept)) - values.keys())}"
    case.path = kept
    name, functions = f"{type(part).__name__}: {stem}", part.functions.split()
    measured(request, case, functions, test=name, against=getattr(adapter, "AGAINST", "the authors' code"))
    gaps = [f"{case.largest[kind]:.1e}" if kind in case.largest else "-" for kind in ("values", "gradients")]
    table.rows.append([name, part.authors, part.functions, *gaps, f"{case.error[0]:.2g} of it", "-", "ok"])
    folder = request.config.getoption("write_golden")
    if folder is not None and stem in part.files:
        adapters.write(part, folder / part.folder / stem, values)
