"""Row reductions in float32 that stay accurate over 150,000 columns, and checks that all losses share."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
from jaxtyping import Float

from mlx_distill.errors import ConfigError, ModelError

# A plain float32 row sum over 150,000 columns is off by 3e-4 on the CPU; sums of sums of 2048 are not.
TILE = 2048
# Used instead of minus infinity: 0 * LOWEST is 0, while 0 * -inf is nan.
LOWEST = -1e30
# Just above the smallest normal float32: the lower bound of arguments of a logarithm.
TINY = 1.2e-38
# A mass computed as one minus a float32 sum is rounding error below this.
RESOLUTION = 2e-6


def row_sum(x: Float[mx.array, "*b v"]) -> Float[mx.array, "*b"]:
    """Sum over the last axis as a sum of sums of 2048 columns.

    >>> row_sum(mx.ones((2, 5000)))
    array([5000, 5000], dtype=float32)
    """
    width = x.shape[-1]
    if width <= TILE:
        return x.sum(axis=-1)
    whole = width // TILE * TILE
    parts = x[..., :whole].reshape(*x.shape[:-1], whole // TILE, TILE).sum(axis=-1).sum(axis=-1)
    return parts if whole == width else parts + x[..., whole:].sum(axis=-1)


def row_logsumexp(x: Float[mx.array, "*b v"]) -> Float[mx.array, "*b"]:
    """``log(sum(exp(x)))`` over the last axis, with :func:`row_sum`."""
    top = mx.stop_gradient(x.max(axis=-1))
    return top + mx.log(row_sum(mx.exp(x - top[..., None])))


def eager_exp(x: Float[mx.array, "*b v"]) -> Float[mx.array, "*b v"]:
    """``exp`` of an array that no gradient goes through: evaluated, and on a CPU by NumPy, since MLX's takes
    many times as long there.
    """
    return mx.array(np.exp(np.array(x, copy=False))) if mx.default_device() == mx.cpu else mx.exp(x)


def eager_logaddexp(x: Float[mx.array, "*b v"], y: Float[mx.array, "*b v"]) -> Float[mx.array, "*b v"]:
    """``log(exp(x) + exp(y))`` of arrays that no gradient goes through, as :func:`eager_exp`.

    >>> eager_logaddexp(mx.array([0.0, -float("inf")]), mx.array([0.0, 3.0])).tolist()
    [0.6931471824645996, 3.0]
    """
    if mx.default_device() != mx.cpu:
        return mx.logaddexp(x, y)
    a, b = np.array(x, copy=False), np.array(y, copy=False)
    # NumPy's own logaddexp takes several times as long as its parts.
    return mx.array(np.maximum(a, b) + np.log1p(np.exp(-np.abs(a - b))))


def log_softmax(logits: Float[mx.array, "*b v"], temperature: float = 1.0) -> Float[mx.array, "*b v"]:
    """Float32 log-probabilities ``z/T - logsumexp(z/T)``; masked columns (``-inf``) become a huge negative
    number.
    """
    z = mx.maximum(logits.astype(mx.float32), LOWEST) / temperature
    return z - row_logsumexp(z)[..., None]


def check_temperature(temperature: float) -> None:
    """Refuse a temperature that is not a positive number."""
    if not 0 < temperature < float("inf"):
        raise ConfigError(
            f"temperature is {temperature}",
            fix="give a positive number; 1 leaves the distributions as they are",
        )


def check_widths(student: int, teacher: int) -> None:
    """Refuse two vocabularies of different width: over different tokens a divergence is undefined."""
    if student != teacher:
        raise ModelError(
            f"the student's vocabulary has {student} columns and the teacher's {teacher}",
            fix=(
                "with one tokenizer cut the padding columns of both to its length; with two tokenizers use "
                "token_group_kl or alm"
            ),
        )


def check_fraction(name: str, value: float) -> None:
    """Refuse a mixing weight outside [0, 1]."""
    if not 0 <= value <= 1:
        raise ConfigError(f"{name} is {value}", fix="give a number from 0 to 1")
