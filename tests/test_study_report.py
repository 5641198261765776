"""Results files and the READMEs that are made of them."""

from pathlib import Path

import pytest

from shared import checkpoints
from shared.study import report

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("file", sorted(ROOT.glob("results/*.json")), ids=lambda file: file.stem)
def test_committed_results(file: Path, monkeypatch: pytest.MonkeyPatch):
    """One schema, three seeds (NMTune: two, of five of tuning each), and the README's numbers are the file's."""
    monkeypatch.chdir(ROOT)
    summary = checkpoints.read_json(file)
    assert set(summary) == {"paper", "seeds", "machine", "date", "commit", "arms", "claims"}
    assert len(summary["seeds"]) >= (2 if file.stem == "nmtune" else 3)
    for metrics in summary["arms"].values():
        for value in metrics.values():
            assert set(value) == {"mean", "std", "values"} and len(value["values"]) == len(summary["seeds"])
    verdicts = {
        "reproduced",
        "same direction",
        "not reproduced",
        "not testable at this scale",
        "not resolved at this scale",
        "no claim",
    }
    assert all(set(row) == {"claim", "paper", "here", "verdict"} for row in summary["claims"])
    assert {row["verdict"] for row in summary["claims"]} <= verdicts
    assert report.update_readme(file.stem, write=False), "run `make readme`"
