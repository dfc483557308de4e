"""Tests of groups, raters, checkers, folds and repeats: values by hand, properties, edge cases."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from scipy import stats

from mlx_distill.errors import ConfigError, DataError
from mlx_distill.metrics.consistency import (
    flip_rate,
    item_means,
    repeated_rate,
    right_in_all_runs,
    score_deviation,
)
from mlx_distill.metrics.corrected import corrected_rate, prediction_powered, upper_limit_of_none
from mlx_distill.metrics.cross_validation import nadeau_bengio
from mlx_distill.metrics.homogeneity import benjamini_hochberg, funnel_limits, homogeneity_test
from mlx_distill.metrics.intervals import wilson
from mlx_distill.metrics.raters import cohen_kappa, gwet_ac1


def planted(seed: int = 0, worse: float = 0.3) -> tuple[list[bool], list[str]]:
    rng = np.random.default_rng(seed)
    groups = [f"group {i % 8}" for i in range(800)]
    return [bool(rng.random() < (worse if group == "group 3" else 0.1)) for group in groups], groups


def test_homogeneity_equals_scipys_statistic_and_nearly_its_p_value() -> None:
    events, groups = planted(worse=0.18)
    result = homogeneity_test(events, groups)
    happened = Counter(group for event, group in zip(events, groups, strict=True) if event)
    counts = list(happened.values())
    expected = stats.chi2_contingency([counts, [100 - k for k in counts]], correction=False)
    assert result["statistic"] == pytest.approx(expected.statistic, rel=1e-12)
    assert result["p_value"] == pytest.approx(expected.pvalue, abs=0.01)
    assert (result["groups"], result["pooled"]["n"]) == (8, 800)


def test_homogeneity_of_two_small_groups_is_exact() -> None:
    # All tables with the margins 5, 5 and 4 events: the observed 4 and 0 is as extreme as 0 and 4.
    result = homogeneity_test([True] * 4 + [False] * 6, ["a"] * 5 + ["b"] * 5, permutations=40_000)
    assert result["p_value"] == pytest.approx(2 * 5 / 210, abs=0.004)


def test_a_group_three_times_worse_is_found_and_the_order_of_rows_does_not_matter() -> None:
    events, groups = planted()
    result = homogeneity_test(events, groups)
    assert result["p_value"] < 0.01
    order = np.random.default_rng(0).permutation(800)
    moved = homogeneity_test([events[i] for i in order], [groups[i] for i in order])
    assert moved["statistic"] == pytest.approx(result["statistic"])
    assert moved["p_value"] == pytest.approx(result["p_value"], abs=0.002)


def test_homogeneity_where_nothing_can_differ_and_where_it_cannot_be_tested() -> None:
    for events, groups in (
        ([], []),
        ([True, False], ["a", "a"]),
        ([True] * 4, list("aabb")),
        ([False], ["a"]),
    ):
        result = homogeneity_test(events, groups)
        assert (result["p_value"], result["statistic"]) == (1.0, 0.0)
    with pytest.raises(DataError, match="1 of 2 rows have no group"):
        homogeneity_test([True, False], ["a", None])
    with pytest.raises(DataError, match="1 events and 2 groups"):
        homogeneity_test([True], ["a", "b"])
    with pytest.raises(DataError, match="booleans"):
        homogeneity_test([0.5, 1.0], ["a", "b"])
    with pytest.raises(ConfigError, match="permutations"):
        homogeneity_test([True, False], ["a", "b"], permutations=0)


def test_adjusted_p_values_by_hand() -> None:
    # sorted .01 .03 .04 .2: times 4/1, 4/2, 4/3, 4/4, then the smallest from the right
    assert benjamini_hochberg([0.04, 0.01, 0.2, 0.03]) == pytest.approx([0.16 / 3, 0.04, 0.2, 0.16 / 3])
    assert benjamini_hochberg([]) == []
    for wrong in (1.2, -0.1, float("nan"), None):
        with pytest.raises(DataError):
            benjamini_hochberg([0.1, wrong])


def test_funnel_limits_hold_their_share_of_groups() -> None:
    for n, p in ((30, 0.1), (200, 0.02), (500, 0.4)):
        low, high = funnel_limits(p, n)
        assert 0 <= low < p < high <= 1
        inside = stats.binom.cdf(np.floor(high * n), n, p) - stats.binom.cdf(np.ceil(low * n) - 1, n, p)
        assert inside == pytest.approx(0.95, abs=0.06)
        wide = funnel_limits(p, n, 0.998)
        assert wide[0] <= low and wide[1] > high
    assert funnel_limits(0.2, 0) == (0.0, 1.0)
    assert funnel_limits(0.0, 40) == (0.0, 0.0)
    with pytest.raises(DataError, match="a rate of 0 to 1"):
        funnel_limits(1.2, 40)


def test_kappa_and_ac1_by_hand() -> None:
    # 2x2 of 40 items: 20 both yes, 5 and 5 split, 10 both no; a = .75, both yes rates .625
    first = ["y"] * 25 + ["n"] * 15
    second = ["y"] * 20 + ["n"] * 5 + ["y"] * 5 + ["n"] * 10
    chance = 0.625**2 + 0.375**2
    assert cohen_kappa(first, second)["value"] == pytest.approx((0.75 - chance) / (1 - chance))
    chance = 2 * 0.625 * 0.375
    assert gwet_ac1(first, second)["value"] == pytest.approx((0.75 - chance) / (1 - chance))


@pytest.mark.parametrize("coefficient", [cohen_kappa, gwet_ac1])
def test_standard_errors_are_those_of_the_jackknife(coefficient: type) -> None:
    rng = np.random.default_rng(3)
    first = rng.integers(0, 3, 150)
    second = np.where(rng.random(150) < 0.6, first, rng.integers(0, 3, 150))
    whole = coefficient(first.tolist(), second.tolist())
    others = [
        coefficient(np.delete(first, i).tolist(), np.delete(second, i).tolist())["value"] for i in range(150)
    ]
    error = np.sqrt(149 / 150 * np.sum((np.array(others) - np.mean(others)) ** 2))
    assert (whole["high"] - whole["low"]) / (2 * 1.959964) == pytest.approx(error, rel=0.03)


def test_weights_count_near_ratings_in_part() -> None:
    first, second = [1, 2, 3, 4, 5] * 8, [2, 2, 3, 4, 4] * 8
    plain = cohen_kappa(first, second)["value"]
    linear = cohen_kappa(first, second, weights="linear")["value"]
    assert plain < linear < cohen_kappa(first, second, weights="quadratic")["value"] < 1


@pytest.mark.parametrize("coefficient", [cohen_kappa, gwet_ac1])
def test_raters_at_the_edges(coefficient: type) -> None:
    assert coefficient([], [])["value"] is None
    assert coefficient(["a"] * 9, ["a"] * 9)["value"] is None  # is there another label at all?
    perfect = coefficient(["a", "b"] * 5, ["a", "b"] * 5)
    assert perfect["value"] == perfect["high"] == 1.0 and perfect["low"] < 0.6  # 10 items are few
    missing = coefficient(["a", None, "b", "a"], ["a", "b", float("nan"), "b"])
    assert missing["n"] == 2
    with pytest.raises(DataError, match="'z' is none of the categories"):
        coefficient(["a", "z"], ["a", "b"], categories=["a", "b"])
    with pytest.raises(DataError, match="2 items of the first"):
        coefficient(["a", "b"], ["a"])
    swapped = coefficient(["a", "b", "b", "a"], ["a", "a", "b", "a"])
    assert swapped == coefficient(["a", "a", "b", "a"], ["a", "b", "b", "a"])


def test_one_known_label_is_agreement_for_ac1_alone() -> None:
    gold = gwet_ac1([5] * 12, [5] * 12, categories=[1, 2, 3, 4, 5])
    assert gold["value"] == 1.0 and gold["low"] < 0.8
    assert cohen_kappa([5] * 12, [5] * 12, categories=[1, 2, 3, 4, 5])["value"] is None


def test_a_perfect_checker_changes_nothing_and_a_known_one_inverts() -> None:
    sample = {"true_positives": 500, "positives": 500, "true_negatives": 500, "negatives": 500}
    exact = corrected_rate(20, 200, **sample)
    assert exact["value"] == pytest.approx(0.1)
    assert (exact["low"], exact["high"]) == pytest.approx(wilson(20, 200), abs=0.012)
    # prevalence .2 with .9 and .8: flagged .2 * .9 + .8 * .2 = .34
    sample = {"true_positives": 90, "positives": 100, "true_negatives": 80, "negatives": 100}
    assert corrected_rate(340, 1000, **sample)["value"] == pytest.approx(0.2)
    few = {key: value // 10 for key, value in sample.items()}
    wide, narrow = corrected_rate(340, 1000, **few), corrected_rate(340, 1000, **sample)
    assert wide["high"] - wide["low"] > 1.5 * (narrow["high"] - narrow["low"])


def test_checkers_that_tell_nothing_are_refused() -> None:
    sample = {"true_positives": 4, "positives": 10, "true_negatives": 6, "negatives": 10}
    with pytest.raises(DataError, match="tells nothing"):
        corrected_rate(5, 50, **sample)
    with pytest.raises(DataError, match="sample is wrong"):
        corrected_rate(5, 50, **{**sample, "true_positives": 0, "positives": 0})
    with pytest.raises(DataError, match="flagged: 51 of 50"):
        corrected_rate(51, 50, **sample)
    empty = corrected_rate(0, 0, **{**sample, "true_positives": 9})
    assert (empty["value"], empty["low"], empty["n"]) == (None, None, 0)
    clipped = corrected_rate(0, 50, **{**sample, "true_positives": 9})
    assert clipped["value"] == clipped["low"] == 0.0 and clipped["high"] > 0


def test_the_limit_of_none_is_wilsons() -> None:
    for n in (0, 1, 30, 1_000):
        assert upper_limit_of_none(n) == pytest.approx(wilson(0, n)[1])
    assert upper_limit_of_none(100) == pytest.approx(3.84 / 103.84, abs=1e-4)


def test_prediction_powered_by_hand_and_at_the_edges() -> None:
    judged, checked, human = [1, 0, 1, 1], [1, 1, 0, 1], [1, 0, 0, 1]
    result = prediction_powered(judged, checked, human)
    assert result["value"] == pytest.approx(0.75 - 0.25)
    error = np.sqrt(0.25 / 4 + np.var([0, -1, 0, 0], ddof=1) / 4)
    assert result["low"] == pytest.approx(max(0, 0.5 - stats.t.ppf(0.975, 3) * error))
    agreeing = prediction_powered([1.0, 0.0] * 50, [1.0, 0.0], [1.0, 0.0])
    assert agreeing["high"] - agreeing["low"] > 0.9  # two checked rows say little
    assert prediction_powered([1.0, 0.0], [1.0], [1.0])["low"] is None
    with pytest.raises(DataError, match=r"outside 0\.0 to 1\.0"):
        prediction_powered([1, 5], [1], [1])
    with pytest.raises(DataError, match="2 checked rows of the judge and 1"):
        prediction_powered([1, 0], [1, 0], [1])
    with pytest.raises(DataError, match="0 checked rows"):
        prediction_powered([1, 0], [], [])


def test_folds_at_the_edges() -> None:
    one = nadeau_bengio([0.1], test_rows=20, train_rows=80)
    assert (one["value"], one["low"], one["p_value"]) == (0.1, None, 1.0)
    same = nadeau_bengio([0.0] * 5, test_rows=20, train_rows=80)
    assert (same["value"], same["high"], same["p_value"]) == (0.0, None, 1.0)
    assert nadeau_bengio([], test_rows=20, train_rows=80)["value"] is None
    for rows in ((0, 80), (20, 0)):
        with pytest.raises(DataError, match="rows of a fold"):
            nadeau_bengio([0.1, 0.2], test_rows=rows[0], train_rows=rows[1])
    with pytest.raises(DataError, match="value 2 of 2"):
        nadeau_bengio([0.1, float("nan")], test_rows=20, train_rows=80)


def test_the_correction_of_folds_is_that_of_the_paper() -> None:
    d = [0.02, -0.01, 0.03, 0.0, 0.01]
    corrected = nadeau_bengio(d, test_rows=20, train_rows=80)
    naive = nadeau_bengio(d, test_rows=1e-12, train_rows=1)
    assert naive["p_value"] == pytest.approx(stats.ttest_1samp(d, 0).pvalue)
    width = [result["high"] - result["low"] for result in (corrected, naive)]
    assert width[0] / width[1] == pytest.approx(np.sqrt((1 / 5 + 1 / 4) / (1 / 5)))


def test_repeats_are_averaged_by_item_first() -> None:
    runs = [[True] * 5, [False] * 5, [True, True, True, False, False]] * 10
    result = repeated_rate(runs)
    assert (result["value"], result["n"]) == (pytest.approx((1 + 0 + 0.6) / 3), 30)
    means = np.array(item_means(runs))
    half = stats.t.ppf(0.975, 29) * means.std(ddof=1) / np.sqrt(30)
    assert result["low"] == pytest.approx(means.mean() - half)
    # Ten times the runs say no more about the items where the runs agree.
    again = repeated_rate([run * 10 for run in runs])
    assert (again["low"], again["high"]) == pytest.approx((result["low"], result["high"]))


def test_repeats_at_the_edges() -> None:
    assert repeated_rate([])["value"] is None
    certain = repeated_rate([[True, True]] * 12)
    assert certain["value"] == certain["high"] == 1.0 and certain["low"] < 0.8
    assert flip_rate([["a", "a"], [None, None], ["a", "b"]])["value"] == pytest.approx(2 / 3)
    assert right_in_all_runs([[True, True], [True, False], [False, False]])["value"] == pytest.approx(1 / 3)
    with pytest.raises(DataError, match="item 2 has 1 runs"):
        flip_rate([["a", "a"], ["a"]])
    with pytest.raises(DataError, match="item 1 has 0 runs"):
        repeated_rate([[]])
    with pytest.raises(DataError, match="item 1: value 1"):
        item_means([[float("nan")]])


def test_score_deviation_by_hand_and_at_the_edges() -> None:
    runs = [[50, 60, 55, 45, 50], [70] * 5, [None, 80, 90, None, 100], [None] * 4 + [3]]
    result = score_deviation(runs, (0, 100))
    expected = [np.std(runs[0], ddof=1), 0.0, 10.0]
    assert result["value"] == pytest.approx(np.mean(expected) / 100)
    assert (result["n"], result["left_out"]) == (3, 1)
    assert result["low"] >= 0
    steady = score_deviation([[70, 70]] * 3, (0, 100))
    assert steady["value"] == 0.0 and steady["high"] > 0.03  # three songs prove no 3 %
    assert score_deviation([[None, None]], (0, 100)) == {
        "value": None,
        "low": None,
        "high": None,
        "n": 0,
        "left_out": 1,
    }
    with pytest.raises(DataError, match="lowest and highest"):
        score_deviation(runs, (5, 5))
