"""Two models on the same rows: intervals and tests of the difference, and the verdict.

Such models are *paired*: only the rows on which they differ (the discordant ones) carry information about the
difference of their rates. So McNemar's test and the Bonett-Price interval are used, not a test of two
independent samples. Rows that share a cluster (an artist, an author) are not independent; with ``clusters``
the standard error is that of :mod:`mlx_distill.metrics.clusters`.

A difference is always the first model's minus the second's. Where ``B`` replaces ``A``, give ``B`` first: the
:func:`verdict` is about B minus A.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Literal, TypedDict

import numpy as np
from jaxtyping import Bool, Float

from mlx_distill.errors import ConfigError, DataError
from mlx_distill.metrics.clusters import (
    FEW_CLUSTERS,
    cluster_numbers,
    clustered_interval,
    clustered_standard_error,
)
from mlx_distill.metrics.intervals import Estimate, Values, finite, normal_quantile, t_quantile

Verdict = Literal["better", "non_inferior", "worse", "inconclusive"]
MIN_ROWS = 6
"""Fewer rows show nothing: even if all differ in one direction, chance does the same in ``0.5^5 = 3 %``."""


class Comparison(TypedDict):
    """Two models on the same rows.

    ``difference`` is the first's rate or mean minus the second's, ``p_value`` that of the test of no
    difference. ``both``, ``first_only``, ``second_only`` and ``neither`` count the rows by which model is
    right; of numbers, ``first_only`` and ``second_only`` count the rows on which that model's is the higher,
    and of the equal ones ``neither`` counts those that are 0. ``method`` names interval and test.
    ``clusters`` is the number of clusters, None without; ``few_clusters`` warns that there are fewer than 20,
    so that the interval may be too narrow.
    """

    difference: Estimate
    p_value: float
    both: int
    first_only: int
    second_only: int
    neither: int
    method: str
    clusters: int | None
    few_clusters: bool


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
    from scipy.stats import binom

    if b < 0 or c < 0:
        raise ValueError("counts must not be negative")
    n, k = b + c, min(b, c)
    if n == 0:
        return 1.0
    return min(1.0, float(2 * binom.cdf(k, n, 0.5) - binom.pmf(k, n, 0.5)))


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
    first: Values,
    second: Values,
    *,
    clusters: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
) -> Comparison:
    """Compare the rates of two models on the same rows.

    Without clusters: :func:`bonett_price` and :func:`mcnemar_mid_p`. With clusters the same idea: Bonett and
    Price add a row that only the first has correct and one that only the second has; here two *clusters* of
    the average size are added, all right and all wrong. Of the differences ``d`` of these ``G + 2`` clusters,
    ``mean(d) +- t SE`` with the clustered standard error and ``G - 1`` degrees of freedom, and the p-value is
    that of the same ``t``. So an interval has a width even where the models never differ, and duplicating
    every row within its cluster changes nothing.

    Args:
        first: Whether the first model is right, one value per row.
        second: The same of the second model, in the same order.
        clusters: The cluster of each row; None, NaN or "" where a row has none and stands alone.
        confidence: Level of the interval.

    Returns:
        The comparison; without rows its difference is None and its p-value 1.

    Raises:
        DataError: lengths differ, or a value is not a boolean.

    >>> result = compare_paired([True, True, False, True], [True, False, False, False])
    >>> result["difference"]["value"], result["first_only"], result["p_value"]
    (0.5, 2, 0.25)
    """
    x, y = _pairs(first, second, booleans=True)
    n, both = x.size, int((x * y).sum())
    b, c = int(x.sum()) - both, int(y.sum()) - both
    difference: Estimate = {"value": (b - c) / n if n else None, "low": None, "high": None, "n": n}
    counts: tuple[int, int, int, int] = (both, b, c, n - both - b - c)
    if clusters is None:
        if n:
            difference["low"], difference["high"] = bonett_price(b, c, n, confidence)
        return _comparison(difference, mcnemar_mid_p(b, c), counts, "Bonett-Price, McNemar mid-p")
    numbers = cluster_numbers(clusters, n)
    count = int(numbers.max()) + 1 if n else 0
    p_value = 1.0
    if count > 1:
        p_value, difference["low"], difference["high"] = _clustered_rates(x - y, numbers, confidence)
    method = "Bonett-Price by cluster, t test of clusters"
    return _comparison(difference, p_value, counts, method, count)


def _clustered_rates(
    differences: Float[np.ndarray, " n"], numbers: np.ndarray, confidence: float
) -> tuple[float, float, float]:
    """P-value and interval with two clusters added: see :func:`compare_paired`."""
    from scipy.special import stdtr

    count = int(numbers.max()) + 1
    size = differences.size / count
    # One row of weight ``size`` is a cluster of ``size`` equal rows.
    values = np.concatenate([differences, [1.0, -1.0]])
    weights = np.concatenate([np.ones(differences.size), [size, size]])
    groups = np.concatenate([numbers, [count, count + 1]])
    mean = float(differences.sum()) / float(weights.sum())
    error = clustered_standard_error(values, groups, weights)
    half = t_quantile(confidence, count - 1) * error
    p_value = float(2 * stdtr(count - 1, -abs(mean) / error))
    return p_value, max(-1.0, mean - half), min(1.0, mean + half)


def compare_means(
    first: Values,
    second: Values,
    *,
    clusters: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
) -> Comparison:
    """Compare a number of two models on the same rows, such as the error of a score or an F1 of themes.

    ``mean(d) +- t s / sqrt(n)`` with the differences ``d = first - second``, their standard deviation ``s``
    and ``n - 1`` degrees of freedom; with clusters the standard error of
    :func:`mlx_distill.metrics.clusters.clustered_mean` and ``G - 1``. The p-value is that of the same t.
    Where no difference varies, the half width is ``R z^2 / (n + z^2)`` with the range ``R`` of all values:
    a share of rows of which none of ``n`` was seen is at most ``z^2 / (n + z^2)``.

    Args:
        first: The first model's number, one per row; of a row whose answer is invalid, that of the worst one.
        second: The same of the second model, in the same order.
        clusters: The cluster of each row; None, NaN or "" where a row has none and stands alone.
        confidence: Level of the interval.

    Returns:
        The comparison. Of one row or one cluster the ends of the interval are None and the p-value is 1.

    Raises:
        DataError: lengths differ, or a value is None, NaN or infinite.

    >>> result = compare_means([0.5, 1.0, 0.0, 0.75], [0.25, 1.0, 0.0, 0.25])
    >>> result["difference"]["value"], result["first_only"], result["both"], result["neither"]
    (0.1875, 2, 1, 1)
    """
    x, y = _pairs(first, second)
    d = x - y
    n = d.size
    tolerance = 1e-12 * max(1.0, float(np.abs(x).max(initial=0)), float(np.abs(y).max(initial=0)))
    higher, lower = int((d > tolerance).sum()), int((d < -tolerance).sum())
    zeros = int(((x == 0) & (y == 0)).sum())
    counts = (n - higher - lower - zeros, higher, lower, zeros)
    numbers = np.arange(n) if clusters is None else cluster_numbers(clusters, n)
    count = int(numbers.max()) + 1 if n else 0
    spread = float(np.ptp(np.concatenate([x, y]))) if n else 0.0
    interval = clustered_interval(d, numbers, confidence, spread=spread)
    difference: Estimate = {
        "value": interval.mean,
        "low": interval.low,
        "high": interval.high,
        "n": n,
    }
    if clusters is None:
        return _comparison(difference, interval.p_value, counts, "paired t")
    return _comparison(difference, interval.p_value, counts, "paired t of clusters", count)


def _pairs(
    first: Values, second: Values, *, booleans: bool = False
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    if len(first) != len(second):
        raise DataError(
            f"{len(first)} rows of the first model and {len(second)} of the second",
            fix="compare the models on the same rows, in the same order",
        )
    x, y = finite(first, "the first model"), finite(second, "the second model")
    if booleans and not (_is_boolean(x).all() and _is_boolean(y).all()):
        raise DataError("a row is right or wrong, and some values are other numbers", fix="use compare_means")
    return x, y


def _is_boolean(values: Float[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
    return (values == 0) | (values == 1)


def _comparison(
    difference: Estimate,
    p_value: float,
    counts: tuple[int, int, int, int],
    method: str,
    clusters: int | None = None,
) -> Comparison:
    both, first_only, second_only, neither = counts
    return {
        "difference": difference,
        "p_value": p_value,
        "both": both,
        "first_only": first_only,
        "second_only": second_only,
        "neither": neither,
        "method": method,
        "clusters": clusters,
        "few_clusters": clusters is not None and clusters < FEW_CLUSTERS,
    }


def verdict(difference: Estimate, margin: float | None = None) -> Verdict:
    """What the interval of a difference ``B - A`` shows, where higher is better.

    In this order: ``better`` where the whole interval is above 0; ``non_inferior`` where it is above
    ``-margin``; ``worse`` where it is below 0; else ``inconclusive``. A difference that is shown to be below
    0 and within the margin is therefore ``non_inferior``. Fewer than :data:`MIN_ROWS` rows are inconclusive.

    With a 95 % interval each of the first three is wrong in about 2.5 % of all cases. Exactly, of 320 and
    more rows: ``better`` in at most 2.5 %; ``non_inferior`` in 2.4 to 3.3 % where the models differ on two
    points more rows than a margin of 3 or 5, and in up to 4.2 % where they differ on hardly more, so that
    nearly all changes are losses (5.4 % for a margin of 1 point).

    Args:
        difference: Of B minus A; of a figure that is better when lower, A minus B.
        margin: How much worse is still as good, in the unit of the difference (0.03 for 3 points of a rate),
            chosen before the data is seen; None where no margin is given: then nothing is ``non_inferior``.

    Raises:
        ConfigError: the margin is not positive.

    >>> verdict({"value": -0.004, "low": -0.02, "high": 0.012, "n": 900}, margin=0.03)
    'non_inferior'
    >>> verdict({"value": -0.004, "low": -0.02, "high": 0.012, "n": 900})
    'inconclusive'
    """
    if margin is not None and not (margin > 0 and math.isfinite(margin)):
        raise ConfigError(f"a margin of {margin}", fix="give a margin above 0, such as 0.03 for 3 points")
    low, high = difference["low"], difference["high"]
    if low is None or high is None or difference["n"] < MIN_ROWS:
        return "inconclusive"
    if math.isnan(low) or math.isnan(high):
        raise DataError("the interval of the difference is NaN", fix="leave out the rows without a value")
    if low > 0:
        return "better"
    if margin is not None and low > -margin:
        return "non_inferior"
    return "worse" if high < 0 else "inconclusive"


def relative_margin(share: float, a_value: float | None) -> float:
    """The margin that is a share of A's value: ``share |a|``, in A's unit.

    A's value is itself measured: with few rows the margin varies as it does, which the verdict's error rates
    do not count. A margin in points has no such error.

    Raises:
        ConfigError: the share is not positive.
        DataError: A's value is 0, None or not finite: a share of it is no margin.

    >>> round(relative_margin(0.05, 0.8), 4)
    0.04
    """
    if not (share > 0 and math.isfinite(share)):
        raise ConfigError(f"a margin of {share:g} of A's value", fix="give a share above 0, such as 5%")
    if a_value is None or not math.isfinite(a_value) or a_value == 0:
        raise DataError(f"a share of A's value {a_value} is no margin", fix="give it in points: 3pt")
    return share * abs(a_value)
