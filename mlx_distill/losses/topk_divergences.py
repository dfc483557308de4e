"""Every divergence against the teacher's k most probable tokens and one bucket for all the others."""

from __future__ import annotations

import mlx.core as mx
from jaxtyping import Float, Int

from mlx_distill.errors import ConfigError
from mlx_distill.losses.divergences import Pointwise, pointwise_form, summand
from mlx_distill.losses.numerics import (
    LOWEST,
    RESOLUTION,
    TINY,
    check_temperature,
    log_softmax,
    row_logsumexp,
    row_sum,
)
from mlx_distill.losses.topk import checked_targets
from mlx_distill.records import TopK


def sparse_divergence(
    student_logits: Float[mx.array, "*b v"],
    targets: TopK,
    *,
    divergence: str = "reverse_kl",
    temperature: float = 1.0,
    log_partition: Float[mx.array, "*b"] | None = None,
    **options: float,
) -> Float[mx.array, "*b"]:
    r"""A divergence over k + 1 outcomes: the teacher's top k tokens and a bucket that holds all other mass of
    either model.

    .. math:: T^2 \Big(\sum_{i \in K} f(\log q_i, \log p_i) + f(\log r_q, \log r_p)\Big), \quad
        r = 1 - \sum_{i \in K}

    where f is the summand of :data:`~mlx_distill.losses.divergences.DIVERGENCES`. All of them are
    f-divergences, so merging outcomes never makes them larger (data processing): this is a lower bound of the
    divergence over the whole vocabulary, zero at equality, and equal to it where k is the vocabulary. Without
    the bucket a reverse KL is minimal where the student puts all its mass outside of the top k
    (https://github.com/volcengine/verl/issues/5041), and a renormalised one gives that mass no gradient.

    For the forward KL at a temperature :func:`~mlx_distill.losses.topk.sparse_forward_kl` softens within the
    top k alone. Here T is exact, and needs what a top k does not tell: the partition over the whole
    vocabulary.

    Args:
        student_logits: Unnormalised, any float type; computed in float32.
        targets: ``ids [*b, k]``, distinct within a row, and ``logprobs [*b, k]`` in nats over the whole
            vocabulary at temperature 1; ``LOWEST`` marks an unused slot.
        divergence: A key of :data:`~mlx_distill.losses.divergences.DIVERGENCES`.
        temperature: T of both models.
        log_partition: ``log Σ_v p_v^(1/T)`` of the teacher; may be None at T = 1, where it is 0.
        **options: Of the divergence, such as ``beta``.

    Returns:
        Nats a position (a probability for the total variation), not averaged.

    Raises:
        DataError: More targets than the student has columns, or other leading axes.
        ConfigError: An unknown divergence or option, a temperature that is not positive, or one other than 1
            without the partition.

    >>> logits = mx.array([[2.0, 1.0, 0.0, -1.0]])
    >>> logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    >>> abs(round(sparse_divergence(logits, TopK(mx.array([[0, 1]]), logprobs[:, :2])).item(), 5))
    0.0
    """
    check_temperature(temperature)
    _, pointwise = pointwise_form(divergence, options)
    if temperature != 1 and log_partition is None:
        raise ConfigError(
            f"{divergence} over a top k at temperature {temperature:g} needs the teacher's partition",
            fix="give log_partition, or use temperature 1",
        )
    targets = checked_targets(student_logits.shape[:-1], student_logits.shape[-1], targets)
    log_q = log_softmax(student_logits, temperature)
    log_p = mx.stop_gradient(targets.logprobs).astype(mx.float32)
    unused = log_p <= LOWEST / 2
    log_p = log_p / temperature
    if log_partition is not None:
        log_p = log_p - mx.stop_gradient(log_partition).astype(mx.float32)[..., None]
    return temperature**2 * bucket_divergence(log_q, targets.ids, mx.where(unused, LOWEST, log_p), pointwise)


def bucket_divergence(
    log_q: Float[mx.array, "*b v"],
    ids: Int[mx.array, "*b k"],
    log_p: Float[mx.array, "*b k"],
    pointwise: Pointwise,
) -> Float[mx.array, "*b"]:
    """The formula of :func:`sparse_divergence` without T², shared with the cross-tokenizer form.

    Args:
        log_q: The student's log-probabilities of all outcomes.
        ids: Outcomes that the teacher's mass is known of; in an unused slot one that is listed anyway, or
            that the student gives no mass.
        log_p: The teacher's log-probabilities of them; ``LOWEST`` marks an unused slot.
        pointwise: Of :func:`~mlx_distill.losses.divergences.pointwise_form`.
    """
    unused = log_p <= LOWEST / 2
    head = mx.take_along_axis(log_q, ids, axis=-1)
    terms = row_sum(mx.where(unused, 0.0, summand(pointwise, _bounded(head), _bounded(log_p))))
    log_tail_q = _bounded(row_logsumexp(mx.put_along_axis(log_q, ids, mx.array(LOWEST), axis=-1)))
    tail_p = 1.0 - row_sum(mx.where(unused, 0.0, mx.exp(log_p)))
    # One minus a sum of float32 numbers is rounding below this. Of the masses from 0 to this the one nearest
    # to the student's is taken: 0 would be a wall to a reverse KL, and more a cost to a forward one.
    nearest = mx.minimum(mx.stop_gradient(mx.exp(log_tail_q)), RESOLUTION)
    log_tail_p = mx.log(mx.maximum(mx.where(tail_p < RESOLUTION, nearest, tail_p), TINY))
    return terms + summand(pointwise, log_tail_q, log_tail_p)


def _bounded(log_probability: mx.array) -> mx.array:
    """Masked columns have a log-probability that is finite: ``0 * -inf`` is not a number."""
    return mx.maximum(log_probability, mx.log(mx.array(TINY)))
