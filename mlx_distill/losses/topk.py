"""Forward KL against the teacher's k most probable tokens and one bucket for all the others.

A cache cannot hold 150,000 numbers a position; it holds the top k and, because the log-probabilities are over
the *whole* vocabulary, the mass outside. Renormalising over the top k alone would give no gradient to the
student's mass outside it; taking the teacher's mass outside as zero gives a minimum above zero. With the
bucket the loss is zero at equality and never above the full KL.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np
from jaxtyping import Float, Int

from mlx_distill.errors import DataError
from mlx_distill.losses.numerics import LOWEST, RESOLUTION, check_temperature, row_logsumexp, row_sum
from mlx_distill.losses.output_head import Head, head_weight
from mlx_distill.losses.tiled import (
    BLOCK_ROWS,
    check_hidden,
    detached,
    flat_rows,
    gathered_gradient,
    gathered_logits,
    tail_logsumexp,
    with_gradient,
)
from mlx_distill.records import TopK


def sparse_forward_kl(
    student_logits: Float[mx.array, "*b v"], targets: TopK, *, temperature: float = 1.0
) -> Float[mx.array, "*b"]:
    """Forward KL over the teacher's top k tokens and a bucket that holds all other mass of either model.

    By the chain rule of KL: ``KL(c_p‖c_q) + c_p · T² · KL(p_T|K ‖ q_T|K)``, where ``c`` is the mass on the
    top k (the first term is a KL of two outcomes, K or not K, at temperature 1) and ``p_T|K`` the
    distribution *within* the top k, softened by T. At T = 1 that is exactly
    ``Σ_K p log(p/q) + r_p log(r_p/r_q)``, ``r = 1 - c``, a lower bound of the full KL; where k is the whole
    vocabulary it is the full KL at any T. The tail's mass at another temperature cannot be computed from a
    top k, so T is not applied to it; treating the tail as one token of probability ``r_p^(1/T)`` would move
    the minimum of the loss. Source: the top-k and temperature of https://arxiv.org/abs/1503.02531, the bucket
    as in https://arxiv.org/abs/2503.16870 (section 2).

    Args:
        student_logits: Unnormalised, any float type; computed in float32.
        targets: ``ids [*b, k]``, distinct within a row, and ``logprobs [*b, k]`` in nats over the whole
            vocabulary at temperature 1. An id that the student has no column for makes the loss NaN:
            :func:`within_columns` removes such ids.
        temperature: T, for the distribution within the top k.

    Returns:
        Nats a position, not averaged.

    Raises:
        DataError: More targets than the student has columns, or other leading axes.
        ConfigError: The temperature is not positive.

    >>> logits = mx.array([[2.0, 1.0, 0.0, -1.0]])
    >>> logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    >>> abs(round(sparse_forward_kl(logits, TopK(mx.array([[0, 1]]), logprobs[:, :2])).item(), 5))
    0.0
    """
    check_temperature(temperature)
    targets = checked_targets(student_logits.shape[:-1], student_logits.shape[-1], targets)
    z = mx.maximum(student_logits.astype(mx.float32), LOWEST)
    head = mx.take_along_axis(z, targets.ids, axis=-1)
    if targets.ids.shape[-1] == z.shape[-1]:
        return bucket_kl(head, None, targets.logprobs, temperature=temperature)
    # The tail is summed without the top k, not as 1 - sum: for a confident student that would be rounding.
    tail = mx.put_along_axis(z, targets.ids, mx.array(LOWEST), axis=-1)
    return bucket_kl(head, row_logsumexp(tail), targets.logprobs, temperature=temperature)


def sparse_linear_kl(
    student_hidden: Float[mx.array, "*b d"],
    student_head: Head,
    targets: TopK,
    *,
    temperature: float = 1.0,
    block_rows: int = BLOCK_ROWS,
) -> Float[mx.array, "*b"]:
    """:func:`~mlx_distill.losses.topk.sparse_forward_kl` from hidden state and head, equal in value and
    gradient.

    The logits of the k target columns are gathered; the other columns are one online ``logsumexp`` over the
    tiles, without the k.

    Args:
        student_hidden: The student's last hidden states, any float type; the gradient goes here.
        student_head: As in :func:`~mlx_distill.losses.tiled.linear_divergence`; constant.
        targets: ``ids [*b, k]`` and ``logprobs [*b, k]`` in nats over the whole vocabulary at temperature 1.
        temperature: T, for the distribution within the top k.
        block_rows: Positions whose logits of one tile exist at the same time.

    Returns:
        Nats a position, not averaged.

    Raises:
        DataError: The targets belong to other positions, or to a wider vocabulary.
        ModelError: The head does not fit the hidden state.

    >>> h, w = mx.array([[1.0, 2.0]]), mx.array([[0.5, 0.0], [0.0, 0.5], [1.0, 1.0]])
    >>> logits = h @ w.T
    >>> logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    >>> round(abs(sparse_linear_kl(h, w, TopK(mx.array([[2]]), logprobs[:, 2:])).item()), 5)
    0.0
    """
    check_temperature(temperature)
    head = head_weight(student_head)
    check_hidden(student_hidden, head)
    targets = checked_targets(student_hidden.shape[:-1], head.columns, targets)
    rows = flat_rows(student_hidden)
    n, k = rows.shape[0], targets.ids.shape[-1]
    if n == 0:
        return mx.zeros(student_hidden.shape[:-1])
    x, ids = detached(rows), targets.ids.reshape(n, k)
    logprobs = mx.stop_gradient(targets.logprobs).reshape(n, k)
    z = gathered_logits(x, head, ids)
    if k == head.columns:
        (value,), (by_logit,) = mx.vjp(
            lambda z: bucket_kl(z, None, logprobs, temperature=temperature), [z], [mx.ones((n,))]
        )
        gradient = gathered_gradient(by_logit, z, head, ids)
    else:
        tail, by_hidden = tail_logsumexp(x, head, ids, block_rows=block_rows)
        (value,), (by_logit, by_tail) = mx.vjp(
            lambda z, tail: bucket_kl(z, tail, logprobs, temperature=temperature), [z, tail], [mx.ones((n,))]
        )
        gradient = gathered_gradient(by_logit, z, head, ids) + by_tail[:, None] * by_hidden
    mx.eval(value, gradient)
    return with_gradient(value, gradient, rows).reshape(student_hidden.shape[:-1])


def bucket_kl(
    head: Float[mx.array, "*b k"],
    tail: Float[mx.array, "*b"] | None,
    logprobs: Float[mx.array, "*b k"],
    *,
    temperature: float = 1.0,
) -> Float[mx.array, "*b"]:
    """The formula of :func:`sparse_forward_kl` from its parts, shared by the dense, the tiled and the
    cross-tokenizer form.

    Args:
        head: The student's unnormalised log-probabilities of the teacher's k outcomes.
        tail: The student's logsumexp of all other outcomes, on the same scale; None where there are none.
        logprobs: The teacher's log-probabilities of the k outcomes; ``LOWEST`` marks an unused slot.
        temperature: T, for the distribution within the k outcomes.
    """
    empty = logprobs <= LOWEST / 2
    head = mx.where(empty, LOWEST, head)
    logprobs = mx.stop_gradient(logprobs).astype(mx.float32)
    mass_p = row_logsumexp(logprobs)
    within = _within_kl(head, logprobs, temperature)
    if tail is None:
        return within
    # Stored log-probabilities are rounded: their sum may be a little over one.
    mass_p = mx.minimum(mass_p, 0.0)
    # A student whose other columns are all masked has no tail (-inf); the bound keeps 1e-8 * inf finite.
    log_ratio = mx.maximum(tail - row_logsumexp(head), -1e4)
    in_p, out_p = mx.exp(mass_p), -mx.expm1(mass_p)
    out_p = mx.where(out_p < RESOLUTION, 0.0, out_p)
    binary = in_p * (mass_p + _softplus(log_ratio)) + out_p * (
        mx.log(mx.maximum(out_p, RESOLUTION)) + _softplus(-log_ratio)
    )
    return binary + in_p * within


def rows_of(targets: TopK, at: slice) -> TopK:
    """The targets of a slice of positions."""
    return TopK(targets.ids[at], targets.logprobs[at])


def within_columns(
    ids: Int[np.ndarray, "n k"], logprobs: Float[np.ndarray, "n k"], columns: int
) -> tuple[Int[np.ndarray, "n j"], Float[np.ndarray, "n j"]]:
    """A teacher's top k over the first ``columns`` tokens alone: what it gives to tokens from there on is
    removed, and the rest divided by its sum.

    A removed entry gets the log-probability ``LOWEST``, which marks an unused slot, and the id of another.
    Removed entries are last, and no more than ``columns`` entries are returned.

    >>> ids, logprobs = within_columns(np.array([[7, 1]]), np.log([[0.5, 0.25]]), 4)
    >>> ids.tolist(), np.exp(logprobs).tolist()
    ([[1, 1]], [[0.5, 0.0]])
    """
    beyond = ids >= columns
    if not beyond.any():
        return ids, logprobs
    removed = np.where(beyond, np.exp(logprobs.astype(np.float64)), 0.0).sum(axis=1, keepdims=True)
    kept = logprobs - np.log(np.maximum(1.0 - removed, RESOLUTION))
    order = np.argsort(beyond, axis=1, kind="stable")[:, :columns]  # what is removed comes last
    ids, kept, beyond = (np.take_along_axis(a, order, axis=1) for a in (ids, kept, beyond))
    other = np.where(beyond[:, :1], 0, ids[:, :1])
    return np.where(beyond, other, ids), np.where(beyond, LOWEST, kept).astype(logprobs.dtype)


def checked_targets(rows: tuple[int, ...], width: int, targets: TopK) -> TopK:
    """Refuse targets that belong to other positions or to another vocabulary; ids beyond the student's
    columns, which would be read from the memory behind its logits, get the log-probability NaN.
    """
    if targets.ids.shape != targets.logprobs.shape or targets.ids.shape[:-1] != rows:
        raise DataError(
            f"targets of shape {targets.ids.shape} and {targets.logprobs.shape} for positions {rows}",
            fix="give ids and logprobs of shape [positions, k]",
        )
    if targets.ids.shape[-1] > width:
        raise DataError(
            f"{targets.ids.shape[-1]} targets a position, but the student has {width} columns",
            fix="with another tokenizer use token_group_kl",
        )
    beyond = targets.ids >= width
    return TopK(mx.where(beyond, 0, targets.ids), mx.where(beyond, mx.nan, targets.logprobs))


def _within_kl(head: mx.array, logprobs: mx.array, temperature: float) -> mx.array:
    p = logprobs / temperature
    q = head / temperature
    log_p, log_q = p - row_logsumexp(p)[..., None], q - row_logsumexp(q)[..., None]
    return temperature**2 * row_sum(mx.exp(log_p) * (log_p - log_q))


def _softplus(x: mx.array) -> mx.array:
    return mx.logaddexp(x, mx.zeros_like(x))
