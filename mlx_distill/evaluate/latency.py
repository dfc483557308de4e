"""Latency and throughput with intervals, from each row's share of its batch's wall time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from mlx_distill.metrics.classification import Row
from mlx_distill.metrics.intervals import Estimate, mean_estimate


def latency_quantile(rows: Sequence[Row], quantile: float, confidence: float = 0.95) -> Estimate:
    """A quantile of the seconds per row, with the interval of order statistics.

    ``x_(r)`` to ``x_(s)`` with the ranks that a binomial distribution of ``n`` rows and probability
    ``quantile`` leaves outside with at most ``(1 - confidence) / 2`` each; no assumption on the distribution
    of times. Where so few rows have no such rank, that end is None: it is not bounded.

    The rows are taken as independent. Rows that were answered together share a batch and have similar times,
    so with few batches the true interval is wider.

    Args:
        rows: Predictions; those without a time are left out.
        quantile: 0.5 for the median.
        confidence: Level of the interval.

    >>> rows = [{"latency_s": seconds} for seconds in (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0)]
    >>> estimate = latency_quantile(rows, 0.5)
    >>> estimate["value"], estimate["low"], estimate["high"]
    (5.0, 2.0, 8.0)
    """
    import numpy as np

    times = _times(rows)
    if not times:
        return {"value": None, "low": None, "high": None, "n": 0}
    from scipy.stats import quantile_test

    value = float(np.quantile(times, quantile))
    ends = quantile_test(times, q=value, p=quantile).confidence_interval(confidence)
    low, high = (None if math.isnan(end) else float(end) for end in ends)
    return {"value": value, "low": low, "high": high, "n": len(times)}


def latency_intervals(rows: Sequence[Row], confidence: float = 0.95) -> dict[str, Any]:
    """Estimates beside the plain numbers of :func:`mlx_distill.metrics.latency`: median, 95th percentile and
    rows per minute, each under its name and ``_interval``.
    """
    mean = mean_estimate(_times(rows), confidence, bounds=(0.0, math.inf))
    per_minute: Estimate = {
        "value": _per_minute(mean["value"]),
        "low": _per_minute(mean["high"]),
        "high": _per_minute(mean["low"]),
        "n": mean["n"],
    }
    return {
        "latency_s_interval": latency_quantile(rows, 0.5, confidence),
        "latency_p95_s_interval": latency_quantile(rows, 0.95, confidence),
        "items_per_minute_interval": per_minute,
    }


def _times(rows: Sequence[Row]) -> list[float]:
    return [float(row["latency_s"]) for row in rows if (row.get("latency_s") or 0) > 0]


def _per_minute(seconds: float | None) -> float | None:
    return 60 / seconds if seconds else None  # an end of 0 seconds is no upper end
