"""The charts and their coordinates."""

from __future__ import annotations

import re

import numpy as np
import pytest

from mlx_distill.report.charts import bar, line_chart, nice_ticks, smoothed, stacked, strip


def test_the_length_of_a_bar_is_its_rate() -> None:
    drawn = bar({"value": 0.25, "low": 0.1, "high": 0.5, "n": 8}, "x") or ""
    assert 'width="25.00%"' in drawn
    assert 'x1="10.00%" x2="50.00%"' in drawn
    assert bar({"value": None, "low": None, "high": None, "n": 0}, "x") is None
    assert bar(None, "x") is None


def test_strips_place_dots_on_the_axis() -> None:
    drawn = strip(
        [("a", "A", {"value": 0.0, "low": -0.5, "high": 9.0}), ("b", "B", None)], -1.0, 1.0, zero=0.0
    )
    assert 'cx="50.00%"' in drawn
    assert 'x1="25.00%" x2="100.00%"' in drawn  # clipped to the axis
    assert drawn.count("<circle") == 1


def test_stacked_parts_fill_the_bar() -> None:
    drawn = stacked([("a", "A", 1), ("b", "B", 3), ("c", "C", 0)], "all")
    assert re.findall(r'x="([\d.]+)%" y="0" width="([\d.]+)%"', drawn) == [
        ("0.00", "25.00"),
        ("25.00", "75.00"),
    ]


@pytest.mark.parametrize(
    "values", [[0.5], [2.0, 2.0], [0.0, 0.0], [5.0, 0.001, 3.0], [-1.0, 2.0], list(np.linspace(9, 0.01, 300))]
)
def test_curves_stay_inside_the_chart(values: list[float]) -> None:
    series = {"loss": {"step": list(range(1, len(values) + 1)), "value": [float(v) for v in values]}}
    drawn = line_chart(series, {"loss": "loss"}, "x")
    numbers = [
        tuple(map(float, pair.split(",")))
        for points in re.findall(r'points="([^"]+)"', drawn)
        for pair in points.split()
    ]
    assert len(numbers) >= len(values)
    assert all(0 <= x <= 460 and 0 <= y <= 232 for x, y in numbers)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.0, 0.037), (3.0, 3.0), (1.0, 1234.0), (-2.0, 5.0)])
def test_ticks_are_few_and_span_the_range(low: float, high: float) -> None:
    ticks = nice_ticks(low, high)
    assert ticks[0] <= low
    assert ticks[-1] >= high
    assert 2 <= len(ticks) <= 9


def test_smoothing_keeps_length_and_constant_values() -> None:
    points = [(float(i), 3.0) for i in range(100)]
    assert smoothed(points) == points
    noisy = smoothed([(float(i), float(i % 2)) for i in range(100)])
    assert all(0.2 < y < 0.8 for _, y in noisy[5:-5])
