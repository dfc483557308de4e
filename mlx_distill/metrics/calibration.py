"""Whether probabilities mean what they say: temperature scaling, and the figures that judge it.

A model is calibrated where, of the items that it gives a probability of 0.8, eight in ten are right.
Temperature scaling divides log-probabilities by one number and normalises again: the order of the classes,
and so the accuracy, stays; the confidence changes. Source: Guo et al. 2017, https://arxiv.org/abs/1706.04599.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from mlx_distill.errors import DataError

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
    if not len(truth):
        raise DataError("no rows", fix="give rows with a true label")
    confidence = probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) == truth
    bins = bins or max(1, min(15, len(truth) // 20))
    edges = np.quantile(confidence, np.arange(1, bins) / bins)
    numbers = np.searchsorted(edges, confidence, side="left")
    gaps = np.bincount(numbers, right - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(truth))


def brier_score(probabilities: Float[np.ndarray, "n c"], truth: Int[np.ndarray, " n"]) -> float:
    """The mean squared distance from the truth: ``mean_i Σ_k (p_ik - [k = y_i])²``, 0 to 2.

    Source: Brier 1950, https://doi.org/10.1175/1520-0493(1950)078<0001:VOFEIT>2.0.CO;2.

    >>> round(brier_score(np.array([[0.8, 0.2], [0.6, 0.4]]), np.array([0, 1])), 6)
    0.4
    """
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
    return float(-log_probs[np.arange(len(truth)), truth].mean())
