"""Rates that an imperfect checker or judge measured, corrected by a sample that people checked."""

from __future__ import annotations

import math

import numpy as np

from mlx_distill.errors import DataError
from mlx_distill.metrics.intervals import Estimate, Values, finite, normal_quantile, rate, t_quantile


class CorrectedRate(Estimate):
    """A corrected rate with the checker's raw one, its sensitivity and its specificity."""

    raw: Estimate
    sensitivity: Estimate
    specificity: Estimate


def corrected_rate(
    flagged: int,
    n: int,
    *,
    true_positives: int,
    positives: int,
    true_negatives: int,
    negatives: int,
    confidence: float = 0.95,
) -> CorrectedRate:
    """The true rate of what a checker flags, corrected by the checker's own errors (Rogan-Gladen).

    ``(q + sp - 1) / (se + sp - 1)`` with the flagged share ``q``, the checker's sensitivity ``se`` and
    specificity ``sp``, clipped to 0 and 1. The interval is that of Lang and Reiczigel, which counts the
    uncertainty of all three.

    Args:
        flagged: Answers (or claims) that the checker flagged.
        n: All that it checked.
        true_positives: Of a hand-checked sample, flagged ones that are wrong in truth.
        positives: Of that sample, all that are wrong in truth.
        true_negatives: Of that sample, not flagged ones that are right in truth.
        negatives: Of that sample, all that are right in truth.
        confidence: Level of the interval.

    Raises:
        DataError: impossible counts; no wrong or no right answer in the sample, so that the checker's errors
            are not known; or a checker that is no better than chance (``se + sp <= 1``).

    >>> estimate = corrected_rate(
    ...     30, 200, true_positives=18, positives=20, true_negatives=76, negatives=80
    ... )
    >>> round(estimate["value"], 4), round(estimate["raw"]["value"], 4)
    (0.1176, 0.15)

    Rogan and Gladen (1978), "Estimating prevalence from the results of a screening test"; Lang and Reiczigel
    (2014), "Confidence limits for prevalence of disease adjusted for estimated sensitivity and specificity".
    """
    counts = (("flagged", flagged, n), ("sensitivity", true_positives, positives))
    for name, k, size in (*counts, ("specificity", true_negatives, negatives)):
        if not 0 <= k <= size:
            raise DataError(f"{name}: {k} of {size}", fix="give counts of the same rows")
    if not positives or not negatives:
        missing = "wrong" if not positives else "right"
        raise DataError(
            f"no answer of the hand-checked sample is {missing}, so the checker's errors are not known",
            fix="check more answers by hand, some of them flagged and some not",
        )
    sensitivity, specificity = true_positives / positives, true_negatives / negatives
    if sensitivity + specificity <= 1:
        raise DataError(
            f"a checker with sensitivity {sensitivity:.2f} and specificity {specificity:.2f} tells nothing",
            fix="use another checker, or check more answers by hand",
        )
    known = {
        "raw": rate(flagged, n, confidence),
        "sensitivity": rate(true_positives, positives, confidence),
        "specificity": rate(true_negatives, negatives, confidence),
    }
    if n == 0:
        return {"value": None, "low": None, "high": None, "n": 0, **known}  # type: ignore[typeddict-item]
    value = _clip((flagged / n + specificity - 1) / (sensitivity + specificity - 1))
    low, high = _lang_reiczigel(
        (flagged, n), (true_positives, positives), (true_negatives, negatives), confidence
    )
    ends = {"value": value, "low": min(low, value), "high": max(high, value), "n": n}
    return {**ends, **known}  # type: ignore[typeddict-item]


def _lang_reiczigel(
    raw: tuple[int, int], sensitive: tuple[int, int], specific: tuple[int, int], confidence: float
) -> tuple[float, float]:
    """``p + d -+ z SE``, with ``z^2`` rows added to the raw ones and two to each of the others."""
    z = normal_quantile(confidence)
    n, n_se, n_sp = raw[1] + z * z, sensitive[1] + 2, specific[1] + 2
    q, se, sp = (raw[0] + z * z / 2) / n, (sensitive[0] + 1) / n_se, (specific[0] + 1) / n_sp
    slope = se + sp - 1
    if slope <= 0:  # a small sample, pulled towards one half
        return 0.0, 1.0
    p = (q + sp - 1) / slope
    var_se, var_sp = se * (1 - se) / n_se, sp * (1 - sp) / n_sp
    shift = 2 * z * z * (p * var_se - (1 - p) * var_sp)
    error = math.sqrt(q * (1 - q) / n + p * p * var_se + (1 - p) ** 2 * var_sp) / slope
    return _clip(p + shift - z * error), _clip(p + shift + z * error)


def _clip(x: float) -> float:
    return min(1.0, max(0.0, x))


def upper_limit_of_none(n: int, confidence: float = 0.95) -> float:
    """The upper end of a rate of which none was seen in ``n`` rows: ``z^2 / (n + z^2)``, Wilson's at 0.

    >>> round(upper_limit_of_none(100), 4)
    0.037
    """
    if n < 0:
        raise DataError(f"{n} rows", fix="give a number of rows")
    square = normal_quantile(confidence) ** 2
    return square / (n + square)


def prediction_powered(
    judged: Values,
    judged_checked: Values,
    human: Values,
    *,
    bounds: tuple[float, float] = (0.0, 1.0),
    confidence: float = 0.95,
) -> Estimate:
    """A mean that a judge model measured on many rows, corrected by people's values of a few of them.

    ``mean(f) + mean(y - g)`` with the judge's values ``f`` of the rows that no person checked, and the
    people's ``y`` and the judge's ``g`` of the checked ones; the variance is ``var(f) / N + var(y - g) / n``.
    However wrong the judge is, the interval holds; the better it is, the narrower. ``t`` with ``n - 1``
    degrees of freedom. Where ``y - g`` does not vary, its half width is ``R z^2 / (n + z^2)`` with the range
    ``R`` of the scale.

    Args:
        judged: The judge's values of rows without a human value.
        judged_checked: The judge's values of the rows that people checked, a random sample.
        human: People's values of the same rows, in the same order.
        bounds: Lowest and highest value of the scale.
        confidence: Level of the interval.

    Returns:
        The estimate; ``n`` is the number of all rows. The ends are None with fewer than two checked rows.

    Raises:
        DataError: lengths differ, or a value is None, NaN or outside the scale.

    >>> estimate = prediction_powered([1, 1, 0, 1] * 50, [1, 1, 0, 1, 0] * 8, [1, 0, 0, 1, 0] * 8)
    >>> round(estimate["value"], 3), estimate["n"]
    (0.55, 240)

    Angelopoulos and others (2023), "Prediction-powered inference", https://arxiv.org/abs/2301.09633.
    """
    f, g, y = finite(judged, "judged"), finite(judged_checked, "judged_checked"), finite(human, "human")
    if g.size != y.size:
        raise DataError(
            f"{g.size} checked rows of the judge and {y.size} of people",
            fix="give both values of each checked row",
        )
    lowest, highest = bounds
    for name, values in (("judge", f), ("judge", g), ("human", y)):
        if values.size and not (lowest <= values.min() and values.max() <= highest):
            raise DataError(f"a {name} value is outside {lowest} to {highest}", fix="give the scale's bounds")
    total = f.size + g.size
    if not f.size or not g.size:
        raise DataError(
            f"{f.size} judged and {g.size} checked rows",
            fix="give some of each, or use the people's mean alone",
        )
    value = float(f.mean() + (y - g).mean())
    if f.size < 2 or g.size < 2:
        return {"value": value, "low": None, "high": None, "n": total}
    judge_variance, gap_variance = float(f.var(ddof=1)) / f.size, float((y - g).var(ddof=1)) / g.size
    z, t = normal_quantile(confidence), t_quantile(confidence, g.size - 1)
    floor = (highest - lowest) * z * z / (g.size + z * z) if gap_variance == 0 else 0.0
    half = float(np.hypot(t * math.sqrt(judge_variance + gap_variance), floor))
    return {
        "value": value,
        "low": max(lowest, value - half),
        "high": min(highest, value + half),
        "n": total,
    }
