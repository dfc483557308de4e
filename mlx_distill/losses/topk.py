"""Forward KL against the teacher's k most probable tokens and one bucket for all the others.

A cache cannot hold 150,000 numbers a position; it holds the top k and, because the log-probabilities are over
the *whole* vocabulary, the mass outside. Renormalising over the top k alone would give the student's mass
outside no gradient, and keeping the teacher's zeros outside has a floor above zero. With the bucket the loss
is zero at equality and never above the full KL.
"""

from __future__ import annotations

import mlx.core as mx
from jaxtyping import Float

from mlx_distill.errors import DataError
from mlx_distill.losses.numerics import LOWEST, RESOLUTION, check_temperature, row_logsumexp
from mlx_distill.records import TopK


def sparse_forward_kl(
    student_logits: Float[mx.array, "*b v"], targets: TopK, *, temperature: float = 1.0
) -> Float[mx.array, "*b"]:
    """Forward KL over the teacher's top k tokens and a bucket that holds the rest of either side.

    By the chain rule of KL: ``KL(c_p‖c_q) + c_p · T² · KL(p_T|K ‖ q_T|K)``, where ``c`` is the mass on the
    top k (the first term is a KL of two outcomes, K or not K, at temperature 1) and ``p_T|K`` the
    distribution *within* the top k, softened by T. At T = 1 that is exactly
    ``Σ_K p log(p/q) + r_p log(r_p/r_q)``, ``r = 1 - c``, a lower bound of the full KL; where k is the whole
    vocabulary it is the full KL at any T. What the tail's mass would be at another temperature cannot be
    known from a top k, so T never touches it; treating the tail as one token of probability ``r_p^(1/T)``
    instead would change what the loss pulls towards. Source: the top-k and temperature of
    https://arxiv.org/abs/1503.02531, the bucket as in https://arxiv.org/abs/2503.16870 (section 2).

    Args:
        student_logits: Unnormalised, any float type; computed in float32.
        targets: ``ids [*b, k]``, distinct within a row, and ``logprobs [*b, k]`` in nats over the whole
            vocabulary at temperature 1.
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
    check_targets(student_logits.shape[:-1], student_logits.shape[-1], targets)
    z = mx.maximum(student_logits.astype(mx.float32), LOWEST)
    head = mx.take_along_axis(z, targets.ids, axis=-1)
    if targets.ids.shape[-1] == z.shape[-1]:
        return bucket_kl(head, None, targets.logprobs, temperature=temperature)
    # The tail is summed without the top k, not as 1 - sum: a confident student's tail would drown in
    # rounding.
    tail = mx.put_along_axis(z, targets.ids, mx.array(LOWEST), axis=-1)
    return bucket_kl(head, row_logsumexp(tail), targets.logprobs, temperature=temperature)


def bucket_kl(
    head: Float[mx.array, "*b k"],
    tail: Float[mx.array, "*b"] | None,
    logprobs: Float[mx.array, "*b k"],
    *,
    temperature: float = 1.0,
) -> Float[mx.array, "*b"]:
    """The loss of :func:`sparse_forward_kl` from its parts: what the dense, the tiled and the cross-tokenizer
    form have in common.

    Args:
        head: The student's unnormalised log-probabilities of the teacher's k outcomes.
        tail: The student's logsumexp of everything else, on the same scale; None where nothing else exists.
        logprobs: The teacher's log-probabilities of the k outcomes; ``LOWEST`` marks a slot that holds none.
        temperature: T, for the distribution within the k outcomes.
    """
    empty = logprobs <= LOWEST / 2
    head = mx.where(empty, LOWEST, head)
    logprobs = mx.stop_gradient(logprobs).astype(mx.float32)
    mass_p = row_logsumexp(logprobs)
    within = _within_kl(head, logprobs, temperature)
    if tail is None:
        return within
    # Stored log-probabilities are rounded: their mass may come out a little over one.
    mass_p = mx.minimum(mass_p, 0.0)
    # A student whose other columns are all masked has no tail at all; the bound keeps its infinity off a mass
    # of 1e-8.
    log_ratio = mx.maximum(tail - row_logsumexp(head), -1e4)
    in_p, out_p = mx.exp(mass_p), -mx.expm1(mass_p)
    out_p = mx.where(out_p < RESOLUTION, 0.0, out_p)
    binary = in_p * (mass_p + _softplus(log_ratio)) + out_p * (
        mx.log(mx.maximum(out_p, RESOLUTION)) + _softplus(-log_ratio)
    )
    return binary + in_p * within


def check_targets(rows: tuple[int, ...], width: int, targets: TopK) -> None:
    """Refuse targets that belong to other positions or to another vocabulary."""
    if targets.ids.shape != targets.logprobs.shape or targets.ids.shape[:-1] != rows:
        raise DataError(
            f"targets of shape {targets.ids.shape} and {targets.logprobs.shape} for positions of shape {rows}",
            fix="give ids and logprobs of shape [positions, k]",
        )
    if targets.ids.shape[-1] > width:
        raise DataError(
            f"{targets.ids.shape[-1]} targets a position, but the student has {width} columns",
            fix="with another tokenizer use token_group_kl",
        )


def _within_kl(head: mx.array, logprobs: mx.array, temperature: float) -> mx.array:
    p = logprobs / temperature
    q = head / temperature
    log_p, log_q = p - row_logsumexp(p)[..., None], q - row_logsumexp(q)[..., None]
    return temperature**2 * (mx.exp(log_p) * (log_p - log_q)).sum(axis=-1)


def _softplus(x: mx.array) -> mx.array:
    return mx.logaddexp(x, mx.zeros_like(x))
