from __future__ import annotations

import numpy as np
import pytest

from mlx_distill.errors import DataError
from mlx_distill.metrics.calibration import (
    MIN_ROWS,
    brier_score,
    calibration_error,
    class_numbers,
    expected_calibration_error,
    fit_temperature,
    scale,
)


def sample(n: int, temperature: float, classes: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits that are ``temperature`` times those that the labels are drawn from."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, classes)) * 1.5
    truth = (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)
    return logits * temperature, truth


@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_the_temperature_of_synthetic_logits_is_recovered(temperature: float) -> None:
    logits, truth = sample(8000, temperature)
    fitted = fit_temperature(logits, truth)
    assert fitted == pytest.approx(temperature, rel=0.05)
    # The derivative of the likelihood by 1/T is zero there: the mean logit of the truth is the expected one.
    probabilities = np.exp(scale(logits, fitted))
    own = logits[np.arange(len(truth)), truth].mean()
    assert own == pytest.approx((probabilities * logits).sum(axis=1).mean(), rel=1e-3)


def test_no_temperature_nearby_is_better() -> None:
    logits, truth = sample(300, 2.0)
    fitted = fit_temperature(logits, truth)
    best = calibration_error(logits, truth, fitted).nll
    for other in (fitted * 0.98, fitted * 1.02, 1.0):
        assert calibration_error(logits, truth, other).nll > best


def test_log_probabilities_and_logits_give_the_same_temperature() -> None:
    logits, truth = sample(500, 2.0)
    assert fit_temperature(scale(logits, 1.0), truth) == pytest.approx(fit_temperature(logits, truth), 1e-4)


def test_too_few_rows_and_rows_that_are_all_right_are_refused() -> None:
    logits, truth = sample(MIN_ROWS - 1, 2.0)
    with pytest.raises(DataError, match=f"{MIN_ROWS - 1} rows"):
        fit_temperature(logits, truth)
    logits, _ = sample(200, 2.0)
    with pytest.raises(DataError, match="every row is right"):
        fit_temperature(logits, logits.argmax(axis=1))
    with pytest.raises(DataError, match="say nothing"):
        fit_temperature(logits, logits.argmin(axis=1))


def test_the_calibration_error_is_the_sum_over_bins_of_equal_mass() -> None:
    rng = np.random.default_rng(1)
    probabilities = rng.dirichlet([1, 1, 1], size=90)
    truth = rng.integers(0, 3, 90)
    confidence, right = probabilities.max(1), probabilities.argmax(1) == truth
    order = np.argsort(confidence)
    expected = sum(
        len(part) / 90 * abs(right[part].mean() - confidence[part].mean())
        for part in np.array_split(order, 6)
    )
    assert expected_calibration_error(probabilities, truth, bins=6) == pytest.approx(expected)


def test_rows_of_equal_confidence_share_a_bin() -> None:
    probabilities = np.array([[0.7, 0.3]] * 100)
    truth = np.array([0] * 70 + [1] * 30)
    for order in (np.arange(100), np.random.default_rng(0).permutation(100)):
        assert expected_calibration_error(probabilities, truth[order], bins=5) == pytest.approx(0, abs=1e-12)


def test_calibration_falls_with_the_right_temperature_and_the_order_of_classes_stays() -> None:
    logits, truth = sample(4000, 3.0)
    before, after = (calibration_error(logits, truth, t) for t in (1.0, 3.0))
    assert after.ece < before.ece / 3 and after.nll < before.nll and after.brier < before.brier
    assert (scale(logits, 3.0).argmax(1) == logits.argmax(1)).all()


def test_brier_of_certainty_and_of_the_opposite() -> None:
    probabilities = np.array([[1.0, 0.0], [1.0, 0.0]])
    assert brier_score(probabilities, np.array([0, 0])) == 0
    assert brier_score(probabilities, np.array([1, 1])) == 2


def test_a_label_that_is_none_of_the_classes_has_no_number() -> None:
    assert class_numbers(["x", "a", None], ["a"]).tolist() == [-1, 0, -1]
