"""The parts of all papers with adapters, ours against the authors' code: `pytest -s tests/parity --upstream CLONE`.

Both sides get the same seeded inputs. With `--write-golden DIR`, inputs and the authors' outputs are written to DIR as
case files of the names in tests/golden; a file with outputs that the authors' code no longer makes is refused.
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
    if not part.no_live
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
    more = set(Case(kept)) - values.keys() if kept.is_file() else set()
    assert not adapters.unmatched(more, part.unused), f"{kept} has more names: {sorted(more)}"
    case.path = kept
    name, functions = f"{type(part).__name__}: {stem}", part.functions.split()
    against = getattr(adapter, "AGAINST", "the authors' code")
    measured(request, case, functions, test=name, against=against, **part.about())
    gaps = [f"{case.largest[kind]:.1e}" if kind in case.largest else "-" for kind in ("values", "gradients")]
    table.rows.append([name, part.authors, part.functions, *gaps, f"{case.error[0]:.2g} of it", "-", "ok"])
    folder = request.config.getoption("write_golden")
    if folder is not None and stem in part.files:
        if more:
            pytest.fail(f"{kept.name} is not written: nothing that runs today makes its {', '.join(sorted(more))}")
        adapters.write(part, folder / part.folder / stem, values)
