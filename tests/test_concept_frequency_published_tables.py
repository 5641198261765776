"""Tables besides the curves, from files in the authors' layout; functions without their files return nothing."""

import re
import shutil

import numpy as np
import pytest
from concept_frequency_runs import write_published

from concept_frequency.published import replay, tables
from concept_frequency.published.files import Results
from concept_frequency.published.numbers import TABLE9


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Results:
    folder = tmp_path_factory.mktemp("clone")
    write_published(folder)
    return Results(folder)


def test_tables(published):
    rows, (claim,) = tables.agreement(published)
    assert [row["corpora"] for row in rows] == ["CC-3M, CC-12M"] and "aligned: 1.00 to 1.00" in claim["here"]
    rows, _ = tables.tails(published)
    assert len(rows) == 6 and rows[0]["corpus"] == "CC-3M" and rows[0]["below 1e-5 of the corpus"].endswith(" %")
    rows, (claim,) = tables.misalignments(published)
    assert rows[0] == {"corpus": "CC-3M", "table 3": "557,683 (16.81 %)", "here": "557,683 (16.819 %)"}
    assert claim["verdict"] == "reproduced"
    rows, claims = tables.generation(published)
    assert [row["model"] for row in rows] == ["a_one", "b_two"]
    assert rows[0]["max CLIP score"] == "(-1.00)" and rows[1]["max CLIP score"] == "-"
    assert [row["bins differ by"] for row in rows] == ["-", "5e-01"]
    assert [claim["verdict"] for claim in claims] == ["reproduced", "not reproduced"]
    assert tables.fine_grained(published) == {"birdsnap_0", "birdsnap 1"}
    common, fine = tables.common_and_fine(published).values()
    assert set(common) == set(fine) == set(TABLE9) and set(common.values()) == {30.0} and set(fine.values()) == {6.0}
    assert [column.title for column in replay.wag_columns(published)] == [
        "all classes, 40 models", "common (1), 40 models", "fine-grained (2), 40 models",
    ]  # fmt: skip


def test_claims_of_let_it_wag():
    x = np.array([20.0, 40.0, 60.0, 80.0])
    slopes, lost = tables.wag_claims(x, np.array([0.0, 12.0, 20.0, 51.6]))
    assert slopes["here"] == "0.60 1.58" and slopes["verdict"] == "reproduced"
    assert re.findall(r"[\d.]+", lost["here"]) == ["20.0", "40.0", "29.1", "3", "4", "20"]
    assert lost["verdict"] == "direction only"
    assert tables.wag_claims(x, x + 1)[1]["verdict"] == "not reproduced"


def test_a_clone_without_the_other_files(published, tmp_path):
    for name in ("search_counts", "zero_shot_evaluations", "retrieval_evaluations", "let_it_wag_datasets"):
        shutil.copytree(published.folder / name, tmp_path / name)
    for path in tmp_path.glob("search_counts/t2i_*"):
        path.unlink()
    bare = Results(tmp_path)
    for function in (tables.generation, tables.people, tables.misalignments):
        assert function(bare) == ([], [])
    assert tables.tail_concepts(bare) == []
