"""Short versions of ``benchmarks/statistics_bench.py``: error rates, power and coverage, within three
standard errors of what they should be.
"""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def bench() -> Any:
    path = Path(__file__).parents[2] / "benchmarks" / "statistics_bench.py"
    spec = importlib.util.spec_from_file_location("statistics_bench", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def slack(rate: float, draws: int) -> float:
    """Three standard errors of a simulated rate."""
    return 3 * math.sqrt(rate * (1 - rate) / draws)


def test_verdicts_are_rarely_wrong_and_have_the_power_of_the_study(bench: Any) -> None:
    draws = 20_000
    figures = bench.verdicts(draws)
    for n in (320, 900):
        assert figures[f"non_inferior_type_1_n{n}"] <= 0.035
        assert figures[f"better_type_1_n{n}"] <= 0.025 + slack(0.025, draws)
    assert figures["non_inferior_power_n900"] >= 0.81 - slack(0.81, draws)
    assert figures["non_inferior_power_n320"] >= 0.39 - slack(0.39, draws)


@pytest.mark.slow
def test_clustered_intervals_cover_and_naive_ones_do_not(bench: Any) -> None:
    draws = 200
    figures = bench.clusters(draws)
    assert figures["clustered_G60"] >= 0.94 - slack(0.94, draws)
    assert figures["naive_G60"] <= 0.80 + slack(0.80, draws)
    assert figures["better_type_1_clustered"] <= 0.025 + slack(0.025, draws)
    assert figures["better_type_1_naive"] > 0.05


@pytest.mark.slow
def test_equal_groups_alarm_rarely_and_a_worse_one_is_found(bench: Any) -> None:
    draws = 200
    figures = bench.groups(draws, permutations=199)
    assert figures["alarm_equal"] <= 0.05 + slack(0.05, draws)
    assert figures["alarm_one_three_times_worse"] > 0.6
    assert figures["mean_largest_difference_equal"] > 0.10  # of equal groups: no evidence


@pytest.mark.slow
def test_folds_are_corrected(bench: Any) -> None:
    draws = 60
    figures = bench.folds(draws)
    assert figures["false_corrected"] <= 0.05 + slack(0.05, draws)
    assert figures["false_naive"] > 0.15


def test_repeats_cover_when_averaged_by_item(bench: Any) -> None:
    draws = 150
    figures = bench.repeats(draws)
    assert figures["averaged_by_item"] >= 0.95 - slack(0.95, draws)
    assert figures["as_500_items"] <= 0.78 + slack(0.78, draws)


def test_rates_of_checkers_and_judges_cover(bench: Any) -> None:
    draws = 120
    figures = bench.checkers(draws)
    for name in ("corrected_rate", "prediction_powered"):
        assert figures[name] >= 0.95 - slack(0.95, draws)
    assert figures["raw_rate"] < 0.75 and figures["judge_alone"] < 0.5


@pytest.mark.slow
def test_a_calibrated_model_is_within_its_band(bench: Any) -> None:
    draws = 60
    figures = bench.reliability(draws, null_draws=200, sizes=(300,))
    assert figures["alarm_calibrated_n300"] <= 0.05 + slack(0.05, draws)
    assert figures["alarm_overconfident_n300"] > 0.9


@pytest.mark.slow
def test_thresholds_for_five_percent_error_keep_it(bench: Any) -> None:
    figures = bench.auto_decidable(20)
    assert figures["mean_error_n1000"] <= 0.05
    assert figures["mean_coverage_n1000"] > 0.3
