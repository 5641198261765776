"""Verdicts and their precedence, intervals, and simulations of how often they are wrong."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from shared import pictures
from shared.errors import UserError
from studies.harness import verdicts
from studies.harness.verdicts import Claim, Scatter, half_of, half_width, judged, own, pooled, shown, verdict

CLAIM = Claim("higher", "+4", "m", "ours", "base", 1, 4.0, True, 1.0)
FLOORS = [((), {"m": 1.0}), ((), {"m": 30.0}), (("ours", "other"), {"m": 46.0})]  # chance, pixels, a pretrained tower


@pytest.mark.parametrize(
    ("claim", "mean", "half", "learned", "word"),
    [
        (CLAIM, 5.0, 0.5, True, "reproduced"),
        (CLAIM, 2.0, 0.5, True, "reproduced"),  # half of the paper's effect
        (CLAIM, 1.9, 0.5, True, "direction only"),
        (CLAIM, 1.9, 1.8, True, "direction only"),  # a wider interval does not make it more than that
        (CLAIM, -2.0, 0.5, True, "not reproduced"),
        (CLAIM, 0.4, 0.5, True, "no difference above d"),  # the whole interval within ± 1
        (CLAIM, 0.5, 0.5, True, "no difference above d"),  # up to the edge
        (CLAIM, 0.6, 0.5, True, "direction only"),
        (CLAIM, 0.9, 1.5, True, "open"),
        (CLAIM, 1.5, 1.5, True, "open"),  # the interval holds zero
        (CLAIM, 5.0, None, True, "open"),  # one seed
        (CLAIM, 5.0, 0.5, False, "has not learned"),
        (CLAIM, 0.1, 0.2, False, "has not learned"),  # comes before "no difference"
        (CLAIM, 5.0, None, False, "has not learned"),
        (CLAIM._replace(negligible=None), 0.1, 0.2, True, "open"),
        (CLAIM._replace(effect=None), 9.0, 0.5, True, "direction only"),  # no number to compare with
        (CLAIM._replace(sign=-1, effect=-4.0), -5.0, 0.5, True, "reproduced"),
        (CLAIM._replace(sign=-1, effect=-4.0), -1.5, 0.4, True, "direction only"),
        (CLAIM._replace(sign=-1, effect=-4.0), 5.0, 0.5, True, "not reproduced"),
        (CLAIM._replace(paper=None), 5.0, 0.5, False, "no claim"),
    ],
)
def test_words_and_their_precedence(claim: Claim, mean: float, half: float | None, learned: bool, word: str):
    assert verdict(claim, mean, half, learned) == word and word in verdicts.VERDICTS


def arms(*rows: list[float]) -> dict[str, list[dict]]:
    return {name: [{"m": value} for value in row] for name, row in zip(("base", "ours", "other"), rows, strict=False)}


def test_an_arm_has_learned_if_its_interval_is_above_its_floor():
    values = [31.0, 32.0, 33.0]  # 32 ± 2.48
    assert verdicts.has_learned(values, 29.5) and not verdicts.has_learned(values, 29.6)
    assert verdicts.has_learned(values, None) and verdicts.has_learned([30.1], 30.0)
    assert not verdicts.has_learned([30.0], 30.0)


def test_the_stronger_arm_decides_and_a_weak_baseline_is_marked():
    """A tower's floor of 46 is for "ours" and "other"; "base" has none but those of all arms."""
    assert [verdicts.floor_of("m", FLOORS, arm) for arm in ("ours", "base", "other")] == [46.0, 30.0, 46.0]
    assert verdicts.floor_of("seconds", FLOORS, "ours") is None
    claim = CLAIM._replace(effect=None, negligible=None)
    for base, ours, learned, floor, word in (
        ([39.0, 40.0, 40.2], [44.0, 45.2, 45.9], True, 46.0, "has not learned"),  # although "base" is above its floor
        ([39.0, 40.0, 41.2], [49.0, 50.2, 50.9], True, 46.0, "direction only"),
        ([29.0, 30.0, 31.2], [49.0, 50.2, 50.9], False, 46.0, "direction only"),  # the baseline is below its floor
        ([45.0, 46.2, 47.9], [38.0, 39.3, 40.9], True, 30.0, "not reproduced"),  # "base" need not reach 46
    ):
        (row,) = judged([claim], arms(base, ours), FLOORS)
        assert (row["verdict"], row["floor"], row["baseline_learned"]) == (word, floor, learned)


def test_a_claim_within_an_arm_or_against_zero():
    """Baselines "arm:metric" and "0" compare the same runs, whose scatter is their own; `learned_by` is another
    metric."""
    found = {
        "ours": [{"m": m, "n": n, "seen": s} for m, n, s in ((5.0, 1.0, 50.0), (7.0, 2.0, 51.0), (9.0, 6.0, 50.5))],
        "base": [{"m": m, "seen": 1.0} for m in (5.0, 5.5, 7.0)],
    }
    claims = [
        Claim("m above n", "+", "m", "ours", "ours:n", learned_by="seen"),
        Claim("m above zero", "+", "m", "base", "0", learned_by="seen"),
        Claim("missing", "+", "m", "ours", "ours:p"),
        Claim("absent", "+", "m", "other", "0"),
    ]
    rows = judged(claims, found, [((), {"seen": 30.0})])
    assert [row["claim"] for row in rows] == ["m above n", "m above zero"]
    for row, differences in zip(rows, ([4.0, 5.0, 3.0], [5.0, 5.5, 7.0]), strict=True):
        half = stats.t.ppf(0.975, 2) * np.std(differences, ddof=1) / math.sqrt(3)
        assert row["difference"] == pytest.approx(np.mean(differences)) and row["resolves"] == pytest.approx(half)
    assert [row["verdict"] for row in rows] == ["direction only", "has not learned"]


def test_intervals_are_students():
    # scipy.stats.t.interval(0.95, 2, loc=2, scale=1 / sqrt(3)): 2 ± 2.4841
    assert half_width(Scatter(1.0, 2), 3) == pytest.approx(2.48414, abs=1e-4)
    assert own([1.0, 2.0, 3.0]) == Scatter(1.0, 2)


def test_pooling_two_arms_is_the_pair_itself_and_many_know_more():
    two = pooled([[10.0, 20.0, 30.0], [13.0, 21.0, 35.0]])
    assert two.df == 2 and two.std == pytest.approx(own([3.0, 1.0, 5.0]).std)
    rng = np.random.default_rng(0)
    values = rng.normal(0, 5, 400) + np.array([[1.0], [7.0], [-2.0]]) + rng.normal(0, 0.3, (3, 400))
    assert pooled(values).df == 2 * 399 and pooled(values).std == pytest.approx(0.3 * math.sqrt(2), rel=0.05)


def test_few_seeds_take_the_wider_interval_and_eight_their_own():
    rng = np.random.default_rng(0)
    for n in (4, 8):
        values = np.array([[1.0], [1.0], [9.0], [9.0]]) * rng.normal(size=(4, n))  # two calm arms, two wild ones
        differences = values[0] - values[1]
        alone, both = half_width(own(differences), n), half_of(differences, values)
        assert both == alone if n == 8 else both == half_width(pooled(values), n) > alone
    wild = values[2] - values[3]
    assert half_of(wild[:4], values[:, :4]) == half_width(own(wild[:4]), 4)  # the pair's own is wider


def test_scatter_is_pooled_over_arms_that_claims_connect():
    """Two arms with another tower and a larger scatter do not affect the intervals of the other arms, also if they are
    compared with them in a row that is no claim of the paper."""
    rng = np.random.default_rng(0)
    scales = dict.fromkeys("abc", 1.0) | dict.fromkeys("xy", 9.0)
    runs = {name: [{"m": float(value)} for value in rng.normal(scale=s, size=4)] for name, s in scales.items()}
    claims = [Claim("1", "+", "m", "a", "b"), Claim("2", "+", "m", "c", "b"), Claim("3", "+", "m", "x", "y")]
    claims.append(Claim("no claim", None, "m", "a", "x"))
    assert verdicts.related(claims[0], claims) == {"a", "b", "c"} and verdicts.related(claims[2], claims) == {"x", "y"}
    few = judged(claims[:2], {name: runs[name] for name in "abc"}, ())
    assert [row["resolves"] for row in few] == [row["resolves"] for row in judged(claims, runs, ())[:2]]


def test_primary_claims_share_their_level_by_bonferroni():
    found = arms([40.0, 41.0, 42.0], [45.0, 46.5, 46.6])
    claims = [CLAIM, CLAIM._replace(claim="again"), CLAIM._replace(claim="other", primary=False)]
    rows = judged(claims, found, [])
    for row, level in zip(rows, (0.025, 0.025, 0.05), strict=True):
        half = half_width(own([5.0, 5.5, 4.6]), 3, level)
        assert row["interval"] == pytest.approx([row["difference"] - half, row["difference"] + half])
    absent = [*claims, CLAIM._replace(claim="not trained", method="other")]
    assert judged(absent, found, [])[0]["resolves"] > rows[0]["resolves"]  # counts although it has no row


def test_what_is_negligible_is_at_most_half_the_effect():
    with pytest.raises(ValueError, match="more than half"):
        judged([CLAIM._replace(negligible=2.5)], arms([1.0, 2.0], [2.0, 3.0]), [])


def test_seeds_that_do_not_scatter_are_no_certainty():
    (row,) = judged([CLAIM], arms([10.0, 20.0, 30.0], [14.0, 24.0, 34.0]), [])
    assert row["difference"] == 4.0 and row["interval"] is None and row["verdict"] == "open"
    assert row["scatter"] == "all seeds equal" and "all seeds equal" in shown([row])[0]["here"]
    (row,) = judged([CLAIM], arms([10.0, 20.0, 30.0], [14.3, 24.3, 34.3]), [])  # equal but for rounding
    assert row["scatter"] == "all seeds equal" and row["interval"] is None
    (row,) = judged([CLAIM], arms([10.0], [14.0]), [])
    assert row["scatter"] == "one seed"


def test_pilot_runs_tell_the_number_of_seeds():
    for level in (0.05, 0.01):
        n = verdicts.seeds_needed(2.0, CLAIM, level)  # negligible: 1
        assert half_width(Scatter(2.0, n - 1), n, level) <= 1.0 < half_width(Scatter(2.0, n - 2), n - 1, level)
    assert verdicts.seeds_needed(2.0, CLAIM, 0.01) > verdicts.seeds_needed(2.0, CLAIM)
    assert verdicts.seeds_needed(2.0, CLAIM._replace(negligible=None)) == 7  # half of 4
    assert verdicts.seeds_needed(2.0, CLAIM._replace(negligible=None, effect=None)) is None


def test_arms_with_more_seeds_are_compared_in_those_that_both_have():
    found = arms([40.0, 41.0, 42.0, 90.0], [45.0, 46.5, 46.6])
    (row,) = judged([CLAIM], found, [])
    assert [row] == judged([CLAIM], {arm: runs[:3] for arm, runs in found.items()}, []) and row["seeds"] == 3


def test_tables_star_primary_claims_and_say_preview():
    rows = judged([CLAIM], arms([40.0, 41.0, 42.0], [45.0, 46.5, 46.6]), [])
    one_seed = judged([CLAIM._replace(primary=False)], arms([10.0], [50.0]), [])
    rows += [verdicts.not_testable("ImageNet", "55.22", "needs CC3M", primary=True), *one_seed]
    first, untested, alone = shown(rows)
    assert first["claim"] == "★ higher" and first["here"] == "+5.03 ± 1.12" and first["verdict"] == "reproduced"
    assert untested["here"] == "needs CC3M" and untested["verdict"] == "not testable here"
    assert alone["here"] == "+40.00" and alone["verdict"] == "open" and alone["seeds"] == 1
    assert [line["verdict"] for line in shown(rows, preview=True)] == [
        "reproduced (preview)", "not testable here", "open (preview)",
    ]  # fmt: skip


def test_words_say_how_a_difference_stands_to_the_papers():
    row = {"verdict": "direction only", "difference": 1.0, "effect": 4.0, "interval": [-1.0, 3.0]}
    assert "half" in verdicts.worded(row) and "no number" in verdicts.worded(row | {"effect": None})
    unsure = row | {"verdict": "open"}
    assert verdicts.worded(unsure) == verdicts.worded(unsure | {"interval": None}) == "open"
    assert "half" in verdicts.worded(unsure | {"interval": [-1.0, 1.9]})
    assert "half" in verdicts.worded(unsure | {"effect": -4.0, "interval": [-1.9, 3.0]})
    none = row | {"verdict": "no difference above d"}
    assert "paper" in verdicts.worded(none) and "paper" not in verdicts.worded(none | {"effect": None})


# ---------------------------------------------------------------------------------------------------------- simulations

REPEATS = 20_000
EQUAL, WILD_PAIR, CALM_PAIR, ONE_WILD = (1, 1, 1, 1), (3, 3, 1, 1), (1, 1, 3, 3), (3, 1, 1, 1)


def drawn(scales: tuple[float, ...], n: int, repeats: int = REPEATS, shift: float = 0.0) -> np.ndarray:
    """Metrics (repeats, arms, n): an effect of the seed on all arms, each arm's own scatter; `shift` of the first."""
    rng = np.random.default_rng(n)
    own_part = rng.normal(size=(repeats, len(scales), n)) * np.array(scales)[:, None]
    own_part[:, 0] += shift
    return own_part + rng.normal(0, 2, (repeats, 1, n))


@pytest.mark.parametrize("n", [3, 5, 10])
@pytest.mark.parametrize("scales", [EQUAL, WILD_PAIR, CALM_PAIR, ONE_WILD], ids=str)
@pytest.mark.parametrize("level", [0.05, 0.05 / 7])
def test_intervals_hold_at_their_level(n: int, scales: tuple, level: float):
    """From eight seeds on as often as they say, with fewer at least as often, also where arms scatter unequally."""
    values = drawn(scales, n)
    differences = values[:, 0] - values[:, 1]
    held = float(np.mean(np.abs(differences.mean(-1)) <= half_of(differences, values, level)))
    assert held > 1 - level - 0.004 and (n < verdicts.OWN or held < 1 - level + 0.004)


@pytest.mark.parametrize(("n", "least"), [(3, 0.0), (5, 0.0), (10, 0.04)])
def test_all_claims_of_a_paper_hold_together(n: int, least: float):
    """Seven differences from one baseline that are all zero: at most 5 % of studies have a verdict on any of them."""
    values = drawn((1,) * 8, n)
    differences = values[:, 1:] - values[:, :1]
    halves = np.stack([half_of(differences[:, i], values, 0.05 / 7) for i in range(7)], axis=1)
    wrong = float(np.mean((np.abs(differences.mean(-1)) > halves).any(1)))
    assert least <= wrong <= 0.052


@pytest.mark.parametrize("n", [3, 5, 10])
def test_verdicts_are_seldom_false(n: int):
    """By `judged` itself, of an absent difference, of one just above d, and of one of a fourth of the paper's."""
    claim = CLAIM._replace(primary=False)
    for shift, wrong, most in (
        (0.0, {"reproduced", "direction only", "not reproduced"}, 0.055),
        (1.001, {"no difference above d", "not reproduced"}, 0.03),
        (1.0, {"reproduced"}, 0.2 if n == 3 else 0.1),  # the point estimate alone tells a fourth from a half
    ):
        words = []
        for values in drawn((0.8, 0.8, 1.6), n, 300, shift):
            found = {
                arm: [{"m": value} for value in row] for arm, row in zip(("ours", "base", "c"), values, strict=True)
            }
            words.append(judged([claim, Claim("c", "+", "m", "c", "base")], found, [])[0]["verdict"])
        assert np.mean([word in wrong for word in words]) <= most, shift


@pytest.mark.parametrize(("n", "pictures"), [(3, 100), (5, 300), (10, 100)])
def test_a_bootstrap_over_pictures_covers_what_seeds_alone_do_not(n: int, pictures: int):
    rng, held, alone = np.random.default_rng(0), 0, 0
    for seed in range(150):
        of_pictures, of_seeds = rng.normal(0, 0.3, (1, pictures)), rng.normal(0, 0.02, (n, 1))
        hits = of_pictures + of_seeds + rng.normal(0, 0.4, (n, pictures))
        held += abs(hits.mean()) <= half_width(verdicts.bootstrapped(hits, seed), n)
        alone += abs(hits.mean()) <= half_of(hits.mean(1))
    assert held / 150 >= 0.94 > alone / 150


def test_scores_of_pictures_widen_an_interval():
    rng = np.random.default_rng(0)
    hits = {arm: rng.integers(0, 2, (4, 50)) * 100 for arm in ("base", "ours")}
    runs = {arm: [{"m": of.mean()} | pictures.by_picture("m", torch.tensor(of)) for of in each]
            for arm, each in hits.items()}  # fmt: skip
    values = arms(*([run["m"] for run in of] for of in runs.values()))
    (wide,), (plain,), (large,) = (
        judged([CLAIM], runs, []),
        judged([CLAIM], values, [], ["m"]),
        judged([CLAIM], values, []),
    )
    assert wide["resolves"] > plain["resolves"] and wide["difference"] == plain["difference"]
    assert [row["scatter"] for row in (wide, plain, large)] == ["seeds and pictures", "seeds alone", "seeds"]
    (secondary,) = judged([CLAIM._replace(primary=False)], runs, [], ["m"])
    assert secondary["scatter"] == "seeds" and secondary["resolves"] == plain["resolves"]
    runs["ours"][2]["m"] += 1e-5
    with pytest.raises(UserError, match="by picture"):
        judged([CLAIM], runs, [])


def test_more_seeds_do_not_lower_the_scatter_of_pictures():
    assert verdicts.seeds_needed(2.0, CLAIM, of_pictures=0.1) > verdicts.seeds_needed(2.0, CLAIM)
    assert verdicts.seeds_needed(2.0, CLAIM, of_pictures=0.3) is None  # 1.96 sqrt(0.3) > 1
