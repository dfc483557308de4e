"""The rate of an event among rows that come in clusters."""

from __future__ import annotations

import numpy as np
import pytest

from mlx_distill.errors import DataError
from mlx_distill.metrics import clustered_mean, clustered_rate, rate, wilson
from mlx_distill.metrics.clusters import share_estimate


def test_rows_that_stand_alone_have_wilsons_interval() -> None:
    for k, n in ((0, 12), (3, 40), (40, 40)):
        estimate = clustered_rate([i < k for i in range(n)], [None] * n)
        assert (estimate["low"], estimate["high"]) == pytest.approx(wilson(k, n), abs=1e-9)


def test_duplicated_rows_within_clusters_tell_nothing_more() -> None:
    rng = np.random.default_rng(0)
    events = (rng.random(90) < 0.2).tolist()
    clusters = rng.integers(0, 30, size=90).tolist()
    once, twice = clustered_rate(events, clusters), clustered_rate(events * 2, clusters * 2)
    assert (once["low"], once["high"]) == pytest.approx((twice["low"], twice["high"]), abs=1e-12)


def test_a_low_rate_is_covered_where_t_is_too_narrow() -> None:
    rng, covered, t_covered = np.random.default_rng(1), 0, 0
    for _ in range(300):
        rates = rng.beta(0.05, 0.95, size=60)  # 5 %, an intraclass correlation of 0.5
        sizes = rng.integers(1, 6, size=60)
        events = np.concatenate([rng.random(n) < p for n, p in zip(sizes, rates, strict=True)]).tolist()
        clusters = np.repeat(np.arange(60), sizes).tolist()
        wilson_like, mean = clustered_rate(events, clusters), clustered_mean(events, clusters)
        covered += wilson_like["low"] <= 0.05 <= wilson_like["high"]
        t_covered += mean["low"] is not None and mean["low"] <= 0.05 <= mean["high"]
    assert covered / 300 > 0.90 > t_covered / 300


def test_rows_without_a_cluster_each_are_refused() -> None:
    with pytest.raises(DataError, match="1 clusters of 2 rows"):
        clustered_rate([True, False], ["a"])
    assert clustered_rate([], [])["value"] is None


def test_clusters_of_one_row_have_the_intervals_of_rows() -> None:
    hits = [i % 3 == 0 for i in range(60)]
    rows, alone = share_estimate(hits), share_estimate(hits, [None] * 60)
    for key in ("value", "low", "high", "n"):
        assert alone[key] == pytest.approx(rows[key])
    assert rows == rate(20, 60)
