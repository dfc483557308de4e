"""How much a model's answers to the same item vary between runs.

``R`` runs of ``n`` items are not ``n R`` items: counted so, the 95 % interval of 5 runs held the true value
in 78 % of simulations, averaged by item first in 94 % (``benchmarks/statistics_bench.py``). All functions
take one sequence per item with its value in each run.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TypeVar

import numpy as np

from mlx_distill.errors import DataError
from mlx_distill.metrics.clusters import clustered_interval
from mlx_distill.metrics.intervals import Estimate, finite, rate

T = TypeVar("T")


class ScoreDeviation(Estimate):
    """A mean standard deviation over ``n`` items; ``left_out`` items had fewer than two valid scores."""

    left_out: int


def item_means(values: Sequence[Sequence[float]]) -> list[float]:
    """The mean over the runs of each item; two models' are compared by
    :func:`mlx_distill.metrics.paired.compare_means`.

    Raises:
        DataError: an item without runs, or a value that is None or NaN.

    >>> item_means([[True, False], [True, True]])
    [0.5, 1.0]
    """
    return [float(finite(runs, f"item {i + 1}").mean()) for i, runs in enumerate(_items(values, 1))]


def repeated_rate(correct: Sequence[Sequence[bool]], *, confidence: float = 0.95) -> Estimate:
    """The rate of right answers over all runs, averaged by item first.

    ``mean(m) +- t s / sqrt(n)`` over the items' means ``m`` with ``n - 1`` degrees of freedom, within 0 and
    1; the variance of ``m`` contains both that between items and, divided by the runs, that between runs.

    Args:
        correct: For each item, whether each run's answer is right; an invalid answer is wrong.
        confidence: Level of the interval.

    >>> round(repeated_rate([[True, True], [True, False], [False, False]])["value"], 3)
    0.5
    """
    means = np.asarray(item_means(correct), dtype=np.float64)
    interval = clustered_interval(means, np.arange(means.size), confidence, spread=1.0)
    return _within(interval.mean, interval.low, interval.high, means.size, 1.0)


def flip_rate(answers: Sequence[Sequence[Hashable]], *, confidence: float = 0.95) -> Estimate:
    """The share of items whose label is not the same in all runs, with Wilson's interval.

    An invalid answer (None) is like no other, not even another invalid one: an item with one has flipped.

    Raises:
        DataError: an item with fewer than two runs.

    >>> flip_rate([["a", "a"], ["a", "b"], ["a", None], ["b", "b"]])["value"]
    0.5
    """
    flipped = [len(set(runs)) > 1 or None in runs for runs in _items(answers, 2)]
    return rate(sum(flipped), len(flipped), confidence)


def right_in_all_runs(correct: Sequence[Sequence[bool]], *, confidence: float = 0.95) -> Estimate:
    """The share of items that are right in every run, with Wilson's interval.

    >>> right_in_all_runs([[True, True], [True, False]])["value"]
    0.5
    """
    always = [all(runs) for runs in _items(correct, 1)]
    return rate(sum(always), len(always), confidence)


def score_deviation(
    scores: Sequence[Sequence[float | None]], bounds: tuple[float, float], *, confidence: float = 0.95
) -> ScoreDeviation:
    """Mean over the items of the standard deviation of their scores, as a share of the scale.

    ``mean_i(s_i) / (highest - lowest)`` with ``s_i`` the sample standard deviation (``R - 1``) of item ``i``.

    Args:
        scores: For each item its score in each run; None where the answer is invalid.
        bounds: Lowest and highest score of the scale.
        confidence: Level of the interval (``t`` over the items).

    Returns:
        The estimate over the items with at least two valid scores, and the number of the others.

    Raises:
        DataError: an item with fewer than two runs, or a scale without a width.

    >>> deviation = score_deviation([[50, 60], [70, 70], [None, 80]], (0, 100))
    >>> round(deviation["value"], 4), deviation["n"], deviation["left_out"]
    (0.0354, 2, 1)
    """
    lowest, highest = bounds
    if not highest > lowest:
        raise DataError(f"a scale from {lowest} to {highest}", fix="give its lowest and highest value")
    valid = [[score for score in runs if score is not None] for runs in _items(scores, 2)]
    arrays = [finite(runs, "scores") for runs in valid if len(runs) > 1]
    deviations = np.array([array.std(ddof=1) for array in arrays]) / (highest - lowest)
    # Half of the runs at either end is the largest deviation there is; of two runs it is sqrt(1/2).
    largest = max((0.5 * (len(array) / (len(array) - 1)) ** 0.5 for array in arrays), default=0.0)
    interval = clustered_interval(deviations, np.arange(deviations.size), confidence, spread=largest)
    estimate = _within(interval.mean, interval.low, interval.high, deviations.size, largest)
    left_out = len(valid) - len(arrays)
    return {
        "value": estimate["value"],
        "low": estimate["low"],
        "high": estimate["high"],
        "n": estimate["n"],
        "left_out": left_out,
    }


def _items(values: Sequence[Sequence[T]], least: int) -> Sequence[Sequence[T]]:
    for i, runs in enumerate(values):
        if len(runs) < least:
            raise DataError(
                f"item {i + 1} has {len(runs)} runs, and {least} are needed",
                fix="give every item its answer in each run, None where it is invalid",
            )
    return values


def _within(value: float | None, low: float | None, high: float | None, n: int, highest: float) -> Estimate:
    return {
        "value": value,
        "low": None if low is None else max(0.0, low),
        "high": None if high is None else min(highest, high),
        "n": n,
    }
