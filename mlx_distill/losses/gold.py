"""GOLD: a divergence on the tokens that two vocabularies share, and sorted probabilities for the others."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
from jaxtyping import Float

from mlx_distill.errors import ConfigError
from mlx_distill.losses.cross_tokenizer import check_starts
from mlx_distill.losses.divergences import pointwise_form
from mlx_distill.losses.numerics import LOWEST, RESOLUTION, check_temperature, log_softmax, row_sum
from mlx_distill.losses.token_groups import TokenGroups
from mlx_distill.losses.topk_divergences import bucket_divergence
from mlx_distill.losses.uld import descending, top_and_rest
from mlx_distill.records import TopK


def gold(
    student_logits: Float[mx.array, "n v"],
    targets: TopK,
    groups: TokenGroups,
    *,
    temperature: float = 1.0,
    beta: float = 0.5,
) -> Float[mx.array, " n"]:
    r"""General online logit distillation, at positions where both models start a token at the same byte.

    .. math:: w\, T^2\, \mathrm{JS}_\beta\big(p_M, r_p \,\|\, q_M, r_q\big)
        + (1 - w) \sum_j |q^\downarrow_{U,j} - p^\downarrow_{U,j}|, \quad w = |M| / |V_t|

    M are the tokens that both vocabularies have (one outcome each; r is all other mass of either model, one
    outcome more), U those of each vocabulary alone, sorted by themselves as in
    :func:`~mlx_distill.losses.uld.uld`. With one tokenizer it is the generalised Jensen-Shannon divergence.
    Source: ``ULDLoss`` of TRL's ``GOLDTrainer`` (``uld_use_hybrid_loss``), trl 1.16,
    https://huggingface.co/docs/trl/gold_trainer.

    What differs from TRL, whose formula is wrong there:

    - it takes the divergence over ``p_M`` and ``q_M`` without r. They do not sum to one, so its "divergence"
      is negative where the student has more mass on M than the teacher. With r it is a divergence; the rest
      of the formula has TRL's values;
    - between two common boundaries with several tokens it multiplies the distribution at one of them by the
      probabilities of the other tokens of the text: at the first ("observed", the default, and read one
      position late), where the product belongs to the text's own token alone, or at the last ("bayesian"),
      where the two models have different texts before them, so that equal tokens are other texts. Both leave
      unnormalised distributions, scaled differently for the two models. Here the distributions at the common
      start are compared as they are, over the same text. What follows within a span is trained by a
      likelihood of the whole span: :func:`~mlx_distill.losses.cross_tokenizer.alm` beside this loss;
    - it compares tokens as they are written, so only tokenizers of one way of writing share any; here their
      bytes. The stop tokens of both models are one token; it leaves them out.

    Where only the teacher's top k is known, the other tokens are part of r, and for U the unlisted mass is
    placed to make the distance smallest: a lower bound, zero at equality, exact where k is the vocabulary.

    Args:
        student_logits: At the common starts; computed in float32.
        targets: The *teacher's* token ids ``[n, k]`` and their log-probabilities in nats over the teacher's
            whole vocabulary at temperature T; ``LOWEST`` marks an unused slot.
        groups: From :func:`~mlx_distill.losses.token_groups.build_token_groups`.
        temperature: T of both models. T² is a factor of the divergence alone: TRL has it nowhere.
        beta: The teacher's weight in the mixture; 0 is the forward KL, 1 the reverse.

    Returns:
        One number a position, not averaged.

    Raises:
        DataError: The targets belong to other positions.
        ModelError: The logits are narrower than the student's tokenizer.
        ConfigError: Groups that do not tell which tokens are equal, or an impossible setting.

    >>> one = np.arange(3, dtype=np.int32)
    >>> groups = TokenGroups(student=one, teacher=one, count=4, shared=3, same_token=one)
    >>> targets = TopK(mx.array([[0, 1]]), mx.log(mx.array([[0.5, 0.3]])))
    >>> abs(round(gold(mx.log(mx.array([[0.5, 0.3, 0.2]])), targets, groups).item(), 5))
    0.0
    """
    check_temperature(temperature)
    _, pointwise = pointwise_form("js_divergence", {"beta": beta})
    check_starts(student_logits, targets, groups)
    same = groups.same_token
    if same is None:
        raise ConfigError(
            "token groups that do not tell which tokens of the two vocabularies are equal",
            fix="make them with build_token_groups(student_tokenizer, teacher_tokenizer)",
        )
    width, known = student_logits.shape[-1], targets.ids < len(same)
    student_ids = mx.where(known, mx.array(same)[mx.where(known, targets.ids, 0)], -1)
    log_p = mx.stop_gradient(targets.logprobs).astype(mx.float32)
    listed = log_p > LOWEST / 2
    is_shared = listed & (student_ids >= 0)
    log_q = log_softmax(student_logits, temperature)
    # A column without mass, for the teacher's tokens that the student lacks.
    padded = mx.concatenate([log_q, mx.full((log_q.shape[0], 1), LOWEST)], axis=-1)
    divergence = bucket_divergence(
        padded, mx.where(is_shared, student_ids, width), mx.where(is_shared, log_p, LOWEST), pointwise
    )
    p = mx.where(listed, mx.exp(log_p), 0.0)
    own = np.ones(width, dtype=bool)
    own[same[same >= 0]] = False
    distance = _sorted_distance(
        mx.where(mx.array(own), mx.exp(log_q), 0.0),
        mx.where(is_shared, 0.0, p),
        (listed & ~is_shared).sum(axis=-1, keepdims=True),
        1.0 - row_sum(p),
    )
    weight = float((same >= 0).mean())
    return weight * temperature**2 * divergence + (1.0 - weight) * distance


def _sorted_distance(
    q: Float[mx.array, "n v"], p: Float[mx.array, "n k"], count: mx.array, unlisted: Float[mx.array, " n"]
) -> Float[mx.array, " n"]:
    """The distance of sorted masses, of which the teacher's ``count`` largest are known, and the sum of the
    smaller ones up to those that are shared: from 0 to ``unlisted``.
    """
    q, rest = top_and_rest(q, p.shape[-1])
    p, both = descending(p), min(p.shape[-1], q.shape[-1])
    known = mx.arange(both) < count
    distance = row_sum(mx.where(known, mx.abs(q[:, :both] - p[:, :both]), 0.0)) + row_sum(p[:, both:])
    rest = rest + row_sum(mx.where(known, 0.0, q[:, :both]))
    return distance + mx.maximum(rest - mx.where(unlisted < RESOLUTION, 0.0, unlisted), 0.0)
