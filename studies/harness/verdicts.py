"""Claims of a paper and their verdicts, computed from metrics by seed.

A claim compares two arms in one metric, paired by seed. With n seeds and differences d_i, the interval of the mean is
mean(d) ± t(1 - level / 2, df) s / sqrt(n). All m primary claims of a study have level 0.05 / m (Bonferroni), in their
interval and in their verdict alike, so that with probability 0.95 all of these intervals hold; others have 0.05.
"""

import math
from collections.abc import Container, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import t as student_t

from shared import pictures
from shared.errors import UserError

VERDICTS = {  # in this precedence
    "not testable here": "needs the paper's data, models, geometry or machines, or what the study does not measure",
    "has not learned": "the lower end of the 95 % interval of the stronger arm is not above its floors, for which "
    "no encoder is trained",
    "no difference above d": "the whole interval lies within ± d, which studies/PAPER.py declares",
    "reproduced": "the whole interval lies on the paper's side of zero, and the difference is at least half of the "
    "paper's, in its unit",
    "direction only": "the whole interval lies on the paper's side of zero, but the difference is less than half of "
    "the paper's, or the paper has no number in this unit",
    "not reproduced": "the whole interval lies on the other side",
    "open": "the interval contains zero and reaches beyond d, or there is none: one seed, or seeds without any scatter",
    "no claim": "the paper makes no claim about this difference",
}
LEVEL, OWN = 0.05, 8  # from OWN seeds on, the scatter is the pair's own
SMALL, DRAWS = pictures.SMALL, 2000  # pictures below which a test set is resampled, too; draws of this bootstrap
MARKED = ("seeds alone", "all seeds equal")  # words on a row's scatter that tables show
MeasuredFloors = Sequence[tuple[Sequence[str], dict[str, float]]]  # (arms, or () for all arms; {metric: value}) of each
Arms = dict[str, list[dict]]  # arm -> metrics of each seed


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
    where: str = ""  # why the mechanism can act at this scale


class Scatter(NamedTuple):
    """Standard deviation over seeds of the difference between two arms, and its degrees of freedom."""

    std: Any  # a number, or an array of them
    df: int


# ---------------------------------------------------------------------------------------------------------- intervals


def own(differences: Any) -> Scatter:
    """The scatter of pairs of arms, from their differences (..., n)."""
    return Scatter(np.std(differences, axis=-1, ddof=1), np.shape(differences)[-1] - 1)


def pooled(values: Any) -> Scatter:
    """The scatter of a difference between two of A arms, from values (..., A, n); a seed has the same effect on all.

    Residuals of the additive model arm + seed have (A - 1)(n - 1) degrees of freedom and variance v; a difference has
    variance 2 v.
    """
    x = np.asarray(values, dtype=float)
    residual = x - x.mean(-2, keepdims=True) - x.mean(-1, keepdims=True) + x.mean((-2, -1), keepdims=True)
    df = (x.shape[-2] - 1) * (x.shape[-1] - 1)
    return Scatter(np.sqrt(2 * (residual**2).sum((-2, -1)) / df), df)


def half_width(scatter: Scatter, n: int, level: float = LEVEL) -> Any:
    """Half width of the (1 - level) interval of the mean of n differences."""
    return student_t.ppf(1 - level / 2, scatter.df) * scatter.std / math.sqrt(n)


def half_of(differences: Any, related: Any = None, level: float = LEVEL) -> Any:
    """Half width of the interval of the mean of differences (..., n): from their own scatter; with fewer than OWN
    seeds, the wider of this one and that from the scatter pooled over related arms (..., A, n)."""
    n = np.shape(differences)[-1]
    half = half_width(own(differences), n, level)
    if n >= OWN or related is None or np.shape(related)[-2] < 2:
        return half
    return np.maximum(half, half_width(pooled(related), n, level))


def bootstrapped(hits: np.ndarray, seed: int = 0) -> Scatter:
    """The scatter of differences over seeds and pictures: hits (seeds, pictures), differences of each picture.

    Seeds and pictures are drawn with replacement, independently; the standard deviation of the mean is multiplied by
    sqrt(n), so that it stands for that of one of n seeds.
    """
    (n, pictures), draw = hits.shape, np.random.default_rng(seed)
    of_seeds, of_pictures = (draw.multinomial(k, np.full(k, 1 / k), DRAWS) / k for k in (n, pictures))
    means = ((of_seeds @ hits) * of_pictures).sum(-1)
    return Scatter(float(np.std(means)) * n / math.sqrt(n - 1), n - 1)


def seeds_needed(std: float, claim: Claim, level: float = LEVEL, of_pictures: float = 0.0) -> int | None:
    """The fewest seeds whose half width at `level` is at most `negligible` or, if this is None, half of the effect.

    of_pictures: the part of the mean's variance that is of the choice of pictures, which seeds do not lower.
    """
    width = claim.negligible if claim.negligible is not None else abs(claim.effect or 0) / 2
    n = np.arange(2, 1000)
    enough = n[student_t.ppf(1 - level / 2, n - 1) * np.sqrt(std**2 / n + of_pictures) <= width]
    return int(enough[0]) if len(enough) else None


# ----------------------------------------------------------------------------------------------------- floors, verdicts


def floor_of(metric: str, floors: MeasuredFloors, arm: str) -> float | None:
    """The highest floor of an arm in this metric; None if there is none. Floors that name no arm are for all arms."""
    counting = [values for arms, values in floors if not arms or arm in arms]
    return max((values[metric] for values in counting if metric in values), default=None)


def has_learned(values: Sequence[float], floor: float | None) -> bool:
    """Whether the lower end of an arm's own 95 % interval is above its floor; its mean, if it has one seed."""
    if floor is None:
        return True
    half = half_width(own(values), len(values)) if len(values) > 1 else 0.0
    return bool(np.mean(values) - half > floor)


def verdict(claim: Claim, mean: float, half: float | None, learned: bool) -> str:
    """The verdict on a mean difference ± half. learned: whether the stronger arm is above its floors."""
    if claim.paper is None:
        return "no claim"
    if not learned:
        return "has not learned"
    if half is None:
        return "open"
    if claim.negligible is not None and abs(mean) + half <= claim.negligible:
        return "no difference above d"
    if abs(mean) <= half:
        return "open"
    if mean * claim.sign < 0:
        return "not reproduced"
    return "reproduced" if claim.effect is not None and abs(mean) >= abs(claim.effect) / 2 else "direction only"


def related(claim: Claim, claims: Iterable[Claim]) -> set[str]:
    """The claim's arms, and arms that claims of the paper connect with them. Other arms may scatter more, such as those
    with another tower or a worse teacher."""
    found = {claim.method, claim.baseline}
    pairs = [{each.method, each.baseline} for each in claims if each.paper is not None]
    while joined := [pair for pair in pairs if pair & found and not pair <= found]:
        found = found.union(*joined)
    return found


def side(arms: Arms, name: str, metric: str) -> list[float] | None:
    """Values by seed of an arm, of "arm:metric" (whatever `metric` is) or of "0"; None if they were not measured."""
    if name == "0":
        return [0.0] * max(map(len, arms.values()))
    arm, _, other = name.partition(":")
    runs = arms.get(arm, [])
    return [run[other or metric] for run in runs] if runs and all((other or metric) in run for run in runs) else None


def scores_of(run: dict[str, Any], metric: str) -> np.ndarray | None:
    """The scores (pictures,) of a run's metric; None if it has none. UserError if their mean is not the metric."""
    if (text := run.get(metric + pictures.SUFFIX)) is None:
        return None
    scores = pictures.unpacked(text)
    if abs(scores.mean() - run[metric]) > 1e-6:
        raise UserError(f"{metric} is {run[metric]}, but the mean of its scores by picture is {scores.mean()}")
    return scores


def judged(
    claims: Iterable[Claim], arms: Arms, floors: MeasuredFloors, small: Container[str] = ()
) -> list[dict[str, Any]]:
    """A row of the table of claims for each claim whose metrics were measured, primary claims first.

    If both arms of a primary claim have scores by picture (see `shared.pictures`), its scatter is over seeds and
    pictures. `small`: metrics of sets with fewer than SMALL pictures. A difference that is the same for all seeds has
    no interval. UserError if `negligible` is more than half of the effect.
    """
    claims = list(claims)
    level = LEVEL / max(sum(claim.primary for claim in claims), 1)
    rows = []
    for claim in sorted(claims, key=lambda each: not each.primary):
        if claim.negligible is not None and claim.effect is not None and claim.negligible > abs(claim.effect) / 2:
            raise UserError(f"{claim.claim}: negligible {claim.negligible} is more than half of the paper's effect")
        by, names = claim.learned_by or claim.metric, (claim.method, claim.baseline)
        sides = [side(arms, name, claim.metric) for name in names]
        scores = {
            name: of if by == claim.metric else side(arms, name.partition(":")[0], by)
            for name, of in zip(names, sides, strict=True)
            if name != "0"
        }
        if None in sides or None in scores.values():
            continue
        n = min(map(len, sides))  # old results have more seeds of some arms
        method, baseline = (np.array(values[:n]) for values in sides)
        differences = method - baseline
        bars = {name: floor_of(by, floors, name.partition(":")[0]) for name in scores}
        reached = {name: has_learned(scores[name][:n], bars[name]) for name in scores}
        stronger = max(scores, key=lambda name: np.mean(scores[name][:n]))
        connected = [side(arms, arm, claim.metric) for arm in sorted(related(claim, claims) & arms.keys())]
        same = claim.baseline in arms and len(set(baseline)) > 1  # else seeds have no common effect on both
        others = [values[:n] for values in connected if values and len(values) >= n] if same else None
        at, half, std, of_pictures, over = level if claim.primary else LEVEL, None, None, 0.0, "one seed"
        if n > 1:
            std, half = float(own(differences).std), float(half_of(differences, others, at))
            over = "seeds alone" if claim.primary and claim.metric in small else "seeds"
            every = [scores_of(run, claim.metric) for name in names for run in arms.get(name, [])[:n]]
            if claim.primary and len(every) == 2 * n and all(each is not None for each in every):
                both = bootstrapped(np.array(every[:n]) - np.array(every[n:]))
                half, over = max(half, float(half_width(both, n, at))), "seeds and pictures"
                of_pictures = max(both.std**2 - std**2, 0.0) / n
            if half < 1e-9:  # seeds without any scatter show none, which is no certainty
                half, over = None, "all seeds equal"
        mean = float(differences.mean())
        rows.append(
            {
                "claim": claim.claim,
                "primary": claim.primary,
                "paper": claim.paper or "-",
                "effect": claim.effect,
                "sign": claim.sign,
                "metric": claim.metric,
                "floor": bars[stronger],
                "method": float(method.mean()),
                "baseline": float(baseline.mean()),
                "baseline_learned": reached.get(claim.baseline),
                "method_learned": reached[claim.method],
                "difference": mean,
                "std": std,
                "interval": None if half is None else [mean - half, mean + half],
                "resolves": half,
                "scatter": over,
                "seeds": n,
                "negligible": claim.negligible,
                "seeds_needed": seeds_needed(std, claim, at, of_pictures) if std else None,
                "where": claim.where,
                "verdict": verdict(claim, mean, half, reached[stronger]),
            }
        )
    return rows


def not_testable(claim: str, paper: str, why: str, primary: bool = False) -> dict[str, Any]:
    """A row for a claim that cannot be tested here."""
    numbers = ("metric", "effect", "floor", "method", "baseline", "difference", "interval", "resolves", "negligible")
    row = {"claim": claim, "primary": primary, "paper": paper} | dict.fromkeys(numbers)
    return row | {"verdict": "not testable here", "where": why}


def primary(summary: dict | None) -> dict[str, dict]:
    """{claim: row} of the claims of the abstract."""
    return {row["claim"]: row for row in (summary or {"claims": ()})["claims"] if row["primary"]}


# --------------------------------------------------------------------------------------------------------------- tables


def number(value: float | None, half: float | None = None) -> str:
    """A signed difference; one with a narrow interval has a third digit, so that it does not seem to contain 0."""
    return "-" if value is None else f"{value:+.{3 if half is not None and 0.0005 < half < 0.0995 else 2}f}"


def worded(row: dict[str, Any]) -> str:
    """The verdict of a row, and how the difference stands to the paper's where the word leaves that open."""
    word, effect = row["verdict"], row.get("effect")
    if row["difference"] is None:
        return word
    if word == "direction only":
        return f"{word} ({'no number in this unit' if effect is None else 'less than half'})"
    if word == "no difference above d" and effect is not None:
        return f"{word} (the paper has one)"
    if word == "open" and effect is not None and max(end / effect for end in row["interval"] or (effect,)) < 0.5:
        return f"{word} (less than half)"
    return word


def shown(rows: Iterable[dict[str, Any]], preview: bool = False) -> list[dict[str, str]]:
    """Rows formatted for tables: primary claims are starred. preview: verdicts say so if their interval is too wide to
    resolve d."""
    lines = []
    for row in rows:
        half, d, word = row["resolves"], row.get("negligible"), worded(row)
        here = row.get("where", "") if row["difference"] is None else number(row["difference"], half)
        here += f" ± {number(half, half)[1:]}" if half is not None else ""
        here += f" ({row['scatter']})" if row.get("scatter") in MARKED else ""
        wide = d is not None and (half is None or half > d) and word != "has not learned"
        lines.append(
            {
                "claim": "★ " * row["primary"] + row["claim"],
                "paper": row["paper"],
                "here": here,
                "d": "-" if d is None else f"{d:.3g}",
                "seeds": row.get("seeds", "-"),
                "verdict": f"{word} (preview)" if preview and wide else word,
            }
        )
    return lines
