"""Paired comparisons, verdicts and what rows can show: published values, exact properties, edge cases."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from mlx_distill.errors import ConfigError, DataError
from mlx_distill.metrics.clusters import cluster_numbers, clustered_mean, clustered_standard_error
from mlx_distill.metrics.corrected import upper_limit_of_none
from mlx_distill.metrics.paired import (
    bonett_price,
    compare_means,
    compare_paired,
    mcnemar_mid_p,
    relative_margin,
    verdict,
)
from mlx_distill.metrics.power import provable_margin, rows_needed


def sample(n: int = 240, seed: int = 0) -> tuple[list[bool], list[bool], list[str]]:
    """Two models on rows of 60 artists, which resemble each other."""
    rng = np.random.default_rng(seed)
    artists = rng.integers(0, 60, n)
    skill = rng.beta(2, 1, 60)
    first, second = rng.random(n) < skill[artists], rng.random(n) < skill[artists] * 0.9
    return first.tolist(), second.tolist(), [f"artist {a}" for a in artists]


def estimate(low: float | None, high: float | None, n: int = 500) -> Any:
    return {
        "value": None if low is None or high is None else (low + high) / 2,
        "low": low,
        "high": high,
        "n": n,
    }


def test_published_values() -> None:
    # ci.prop.ps(.05, 12, 4, 26, 6) of Bonett's package statpsych, from the formula of Bonett and Price (2012)
    assert bonett_price(26, 4, 48) == pytest.approx((0.2548067, 0.6251933), abs=1e-7)
    # Fagerland, Lydersen and Laake (2013), airway hyper-responsiveness, 1 and 7 discordant of 21
    assert mcnemar_mid_p(1, 7) == pytest.approx(0.0391, abs=5e-5)


@pytest.mark.parametrize("clustered", [False, True])
def test_swapping_the_models_negates(clustered: bool) -> None:
    first, second, artists = sample()
    clusters = artists if clustered else None
    for compare in (compare_paired, compare_means):
        a, b = compare(first, second, clusters=clusters), compare(second, first, clusters=clusters)
        assert a["difference"]["value"] == pytest.approx(-b["difference"]["value"], abs=1e-15)
        assert a["difference"]["low"] == pytest.approx(-b["difference"]["high"], abs=1e-12)
        assert a["difference"]["high"] == pytest.approx(-b["difference"]["low"], abs=1e-12)
        assert a["p_value"] == pytest.approx(b["p_value"], abs=1e-12)
        assert (a["first_only"], a["second_only"]) == (b["second_only"], b["first_only"])


@pytest.mark.parametrize("clustered", [False, True])
def test_the_order_of_rows_changes_nothing(clustered: bool) -> None:
    columns = sample()
    order = np.random.default_rng(1).permutation(len(columns[0]))
    moved = [[column[i] for i in order] for column in columns]
    for compare in (compare_paired, compare_means):
        a, b = (compare(x, y, clusters=names if clustered else None) for x, y, names in (columns, moved))
        for key in ("value", "low", "high"):
            assert a["difference"][key] == pytest.approx(b["difference"][key], abs=1e-12)
        assert a["p_value"] == pytest.approx(b["p_value"], abs=1e-12)


@pytest.mark.parametrize("n", [1, 5, 40, 3_000])
@pytest.mark.parametrize("clustered", [False, True])
def test_a_model_against_itself_does_not_differ(n: int, clustered: bool) -> None:
    right = (np.random.default_rng(n).random(n) < 0.8).tolist()
    scores = np.random.default_rng(n).normal(60, 10, n).tolist()
    clusters = [i // 2 for i in range(n)] if clustered else None
    for result in (
        compare_paired(right, right, clusters=clusters),
        compare_means(scores, scores, clusters=clusters),
    ):
        assert (result["difference"]["value"], result["p_value"]) == (0.0, 1.0)
        assert (result["first_only"], result["second_only"]) == (0, 0)
        assert verdict(result["difference"], None) == "inconclusive"
        assert verdict(result["difference"], 0.03) in ("inconclusive", "non_inferior")
    shown = verdict(compare_paired(right, right, clusters=clusters)["difference"], 0.03)
    assert shown == ("non_inferior" if n == 3_000 else "inconclusive")  # 5 or 40 rows show nothing


@pytest.mark.parametrize("times", [2, 5])
def test_copies_of_rows_within_their_cluster_change_nothing(times: int) -> None:
    first, second, artists = sample()
    numbers = [0.1 * i + x for i, x in enumerate(first)]
    copied = [column * times for column in (first, second, artists, numbers)]
    a = compare_paired(first, second, clusters=artists)
    b = compare_paired(copied[0], copied[1], clusters=copied[2])
    c, d = clustered_mean(numbers, artists), clustered_mean(copied[3], copied[2])
    for key in ("value", "low", "high"):
        assert a["difference"][key] == pytest.approx(b["difference"][key], abs=1e-12)
        assert c[key] == pytest.approx(d[key], abs=1e-12)
    assert a["p_value"] == pytest.approx(b["p_value"], abs=1e-12)
    # Without clusters the copies would count as new rows.
    assert _width(compare_paired(copied[0], copied[1])) < 0.8 * _width(compare_paired(first, second))


def _width(result: Any) -> float:
    return float(result["difference"]["high"] - result["difference"]["low"])


def test_clusters_widen_the_interval_where_rows_resemble_each_other() -> None:
    first, second, artists = sample()
    first, second, artists = first * 2, second * 2, artists * 2
    plain, clustered = compare_paired(first, second), compare_paired(first, second, clusters=artists)
    assert _width(clustered) > 1.2 * _width(plain)
    assert clustered["difference"]["value"] == plain["difference"]["value"]
    assert (plain["clusters"], clustered["clusters"]) == (None, len(set(artists)))
    assert not clustered["few_clusters"]


def test_clusters_of_single_rows_are_nearly_no_clusters() -> None:
    first, second, _ = sample(900)
    plain, single = compare_paired(first, second), compare_paired(first, second, clusters=range(900))
    for key in ("low", "high"):
        assert single["difference"][key] == pytest.approx(plain["difference"][key], abs=3e-4)


def test_the_clustered_error_of_single_rows_is_the_usual_one() -> None:
    x = np.random.default_rng(0).normal(size=50)
    error = clustered_standard_error(x, np.arange(50))
    assert error == pytest.approx(x.std(ddof=1) / math.sqrt(50), rel=1e-12)


def test_the_clustered_error_by_hand() -> None:
    # Sums of deviations of the three clusters: -2, 0.5, 1.5; sqrt(3/2 (4 + 0.25 + 2.25)) / 6
    x = np.array([0.0, 1.0, 2.0, 1.5, 2.0, 2.5])
    assert clustered_standard_error(x, np.array([0, 0, 1, 1, 2, 2])) == pytest.approx(math.sqrt(9.75) / 6)


def test_a_row_without_a_cluster_stands_alone() -> None:
    numbers = cluster_numbers(["x", None, "", "x", float("nan"), None, ("row", 1)], 7)
    assert numbers.tolist() == [0, 1, 2, 0, 3, 4, 5]
    with pytest.raises(DataError, match="2 clusters of 3 rows"):
        clustered_mean([1, 2, 3], ["x", "y"])


def test_few_clusters_are_flagged_and_one_gives_no_interval() -> None:
    few = clustered_mean([1.0, 2.0, 4.0], ["x", "y", "y"])
    assert few["few_clusters"] and few["clusters"] == 2 and few["high"] > 10  # t with one degree of freedom
    one = clustered_mean([1.0, 2.0], ["x", "x"])
    assert (one["value"], one["low"], one["high"], one["clusters"]) == (1.5, None, None, 1)
    paired = compare_paired([True] * 30, [False] * 30, clusters=["x"] * 30)
    assert paired["difference"]["low"] is None and paired["p_value"] == 1.0 and paired["few_clusters"]
    assert verdict(paired["difference"], 0.05) == "inconclusive"


def test_equal_values_claim_no_exact_mean() -> None:
    assert clustered_mean([0.7] * 9, range(9))["low"] is None
    all_right = clustered_mean([True] * 9, range(9), spread=1.0)
    assert 1 - all_right["low"] == pytest.approx(upper_limit_of_none(9))
    # Each cluster has the same mean although the rows differ: a cluster that was not seen may differ by 1.
    estimate = clustered_mean([0.0, 1.0] * 10, [i // 2 for i in range(20)])
    square = 1.959963984540054**2
    assert estimate["value"] == 0.5 and estimate["high"] - 0.5 == pytest.approx(square / (10 + square))
    same = compare_means([3.0, 8.0, 5.0], [2.0, 7.0, 4.0])
    assert same["difference"]["low"] < 0 < 1 < same["difference"]["high"]
    assert same["p_value"] == mcnemar_mid_p(3, 0)


def test_means_by_hand() -> None:
    result = compare_means([0.5, 1.0, 0.0, 0.75], [0.25, 1.0, 0.0, 0.25])
    d = np.array([0.25, 0, 0, 0.5])
    half = 3.182446305284263 * d.std(ddof=1) / 2
    assert result["difference"]["low"] == pytest.approx(0.1875 - half)
    assert result["difference"]["high"] == pytest.approx(0.1875 + half)
    assert (result["both"], result["first_only"], result["second_only"], result["neither"]) == (1, 2, 0, 1)


@pytest.mark.parametrize("compare", [compare_paired, compare_means])
def test_edges_of_the_number_of_rows(compare: Any) -> None:
    for clusters in (None, []):
        empty = compare([], [], clusters=clusters)
        assert empty["difference"] == {"value": None, "low": None, "high": None, "n": 0}
        assert empty["p_value"] == 1.0 and verdict(empty["difference"], 0.03) == "inconclusive"
    for n in range(1, 6):
        result = compare([True] * n, [False] * n)
        assert result["difference"]["value"] == 1.0
        assert verdict(result["difference"], 0.03) == "inconclusive"
    assert verdict(compare([True] * 40, [False] * 40)["difference"]) == "better"
    assert verdict(compare([False] * 40, [True] * 40)["difference"], 0.05) == "worse"


def test_what_is_no_boolean_or_number_is_an_error() -> None:
    with pytest.raises(DataError, match="compare_means"):
        compare_paired([0.5, 1.0], [True, False])
    for wrong in (float("nan"), None, float("inf")):
        for compare in (compare_paired, compare_means):
            with pytest.raises(DataError, match="value 2 of 3"):
                compare([True, wrong, True], [True, True, True])
    with pytest.raises(DataError, match="same order"):
        compare_means([1.0], [1.0, 2.0])
    with pytest.raises(DataError, match="3 clusters of 2 rows"):
        compare_paired([True, False], [True, True], clusters=["x", "y", "z"])


def test_verdicts_in_their_order() -> None:
    cases = [
        (0.001, 0.05, None, "better"),
        (0.001, 0.05, 0.03, "better"),
        (-0.02, 0.05, 0.03, "non_inferior"),
        (-0.02, -0.001, 0.03, "non_inferior"),  # shown to be lower, and within the margin
        (-0.02, -0.001, None, "worse"),
        (-0.04, -0.001, 0.03, "worse"),
        (-0.04, 0.05, 0.03, "inconclusive"),
        (-0.03, 0.05, 0.03, "inconclusive"),  # the end is the margin itself
        (0.0, 0.05, None, "inconclusive"),
        (None, None, 0.03, "inconclusive"),
    ]
    for low, high, margin, expected in cases:
        assert verdict(estimate(low, high), margin) == expected
    assert verdict(estimate(0.1, 0.3, n=5)) == "inconclusive"
    for margin in (0.0, -0.03, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="margin"):
            verdict(estimate(-0.02, 0.05), margin)
    with pytest.raises(DataError, match="NaN"):
        verdict(estimate(float("nan"), 0.2), 0.03)


def test_a_margin_as_a_share_of_the_first_value() -> None:
    assert relative_margin(0.05, 0.9) == pytest.approx(0.045)
    assert relative_margin(0.05, -2.0) == pytest.approx(0.1)
    for value in (0.0, None, float("nan")):
        with pytest.raises(DataError, match="in points"):
            relative_margin(0.05, value)
    with pytest.raises(ConfigError, match="share above 0"):
        relative_margin(0.0, 0.9)


def test_margins_and_rows_of_the_study() -> None:
    assert provable_margin(0.10, 320) == pytest.approx(0.0495, abs=5e-5)
    assert provable_margin(0.05, 320) == pytest.approx(0.0350, abs=5e-5)
    assert provable_margin(0.10, 1_000) == pytest.approx(0.0280, abs=5e-5)
    assert [rows_needed(0.10, difference=d) for d in (0.02, 0.03, 0.05)] == [1_960, 870, 312]
    assert rows_needed(0.10, difference=-0.02) == 1_960
    n = rows_needed(0.10, margin=0.03)
    assert provable_margin(0.10, n) <= 0.03 < provable_margin(0.10, n - 1)
    assert (
        rows_needed(0.10, margin=0.03, difference=-0.01)
        > 2 * n
        > rows_needed(0.10, margin=0.03, difference=0.01)
    )
    assert rows_needed(0.10, margin=0.03, power=0.5) < n < rows_needed(0.10, margin=0.03, power=0.9)


def test_rows_that_models_need_which_never_differed() -> None:
    # No discordant row was seen: the interval is still 2.77 / (n + 2) wide on either side.
    margin = provable_margin(0.0, 400)
    low, _ = bonett_price(0, 0, 400)
    assert -low < margin < 2 * -low
    assert rows_needed(0.0, margin=0.03) == 1


def test_impossible_plans_are_errors() -> None:
    for discordance in (-0.1, 1.5, float("nan")):
        with pytest.raises(DataError, match="discordance"):
            provable_margin(discordance, 100)
    with pytest.raises(ConfigError, match="at least one"):
        provable_margin(0.1, 0)
    with pytest.raises(DataError, match="at most the discordance"):
        rows_needed(0.05, difference=0.1)
    with pytest.raises(DataError, match="no number of rows shows it"):
        rows_needed(0.10, margin=0.03, difference=-0.03)
    with pytest.raises(DataError, match="give a margin instead"):
        rows_needed(0.10, difference=0.0)
    with pytest.raises(ConfigError, match="a margin, a difference"):
        rows_needed(0.10)
    for wrong in ({"power": 1.0}, {"confidence": 0.0}):
        with pytest.raises(ConfigError, match="between 0 and 1"):
            rows_needed(0.10, margin=0.03, **wrong)
