"""Figures against exact probabilities, held to sums written out row by row, and to draws."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mlx_distill.errors import DataError
from mlx_distill.metrics.calibration import expected_calibration_error
from mlx_distill.metrics.known_probabilities import (
    attainable_accuracy,
    divergences,
    exact_calibration_error,
    expected_accuracy,
)

RNG = np.random.default_rng(0)
EXACT, MODEL = RNG.dirichlet([1.0] * 4, 300), RNG.dirichlet([1.0] * 4, 300)


def test_divergences_are_the_sums_of_each_row() -> None:
    plain = [
        sum(p * math.log(p / q) for p, q in zip(exact, model, strict=True))
        for exact, model in zip(EXACT, MODEL, strict=True)
    ]
    np.testing.assert_allclose(divergences(EXACT, MODEL), plain, atol=1e-6)
    np.testing.assert_allclose(divergences(EXACT, EXACT), 0, atol=1e-12)
    assert divergences(np.array([[0.0, 1.0]]), np.array([[1.0, 0.0]]))[0] == pytest.approx(math.log(1e9))


def test_accuracies_are_the_means_over_many_draws_of_the_labels() -> None:
    drawn = np.array([RNG.choice(4, p=exact, size=4000) for exact in EXACT])
    of_model = (drawn == MODEL.argmax(1)[:, None]).mean()
    best = (drawn == EXACT.argmax(1)[:, None]).mean()
    assert expected_accuracy(EXACT, MODEL).mean() == pytest.approx(of_model, abs=2e-3)
    assert attainable_accuracy(EXACT).mean() == pytest.approx(best, abs=2e-3)
    assert (attainable_accuracy(EXACT) >= expected_accuracy(EXACT, MODEL)).all()


def test_the_calibration_error_needs_no_draws() -> None:
    assert exact_calibration_error(EXACT, EXACT) == pytest.approx(0)
    sharper = EXACT**3 / (EXACT**3).sum(1, keepdims=True)
    error = exact_calibration_error(EXACT, sharper)
    # A model that is always overconfident errs by its mean overconfidence, however rows are binned.
    assert error == pytest.approx((sharper.max(1) - EXACT.max(1)).mean()) and error > 0.05
    drawn = np.array([RNG.choice(4, p=exact) for exact in np.repeat(EXACT, 100, axis=0)])
    estimate = expected_calibration_error(np.repeat(sharper, 100, axis=0), drawn)
    assert error == pytest.approx(estimate, abs=0.01)
    with pytest.raises(DataError, match="no rows"):
        exact_calibration_error(EXACT[:0], MODEL[:0])
