"""Intervals and paired tests against scipy's and published values (constants by scipy 1.17.1)."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mlx_distill.errors import DataError
from mlx_distill.evaluate.latency import latency_intervals
from mlx_distill.metrics.classification import score_mae
from mlx_distill.metrics.intervals import (
    bootstrap_mean,
    bootstrap_totals,
    mean_estimate,
    newcombe,
    normal_quantile,
    paired_bootstrap,
    rate,
    wilson,
)
from mlx_distill.metrics.paired import bonett_price, compare_paired, mcnemar_mid_p

# stats.binomtest(k, n).proportion_ci(confidence, method="wilson")
WILSON = [
    (9, 10, 0.95, 0.5958499732047615, 0.9821237869049271),
    (0, 20, 0.95, 0.0, 0.16112515805281935),
    (20, 20, 0.95, 0.8388748419471808, 1.0),
    (271, 300, 0.9, 0.8715597837542944, 0.9278969993577689),
    (1, 3, 0.99, 0.04042662929608476, 0.855783984952333),
]
# n, k = b + c, min(b, c); min(1, 2 * stats.binom.cdf(k, n, 0.5) - stats.binom.pmf(k, n, 0.5))
MID_P = [
    (1, 8, 0.021484374999999983),
    (0, 5, 0.03125000000000003),
    (5, 5, 1.0),
    (30, 12, 0.0054015726545912895),
    (700, 800, 0.009824629369101676),
]


@pytest.mark.parametrize(("k", "n", "confidence", "low", "high"), WILSON)
def test_wilson_equals_scipy(k: int, n: int, confidence: float, low: float, high: float) -> None:
    assert wilson(k, n, confidence) == pytest.approx((low, high), abs=1e-13)


@pytest.mark.parametrize("n", [1, 7, 60])
def test_wilson_contains_the_rate_and_stays_within_0_and_1(n: int) -> None:
    for k in range(n + 1):
        low, high = wilson(k, n)
        assert 0.0 <= low <= k / n <= high <= 1.0
        assert wilson(n - k, n) == pytest.approx((1 - high, 1 - low))


def test_no_items_give_no_value() -> None:
    assert wilson(0, 0) == (0.0, 1.0)
    assert rate(0, 0) == {"value": None, "low": None, "high": None, "n": 0}
    assert mean_estimate([])["value"] is None
    empty = compare_paired([], [])
    assert empty["difference"]["value"] is None and empty["p_value"] == 1.0


@pytest.mark.parametrize(("k", "n"), [(-1, 3), (4, 3)])
def test_impossible_counts_are_an_error(k: int, n: int) -> None:
    with pytest.raises(ValueError, match="successes in"):
        wilson(k, n)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95.0])
def test_impossible_levels_are_an_error(confidence: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        normal_quantile(confidence)


@pytest.mark.parametrize(("b", "c", "expected"), MID_P)
def test_mid_p_equals_scipy_and_is_symmetric(b: int, c: int, expected: float) -> None:
    assert mcnemar_mid_p(b, c) == pytest.approx(expected, rel=1e-10)
    assert mcnemar_mid_p(b, c) == mcnemar_mid_p(c, b)


def test_mid_p_equals_its_plain_sum() -> None:
    for b, c in [(0, 1), (2, 9), (13, 17), (60, 40)]:
        n, k = b + c, min(b, c)
        mass = [math.comb(n, i) / 2**n for i in range(n + 1)]
        assert mcnemar_mid_p(b, c) == pytest.approx(min(1.0, 2 * sum(mass[: k + 1]) - mass[k]))


def test_mid_p_of_many_items_does_not_overflow() -> None:
    assert 0.0 < mcnemar_mid_p(4_000, 4_400) < 1e-4
    assert mcnemar_mid_p(0, 0) == 1.0


def test_bonett_price_by_hand() -> None:
    # b = 1, c = 7, n = 21: p = 2/23, q = 8/23; -6/23 -+ 1.959964 * sqrt((10/23 - 36/529) / 23)
    half = 1.959963984540054 * math.sqrt((10 / 23 - 36 / 529) / 23)
    assert bonett_price(1, 7, 21) == pytest.approx((-6 / 23 - half, -6 / 23 + half), abs=1e-12)
    low, high = bonett_price(7, 1, 21)
    assert (-high, -low) == pytest.approx(bonett_price(1, 7, 21))


def test_bonett_price_has_a_width_without_discordant_items_and_checks_its_counts() -> None:
    low, high = bonett_price(0, 0, 50)
    assert low < 0 < high
    with pytest.raises(ValueError, match="discordant"):
        bonett_price(3, 3, 5)


def test_bonett_price_has_its_nominal_coverage() -> None:
    rng = np.random.default_rng(3)
    draws = rng.multinomial(60, [0.12, 0.06, 0.82], size=2_000)
    inside = [low <= 0.06 <= high for low, high in (bonett_price(int(b), int(c), 60) for b, c, _ in draws)]
    assert 0.94 <= np.mean(inside) <= 0.99


def test_newcombe_equals_the_published_example() -> None:
    # Newcombe (1998), table II, 56/70 - 48/80 by method 10: 0.0524 to 0.3339
    assert newcombe(56, 70, 48, 80) == pytest.approx((0.0524, 0.3339), abs=5e-5)
    with pytest.raises(ValueError, match="both samples"):
        newcombe(0, 0, 1, 2)


def test_compare_paired_counts_all_four_cases() -> None:
    first, second = (
        [True] * 5 + [True] * 3 + [False] + [False] * 2,
        [True] * 5 + [False] * 3 + [True] + [False] * 2,
    )
    result = compare_paired(first, second)
    assert (result["both"], result["first_only"], result["second_only"], result["neither"]) == (5, 3, 1, 2)
    assert result["difference"]["value"] == pytest.approx(2 / 11)
    assert result["p_value"] == mcnemar_mid_p(3, 1)
    with pytest.raises(DataError, match="1 rows of the first model and 2"):
        compare_paired([True], [True, False])


def test_bootstrap_is_near_scipys_bca_and_seeded() -> None:
    rng = np.random.default_rng(7)
    x = rng.exponential(2.0, 40)
    y = x * 0.7 + np.random.default_rng(8).normal(0, 0.5, 40)
    # stats.bootstrap((x, y), difference of means, paired=True, method="BCa", n_resamples=50_000, rng=1)
    assert paired_bootstrap(x, y) == pytest.approx((0.39952128, 0.90711594), abs=0.01)
    assert paired_bootstrap(x, y) == paired_bootstrap(x, y)
    assert paired_bootstrap(x, y, seed=1) != paired_bootstrap(x, y)
    low, high = paired_bootstrap(x, y)
    assert low < (x - y).mean() < high


@pytest.mark.parametrize("n", [2, 30, 400])
def test_bootstrap_equals_scipys_from_the_same_draws(n: int) -> None:
    from scipy import stats

    values = np.random.default_rng(n).exponential(2.0, n)
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=2_000, method="BCa", batch=2_000, rng=np.random.default_rng(0)
    ).confidence_interval
    assert bootstrap_mean(values, resamples=2_000) == pytest.approx((theirs.low, theirs.high), rel=1e-9)


def test_a_mean_of_few_or_equal_values_claims_no_more_than_it_knows() -> None:
    few = np.random.default_rng(0).normal(size=8)
    estimate, (low, high) = mean_estimate(few), bootstrap_mean(few)
    assert estimate["low"] < low and estimate["high"] > high
    for values in ([2.0], [2.0] * 50):
        assert mean_estimate(values) == {"value": 2.0, "low": None, "high": None, "n": len(values)}
    with pytest.raises(DataError, match="value 2 of 2 is nan"):
        mean_estimate([1.0, float("nan")])


def test_bootstrap_of_totals_draws_rows() -> None:
    rows = np.array([[1, 1]] * 60 + [[0, 1]] * 40)
    low, high = bootstrap_totals(rows, lambda totals: totals[:, 0] / totals[:, 1])
    assert (low, high) == pytest.approx((0.504, 0.696), abs=0.015)
    # Ten rows in each cluster, all alike: the clusters are what is drawn.
    wide = bootstrap_totals(rows.reshape(10, 10, 2).sum(axis=1), lambda t: t[:, 0] / t[:, 1])
    assert wide[1] - wide[0] > 2 * (high - low)
    with pytest.raises(ValueError, match="at least one row"):
        bootstrap_totals(rows[:0], lambda totals: totals[:, 0])


def test_bootstrap_in_chunks() -> None:
    values = np.random.default_rng(0).normal(size=300_000)  # 6 draws in a chunk
    low, high = bootstrap_mean(values, resamples=64)
    assert low < values.mean() < high
    assert high - low < 5 / math.sqrt(values.size)


def test_bootstrap_of_equal_values_has_no_width() -> None:
    assert bootstrap_mean(np.full(5, 3.0)) == (3.0, 3.0)
    assert bootstrap_mean(np.array([2.0])) == (2.0, 2.0)
    with pytest.raises(ValueError, match="at least one value"):
        bootstrap_mean(np.array([]))


def test_the_interval_of_a_mean_stays_within_its_range() -> None:
    wild, clipped = mean_estimate([0.0, 0.9]), mean_estimate([0.0, 0.9], bounds=(0.0, 1.0))
    assert wild["low"] < -1 and wild["high"] > 2
    assert (clipped["low"], clipped["high"]) == (0.0, 1.0)
    far = [{"truth": {"s": 0}, "answer": {}, "score": score} for score in (0, 100)]
    error = score_mae(far, "s", scale=(0, 100))
    assert (error["low"], error["high"]) == (0.0, 100.0)
    times = [{"latency_s": time} for time in (0.1, 9.0)]
    assert latency_intervals(times)["items_per_minute_interval"]["high"] is None
