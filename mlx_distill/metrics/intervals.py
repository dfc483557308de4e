"""Confidence intervals and paired tests, in plain Python and numpy.

Two models that answer the same items are *paired*: only the items on which they differ (the discordant ones)
carry information about the difference. So McNemar's test and the Bonett-Price interval are used, not the
chi-squared test of two independent samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import TypedDict

import numpy as np
from jaxtyping import Float


class Estimate(TypedDict):
    """A measured value with its confidence interval over ``n`` items; at ``n = 0`` the others are None."""

    value: float | None
    low: float | None
    high: float | None
    n: int


class Comparison(TypedDict):
    """Two models on the same items: difference of their rates (first minus second), McNemar's mid-p value.

    ``both``, ``first_only``, ``second_only`` and ``neither`` count the items by which model is correct.
    """

    difference: Estimate
    p_value: float
    both: int
    first_only: int
    second_only: int
    neither: int


def normal_quantile(confidence: float) -> float:
    """Two-sided critical value of the standard normal distribution: ``z`` with ``P(|Z| <= z) = confidence``.

    >>> round(normal_quantile(0.95), 4)
    1.96
    """
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence is between 0 and 1, not {confidence}")
    return NormalDist().inv_cdf(0.5 + confidence / 2)


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
    if n == 0:
        return 0.0, 1.0
    z, p = normal_quantile(confidence), k / n
    denominator = 1 + z * z / n
    centre = (p + z * z / (2 * n)) / denominator
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / denominator
    # The ends are exact at k = 0 and k = n; rounding would leave about 1e-17.
    return (0.0 if k == 0 else max(0.0, centre - half)), (1.0 if k == n else min(1.0, centre + half))


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


def mcnemar_mid_p(b: int, c: int) -> float:
    """Mid-p value of McNemar's exact test of equal accuracy.

    ``min(1, 2 P(X <= k) - P(X = k))`` with ``X ~ Binomial(b + c, 1/2)`` and ``k = min(b, c)``. The mid-p
    variant keeps the type I error close to the nominal level, where the exact test is conservative.

    Args:
        b: Items that only the first model has correct.
        c: Items that only the second model has correct.

    >>> round(mcnemar_mid_p(1, 8), 4)
    0.0215

    Fagerland, Lydersen and Laake (2013), "The McNemar test for binary matched-pairs data".
    """
    if b < 0 or c < 0:
        raise ValueError("counts must not be negative")
    n, k = b + c, min(b, c)
    if n == 0:
        return 1.0
    # In integers: in floats the terms underflow at a few thousand items.
    term, below = 1, 0
    for i in range(k):
        below += term
        term = term * (n - i) // (i + 1)
    return min(1.0, (2 * below + term) / 2**n)


def bonett_price(b: int, c: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Interval of the difference ``(b - c) / n`` of two paired rates.

    With ``p = (b+1)/(n+2)`` and ``q = (c+1)/(n+2)``: ``p - q +- z sqrt((p + q - (p-q)^2) / (n+2))``, clipped
    to -1 and 1.

    Args:
        b: Items that only the first model has correct.
        c: Items that only the second model has correct.
        n: All items.

    Raises:
        ValueError: no items, or more discordant items than items.

    >>> [round(x, 4) for x in bonett_price(10, 4, 100)]
    [-0.0172, 0.1348]

    Bonett and Price (2012), "Adjusted Wald confidence interval for a difference of binomial proportions based
    on paired data".
    """
    if n < 1 or b < 0 or c < 0 or b + c > n:
        raise ValueError(f"{b} and {c} discordant items of {n}")
    p, q = (b + 1) / (n + 2), (c + 1) / (n + 2)
    half = normal_quantile(confidence) * math.sqrt((p + q - (p - q) ** 2) / (n + 2))
    return max(-1.0, p - q - half), min(1.0, p - q + half)


def compare_paired(
    first: Sequence[bool], second: Sequence[bool], confidence: float = 0.95
) -> Comparison | None:
    """Compare the rates of two models on the same items: difference, Bonett-Price interval, mid-p value.

    Args:
        first: Whether the first model is correct, one value per item.
        second: The same of the second model, in the same order.
        confidence: Level of the interval.

    Returns:
        The comparison; None for no items.

    >>> result = compare_paired([True, True, False, True], [True, False, False, False])
    >>> result["difference"]["value"], result["first_only"], result["p_value"]
    (0.5, 2, 0.25)
    """
    pairs = list(zip(first, second, strict=True))
    if not pairs:
        return None
    n = len(pairs)
    both, b = sum(x and y for x, y in pairs), sum(x and not y for x, y in pairs)
    c = sum(y and not x for x, y in pairs)
    low, high = bonett_price(b, c, n, confidence)
    difference: Estimate = {"value": (b - c) / n, "low": low, "high": high, "n": n}
    return {
        "difference": difference,
        "p_value": mcnemar_mid_p(b, c),
        "both": both,
        "first_only": b,
        "second_only": c,
        "neither": n - both - b - c,
    }


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
    normal = NormalDist()
    bias = normal.inv_cdf(float(np.clip(below, 0.5 / resamples, 1 - 0.5 / resamples)))
    acceleration = float(np.sum(deviations**3) / (6 * np.sum(deviations**2) ** 1.5))
    z = normal_quantile(confidence)
    ends = [normal.cdf(bias + (bias + end) / (1 - acceleration * (bias + end))) for end in (-z, z)]
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


def mean_estimate(values: Sequence[float], confidence: float = 0.95) -> Estimate:
    """The mean of the values with its bootstrap interval.

    >>> mean_estimate([])
    {'value': None, 'low': None, 'high': None, 'n': 0}
    """
    if not values:
        return {"value": None, "low": None, "high": None, "n": 0}
    array = np.asarray(values, dtype=np.float64)
    # 1e8 draws take about a second; with many items the interval is narrow and needs fewer resamples.
    resamples = min(10_000, max(1_000, 100_000_000 // array.size))
    low, high = bootstrap_mean(array, confidence, resamples=resamples)
    return {"value": float(array.mean()), "low": low, "high": high, "n": len(values)}
