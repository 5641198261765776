"""Curves from published files: panels, claims, and the bins that the paper leaves out."""

import pytest
from concept_frequency_runs import write_published

from concept_frequency.published import curves
from concept_frequency.published.files import Results
from concept_frequency.published.numbers import CURVE_MODELS


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Results:
    folder = tmp_path_factory.mktemp("clone")
    write_published(folder)
    return Results(folder)


def test_panels_have_legend_and_saved_curve(published):
    key = ("classification", "integrated", "class")
    found = curves.figure_panels(published, key)
    assert [p.model for p in found] == list(CURVE_MODELS[:4])
    first = found[0]
    assert first.printed == 0.97 and first.gap == 0 and first.saved == pytest.approx(first.about.rho)
    assert found[1].saved is None and first.about.rho > 0.98 and abs(first.about.across) < 0.2
    near = [p._replace(about=p.about._replace(rho=p.printed)) for p in found]
    rows = {row["claim"]: row for row in curves.legend_claims({key: near})}
    assert rows["published files: rho, classification, matched counts (fig. 2)"]["verdict"] == "reproduced"
    assert rows["published files: bins of the curves that the authors saved"]["here"] == "1 of 1 equal to 1e-6"
    off = curves.legend_claims({key: [p._replace(gap=0.1) for p in found]})
    assert {row["verdict"] for row in off} == {"not reproduced"}


def test_tables_of_what_the_paper_leaves_out(published):
    assert len(curves.data_sets(published)) == 4 and len(curves.left_out(published)) == 2
    rows, (claim,) = curves.with_zeros(published)
    assert len(rows) == 4 and claim["verdict"] == "reproduced"
    rows, (claim,) = curves.table6(published)
    assert rows[0]["2 to 9"].endswith("(13.89)") and claim["verdict"] != "reproduced"
    rows, (claim,) = curves.by_count(published)
    assert claim["paper"].endswith("8 of 10 in table 6") and claim["verdict"] == "reproduced"
    as_printed = curves.as_printed
    assert as_printed(5.109, "5.11") and as_printed(5.109, "5.10") and not as_printed(5.1, "5.11")
    rows, (_, significant) = curves.thresholds(published)
    assert rows[0]["0.7"].endswith("**") and rows[0]["0.5"] == "-" and rows[0]["legend, 0.5"] == "0.94"
    assert significant["here"].startswith("4 of 4")
