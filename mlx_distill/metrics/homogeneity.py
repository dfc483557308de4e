"""Whether a rate is the same in all groups.

The difference between the highest and the lowest of several groups is no evidence: of eight equal groups with
50 rows each and a rate of 10 % it is 12 points on average. One test over all groups, corrected for the number
of metrics that are tested, says whether groups differ; limits around the common rate say which stand out.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TypedDict

import numpy as np
from jaxtyping import Float, Int

from mlx_distill.errors import ConfigError, DataError
from mlx_distill.metrics.intervals import Estimate, Values, check_confidence, finite, rate


class HomogeneityTest(TypedDict):
    """A test of one rate in all groups.

    ``p_value`` by permutation, ``statistic`` the chi-squared one with ``groups - 1`` degrees of freedom,
    ``pooled`` the rate over all rows, ``groups`` the number of groups, ``permutations`` how many were drawn.
    """

    p_value: float
    statistic: float
    pooled: Estimate
    groups: int
    permutations: int


def homogeneity_test(
    events: Values, groups: Sequence[Hashable], *, permutations: int = 9_999, seed: int = 0
) -> HomogeneityTest:
    """Test that the rate of an event is the same in all groups, by permuting the group labels.

    The statistic is ``sum_g n_g (p_g - p)^2 / (p (1 - p))``. Permuting labels draws the events of the groups
    from a multivariate hypergeometric distribution, and
    ``p = (1 + #{permuted >= observed}) / (1 + permutations)``.

    Args:
        events: Whether the event happened, one value per row that could have it: of a false-positive rate,
            the rows whose true label is negative.
        groups: The group of each row.
        permutations: Number of draws; the p-value is at least ``1 / (1 + permutations)``.
        seed: The same seed gives the same p-value.

    Returns:
        The test. Where there are fewer than two groups, or no row or every row has the event, nothing can
        differ: the statistic is 0 and the p-value 1.

    Raises:
        DataError: lengths differ, an event is not a boolean, or a row has no group.

    >>> test = homogeneity_test([True] * 9 + [False] * 11, ["a"] * 10 + ["b"] * 10)
    >>> test["p_value"] < 0.001, round(test["statistic"], 3)
    (True, 16.364)
    """
    happened, numbers = _rows(events, groups)
    if permutations < 1:
        raise ConfigError(f"{permutations} permutations", fix="give at least 999")
    n, k = happened.size, int(happened.sum())
    sizes = np.bincount(numbers)
    pooled = rate(k, n)
    if sizes.size < 2 or k in (0, n):
        return {
            "p_value": 1.0,
            "statistic": 0.0,
            "pooled": pooled,
            "groups": sizes.size,
            "permutations": permutations,
        }
    observed = float(_chi_squared(np.bincount(numbers, happened)[None], sizes, k, n)[0])
    rng = np.random.default_rng(seed)
    drawn = rng.multivariate_hypergeometric(sizes, k, size=permutations, method="marginals")
    # Equal tables give statistics that differ by rounding.
    as_extreme = int((_chi_squared(drawn, sizes, k, n) >= observed * (1 - 1e-9)).sum())
    return {
        "p_value": (1 + as_extreme) / (1 + permutations),
        "statistic": observed,
        "pooled": pooled,
        "groups": sizes.size,
        "permutations": permutations,
    }


def _rows(
    events: Values, groups: Sequence[Hashable]
) -> tuple[Float[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    if len(events) != len(groups):
        raise DataError(f"{len(events)} events and {len(groups)} groups", fix="give one group per row")
    happened = finite(events, "events")
    if not ((happened == 0) | (happened == 1)).all():
        raise DataError("an event happened or not, and some values are numbers", fix="give booleans")
    without = sum(group is None or group != group for group in groups)
    if without:
        raise DataError(f"{without} of {len(groups)} rows have no group", fix="leave these rows out")
    index: dict[Hashable, int] = {}
    numbers = [index.setdefault(group, len(index)) for group in groups]
    return happened, np.asarray(numbers, dtype=np.int64)


def _chi_squared(counts: np.ndarray, sizes: Int[np.ndarray, " g"], k: int, n: int) -> Float[np.ndarray, " r"]:
    p = k / n
    return ((counts - sizes * p) ** 2 / sizes).sum(axis=1) / (p * (1 - p))


def benjamini_hochberg(p_values: Values) -> list[float]:
    """P-values adjusted for testing several hypotheses: below 0.05, at most 5 % of the findings are false.

    The i-th smallest of m becomes ``min_{j >= i} p_j m / j``, at most 1. In the order of the input.

    Raises:
        DataError: a p-value that is not between 0 and 1.

    >>> [round(p, 4) for p in benjamini_hochberg([0.01, 0.04, 0.03])]
    [0.03, 0.04, 0.04]

    Benjamini and Hochberg (1995), "Controlling the false discovery rate".
    """
    from scipy.stats import false_discovery_control

    values = finite(p_values, "p-values")
    if not ((values >= 0) & (values <= 1)).all():
        raise DataError("a p-value is not between 0 and 1", fix="give p-values")
    return [] if not values.size else [float(p) for p in false_discovery_control(values, method="bh")]


def funnel_limits(pooled: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Limits within which a group of ``n`` rows lies with this probability if its rate is the pooled one.

    The exact binomial limits, interpolated between the two counts around each: with ``r`` the smallest count
    with ``P(X <= r) >= a``, ``(r - (P(X <= r) - a) / P(X = r)) / n`` for ``a = (1 -+ confidence) / 2``.

    Args:
        pooled: The rate over all groups.
        n: Rows of the group; at 0 the limits are 0 and 1.
        confidence: Level, such as 0.95; 0.998 for the outer limits of a funnel plot.

    Raises:
        DataError: the rate is not between 0 and 1, or ``n`` is negative.

    >>> [round(x, 3) for x in funnel_limits(0.1, 50)]
    [0.014, 0.18]

    Spiegelhalter (2005), "Funnel plots for comparing institutional performance", appendix A.
    """
    from scipy.stats import binom

    check_confidence(confidence)
    if not 0 <= pooled <= 1 or n < 0:
        raise DataError(f"a rate of {pooled} over {n} rows", fix="give a rate of 0 to 1 and a number of rows")
    if n == 0:
        return 0.0, 1.0
    if pooled in (0, 1):
        return float(pooled), float(pooled)
    ends = []
    for tail in ((1 - confidence) / 2, (1 + confidence) / 2):
        count = binom.ppf(tail, n, pooled)
        part = (binom.cdf(count, n, pooled) - tail) / binom.pmf(count, n, pooled)
        ends.append(min(1.0, max(0.0, float((count - part) / n))))
    return ends[0], ends[1]
