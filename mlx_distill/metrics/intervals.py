"""Confidence intervals of rates and means. Models on the same items: :mod:`mlx_distill.metrics.paired`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypedDict

import numpy as np
from jaxtyping import Float, Int, Real

from mlx_distill.errors import DataError

Values = Sequence[Any] | np.ndarray
"""Numbers or booleans, one per row; functions that take them refuse None, NaN and infinite ones."""


class Estimate(TypedDict):
    """A measured value with its confidence interval over ``n`` items; at ``n = 0`` the others are None."""

    value: float | None
    low: float | None
    high: float | None
    n: int


def normal_quantile(confidence: float) -> float:
    """Two-sided critical value of the standard normal distribution: ``z`` with ``P(|Z| <= z) = confidence``.

    >>> round(normal_quantile(0.95), 4)
    1.96
    """
    from scipy.special import ndtri

    return float(ndtri(0.5 + check_confidence(confidence) / 2))


def t_quantile(confidence: float, freedom: float) -> float:
    """Two-sided critical value of Student's t: ``t`` with ``P(|T| <= t) = confidence``.

    Args:
        confidence: Level, such as 0.95.
        freedom: Degrees of freedom.

    >>> round(t_quantile(0.95, 9), 4)
    2.2622
    """
    from scipy.special import stdtrit

    return float(stdtrit(freedom, 0.5 + check_confidence(confidence) / 2))


def check_confidence(confidence: float) -> float:
    """The level itself.

    Raises:
        ValueError: it is not between 0 and 1.
    """
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence is between 0 and 1, not {confidence}")
    return confidence


def finite(values: Values, name: str) -> Float[np.ndarray, " n"]:
    """The values as float64.

    Args:
        values: Numbers.
        name: What they are, for the error.

    Raises:
        DataError: one of them is None, NaN or infinite.

    >>> finite([1, True, 0.5], "scores").tolist()
    [1.0, 1.0, 0.5]
    """
    if isinstance(values, np.ndarray) and values.dtype != object:
        array = values.astype(np.float64)
    else:
        array = np.asarray([np.nan if x is None else x for x in values], dtype=np.float64)
    wrong = np.flatnonzero(~np.isfinite(array))
    if wrong.size:
        more = f", and {wrong.size - 1} more" if wrong.size > 1 else ""
        raise DataError(
            f"{name}: value {wrong[0] + 1} of {array.size} is {array[wrong[0]]}{more}",
            fix="leave the row out of every model, or count its answer as wrong",
        )
    return array


def wilson(k: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion ``k / n``.

    ``(p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)``. It stays within 0 and 1 and has a positive
    width at ``k = 0`` and ``k = n``.

    Args:
        k: Number of successes.
        n: Number of items; at 0 the interval is 0 to 1.
        confidence: Level, such as 0.95.

    Raises:
        ValueError: ``k`` is not between 0 and ``n``.

    >>> [round(x, 4) for x in wilson(9, 10)]
    [0.5958, 0.9821]

    Wilson (1927), "Probable inference, the law of succession, and statistical inference".
    """
    if not 0 <= k <= n:
        raise ValueError(f"{k} successes in {n} items")
    check_confidence(confidence)
    if n == 0:
        return 0.0, 1.0
    from scipy.stats import binomtest

    ends = binomtest(int(k), int(n)).proportion_ci(confidence, method="wilson")
    return float(ends.low), float(ends.high)


def rate(k: int, n: int, confidence: float = 0.95) -> Estimate:
    """The rate ``k / n`` with Wilson's interval.

    >>> rate(0, 0)
    {'value': None, 'low': None, 'high': None, 'n': 0}
    """
    if n == 0:
        return {"value": None, "low": None, "high": None, "n": 0}
    low, high = wilson(k, n, confidence)
    return {"value": k / n, "low": low, "high": high, "n": n}


def newcombe(k1: int, n1: int, k2: int, n2: int, confidence: float = 0.95) -> tuple[float, float]:
    """Interval of the difference ``k1/n1 - k2/n2`` of two *independent* rates, from their Wilson intervals.

    ``d - sqrt((p1-l1)^2 + (u2-p2)^2)`` to ``d + sqrt((u1-p1)^2 + (p2-l2)^2)``.

    Raises:
        ValueError: one of the two has no items.

    >>> [round(x, 4) for x in newcombe(56, 70, 48, 80)]
    [0.0524, 0.3339]

    Newcombe (1998), "Interval estimation for the difference between independent proportions", method 10.
    """
    if n1 == 0 or n2 == 0:
        raise ValueError("a difference of two rates needs items in both samples")
    p1, p2 = k1 / n1, k2 / n2
    (l1, u1), (l2, u2) = wilson(k1, n1, confidence), wilson(k2, n2, confidence)
    return p1 - p2 - math.hypot(p1 - l1, u2 - p2), p1 - p2 + math.hypot(u1 - p1, p2 - l2)


def bootstrap_mean(
    values: Float[np.ndarray, " n"], confidence: float = 0.95, *, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Interval of a mean by the bias-corrected and accelerated bootstrap (BCa).

    The quantiles ``alpha`` of the resampled means are replaced by
    ``Phi(z0 + (z0 + z_alpha) / (1 - a (z0 + z_alpha)))`` with the bias ``z0`` and the acceleration
    ``a = sum(d^3) / (6 sum(d^2)^1.5)`` of the deviations ``d`` (the jackknife's, in closed form).

    Args:
        values: One value per item.
        confidence: Level, such as 0.95.
        resamples: Number of draws of ``n`` items with replacement.
        seed: The same seed gives the same interval.

    Raises:
        ValueError: no values.

    >>> low, high = bootstrap_mean(np.array([1.0, 2.0, 3.0, 4.0]))
    >>> 1.0 < low < 2.5 < high < 4.0
    True

    Efron (1987), "Better bootstrap confidence intervals".
    """
    from scipy.special import ndtr, ndtri

    values = np.asarray(values, dtype=np.float64)
    n = values.size
    if n == 0:
        raise ValueError("a mean needs at least one value")
    mean = float(values.mean())
    deviations = values - mean
    if not np.any(deviations):
        return mean, mean
    means = _resampled_means(values, resamples, np.random.default_rng(seed))
    below = (np.sum(means < mean) + np.sum(means <= mean)) / (2 * resamples)
    bias = float(ndtri(np.clip(below, 0.5 / resamples, 1 - 0.5 / resamples)))
    acceleration = float(np.sum(deviations**3) / (6 * np.sum(deviations**2) ** 1.5))
    z = normal_quantile(confidence)
    ends = [float(ndtr(bias + (bias + end) / (1 - acceleration * (bias + end)))) for end in (-z, z)]
    low, high = np.quantile(means, ends)
    return float(low), float(high)


def _resampled_means(
    values: Float[np.ndarray, " n"], resamples: int, rng: np.random.Generator
) -> Float[np.ndarray, " r"]:
    n = values.size
    chunk = max(1, 2_000_000 // n)  # 16 MB of indices at a time, for any n
    means = []
    for start in range(0, resamples, chunk):
        index = rng.integers(0, n, size=(min(chunk, resamples - start), n))
        means.append(values[index].mean(axis=1))
    return np.concatenate(means)


def paired_bootstrap(
    first: Float[np.ndarray, " n"],
    second: Float[np.ndarray, " n"],
    confidence: float = 0.95,
    *,
    resamples: int = 10_000,
    seed: int = 0,
) -> tuple[float, float]:
    """Interval of ``mean(first - second)`` over the same items: :func:`bootstrap_mean` of the differences.

    >>> paired_bootstrap(np.array([2.0, 3.0]), np.array([1.0, 2.0]))
    (1.0, 1.0)
    """
    first, second = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(f"paired values of {first.size} and {second.size} items")
    return bootstrap_mean(first - second, confidence, resamples=resamples, seed=seed)


def bootstrap_totals(
    tables: Int[np.ndarray, "n k"],
    statistic: Callable[[Real[np.ndarray, "r k"]], Float[np.ndarray, " r"]],
    confidence: float = 0.95,
    *,
    resamples: int = 10_000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of a statistic of summed counts, such as an F1.

    Args:
        tables: Counts of each row, or of each cluster of rows: what is drawn with replacement.
        statistic: Of many sums of drawn tables at once.
        confidence: Level, such as 0.95.
        resamples: Number of draws of ``n`` tables.
        seed: The same seed gives the same interval.

    Raises:
        ValueError: no tables.

    >>> tables = np.array([[1, 0]] * 30 + [[0, 1]] * 10)
    >>> low, high = bootstrap_totals(tables, lambda totals: totals[:, 0] / totals.sum(axis=1))
    >>> 0.55 < low < 0.65 and 0.85 < high < 0.95
    True

    Efron and Tibshirani (1993), "An introduction to the bootstrap", chapter 13.
    """
    if not len(tables):
        raise ValueError("an interval needs at least one row")
    # Drawing n tables with replacement draws how often each distinct one occurs from a multinomial
    # distribution.
    distinct, counts = np.unique(tables, axis=0, return_counts=True)
    distinct = distinct.astype(np.float64)  # products of integers are slow
    rng = np.random.default_rng(seed)
    chunk = max(1, 2_000_000 // max(len(counts), distinct.shape[1]))
    values = [
        statistic(rng.multinomial(len(tables), counts / len(tables), size=size).astype(np.float64) @ distinct)
        for size in [min(chunk, resamples - start) for start in range(0, resamples, chunk)]
    ]
    low, high = np.quantile(np.concatenate(values), [0.5 - confidence / 2, 0.5 + confidence / 2])
    return float(low), float(high)


def ratio_estimate(
    sums: Values, weights: Values, confidence: float = 0.95, *, bounds: tuple[float, float] | None = None
) -> Estimate:
    r"""The ratio of two totals over rows, such as the loss a token, with the t interval of its linearization.

    :math:`R = \sum_i y_i / \sum_i x_i` has the variance
    :math:`\frac{n}{n - 1} \sum_i (y_i - R x_i)^2 / (\sum_i x_i)^2`, so tokens of one row are not taken as
    independent.

    Args:
        sums: :math:`y_i`, of each row.
        weights: :math:`x_i`, of each row, not negative.
        confidence: Level of the interval.
        bounds: The values that the ratio can have; any by default.

    Returns:
        ``value``, ``low``, ``high`` and ``n``, the rows of a positive weight. The ends are None for fewer
        than two of them, the value too for none.

    >>> ratio_estimate([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    {'value': 2.0, 'low': 2.0, 'high': 2.0, 'n': 3}

    Cochran (1977), "Sampling techniques", chapter 6.
    """
    check_confidence(confidence)
    y, x = finite(sums, "sums"), finite(weights, "weights")
    y, x = y[x > 0], x[x > 0]
    n = len(x)
    if not n:
        return {"value": None, "low": None, "high": None, "n": 0}
    ratio = float(y.sum() / x.sum())
    if n < 2:
        return {"value": ratio, "low": None, "high": None, "n": n}
    error = math.sqrt(n / (n - 1) * float(((y - ratio * x) ** 2).sum())) / float(x.sum())
    half = t_quantile(confidence, n - 1) * error
    return clip_ends({"value": ratio, "low": ratio - half, "high": ratio + half, "n": n}, bounds or ANY)


FEW_VALUES = 30
"""Below so many values the bootstrap of a mean is too narrow, and the t interval counts too."""


ANY = (-math.inf, math.inf)
"""The bounds of a number that may have any value."""


def clip_ends(estimate: Estimate, bounds: tuple[float, float]) -> Estimate:
    """An estimate whose interval stays within the values that the mean can have; other keys are kept.

    >>> clip_ends({"value": 0.9, "low": 0.7, "high": 1.1, "n": 4}, (0.0, 1.0))["high"]
    1.0
    """
    value, low, high = estimate["value"], estimate["low"], estimate["high"]
    if value is None or low is None or high is None:
        return estimate
    out = estimate.copy()
    # The value may lie outside, as the score of an answer that keeps to no scale.
    out["low"], out["high"] = min(value, max(low, bounds[0])), max(value, min(high, bounds[1]))
    return out


def mean_estimate(values: Values, confidence: float = 0.95, *, bounds: tuple[float, float] = ANY) -> Estimate:
    """The mean of the values with its bootstrap interval (BCa).

    Below :data:`FEW_VALUES` values the ends are the outer ones of the bootstrap and of
    ``mean +- t s / sqrt(n)``: of 10 normal values the 95 % bootstrap interval held the mean in 91 % of
    simulations. The ends are None where the values do not vary: nothing says how much others would.

    Args:
        values: One per item.
        confidence: Level of the interval.
        bounds: Lowest and highest value that there can be, such as 0 and 1: the interval stays within them.

    Raises:
        DataError: a value is None, NaN or infinite.

    >>> mean_estimate([])
    {'value': None, 'low': None, 'high': None, 'n': 0}
    """
    array = finite(values, "values")
    n = array.size
    if not n:
        return {"value": None, "low": None, "high": None, "n": 0}
    mean = float(array.mean())
    if np.ptp(array) == 0:
        return {"value": mean, "low": None, "high": None, "n": n}
    # 1e8 draws take about a second; with many items the interval is narrow and needs fewer resamples.
    resamples = min(10_000, max(1_000, 100_000_000 // n))
    low, high = bootstrap_mean(array, confidence, resamples=resamples)
    if n < FEW_VALUES:
        half = t_quantile(confidence, n - 1) * float(array.std(ddof=1)) / math.sqrt(n)
        low, high = min(low, mean - half), max(high, mean + half)
    return clip_ends({"value": mean, "low": low, "high": high, "n": n}, bounds)
