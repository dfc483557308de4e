"""Whether probabilities mean what they say: temperature scaling, and the figures that judge it.

A model is calibrated where, of the items that it gives a probability of 0.8, eight in ten are right.
Temperature scaling divides log-probabilities by one number and normalises again: the order of the classes,
and so the accuracy, stays; the confidence changes. Source: Guo et al. 2017, https://arxiv.org/abs/1706.04599.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from mlx_distill.errors import DataError
from mlx_distill.metrics.intervals import Estimate, check_confidence, rate

MIN_ROWS = 50
"""Below so many rows no temperature is fitted: its standard error would be of the size of the correction."""
LOWEST, HIGHEST = 0.05, 20.0
"""The temperatures that are searched; an optimum at one of these is none."""


@dataclass(frozen=True)
class CalibrationError:
    """How well probabilities fit what happened.

    Attributes:
        nll: Mean negative log-likelihood of the true classes, in nats.
        ece: Expected calibration error, see :func:`expected_calibration_error`.
        brier: See :func:`brier_score`.
    """

    nll: float
    ece: float
    brier: float


def scale(log_probs: Float[np.ndarray, "n c"], temperature: float) -> Float[np.ndarray, "n c"]:
    """Log-probabilities at a temperature: ``log softmax(log p / T)``.

    >>> np.exp(scale(np.log([[0.8, 0.2]]), 2.0)).round(3).tolist()
    [[0.667, 0.333]]
    """
    z = np.asarray(log_probs, dtype=np.float64) / temperature
    z = z - z.max(axis=1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=1, keepdims=True))


def fit_temperature(log_probs: Float[np.ndarray, "n c"], truth: Int[np.ndarray, " n"]) -> float:
    """The temperature at which the true classes are most likely: ``argmin_T -Σ log softmax(log p / T)[y]``.

    The sum is convex in β = 1/T, and its derivative, ``Σ (E_p[z] - z_y)`` with the expected and the true
    class's log-probability z, grows with β: the temperature is where it is zero, found by bisection of log β.

    Args:
        log_probs: Log-probabilities (or logits) of the classes.
        truth: The number of each row's true class.

    Raises:
        DataError: fewer than :data:`MIN_ROWS` rows; or the most likely temperature is at an end of the
            range, as it is where every row is right: the rows do not determine one.

    >>> rng = np.random.default_rng(0)
    >>> logits = rng.normal(size=(4000, 3))
    >>> truth = (logits + rng.gumbel(size=logits.shape)).argmax(1)
    >>> abs(fit_temperature(3 * logits, truth) / 3 - 1) < 0.1
    True
    """
    if len(truth) < MIN_ROWS:
        raise DataError(
            f"{len(truth)} rows with a true label, and a temperature needs {MIN_ROWS}",
            fix="raise data.valid_fraction, or give more rows",
        )

    z = np.asarray(log_probs, dtype=np.float64)
    own = float(z[np.arange(len(truth)), truth].mean())

    def slope(temperature: float) -> float:
        return float((np.exp(scale(z, temperature)) * z).sum(axis=1).mean()) - own

    low, high = LOWEST, HIGHEST
    if slope(low) <= 0 or slope(high) >= 0:
        reason = "every row is right" if slope(low) <= 0 else "the labels say nothing about the rows"
        raise DataError(
            f"the rows do not determine a temperature: {reason}",
            fix="give more validation rows, and harder ones",
        )
    while high / low > 1 + 1e-9:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    return low


def calibration_error(
    log_probs: Float[np.ndarray, "n c"], truth: Int[np.ndarray, " n"], temperature: float = 1.0
) -> CalibrationError:
    """Negative log-likelihood, calibration error and Brier score at a temperature.

    Args:
        log_probs: Log-probabilities (or logits) of the classes.
        truth: The number of each row's true class.
        temperature: By which they are divided first.
    """
    scaled = scale(log_probs, temperature)
    probabilities = np.exp(scaled)
    return CalibrationError(
        nll=_nll(scaled, truth),
        ece=expected_calibration_error(probabilities, truth),
        brier=brier_score(probabilities, truth),
    )


def expected_calibration_error(
    probabilities: Float[np.ndarray, "n c"], truth: Int[np.ndarray, " n"], bins: int | None = None
) -> float:
    """The mean gap between confidence and accuracy: ``Σ_b n_b/n |accuracy_b - confidence_b|``.

    The confidence of a row is the probability of its most probable class. Bins hold equal numbers of rows
    (rows of equal confidence stay together): bins of equal width are mostly empty where a model is confident.
    The figure is above 0 by chance alone, more so with fewer rows a bin.

    Args:
        probabilities: Of the classes, each row summing to 1.
        truth: The number of each row's true class.
        bins: How many; where None one for every 20 rows, 15 at most.

    >>> probabilities = np.array([[0.9, 0.1]] * 10)
    >>> round(expected_calibration_error(probabilities, np.array([0] * 6 + [1] * 4)), 6)
    0.3
    """
    confidence, right = _confidence(probabilities, truth)
    numbers = _bin_numbers(confidence, bins)
    return float(np.abs(np.bincount(numbers, right - confidence)).sum() / len(truth))


def _confidence(
    probabilities: Float[np.ndarray, "n c"], truth: Int[np.ndarray, " n"]
) -> tuple[Float[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
    """The probability of each row's most probable class, and whether that is the true one."""
    _check(probabilities, truth)
    return np.minimum(probabilities.max(axis=1), 1.0), probabilities.argmax(axis=1) == truth


def _check(probabilities: Float[np.ndarray, "n c"], truth: Int[np.ndarray, " n"]) -> None:
    if not len(truth):
        raise DataError("no rows", fix="give rows with a true label")
    if np.isnan(probabilities).any():
        raise DataError("a probability is NaN", fix="leave out the rows without probabilities")
    if truth.min() < 0 or truth.max() >= probabilities.shape[1]:
        raise DataError("a true class is none of the classes", fix="leave out the rows without a true label")


def _bin_numbers(confidence: Float[np.ndarray, " n"], bins: int | None) -> Int[np.ndarray, " n"]:
    """Bins with equal numbers of rows, numbered from 0 without the empty ones."""
    bins = bins or max(1, min(15, confidence.size // 20))
    edges = np.quantile(confidence, np.arange(1, bins) / bins)
    return np.unique(np.searchsorted(edges, confidence, side="left"), return_inverse=True)[1]


@dataclass(frozen=True)
class ReliabilityBin:
    """Rows of similar confidence.

    Attributes:
        n: Number of rows.
        confidence: Their mean confidence.
        accuracy: Share of them that is right, with Wilson's interval.
        null_low: The accuracy of a calibrated model lies above this in 97.5 % of draws.
        null_high: And below this in 97.5 %.
    """

    n: int
    confidence: float
    accuracy: Estimate
    null_low: float
    null_high: float


@dataclass(frozen=True)
class Reliability:
    """Accuracy by confidence, beside what a calibrated model with the same confidences would show.

    Attributes:
        n: Number of rows.
        bins: In ascending order of confidence.
        ece: :func:`expected_calibration_error` over these bins.
        null_mean: The mean of that figure if the model were calibrated: it is not 0.
        null_high: Its 95 % quantile if the model were calibrated; an ECE above it shows that it is not.
    """

    n: int
    bins: list[ReliabilityBin]
    ece: float
    null_mean: float
    null_high: float


def reliability(
    probabilities: Float[np.ndarray, "n c"],
    truth: Int[np.ndarray, " n"],
    bins: int | None = None,
    *,
    confidence: float = 0.95,
    draws: int = 1_000,
    seed: int = 0,
) -> Reliability:
    """The reliability diagram with the band in which a calibrated model would lie.

    Even a perfect model has an ECE above 0 (0.08 on average at 100 rows in simulations). So truths are drawn
    from the model's own confidences, ``right ~ Bernoulli(p)``, and the same figures taken of these draws.

    Args:
        probabilities: Of the classes, each row summing to 1.
        truth: The number of each row's true class.
        bins: As in :func:`expected_calibration_error`.
        confidence: Level of the intervals and of the band.
        draws: How many sets of truths are drawn.
        seed: The same seed gives the same band.

    Raises:
        DataError: no rows, a probability that is NaN, or a true class that is none of the classes.

    >>> result = reliability(np.array([[0.9, 0.1]] * 40), np.array([0] * 20 + [1] * 20))
    >>> round(result.ece, 2), result.ece > result.null_high
    (0.4, True)
    """
    check_confidence(confidence)
    if draws < 1:
        raise DataError(f"{draws} draws", fix="give at least 100")
    p, right = _confidence(probabilities, truth)
    numbers = _bin_numbers(p, bins)
    sizes, hits = np.bincount(numbers), np.bincount(numbers, right)
    means = np.bincount(numbers, p) / sizes
    rng = np.random.default_rng(seed)
    drawn = np.stack([np.bincount(numbers, rng.random(p.size) < p) for _ in range(draws)]) / sizes
    errors = (np.abs(drawn - means) * sizes).sum(axis=1) / p.size
    tails = (0.5 - confidence / 2, 0.5 + confidence / 2)
    lows, highs = np.quantile(drawn, tails, axis=0)
    return Reliability(
        n=p.size,
        bins=[
            ReliabilityBin(
                n=int(sizes[i]),
                confidence=float(means[i]),
                accuracy=rate(int(hits[i]), int(sizes[i]), confidence),
                null_low=float(lows[i]),
                null_high=float(highs[i]),
            )
            for i in np.argsort(means)
        ],
        ece=float((np.abs(hits / sizes - means) * sizes).sum() / p.size),
        null_mean=float(errors.mean()),
        null_high=float(np.quantile(errors, confidence)),
    )


@dataclass(frozen=True)
class RiskCoverage:
    """Error among the rows that a model would decide itself, by how many these are.

    Attributes:
        n: Number of rows.
        thresholds: Confidences in descending order; rows at or above one are decided.
        coverage: The share of the rows decided.
        risk: The share of these that is wrong.
        area: The mean of ``risk`` over the rows (AURC).
    """

    n: int
    thresholds: list[float]
    coverage: list[float]
    risk: list[float]
    area: float


def risk_coverage(probabilities: Float[np.ndarray, "n c"], truth: Int[np.ndarray, " n"]) -> RiskCoverage:
    """The risk-coverage curve: the error of the most confident rows, from few to all.

    Rows of equal confidence are decided together.

    Args:
        probabilities: Of the classes.
        truth: The number of each row's true class.

    Raises:
        DataError: no rows, a probability that is NaN, or a true class that is none of the classes.

    >>> probabilities = np.array([[0.9, 0.1], [0.8, 0.2], [0.6, 0.4], [0.6, 0.4]])
    >>> curve = risk_coverage(probabilities, np.array([0, 0, 1, 0]))
    >>> curve.coverage, [round(risk, 2) for risk in curve.risk]
    ([0.25, 0.5, 1.0], [0.0, 0.0, 0.25])

    Geifman and El-Yaniv (2017), "Selective classification for deep neural networks",
    https://arxiv.org/abs/1705.08500.
    """
    thresholds, decided, wrong = _decided(*_confidence(probabilities, truth))
    steps = np.diff(decided, prepend=0)
    return RiskCoverage(
        n=len(truth),
        thresholds=thresholds.tolist(),
        coverage=(decided / len(truth)).tolist(),
        risk=(wrong / decided).tolist(),
        area=float((wrong / decided * steps).sum() / len(truth)),
    )


def _decided(
    confidence: Float[np.ndarray, " n"], right: Bool[np.ndarray, " n"]
) -> tuple[Float[np.ndarray, " t"], Int[np.ndarray, " t"], Int[np.ndarray, " t"]]:
    """For each confidence in descending order the rows at or above it, and the wrong ones of these."""
    order = np.argsort(-confidence, kind="stable")
    sorted_confidence = confidence[order]
    last = np.append(np.flatnonzero(np.diff(sorted_confidence)), confidence.size - 1)
    return sorted_confidence[last], last + 1, np.cumsum(~right[order])[last]


@dataclass(frozen=True)
class AutoDecidable:
    """How many rows a model may decide itself at a given error.

    Attributes:
        max_error: The largest error that is allowed.
        threshold: Confidence from which on it decides, chosen on validation rows; None where no threshold
            keeps the error below the limit: then it decides nothing.
        valid_coverage: Share of the validation rows that it decides.
        valid_error: Share of these that is wrong.
        valid_limit: The upper limit of that error, at most ``max_error``; None without a threshold.
        coverage: Share of the test rows that it decides at this threshold.
        error: Share of these that is wrong.
    """

    max_error: float
    threshold: float | None
    valid_coverage: Estimate
    valid_error: Estimate
    valid_limit: float | None
    coverage: Estimate
    error: Estimate


def auto_decidable(
    valid_probabilities: Float[np.ndarray, "v c"],
    valid_truth: Int[np.ndarray, " v"],
    probabilities: Float[np.ndarray, "n c"],
    truth: Int[np.ndarray, " n"],
    *,
    max_error: float = 0.05,
    confidence: float = 0.95,
) -> AutoDecidable:
    """The largest share of rows that a model may decide itself with an error of at most ``max_error``.

    Of the confidences on the validation rows, the one with the largest coverage whose upper one-sided error
    limit (Clopper-Pearson) is at most ``max_error``. Choosing among many thresholds favours lucky ones, so
    that the figures that count are those on the test rows, which took no part in the choice.

    Args:
        valid_probabilities: Of the classes, on the validation rows, at the temperature that is used.
        valid_truth: The number of each validation row's true class.
        probabilities: Of the classes, on the test rows.
        truth: The number of each test row's true class.
        max_error: The largest error that is allowed, 0 to 1.
        confidence: Level of the one-sided limit and of the intervals.

    Raises:
        DataError: no rows, a probability that is NaN, or a true class that is none of the classes.

    >>> sure, unsure = [[0.99, 0.01]] * 100, [[0.6, 0.4]] * 100
    >>> p, y = np.array(sure + unsure), np.array([0] * 100 + [0, 1] * 50)
    >>> result = auto_decidable(p, y, p, y)
    >>> result.threshold, result.coverage["value"], result.error["value"]
    (0.99, 0.5, 0.0)
    """
    from scipy.special import betaincinv

    check_confidence(confidence)
    if not 0.0 < max_error < 1.0:
        raise DataError(f"a largest error of {max_error}", fix="give a share between 0 and 1, such as 0.05")
    p, right = _confidence(valid_probabilities, valid_truth)
    thresholds, decided, wrong = _decided(p, right)
    limits = np.where(wrong < decided, betaincinv(wrong + 1, np.maximum(decided - wrong, 1), confidence), 1.0)
    allowed = np.flatnonzero(limits <= max_error)
    best = int(allowed[-1]) if allowed.size else None
    threshold = None if best is None else float(thresholds[best])
    test_p, test_right = _confidence(probabilities, truth)
    chosen = np.zeros(test_p.size, dtype=bool) if threshold is None else test_p >= threshold
    count, errors = (0, 0) if best is None else (int(decided[best]), int(wrong[best]))
    return AutoDecidable(
        max_error=max_error,
        threshold=threshold,
        valid_coverage=rate(count, p.size, confidence),
        valid_error=rate(errors, count, confidence),
        valid_limit=None if best is None else float(limits[best]),
        coverage=rate(int(chosen.sum()), chosen.size, confidence),
        error=rate(int((chosen & ~test_right).sum()), int(chosen.sum()), confidence),
    )


def brier_score(probabilities: Float[np.ndarray, "n c"], truth: Int[np.ndarray, " n"]) -> float:
    """The mean squared distance from the truth: ``mean_i Σ_k (p_ik - [k = y_i])²``, 0 to 2.

    Source: Brier 1950, https://doi.org/10.1175/1520-0493(1950)078<0001:VOFEIT>2.0.CO;2.

    >>> round(brier_score(np.array([[0.8, 0.2], [0.6, 0.4]]), np.array([0, 1])), 6)
    0.4
    """
    _check(probabilities, truth)
    wrong = np.array(probabilities, dtype=np.float64)
    wrong[np.arange(len(truth)), truth] -= 1
    return float((wrong**2).sum(axis=1).mean())


def class_numbers(names: Sequence[str | None], labels: Sequence[str]) -> Int[np.ndarray, " n"]:
    """The number of each label, -1 where it is none of them.

    >>> class_numbers(["b", None, "a"], ["a", "b"]).tolist()
    [1, -1, 0]
    """
    number = {label: i for i, label in enumerate(labels)}
    return np.array([number.get(name or "", -1) for name in names], dtype=np.int64)


def _nll(log_probs: Float[np.ndarray, "n c"], truth: Int[np.ndarray, " n"]) -> float:
    _check(log_probs, truth)
    return float(-log_probs[np.arange(len(truth)), truth].mean())
