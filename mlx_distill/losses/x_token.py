"""X-Token's projected KL: the student's probabilities as probabilities of the teacher's tokens."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
from jaxtyping import Float

from mlx_distill.errors import ConfigError
from mlx_distill.losses.cross_tokenizer import check_starts, listed_and_others
from mlx_distill.losses.numerics import LOWEST, TINY, check_temperature, log_softmax
from mlx_distill.losses.token_groups import TokenGroups
from mlx_distill.losses.topk import bucket_kl
from mlx_distill.records import TopK


def x_token_kl(
    student_logits: Float[mx.array, "n v"], targets: TopK, groups: TokenGroups, *, temperature: float = 1.0
) -> Float[mx.array, " n"]:
    r"""Forward KL between the teacher and the projected student, at positions where both models start a token
    at the same byte.

    .. math:: T^2\, \mathrm{KL}(p \,\|\, W^\top q), \quad W_{s,t_i} \propto 0.9 \cdot 0.1^i

    where :math:`t_0 t_1 \ldots` (at most four) are the teacher's tokens that the student's token s is written
    with; a token of both vocabularies is its own alone. Over the teacher's top k and a bucket for all other
    mass: also that of tokens of the student without a counterpart, and of tokens of the teacher that none of
    the student's is written with. With one tokenizer it is the forward KL.
    Source: https://arxiv.org/abs/2605.21699, and ``_compute_p_kl`` of NVIDIA NeMo RL.

    What is wrong in the formula, and kept: mass of a token that the teacher writes with several goes in part
    to the later ones, as if they stood *here*. So two models of equal distributions over texts and other
    tokenizers have a loss above zero; :func:`~mlx_distill.losses.cross_tokenizer.token_group_kl` gives all of
    it to the first. What differs, because it is wrong there:

    - within a span of several tokens the published code averages the student's *probabilities* and the
      teacher's *log-probabilities* over the positions of the span, which are over different texts. Here the
      distributions at the start of the span are compared;
    - it renormalises both over the tokens that the teacher finds likely anywhere in the micro-batch. The loss
      then depends on what else is in the batch, and mass outside gets no gradient. Here the bucket holds it.

    Args:
        student_logits: At the common starts; computed in float32.
        targets: The *teacher's* token ids ``[n, k]`` and their log-probabilities in nats over the teacher's
            whole vocabulary at temperature T; ``LOWEST`` marks an unused slot.
        groups: From :func:`~mlx_distill.losses.token_groups.build_token_groups`.
        temperature: T of both models.

    Returns:
        Nats (times T²) a position, not averaged.

    Raises:
        DataError: The targets belong to other positions.
        ModelError: The logits are narrower than the student's tokenizer.
        ConfigError: Groups that do not tell how tokens are written, or a temperature that is not positive.

    >>> one = np.arange(3, dtype=np.int32)
    >>> groups = TokenGroups(student=one, teacher=one, count=4, shared=3, pieces=one[:, None])
    >>> targets = TopK(mx.array([[0, 1]]), mx.log(mx.array([[0.5, 0.3]])))
    >>> abs(round(x_token_kl(mx.log(mx.array([[0.5, 0.3, 0.2]])), targets, groups).item(), 5))
    0.0
    """
    check_temperature(temperature)
    check_starts(student_logits, targets, groups)
    if groups.pieces is None:
        raise ConfigError(
            "token groups that do not tell how the student's tokens are written by the teacher",
            fix="make them with build_token_groups(student_tokenizer, teacher_tokenizer)",
        )
    log_p = mx.stop_gradient(targets.logprobs).astype(mx.float32)
    outside = len(groups.teacher)
    reached = np.zeros(outside + 1, dtype=bool)
    reached[groups.pieces[groups.pieces >= 0]] = True
    ids = mx.minimum(targets.ids, outside)
    known = (log_p > LOWEST / 2) & mx.array(reached)[ids]
    ids, log_p = mx.where(known, ids, outside), mx.where(known, log_p, LOWEST)
    mass = _projected(mx.exp(log_softmax(student_logits, temperature)), groups.pieces, outside)
    listed, others = listed_and_others(mass, ids, outside)
    listed, others = (mx.log(mx.maximum(x, TINY)) for x in (listed, others))
    return temperature**2 * bucket_kl(listed, others, log_p)


def _projected(q: Float[mx.array, "n v"], pieces: np.ndarray, outside: int) -> Float[mx.array, "n w"]:
    """``W^T q`` over the teacher's tokens, and one column for what has none."""
    count = pieces.shape[1]
    weights = np.where(pieces >= 0, 0.9 * 0.1 ** np.arange(count), 0.0)
    without = ~(pieces >= 0).any(axis=1)
    weights[without, 0] = 1.0
    weights /= weights.sum(axis=1, keepdims=True)
    extra = q.shape[1] - len(pieces)  # columns beyond the tokenizer
    mass = mx.zeros((outside + 1, q.shape[0]))
    for i in range(count):
        at = np.pad(np.where(pieces[:, i] >= 0, pieces[:, i], outside), (0, extra), constant_values=outside)
        weight = np.pad(weights[:, i], (0, extra), constant_values=float(i == 0)).astype(np.float32)
        mass = mass.at[mx.array(at.astype(np.int32))].add((q * mx.array(weight)).T)
    return mass.T
