"""Verdicts and their precedence, pooled standard deviations, Holm's correction."""

import math

import numpy as np
import pytest
from scipy import stats

from studies.harness import verdicts
from studies.harness.verdicts import Claim, Scatter, half_width, holm, judged, own, pooled, shown, verdict

CLAIM = Claim("higher", "+4", "m", "ours", "base", 1, 4.0, True, 1.0)
FLOORS = [((), {"m": 1.0}), ((), {"m": 30.0}), (("ours", "other"), {"m": 46.0})]  # chance, pixels, a pretrained tower


@pytest.mark.parametrize(
    ("claim", "mean", "half", "strongest", "word"),
    [
        (CLAIM, 5.0, 0.5, 40.0, "reproduced"),
        (CLAIM, 3.6, 0.5, 40.0, "reproduced"),  # the interval reaches the paper's effect
        (CLAIM, 2.0, 0.5, 40.0, "same direction"),
        (CLAIM, -2.0, 0.5, 40.0, "not reproduced"),
        (CLAIM, 0.4, 0.5, 40.0, "no difference above d"),  # the whole interval within ± 1
        (CLAIM, 0.5, 0.5, 40.0, "no difference above d"),  # up to the edge
        (CLAIM, 0.6, 0.5, 40.0, "same direction"),
        (CLAIM, 0.9, 1.5, 40.0, "not resolved"),
        (CLAIM, 1.5, 1.5, 40.0, "not resolved"),  # the interval holds zero
        (CLAIM, 5.0, None, 40.0, "not resolved"),  # one seed
        (CLAIM, 5.0, 0.5, 30.0, "has not learned"),  # at the floor is not above it
        (CLAIM, 0.1, 0.2, 29.0, "has not learned"),  # comes before "no difference"
        (CLAIM, 5.0, None, 29.0, "has not learned"),
        (CLAIM._replace(negligible=None), 0.1, 0.2, 40.0, "not resolved"),
        (CLAIM._replace(effect=None), 0.8, 0.5, 40.0, "reproduced"),
        (CLAIM._replace(sign=-1), -5.0, 0.5, 40.0, "reproduced"),
        (CLAIM._replace(sign=-1, effect=-4.0), -2.0, 0.5, 40.0, "same direction"),
        (CLAIM._replace(sign=-1), 5.0, 0.5, 40.0, "not reproduced"),
        (CLAIM._replace(paper=None), 5.0, 0.5, 29.0, "no claim"),
    ],
)
def test_words_and_their_precedence(claim: Claim, mean: float, half: float | None, strongest: float, word: str):
    floor = verdicts.floor_of(CLAIM, FLOORS, "base")
    assert verdict(claim, mean, half, strongest, floor) == word and word in verdicts.VERDICTS


def test_the_effect_is_reached_by_the_interval_before_holm():
    """Its upper end may touch the effect. Holm's wider interval only decides the side."""
    assert verdict(CLAIM, 3.5, 0.5, 40.0, 30.0) == "reproduced"
    assert verdict(CLAIM, 3.25, 1.0, 40.0, 30.0, plain=0.75) == "reproduced"
    assert verdict(CLAIM, 3.25, 1.0, 40.0, 30.0, plain=0.5) == "same direction"
    assert verdict(CLAIM, 3.25, 3.5, 40.0, 30.0, plain=0.75) == "not resolved"


def test_no_floor_of_a_metric_is_no_obstacle():
    seconds = CLAIM._replace(metric="seconds")
    assert verdicts.floor_of(seconds, FLOORS, "ours") is None and verdict(CLAIM, 5.0, 0.5, -3.0, None) == "reproduced"


def test_the_stronger_arm_is_compared_with_its_own_floors():
    """A tower's floor of 46 is for "ours" and "other"; "base" has none but those of all arms."""
    assert [verdicts.floor_of(CLAIM, FLOORS, arm) for arm in ("ours", "base", "other")] == [46.0, 30.0, 46.0]
    claim = CLAIM._replace(effect=None, negligible=None)
    for base, ours, stronger, word in (
        ([39.0, 41.0, 42.0], [45.0, 45.2, 45.9], "ours", "has not learned"),  # although "base" is above its own floor
        ([39.0, 41.0, 42.0], [46.0, 46.2, 46.9], "ours", "reproduced"),
        ([45.0, 45.2, 45.9], [39.0, 41.0, 42.0], "base", "not reproduced"),  # "base" need not reach 46
        ([45.5, 45.5, 45.5], [45.5, 45.5, 45.5], "ours", "has not learned"),  # of equal ones the method
    ):
        found = arms(base, ours)
        assert verdicts.stronger_arm(claim, found) == (stronger, max(np.mean(base), np.mean(ours)))
        (row,) = judged([claim], found, FLOORS)
        assert row["verdict"] == word and row["floor"] == (46.0 if stronger == "ours" else 30.0)


def test_a_baseline_that_is_no_arm_has_the_floors_of_its_arm():
    """A claim against 0 is judged by the method, one against another metric by the arm that it is of."""
    found = {"ours": [{"m": 40.0, "n": 45.0}] * 3}
    for baseline in ("0", "ours:n"):
        claim = CLAIM._replace(baseline=baseline)
        (row,) = judged([claim], found, FLOORS)
        assert row["floor"] == 46.0 and row["verdict"] == "has not learned"


def test_a_claim_against_zero_is_about_its_own_arm_only():
    """Two arms against 0 in one study: the weak one has not learned, whichever claim comes last."""
    claims = [Claim(f"{arm} above zero", "+", "m", arm, "0", learned_by="top1") for arm in ("weak", "strong", "weak")]
    found = {arm: [{"m": 5.0 + i, "top1": top1} for i in range(4)] for arm, top1 in (("weak", 20.0), ("strong", 60.0))}
    for order in (claims[:2], claims[1:]):
        words = {row["claim"]: row["verdict"] for row in judged(order, found, [((), {"top1": 40.0})])}
        assert words == {"weak above zero": "has not learned", "strong above zero": "reproduced"}


def test_only_arms_are_pooled():
    """A claim against 0 with another metric for learning adds no arm to the scatter of that metric."""
    rng = np.random.default_rng(0)
    found = {arm: [{"m": rng.normal(), "top1": rng.normal()} for _ in range(4)] for arm in ("a", "b", "c")}
    claims = [Claim(f"{arm} above a", "+", "top1", arm, "a") for arm in ("b", "c")]
    zero = Claim("b above zero", "+", "m", "b", "0", learned_by="top1")
    alone, beside = (judged(each, found, []) for each in (claims, [*claims, zero]))
    assert [row["resolves"] for row in beside[:2]] == [row["resolves"] for row in alone]


def test_own_scatter_is_that_of_differences():
    assert own([1.0, 2.0, 3.0]) == Scatter(1.0, 2) and own([1.0]) is None


def arms(*rows: list[float]) -> dict[str, list[dict]]:
    return {name: [{"m": value} for value in row] for name, row in zip(("base", "ours", "other"), rows, strict=False)}


def test_pooling_two_arms_is_the_pair_itself():
    two = arms([10.0, 20.0, 30.0], [13.0, 21.0, 35.0])
    mine = own([3.0, 1.0, 5.0])
    found = pooled(two, "m")
    assert found.df == mine.df and found.std == pytest.approx(mine.std)


def test_pooling_many_arms_recovers_the_scatter_with_more_degrees_of_freedom():
    rng = np.random.default_rng(0)
    values = rng.normal(0, 5, 400) + np.array([[1.0], [7.0], [-2.0]]) + rng.normal(0, 0.3, (3, 400))
    found = pooled(arms(*values.tolist()), "m")
    assert found.df == 2 * 399 and found.std == pytest.approx(0.3 * math.sqrt(2), rel=0.05)


def test_what_was_not_measured_of_an_arm_is_not_pooled():
    three = arms([1.0, 2.0], [2.0, 4.0], [9.0, 9.0])
    del three["other"][1]["m"]
    assert pooled(three, "m").df == 1 and pooled(three, "other") is None and pooled(arms([1.0], [2.0]), "m") is None


def test_intervals_are_students():
    # scipy.stats.t.interval(0.95, 2, loc=2, scale=1 / sqrt(3)): 2 ± 2.4841
    assert verdicts.half_width(Scatter(1.0, 2), 3) == pytest.approx(2.48414, abs=1e-4)
    assert verdicts.half_width(None, 3) is None


def test_holm_steps_down_and_stops():
    clear, close, none = (9.0, Scatter(1.0, 7), 8), (1.0, Scatter(1.0, 7), 8), (0.0, Scatter(1.0, 7), 8)
    p = 2 * stats.t.sf(math.sqrt(8), 7)
    assert 0.025 < p * 1.0001 or p < 0.05
    assert holm([clear, clear]) == [0.025, 0.05]
    assert holm([none, clear]) == [0.05, 0.025]
    stopped = holm([close, none, clear, none])
    assert stopped[2] == 0.0125 and stopped[0] == pytest.approx(0.05 / 3)
    assert stopped[1] == stopped[3] == (stopped[0] if p > stopped[0] else 0.025)
    assert holm([(1.0, None, 1)]) == [0.05] and holm([]) == []
    assert holm([(1.0, Scatter(0.0, 2), 3), (0.0, Scatter(0.0, 2), 3)]) == [0.025, 0.05]


def test_rows_are_primary_first_and_hold_what_the_schema_says():
    found = arms([40.0, 41.0, 42.0], [45.0, 46.5, 46.6], [44.0, 45.0, 46.0])
    second = Claim("secondary", "up", "m", "other", "base")
    rows = judged([second, CLAIM], found, FLOORS)
    assert [row["claim"] for row in rows] == ["higher", "secondary"]
    assert set(rows[0]) == {
        "claim",
        "primary",
        "paper",
        "metric",
        "floor",
        "method",
        "baseline",
        "difference",
        "interval",
        "resolves",
        "seeds",
        "negligible",
        "seeds_needed",
        "verdict",
    }
    scatter = pooled(found, "m")
    half = stats.t.ppf(0.975, 4) * scatter.std / math.sqrt(3)
    assert scatter.df == 4 and rows[0]["resolves"] == pytest.approx(half)
    assert rows[0]["interval"] == pytest.approx([rows[0]["difference"] - half, rows[0]["difference"] + half])
    assert rows[0]["verdict"] == "reproduced" and not rows[1]["primary"]
    assert rows[0]["baseline"] == pytest.approx(41) and rows[0]["method"] == pytest.approx(46.0333, abs=1e-3)


def test_primary_claims_hold_together():
    found = arms([40.0, 41.0, 42.0], [45.0, 46.5, 46.6], [44.0, 45.0, 46.0])
    claims = [CLAIM, CLAIM._replace(claim="again"), CLAIM._replace(claim="other", primary=False)]
    alone, together = (judged(some, found, []) for some in (claims[::2], claims))
    assert together[0]["resolves"] > alone[0]["resolves"] and together[2]["resolves"] == alone[1]["resolves"]


def test_scatter_of_earlier_results_is_used_where_it_knows_more():
    one = arms([40.0], [45.0])
    assert judged([CLAIM], one, [])[0]["interval"] is None
    earlier = arms([40.0, 41.0, 42.0, 43.1], [45.0, 46.5, 46.6, 48.0], [44.0, 45.0, 46.0, 46.5])
    known, scatter = judged([CLAIM], one, [], earlier)[0], pooled(dict(list(earlier.items())[:2]), "m")
    assert scatter.df == 3  # of the two arms that the claim compares
    assert known["resolves"] == pytest.approx(stats.t.ppf(0.975, 3) * scatter.std) and known["verdict"] == "reproduced"
    three = arms([40.0, 41.0, 42.0], [45.0, 46.5, 46.6], [44.0, 45.0, 46.0])
    few = judged([CLAIM], three, [], arms([0.0, 99.0], [99.0, 0.0]))[0]
    assert few["resolves"] < 5  # the study's own has more degrees of freedom


def test_what_is_negligible_is_at_most_half_the_effect():
    with pytest.raises(ValueError, match="more than half"):
        judged([CLAIM._replace(negligible=2.5)], arms([1.0, 2.0], [2.0, 3.0]), [])


def test_tables_star_primary_claims():
    rows = judged([CLAIM], arms([40.0, 41.0, 42.0], [45.0, 46.5, 46.6]), [])
    one_seed = judged([CLAIM._replace(primary=False)], arms([10.0], [50.0]), [])
    lines = shown([*rows, verdicts.not_testable("ImageNet", "55.22", "needs CC3M", primary=True), *one_seed])
    assert lines[0]["claim"] == "★ higher" and lines[0]["here"].startswith("+5.03 ± ")
    assert lines[1] == {
        "claim": "★ ImageNet",
        "paper": "55.22",
        "here": "needs CC3M",
        "resolves": "-",
        "d": "-",
        "seeds": "-",
        "verdict": "not testable here",
    }
    assert lines[2] == {
        "claim": "higher",
        "paper": "+4",
        "here": "+40.00",
        "resolves": "-",
        "d": "1",
        "seeds": 1,
        "verdict": "not resolved",
    }


def test_pairing_by_seed_removes_what_seeds_share():
    rows = judged([CLAIM], arms([10.0, 20.0, 30.0], [14.0, 24.0, 34.0]), [])
    assert rows[0]["verdict"] == "reproduced" and shown(rows)[0]["here"] == "+4.00 ± 0.00"


def test_scatter_is_pooled_over_arms_that_claims_connect():
    """Two arms with another tower and a larger scatter do not affect the intervals of the other arms, also if they are
    compared with them in a row that is no claim of the paper."""
    rng = np.random.default_rng(0)
    values = {name: rng.normal(scale=1.0, size=4) for name in "abc"} | {
        name: rng.normal(scale=9.0, size=4) for name in "xy"
    }
    runs = {name: [{"m": float(value)} for value in found] for name, found in values.items()}
    claims = [Claim("1", "+", "m", "a", "b"), Claim("2", "+", "m", "c", "b"), Claim("3", "+", "m", "x", "y")]
    claims.append(Claim("no claim", None, "m", "a", "x"))
    few = {name: runs[name] for name in "abc"}
    with_all = {row["claim"]: row["resolves"] for row in judged(claims, runs, ())}
    assert verdicts.related(claims[0], claims) == {"a", "b", "c"} and verdicts.related(claims[2], claims) == {"x", "y"}
    for row in judged(claims[:2], few, ()):
        assert row["resolves"] == with_all[row["claim"]]
    assert with_all["3"] > 2 * with_all["1"]


def test_another_metric_may_tell_whether_arms_have_learned():
    """The scatter of a ratio to the baseline is that of the pair: a baseline that is always 0 is not pooled."""
    runs = {
        "method": [{"m": 30.0, "ratio": value} for value in (0.5, 0.7, 0.6)],
        "base": [{"m": 20.0, "ratio": 0.0} for _ in range(3)],
        "other": [{"m": 25.0, "ratio": value} for value in (9.0, 0.1, 4.0)],
    }
    claims = [
        Claim("time", "-0.67", "ratio", "method", "base", -1, learned_by="m"),
        Claim("o", "+", "ratio", "other", "base"),
    ]
    row = judged(claims, runs, [((), {"m": 29.0})])[0]
    assert row["verdict"] == "not reproduced" and row["resolves"] == pytest.approx(stats.t.ppf(0.975, 2) * 0.1 / 3**0.5)
    assert judged(claims, runs, [((), {"m": 30.0})])[0]["verdict"] == "has not learned"


def test_pilot_runs_tell_the_number_of_seeds():
    scatter = Scatter(2.0, 14)
    n = verdicts.seeds_needed(scatter, CLAIM)  # negligible: 1
    assert verdicts.half_width(scatter, n) <= 1.0 < verdicts.half_width(scatter, n - 1)
    assert verdicts.seeds_needed(scatter, CLAIM._replace(negligible=None)) == 5  # half of 4
    assert verdicts.seeds_needed(Scatter(0.0, 14), CLAIM) == 2
    assert verdicts.seeds_needed(scatter, CLAIM._replace(negligible=None, effect=None)) is None
    assert verdicts.seeds_needed(None, CLAIM) is None


def test_a_claim_within_an_arm_or_against_zero_scatters_by_itself():
    """Baselines "arm:metric" and "0" compare the same runs, so other arms do not determine their scatter."""
    found = {
        "ours": [{"m": m, "n": n, "seen": 50.0} for m, n in ((5.0, 1.0), (7.0, 2.0), (9.0, 6.0))],
        "base": [{"m": m, "n": 0.0, "seen": 1.0} for m in (5.0, 5.5, 7.0)],
    }
    within = Claim("m above n", "+", "m", "ours", "ours:n", learned_by="seen")
    claims = [within, Claim("m above zero", "+", "m", "base", "0"), Claim("missing", "+", "m", "ours", "ours:p")]
    rows = judged([*claims, Claim("absent", "+", "m", "other", "0")], found, [((), {"seen": 30.0})])
    assert [row["claim"] for row in rows] == ["m above n", "m above zero"]
    for row, differences in zip(rows, ([4.0, 5.0, 3.0], [5.0, 5.5, 7.0]), strict=True):
        half = stats.t.ppf(0.975, 2) * np.std(differences, ddof=1) / math.sqrt(3)
        assert row["difference"] == pytest.approx(np.mean(differences)) and row["resolves"] == pytest.approx(half)
    floors = [((), {"seen": 60.0})]
    assert [row["verdict"] for row in judged([within], found, floors)] == ["has not learned"]


def test_an_arm_with_more_seeds_is_compared_in_those_that_both_have():
    found = arms([40.0, 41.0, 42.0, 90.0], [45.0, 46.5, 46.6], [44.0, 45.0, 46.0])
    (row,) = judged([CLAIM], found, FLOORS)
    same = judged([CLAIM], {arm: runs[:3] for arm, runs in found.items()}, FLOORS)
    assert [row] == same and row["seeds"] == 3
    few = {"a": [{"m": float(i)} for i in range(9)], "b": [{"m": 2.0 * i} for i in range(9)], "c": [{"m": 1.0}] * 2}
    assert pooled(few, "m") == pooled({arm: few[arm] for arm in "ab"}, "m")  # 8 degrees of freedom, not 2
    assert pooled(few, "m", ["a", "c"]) == pooled({arm: few[arm][:2] for arm in "abc"}, "m")  # c is not left out
    claims = [CLAIM._replace(claim=arm, method=arm, baseline="a", paper="+") for arm in "bc"]
    nine, two = judged([each._replace(primary=False) for each in claims], few, [])
    assert nine["resolves"] == half_width(pooled(few, "m"), 9) != two["resolves"]
    assert two["resolves"] == half_width(pooled(few, "m", ["a", "c"]), 2)
    constant = CLAIM._replace(method="c", baseline="0")
    rows = judged([constant, constant._replace(claim="nine", method="a")], few, [])
    assert [row["seeds"] for row in rows] == [2, 9] == [row["seeds"] for row in shown(rows)]
    assert "seeds" not in shown(same)[0]
