"""Claims of a paper and their verdicts, computed from metrics by seed."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from scipy.stats import t as student_t


class Claim(NamedTuple):
    """A difference in `metric`, `method` minus `baseline`, paired by seed; `sign` is that of the paper's difference."""

    claim: str
    paper: str | None  # the paper's number or word; None: the paper makes no claim, the difference is only shown
    metric: str
    method: str
    baseline: str  # an arm; or "arm:metric", another metric of an arm; or "0"
    sign: int = 1  # +1: the paper says higher, -1: lower
    effect: float | None = None  # the paper's difference, if it is in the same unit
    primary: bool = False  # whether the paper's abstract states it
    negligible: float | None = None  # d of "no difference above d": at most half the paper's effect
    learned_by: str | None = None  # metric for comparing the arms with the floor; None: `metric`


def spread(values: Sequence[float]) -> dict[str, Any]:
    """{"mean", "std", "values"} over seeds; std is the sample standard deviation (n-1), 0 for one seed."""
    mean = math.fsum(values) / len(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / max(len(values) - 1, 1)
    return {"mean": mean, "std": math.sqrt(variance), "values": list(values)}


def interval(differences: Sequence[float]) -> float | None:
    """Half width of the 95 % Student interval of the mean, or None for fewer than two seeds."""
    n = len(differences)
    return None if n < 2 else float(student_t.ppf(0.975, n - 1)) * spread(differences)["std"] / math.sqrt(n)


def judge(claim: Claim, method: Sequence[float], baseline: Sequence[float]) -> dict[str, str]:
    """One row of the claims table.

    reproduced: the interval is on the paper's side of 0, and reaches the paper's `effect` if there is one;
    same direction: it is on the paper's side, but below its effect; not reproduced: it is on the other side;
    not resolved at this scale: it contains 0, or there is one seed; no claim: the paper makes none.
    """
    differences = [m - b for m, b in zip(method, baseline, strict=True)]
    mean, half = spread(differences)["mean"], interval(differences)
    here = f"{mean:+.2f}"
    if half is not None:  # two digits of the interval, since rounding could make it seem to contain 0
        digits = 3 if 0.0005 < half < 0.0995 else 2
        here = f"{mean:+.{digits}f} ± {half:.{digits}f}"
    if claim.paper is None:
        verdict = "no claim"
    elif half is None or abs(mean) <= half:
        verdict = "not resolved at this scale"
    elif mean * claim.sign <= 0:
        verdict = "not reproduced"
    elif claim.effect is not None and abs(mean) + half < abs(claim.effect):
        verdict = "same direction"
    else:
        verdict = "reproduced"
    return {"claim": claim.claim, "paper": claim.paper or "-", "here": here, "verdict": verdict}


def measured(claim: Claim, arms: dict[str, list[dict]]) -> bool:
    """Whether all runs of both arms of a claim have its metrics."""
    both, metrics = [claim.method, claim.baseline], {claim.metric, claim.learned_by or claim.metric}
    return all(arm in arms and all(metrics <= set(run) for run in arms[arm]) for arm in both)


def judge_all(claims: Iterable[Claim], arms: dict[str, list[dict]]) -> list[dict[str, str]]:
    """One row for each claim that was `measured`."""
    return [
        judge(claim, *([run[claim.metric] for run in arms[arm]] for arm in (claim.method, claim.baseline)))
        for claim in claims
        if measured(claim, arms)
    ]
