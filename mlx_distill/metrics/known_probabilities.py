"""Predicted distributions against exact ones: where the true answer was drawn from a probability that is
known, a model can be compared with that probability, and the best possible figures are known.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from mlx_distill.errors import DataError

LEAST = 1e-9
"""Probabilities are raised to it before their logarithm, so that a divergence is finite."""


def divergences(
    reference: Float[np.ndarray, "n c"], model: Float[np.ndarray, "n c"]
) -> Float[np.ndarray, " n"]:
    r"""The KL divergence of each row in nats, :math:`\sum_i p_i \log (p_i / q_i)`, q at least 1e-9.

    Args:
        reference: p, such as the exact probabilities.
        model: q.

    >>> divergences(np.array([[0.5, 0.5], [1.0, 0.0]]), np.array([[0.5, 0.5], [0.5, 0.5]])).round(3).tolist()
    [0.0, 0.693]
    """
    p, q = np.maximum(reference, LEAST), np.maximum(model, LEAST)
    return np.asarray((p * np.log(p / q)).sum(axis=1))


def expected_accuracy(
    exact: Float[np.ndarray, "n c"], model: Float[np.ndarray, "n c"]
) -> Float[np.ndarray, " n"]:
    """The probability that the model's most probable class of each row is right: without the chance of the
    draw that the row's own label has.

    >>> expected_accuracy(np.array([[0.7, 0.3]]), np.array([[0.4, 0.6]])).tolist()
    [0.3]
    """
    return exact[np.arange(len(exact)), model.argmax(axis=1)]


def attainable_accuracy(exact: Float[np.ndarray, "n c"]) -> Float[np.ndarray, " n"]:
    """The Bayes accuracy: the probability that the most probable class of each row is right, which no model
    can exceed on average.

    >>> attainable_accuracy(np.array([[0.7, 0.3], [0.2, 0.8]])).tolist()
    [0.7, 0.8]
    """
    return exact.max(axis=1)


def exact_calibration_error(
    exact: Float[np.ndarray, "n c"], model: Float[np.ndarray, "n c"], bins: int = 10
) -> float:
    r"""The calibration error of the most probable class against the exact probability that it is right:
    :math:`\sum_b n_b/n\, |\bar p_b - \bar q_b|` over bins of equal width.

    Unlike :func:`~mlx_distill.metrics.calibration.expected_calibration_error`, which sees drawn labels, it is
    not above 0 by chance.

    Args:
        exact: p.
        model: q.
        bins: Of confidence, of equal width.

    Raises:
        DataError: no rows.

    >>> round(exact_calibration_error(np.array([[0.6, 0.4]]), np.array([[0.9, 0.1]])), 3)
    0.3
    """
    if not len(exact):
        raise DataError("no rows", fix="give rows with exact probabilities")
    confidence, right = model.max(axis=1), expected_accuracy(exact, model)
    numbers = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    return float(np.abs(np.bincount(numbers, right - confidence, minlength=bins)).sum() / len(exact))
