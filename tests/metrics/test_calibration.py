from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from mlx_distill.errors import DataError
from mlx_distill.metrics.calibration import (
    MIN_ROWS,
    auto_decidable,
    brier_score,
    calibration_error,
    class_numbers,
    expected_calibration_error,
    fit_temperature,
    reliability,
    risk_coverage,
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


def calibrated(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    logits, truth = sample(n, 1.0, seed=seed)
    return np.exp(scale(logits, 1.0)), truth


def test_reliability_has_the_calibration_error_over_its_bins() -> None:
    probabilities, truth = calibrated(600)
    result = reliability(probabilities, truth)
    assert result.ece == pytest.approx(expected_calibration_error(probabilities, truth), abs=1e-12)
    assert sum(part.n for part in result.bins) == result.n == 600
    gaps = [part.n / 600 * abs(part.accuracy["value"] - part.confidence) for part in result.bins]
    assert sum(gaps) == pytest.approx(result.ece)
    confidences = [part.confidence for part in result.bins]
    assert confidences == sorted(confidences)
    assert all(part.null_low <= part.confidence <= part.null_high for part in result.bins)
    assert reliability(probabilities, truth) == result


def test_an_overconfident_model_is_outside_the_band_and_a_calibrated_one_is_not() -> None:
    logits, truth = sample(600, 3.0)
    wrong = reliability(np.exp(scale(logits, 1.0)), truth)
    assert wrong.ece > 2 * wrong.null_high
    assert wrong.bins[-1].accuracy["value"] < wrong.bins[-1].null_low
    right = reliability(*calibrated(600))
    assert 0 < right.null_mean < right.null_high < 0.12


def test_the_risk_coverage_curve_by_counting() -> None:
    probabilities, truth = calibrated(200)
    curve = risk_coverage(probabilities, truth)
    confidence, right = probabilities.max(1), probabilities.argmax(1) == truth
    for threshold, coverage, risk in zip(curve.thresholds, curve.coverage, curve.risk, strict=True):
        decided = confidence >= threshold
        assert coverage == pytest.approx(decided.mean()) and risk == pytest.approx(1 - right[decided].mean())
    assert curve.coverage[-1] == 1.0
    assert curve.area == pytest.approx(np.mean(curve.risk))


def test_auto_decidable_takes_the_largest_allowed_coverage() -> None:
    from scipy import stats

    logits, truth = sample(900, 1.0)
    probabilities = np.exp(scale(4 * logits, 1.0))
    truth = np.where(np.random.default_rng(0).random(900) < 0.7, probabilities.argmax(1), truth)
    result = auto_decidable(probabilities[:600], truth[:600], probabilities[600:], truth[600:], max_error=0.1)
    confidence = probabilities[:600].max(1)
    wrong = probabilities[:600].argmax(1) != truth[:600]
    allowed = []
    for threshold in np.unique(confidence):
        decided = confidence >= threshold
        k, n = int(wrong[decided].sum()), int(decided.sum())
        limit = stats.binomtest(k, n, alternative="less").proportion_ci(0.95, method="exact").high
        if limit <= 0.1:
            allowed.append((n, threshold, limit))
    n, threshold, limit = max(allowed)
    assert 0 < n < 600
    assert result.threshold == threshold and result.valid_coverage["value"] == n / 600
    assert result.valid_limit == pytest.approx(limit)
    decided = probabilities[600:].max(1) >= threshold
    assert result.coverage["value"] == pytest.approx(decided.mean())
    assert result.error["n"] == decided.sum()


def test_too_few_rows_or_too_many_errors_decide_nothing() -> None:
    probabilities, truth = np.array([[0.9, 0.1]] * 40), np.zeros(40, dtype=np.int64)
    result = auto_decidable(
        probabilities, truth, probabilities, truth
    )  # 40 right rows: up to 7 % may be wrong
    assert result.threshold is None and result.coverage["value"] == 0.0 and result.error["value"] is None
    many = np.repeat(probabilities, 2, axis=0), np.zeros(80, dtype=np.int64)
    assert auto_decidable(*many, *many).coverage["value"] == 1.0


@pytest.mark.parametrize("function", [reliability, risk_coverage, expected_calibration_error, brier_score])
def test_rows_that_cannot_be_measured_are_errors(function: Callable[..., object]) -> None:
    probabilities, truth = calibrated(60)
    with pytest.raises(DataError, match="no rows"):
        function(probabilities[:0], truth[:0])
    with pytest.raises(DataError, match="none of the classes"):
        function(probabilities, np.where(np.arange(60) == 3, -1, truth))
    probabilities[5, 0] = np.nan
    with pytest.raises(DataError, match="NaN"):
        function(probabilities, truth)


def test_one_row_is_measured() -> None:
    result = reliability(np.array([[0.8, 0.2]]), np.array([0]))
    assert result.ece == pytest.approx(0.2) and len(result.bins) == 1
    assert result.bins[0].accuracy["low"] < 0.3
