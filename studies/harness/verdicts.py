"""Claims of a paper and their verdicts, computed from metrics by seed.

A claim compares two arms in one metric, paired by seed. With n seeds and differences d_i, the interval is
mean(d) ± t(0.975, df) s / sqrt(n). The standard deviation s of a difference is estimated from the pair (df = n - 1), or
pooled over related arms of the study (`pooled`), whichever has more degrees of freedom.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import t as student_t

from shared.errors import UserError

VERDICTS = {  # in this precedence
    "not testable here": "needs the paper's data, models or machines",
    "has not learned": "the stronger of the two arms is not above its floors, for which no encoder is trained "
    "(chance, nearest neighbours or probes on raw pixels or on a pretrained tower, canonical correlation)",
    "no difference above d": "the whole interval lies within ± d, which studies/PAPER.py fixed beforehand",
    "reproduced": "the whole interval lies on the paper's side; if the paper's difference has the same unit, the "
    "interval (before Holm's correction) reaches it",
    "same direction": "the whole interval lies on the paper's side, but it does not reach the paper's difference",
    "not reproduced": "the whole interval lies on the other side",
    "not resolved": "the interval contains zero, or there is no interval",
    "no claim": "the paper makes no claim about this difference",
}
LEVEL = 0.05
MeasuredFloors = Sequence[tuple[Sequence[str], dict[str, float]]]  # (arms, or () for all arms; {metric: value}) of each


class Claim(NamedTuple):
    """A difference in `metric`, `method` minus `baseline`, paired by seed; `sign` is that of the paper's difference."""

    claim: str
    paper: str | None  # the paper's number or word; None: the paper makes no claim about the difference
    metric: str
    method: str
    baseline: str  # an arm; or "arm:metric", another metric of an arm; or "0"
    sign: int = 1  # +1: the paper says higher, -1: lower
    effect: float | None = None  # the paper's difference, if it is in the same unit
    primary: bool = False  # whether the paper's abstract states it
    negligible: float | None = None  # d of "no difference above d": at most half the paper's effect
    learned_by: str | None = None  # metric for comparing the arms with the floor; None: `metric`


def measured(claim: Claim, arms: dict[str, list[dict]]) -> bool:
    """Whether all runs of both arms of a claim have its metrics. The baseline "0" has no `learned_by`."""
    of_both, learned_by = {claim.metric}, {claim.learned_by or claim.metric}
    needed = {claim.method: of_both | learned_by}
    needed[claim.baseline] = of_both if claim.baseline == "0" else of_both | learned_by
    return all(arm in arms and all(metrics <= set(run) for run in arms[arm]) for arm, metrics in needed.items())


class Scatter(NamedTuple):
    """Standard deviation over seeds of the difference between two arms, and its degrees of freedom."""

    std: float
    df: int


def own(differences: Sequence[float]) -> Scatter | None:
    """The scatter of one pair of arms, from its differences; None for fewer than two seeds."""
    n = len(differences)
    return None if n < 2 else Scatter(float(np.std(differences, ddof=1)), n - 1)


def pooled(arms: dict[str, list[dict]], metric: str, pair: Iterable[str] = ()) -> Scatter | None:
    """The scatter of a difference between two of A arms with n seeds; a seed has the same effect on all arms.

    Residuals of the additive model arm + seed have (A - 1)(n - 1) degrees of freedom and variance v; a difference has
    variance 2 v. If arms have different numbers of seeds, some seeds, or some arms that are not of the compared `pair`,
    are left out so that most degrees of freedom remain. None if fewer than two arms or seeds have the metric.
    """
    values = [[run[metric] for run in runs] for runs in arms.values() if all(metric in run for run in runs)]
    most_seeds = min((len(arms[arm]) for arm in pair), default=math.inf)
    lengths = {len(each) for each in values if len(each) <= most_seeds}
    tables = [[each[:n] for each in values if len(each) >= n] for n in lengths]
    most = max(tables, key=lambda table: (len(table) - 1) * (len(table[0]) - 1), default=[])
    if len(most) < 2 or len(most[0]) < 2:
        return None
    x = np.array(most)
    residual = x - x.mean(0) - x.mean(1, keepdims=True) + x.mean()
    df = (x.shape[0] - 1) * (x.shape[1] - 1)
    return Scatter(math.sqrt(2 * float((residual**2).sum()) / df), df)


def related(claim: Claim, claims: Iterable[Claim]) -> set[str]:
    """The claim's arms, and arms that claims of the paper connect with them. Other arms may scatter more, such as those
    with another tower or a worse teacher."""
    found = {claim.method, claim.baseline}
    pairs = [{each.method, each.baseline} for each in claims if each.paper is not None]
    while joined := [pair for pair in pairs if pair & found and not pair <= found]:
        found = found.union(*joined)
    return found


def scatter_of(
    claim: Claim,
    sides: Sequence[Sequence[float]],
    claims: Iterable[Claim],
    trained: set[str],
    sources: Sequence[dict[str, list[dict]]],
) -> Scatter | None:
    """The scatter of a claim's difference: that of the pair, or one pooled over the related arms among `trained`,
    whichever has the most degrees of freedom.

    sides: the metric of the claim's two arms, by seed. sources: arms of these results, and of earlier ones.
    """
    differences = [a - b for a, b in zip(*sides, strict=True)]
    scatters = [own(differences)]
    if claim.baseline in trained and (len(set(sides[1])) > 1 or len(differences) == 1):
        # a constant baseline or another metric does not share the effect of a seed
        comparable = related(claim, claims) & trained  # without "0" and "arm:metric", which are no arms
        for source in sources:
            found = {arm: runs for arm, runs in source.items() if arm in comparable}
            scatters.append(pooled(found, claim.metric, found.keys() & {claim.method, claim.baseline}))
    return max((each for each in scatters if each), key=lambda each: each.df, default=None)


def half_width(scatter: Scatter | None, n: int, level: float = LEVEL) -> float | None:
    """Half width of the (1 - level) interval of the mean of n differences; None without scatter."""
    if scatter is None:
        return None
    return float(student_t.ppf(1 - level / 2, scatter.df)) * scatter.std / math.sqrt(n)


def seeds_needed(scatter: Scatter | None, claim: Claim) -> int | None:
    """The fewest seeds for which the half width is at most `negligible` or, if this is None, half the paper's effect.

    None if the claim has neither, or without scatter. Pilot runs use this to plan a study.
    """
    width = claim.negligible if claim.negligible is not None else abs(claim.effect or 0) / 2
    if scatter is None or not width:
        return None
    return max(2, math.ceil((float(student_t.ppf(1 - LEVEL / 2, scatter.df)) * scatter.std / width) ** 2))


def holm(scatters: Sequence[tuple[float, Scatter | None, int]], level: float = LEVEL) -> list[float]:
    """The level of each of m comparisons (mean difference, scatter, n) for a family-wise `level` (Holm 1979).

    The comparison with the k-th smallest p-value gets level / (m - k + 1). After the first that is not significant,
    all get the same level as this one.
    """

    def p_value(mean: float, scatter: Scatter | None, n: int) -> float:
        if scatter is None:
            return 1.0
        if scatter.std == 0:
            return 0.0 if mean else 1.0
        return 2 * float(student_t.sf(abs(mean) / (scatter.std / math.sqrt(n)), scatter.df))

    p_values, m = [p_value(*each) for each in scatters], len(scatters)
    levels, stopped = [level] * m, None
    for k, i in enumerate(sorted(range(m), key=p_values.__getitem__)):
        levels[i] = stopped or level / (m - k)
        if stopped is None and p_values[i] > levels[i]:
            stopped = levels[i]
    return levels


def verdict(
    claim: Claim, mean: float, half: float | None, strongest: float, floor: float | None, plain: float | None = None
) -> str:
    """The verdict on a mean difference ± half. strongest: the better arm's mean in the metric of `floor`.

    plain: half width before Holm's correction; None: `half`. For "reproduced" the mean plus this width must reach the
    paper's effect.
    """
    if claim.paper is None:
        return "no claim"
    if floor is not None and strongest <= floor:
        return "has not learned"
    if half is None:
        return "not resolved"
    if claim.negligible is not None and abs(mean) + half <= claim.negligible:
        return "no difference above d"
    if abs(mean) <= half:
        return "not resolved"
    if mean * claim.sign < 0:
        return "not reproduced"
    if claim.effect is not None and abs(mean) + (plain or half) < abs(claim.effect):
        return "same direction"
    return "reproduced"


def floor_of(claim: Claim, floors: MeasuredFloors, stronger: str) -> float | None:
    """The highest floor of the claim's stronger arm, in the metric `learned_by`; None if there is none.

    Floors that name no arm are for all arms.
    """
    metric = claim.learned_by or claim.metric
    counting = [values for arms, values in floors if not arms or stronger in arms]
    return max((values[metric] for values in counting if metric in values), default=None)


def stronger_arm(claim: Claim, arms: dict[str, list[dict]]) -> tuple[str, float]:
    """The claim's arm with the higher mean in the metric `learned_by` (the method if they are equal), and this mean.

    For the baseline "0", the arm is the method; a baseline "arm:metric" counts as its arm.
    """
    metric = claim.learned_by or claim.metric
    sides = (claim.method,) if claim.baseline == "0" else (claim.method, claim.baseline)
    means = {arm: float(np.mean([run[metric] for run in arms[arm]])) for arm in sides}
    stronger = max(means, key=means.__getitem__)
    return stronger.partition(":")[0], means[stronger]


def other_baselines(claims: Iterable[Claim], arms: dict[str, list[dict]]) -> dict[str, list[dict]]:
    """{baseline: metrics by seed} for claims' baselines "0" and "arm:metric", as if they were arms.

    For "arm:metric" they include the arm's `learned_by`. All claims share the baseline "0", which has zeros only.
    """
    longest = max(arms.values(), key=len)
    found: dict[str, list[dict]] = {}
    for claim in claims:
        arm, _, metric = claim.baseline.partition(":")
        if claim.baseline == "0" and claim.method in arms:
            for stand_in in found.setdefault("0", [{} for _ in longest]):
                stand_in[claim.metric] = 0.0
            continue
        if arm not in arms or metric == "" or any(metric not in run for run in arms[arm]):
            continue
        stand_ins = found.setdefault(claim.baseline, [{} for _ in arms[arm]])
        for stand_in, run in zip(stand_ins, arms[arm], strict=True):
            stand_in[claim.metric] = run[metric]
            if claim.learned_by in run:
                stand_in[claim.learned_by] = run[claim.learned_by]
    return found


def judged(
    claims: Iterable[Claim],
    arms: dict[str, list[dict]],
    floors: MeasuredFloors,
    earlier: dict[str, list[dict]] | None = None,
) -> list[dict[str, Any]]:
    """A row of the table of claims for each claim that was `measured`, primary claims first.

    An arm may have more seeds than another: a claim compares the first ones, which both have.

    Intervals of primary claims have the levels of Holm's step-down test, so that they hold together. earlier: arms of
    earlier results with the same settings; their pooled scatter is used if it has more degrees of freedom. ValueError
    if a claim's `negligible` is more than half of its effect.
    """
    claims, trained = list(claims), set(arms)
    arms = arms | other_baselines(claims, arms)
    chosen = sorted((claim for claim in claims if measured(claim, arms)), key=lambda claim: not claim.primary)
    found, means = [], []
    for claim in chosen:
        if claim.negligible is not None and claim.effect is not None and claim.negligible > abs(claim.effect) / 2:
            raise UserError(f"{claim.claim}: negligible {claim.negligible} is more than half of the paper's effect")
        n = min(len(arms[arm]) for arm in (claim.method, claim.baseline))
        sides = [[run[claim.metric] for run in arms[arm][:n]] for arm in (claim.method, claim.baseline)]
        difference = float(np.mean([a - b for a, b in zip(*sides, strict=True)]))
        found.append((difference, scatter_of(claim, sides, chosen, trained, (arms, earlier or {})), n))
        means.append({"method": float(np.mean(sides[0])), "baseline": float(np.mean(sides[1]))})
    primary = [each for claim, each in zip(chosen, found, strict=True) if claim.primary]
    levels = holm(primary) + [LEVEL] * (len(chosen) - len(primary))
    rows = []
    for claim, sides, (mean, scatter, n), level in zip(chosen, means, found, levels, strict=True):
        stronger, strongest = stronger_arm(claim, {arm: runs[:n] for arm, runs in arms.items()})
        half, floor = half_width(scatter, n, level), floor_of(claim, floors, stronger)
        rows.append(
            {
                "claim": claim.claim,
                "primary": claim.primary,
                "paper": claim.paper or "-",
                "metric": claim.metric,
                "floor": floor,
                **sides,
                "difference": mean,
                "interval": None if half is None else [mean - half, mean + half],
                "resolves": half,
                "seeds": n,
                "negligible": claim.negligible,
                "seeds_needed": seeds_needed(scatter, claim),
                "verdict": verdict(claim, mean, half, strongest, floor, half_width(scatter, n)),
            }
        )
    return rows


def not_testable(claim: str, paper: str, why: str, primary: bool = False) -> dict[str, Any]:
    """A row for a claim that cannot be tested here."""
    numbers = ("metric", "floor", "method", "baseline", "difference", "interval", "resolves", "negligible")
    row = {"claim": claim, "primary": primary, "paper": paper} | dict.fromkeys(numbers)
    return row | {"verdict": "not testable here", "why": why}


def shown(rows: Iterable[dict[str, Any]]) -> list[dict[str, str]]:
    """Rows formatted for tables: primary claims are starred; narrow intervals and their means get a third digit. If
    rows compare different numbers of seeds, a column says how many."""
    rows = list(rows)
    some_more = len({row["seeds"] for row in rows if "seeds" in row}) > 1
    lines = []
    for row in rows:
        here, resolves, negligible = row.get("why", ""), "-", row.get("negligible")
        if row["difference"] is not None:
            half = row["resolves"]  # with two significant digits, as the interval could seem to contain 0 with fewer
            digits = 3 if half is not None and 0.0005 < half < 0.0995 else 2
            here = f"{row['difference']:+.{digits}f}" + ("" if half is None else f" ± {half:.{digits}f}")
            resolves = "-" if half is None else f"{half:.{digits}f}"
        star = "★ " * row["primary"]
        lines.append(
            {
                "claim": star + row["claim"],
                "paper": row["paper"],
                "here": here,
                "resolves": resolves,
                "d": "-" if negligible is None else f"{negligible:.3g}",
                **({"seeds": row.get("seeds", "-")} if some_more else {}),
                "verdict": row["verdict"],
            }
        )
    return lines
