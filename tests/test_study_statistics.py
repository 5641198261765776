"""Verdicts and their intervals."""

import pytest

from shared.study.statistics import Claim, interval, judge

CLAIM = Claim("higher", "+2", "m", "ours", "base", sign=1, effect=2.0)
SAME = Claim("lower", "-", "m", "ours", "base", sign=-1)


@pytest.mark.parametrize(
    ("claim", "method", "verdict"),
    [
        (CLAIM, [12.0, 12.1, 11.9], "reproduced"),
        (CLAIM, [10.5, 10.6, 10.4], "same direction"),  # surely above 0, surely below the paper's 2
        (CLAIM, [8.0, 8.1, 7.9], "not reproduced"),
        (CLAIM, [12.0, 8.0, 11.0], "not resolved at this scale"),
        (CLAIM, [10.0, 10.0, 10.0], "not resolved at this scale"),
        (SAME, [8.0, 8.1, 7.9], "reproduced"),
        (SAME, [12.0, 12.1, 11.9], "not reproduced"),
    ],
)
def test_verdicts(claim: Claim, method: list[float], verdict: str):
    assert judge(claim, method, [10.0, 10.0, 10.0])["verdict"] == verdict


def test_where_the_paper_claims_nothing():
    assert judge(CLAIM._replace(paper=None), [12.0, 12.1, 11.9], [10.0] * 3)["verdict"] == "no claim"


def test_one_seed_proves_nothing():
    row = judge(CLAIM, [50.0], [10.0])
    assert row["verdict"] == "not resolved at this scale" and row["here"] == "+40.00"


def test_interval_is_students():
    # scipy.stats.t.interval(0.95, 2, loc=2, scale=1 / sqrt(3)): 2 ± 2.4841
    assert interval([1.0, 2.0, 3.0]) == pytest.approx(2.48414, abs=1e-4)
    assert interval([1.0]) is None


def test_pairing_by_seed_removes_what_seeds_share():
    row = judge(CLAIM, [12.0, 22.0, 32.0], [10.0, 20.0, 30.0])
    assert row["verdict"] == "reproduced" and row["here"] == "+2.00 ± 0.00"
