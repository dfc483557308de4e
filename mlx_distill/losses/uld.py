"""Universal logit distillation: the distance of two sorted distributions, for any two tokenizers."""

from __future__ import annotations

import mlx.core as mx
from jaxtyping import Float

from mlx_distill.errors import DataError
from mlx_distill.losses.numerics import LOWEST, log_softmax, row_sum
from mlx_distill.records import TopK


def uld(
    student_logits: Float[mx.array, "n v"], targets: TopK, *, temperature: float = 1.0
) -> Float[mx.array, " n"]:
    r"""Universal logit distillation, at positions where both models start a token at the same byte.

    .. math:: \sum_{j \le k} |q^\downarrow_j - p^\downarrow_j| + |r_q - r_p|, \quad r = 1 - \sum_{j \le k}

    with both distributions sorted by themselves: token identities play no part, so two models that are
    equally sure of *different* tokens have a loss of zero. It is a baseline; it does not replace a term that
    knows the tokens. Source: Boizard et al. 2024, https://arxiv.org/abs/2402.12030.

    What differs from the published code: it pairs the positions of the two answers by number and cuts the
    longer one, and reads the student's logits one position late, so from the first token that the tokenizers
    split differently on it compares unrelated places. Here positions are paired by the bytes before them.
    Where only the teacher's top k is known all smaller probabilities are one outcome, which makes the
    loss a lower bound of that over the whole vocabularies.

    Args:
        student_logits: At the common starts; computed in float32.
        targets: The *teacher's* top k there, descending, in nats over its whole vocabulary; the ids are not
            read. ``LOWEST`` marks an unused slot.
        temperature: T of the student; the teacher's top k is at temperature 1, so another T than 1 is for
            experiments.

    Returns:
        One number a position, from 0 to 2, not averaged.

    Raises:
        DataError: The targets belong to other positions.

    >>> logits = mx.log(mx.array([[0.5, 0.3, 0.2]]))
    >>> uld(logits, TopK(mx.array([[7, 9]]), mx.log(mx.array([[0.5, 0.3]])))).item() < 1e-6
    True
    """
    if targets.logprobs.shape[:-1] != student_logits.shape[:-1]:
        raise DataError(
            f"targets of shape {targets.logprobs.shape} for {student_logits.shape[0]} positions",
            fix="give the teacher's top k at the same common starts",
        )
    logprobs = mx.stop_gradient(targets.logprobs).astype(mx.float32)
    p = mx.where(logprobs <= LOWEST / 2, 0.0, mx.exp(logprobs))
    q, rest = top_and_rest(mx.exp(log_softmax(student_logits, temperature)), p.shape[-1])
    both = min(p.shape[-1], q.shape[-1])
    distance = row_sum(mx.abs(q[..., :both] - p[..., :both]))
    beyond = row_sum(p[..., both:])  # of a teacher with more listed tokens than the student has columns
    tail = mx.maximum(1.0 - row_sum(p), 0.0) + beyond
    return distance + mx.abs(rest - tail)


def top_and_rest(q: Float[mx.array, "n v"], k: int) -> tuple[Float[mx.array, "n j"], Float[mx.array, " n"]]:
    """The k largest numbers of each row, descending, and the sum of the others."""
    if k >= q.shape[-1]:
        return descending(q), mx.zeros(q.shape[:-1])
    top = mx.argpartition(-mx.stop_gradient(q), kth=k - 1, axis=-1)[..., :k]
    rest = row_sum(mx.put_along_axis(q, top, mx.array(0.0), axis=-1))
    return descending(mx.take_along_axis(q, top, axis=-1)), rest


def descending(q: Float[mx.array, "n k"]) -> Float[mx.array, "n k"]:
    """Sorted, with a gradient to each entry's own place."""
    order = mx.argsort(-mx.stop_gradient(q), axis=-1)
    return mx.take_along_axis(q, order, axis=-1)
