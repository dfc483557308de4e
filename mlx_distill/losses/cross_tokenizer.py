"""Losses between models with different tokenizers: KL over token groups, and likelihoods of spans of text.

A *token group* is a set of tokens of both vocabularies that share a byte prefix
(:mod:`mlx_distill.losses.token_groups`). At a position where both models start a token at the same byte, each
distribution over tokens becomes one over groups by summing, and two distributions over the same groups have a
KL divergence.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np
from jaxtyping import Bool, Float, Int

from mlx_distill.errors import ConfigError, DataError, ModelError
from mlx_distill.losses.numerics import LOWEST, RESOLUTION, TINY, check_temperature, row_sum
from mlx_distill.losses.token_groups import TokenGroups, build_token_groups
from mlx_distill.losses.topk import bucket_kl
from mlx_distill.records import TopK

__all__ = [
    "TokenGroups",
    "across_token_kl",
    "alm",
    "build_token_groups",
    "group_topk",
    "inside_token_kl",
    "span_sums",
    "token_group_kl",
]


def token_group_kl(
    student_logits: Float[mx.array, "n v"], targets: TopK, groups: TokenGroups, *, temperature: float = 1.0
) -> Float[mx.array, " n"]:
    r"""Forward KL over token groups, at positions where both models start a token at the same byte.

    ``Σ_g P_g log(P_g / Q_g)`` with ``P_g = Σ_{t in g} p_t`` and ``Q_g = Σ_{s in g} q_s``. The sum runs over
    the groups that the teacher's top k reaches; all other mass of either model is one further outcome, the
    *bucket*. With one tokenizer and k the whole vocabulary this is the full KL.

    **Unlisted mass.** The top k holds the mass ``Σ p``; the remaining mass ``u = 1 - Σ p`` belongs to
    unlisted tokens, and some of them may be members of groups that the top k reaches. How u is divided
    between those groups and the bucket is unknown. The loss takes the division that makes the divergence
    smallest, so at T = 1 it is a lower bound of the KL over all groups and zero at equality for any k. A
    group that receives some of u then has the same ratio P/Q as the bucket, and outcomes of equal ratio can
    be added up without changing the KL: such groups are merged into the bucket (:func:`_absorbed_groups`).

    T softens the distribution within the listed groups, as in
    :func:`~mlx_distill.losses.topk.sparse_forward_kl`. Groups are summed first, at T = 1: a temperature does
    not commute with summing. How mass is distributed *within* a group is not trained, so add a cross-entropy
    term to this loss.

    Args:
        student_logits: At the common starts; computed in float32. Columns beyond the tokenizer belong to
            ``groups.outside``.
        targets: The *teacher's* token ids ``[n, k]`` and their log-probabilities in nats over the teacher's
            whole vocabulary.
        groups: From :func:`build_token_groups`.
        temperature: T.

    Returns:
        Nats a position, not averaged.

    Raises:
        ModelError: The logits are narrower than the student's tokenizer.
        DataError: The targets belong to other positions.
        ConfigError: The temperature is not positive.

    >>> groups = TokenGroups(student=np.array([0, 1, 1]), teacher=np.array([0, 1]), count=3, shared=2)
    >>> logits = mx.log(mx.array([[0.5, 0.3, 0.2]]))
    >>> targets = TopK(mx.array([[0, 1]]), mx.log(mx.array([[0.5, 0.5]])))
    >>> round(abs(token_group_kl(logits, targets, groups).item()), 5)
    0.0
    """
    check_temperature(temperature)
    check_starts(student_logits, targets, groups)
    ids, logprobs, has_unlisted = group_topk(targets, groups)
    return _group_kl(student_logits, ids, logprobs, has_unlisted, groups, temperature)


def inside_token_kl(
    student_logits: Float[mx.array, "n v"],
    ids: Int[mx.array, "n k"],
    logprobs: Float[mx.array, "n k"],
    groups: TokenGroups,
    *,
    temperature: float = 1.0,
) -> Float[mx.array, " n"]:
    """:func:`token_group_kl` where the student begins a token inside a token of the teacher.

    ``Σ_g P_g log(P_g / Q_g)``, P the teacher's distribution over its tokens that go on behind the written
    bytes, each as the group of the student's next token in its text, and Q the student's distribution. Any
    group may have some of the mass that is missing to one, and the division that makes the divergence
    smallest is taken.

    Args:
        student_logits: At the beginnings of the student's tokens.
        ids: Groups, ``inside_groups`` of :class:`~mlx_distill.losses.mid_token.MidTokenTargets`.
        logprobs: ``inside_logprobs`` there.
        groups: Of both vocabularies.
        temperature: T, within the listed groups.

    Returns:
        Nats a position, not averaged.
    """
    check_temperature(temperature)
    return _group_kl(student_logits, ids, logprobs, ids != groups.outside, groups, temperature)


def across_token_kl(
    student_logits: Float[mx.array, "n v"],
    logprobs: Float[mx.array, "n k"],
    sizes: Int[np.ndarray, " n"],
    tokens: Int[mx.array, " e"],
    slots: Int[mx.array, " e"],
    *,
    temperature: float = 1.0,
) -> Float[mx.array, " n"]:
    """KL divergence where the teacher begins a token inside a token of the student.

    ``Σ_o P_o log(P_o / Q_o)`` with ``Q_o = Σ_{s in o} q_s / Σ_{s in S} q_s``: S are the student's tokens that
    begin with the written bytes, q its distribution at the beginning of its token, and P the teacher's in the
    middle of it. Any outcome may have some of the mass that is missing to one, and the division that makes
    the divergence smallest is taken.

    Args:
        student_logits: At the beginnings of the student's tokens.
        logprobs: ``across_logprobs`` of :class:`~mlx_distill.losses.mid_token.MidTokenTargets`.
        sizes: ``across_sizes`` there.
        tokens: ``across_tokens`` there, of these positions alone.
        slots: ``across_slots`` there, of these positions alone.
        temperature: T, within the listed outcomes.

    Returns:
        Nats a position, not averaged.

    >>> logits = mx.log(mx.array([[0.1, 0.3, 0.6]]))  # "7", "73", "8"; written: "7"; then "3" or an end
    >>> p = mx.log(mx.array([[0.75, 0.25]]))
    >>> loss = across_token_kl(logits, p, np.array([2]), mx.array([0, 1]), mx.array([1, 0]))
    >>> round(abs(loss.item()), 5)
    0.0
    """
    check_temperature(temperature)
    n, k = logprobs.shape
    owner = mx.array(np.repeat(np.arange(n), sizes).astype(np.int32))
    z = mx.maximum(student_logits[owner, tokens].astype(mx.float32), LOWEST)
    top = mx.full((n,), LOWEST).at[owner].maximum(mx.stop_gradient(z))
    mass = mx.zeros((n, k + 1)).at[owner, slots].add(mx.exp(z - top[owner]))
    listed = mx.where(logprobs > LOWEST / 2, mass[:, :k], 0.0)
    return _outcome_kl(listed, mass[:, k], logprobs, logprobs > LOWEST / 2, temperature)


def _group_kl(
    student_logits: mx.array,
    ids: mx.array,
    logprobs: mx.array,
    has_unlisted: mx.array,
    groups: TokenGroups,
    temperature: float,
) -> mx.array:
    """:func:`_outcome_kl` of distinct groups ``ids [n, k]``."""
    mass = _group_masses(student_logits, groups)
    listed, bucket = listed_and_others(mass, ids, groups.outside)
    return _outcome_kl(listed, bucket, logprobs, has_unlisted, temperature)


def check_starts(student_logits: mx.array, targets: TopK, groups: TokenGroups) -> None:
    """Refuse targets of other positions, and logits that are narrower than the student's tokenizer."""
    n, width = student_logits.shape
    if targets.ids.shape != targets.logprobs.shape or targets.ids.shape[:-1] != (n,):
        raise DataError(
            f"targets of shape {targets.ids.shape} for {n} positions",
            fix="give the teacher's top k at the same common starts",
        )
    if width < len(groups.student):
        raise ModelError(
            f"student logits of {width} columns for a tokenizer of {len(groups.student)} tokens",
            fix="build the token groups with the student's own tokenizer",
        )


def listed_and_others(
    mass: Float[mx.array, "n c"], ids: Int[mx.array, "n k"], outside: int
) -> tuple[Float[mx.array, "n k"], Float[mx.array, " n"]]:
    """The masses of k outcomes and the sum of all others.

    Args:
        mass: Of all outcomes.
        ids: Of the k; ``outside`` in unused slots, whose mass is 0.
        outside: An outcome that is never a target, so that its mass is one of the others.
    """
    listed = mx.where(ids == outside, 0.0, mx.take_along_axis(mass, ids, axis=1))
    is_listed = mx.put_along_axis(mx.zeros(mass.shape), ids, mx.array(1.0), axis=1)
    is_listed[:, outside] = 0.0
    return listed, row_sum(mx.where(is_listed > 0, 0.0, mass))


def _outcome_kl(
    listed: Float[mx.array, "n k"],
    bucket: Float[mx.array, " n"],
    logprobs: Float[mx.array, "n k"],
    has_unlisted: Bool[mx.array, "n k"],
    temperature: float,
) -> Float[mx.array, " n"]:
    """The divergence of the student's masses, up to a factor a row, from the teacher's, whose missing mass is
    placed where it is smallest.
    """
    absorbed = _absorbed_groups(
        mx.exp(logprobs), mx.stop_gradient(listed), mx.stop_gradient(bucket), has_unlisted
    )
    bucket = bucket + mx.where(absorbed, listed, 0.0).sum(axis=1)
    logprobs = mx.where(absorbed, LOWEST, logprobs)
    return bucket_kl(
        mx.log(mx.maximum(listed, TINY)), mx.log(mx.maximum(bucket, TINY)), logprobs, temperature=temperature
    )


def _absorbed_groups(
    p: Float[mx.array, "n k"],
    q: Float[mx.array, "n k"],
    bucket: Float[mx.array, " n"],
    has_unlisted: Bool[mx.array, "n k"],
) -> Bool[mx.array, "n k"]:
    """The groups that receive some of the teacher's unlisted mass when it is placed to make the KL smallest.

    With x_g the unlisted mass given to group g and x_0 the mass left in the bucket, minimize
    ``Σ_g (p_g + x_g) log((p_g + x_g) / q_g) + x_0 log(x_0 / q_0)`` over x >= 0 with ``Σ x = u``, where only
    groups with unlisted members may receive mass. The derivative by x_g is ``log((p_g + x_g) / q_g) + 1``, so
    at the minimum all outcomes that receive mass have one ratio, the *level*, and every group that receives
    none has a ratio ``p_g / q_g`` at or above it (Karush-Kuhn-Tucker conditions). This is water-filling: u
    raises the lowest ratios to the level, beginning with the bucket, whose ratio without x_0 is 0.

    If the groups S receive mass, ``level = (u + Σ_S p) / (q_0 + Σ_S q)``. S consists of the groups of lowest
    ratio: in ascending order of ``p_g / q_g``, a group belongs to S exactly if its ratio is below the level
    computed from the groups before it. (A group below that level lowers the level, but not below its own
    ratio; a group at or above it cannot be followed by one that is below.)

    Args:
        p: The teacher's listed mass of each group; 0 in unused slots.
        q: The student's mass of the same groups.
        bucket: The student's mass q_0 outside the listed groups.
        has_unlisted: Whether a group has teacher tokens that are not in the top k.
    """
    total = bucket + q.sum(axis=1)
    unlisted = mx.maximum(1 - p.sum(axis=1, keepdims=True), 0.0)
    # Groups that cannot receive mass are sorted to the end and never counted.
    ratio = mx.where(has_unlisted, p / mx.maximum(q / total[:, None], TINY), -LOWEST)
    order = mx.argsort(ratio, axis=1)
    sorted_ratio = mx.take_along_axis(ratio, order, axis=1)
    can_receive = mx.take_along_axis(has_unlisted, order, axis=1)
    p_before, q_before = (
        mx.cumsum(mx.where(can_receive, mx.take_along_axis(x, order, axis=1), 0.0), axis=1, inclusive=False)
        for x in (p, q / total[:, None])
    )
    level = (unlisted + p_before) / mx.maximum(bucket[:, None] / total[:, None] + q_before, TINY)
    receives = can_receive & (sorted_ratio < level) & (unlisted > RESOLUTION)
    return mx.put_along_axis(mx.zeros(p.shape, dtype=mx.bool_), order, receives, axis=1)


def group_topk(
    targets: TopK, groups: TokenGroups
) -> tuple[Int[mx.array, "n k"], Float[mx.array, "n k"], Bool[mx.array, "n k"]]:
    """The teacher's top k summed by group.

    Args:
        targets: Teacher token ids ``[n, k]`` and log-probabilities.
        groups: From :func:`build_token_groups`.

    Returns:
        Distinct group numbers, their log-masses, and whether a group has teacher tokens that are not listed.
        Unused slots hold ``outside``, ``LOWEST`` and False.
    """
    n, k = targets.ids.shape
    width = len(groups.teacher)
    known = targets.ids < width
    group = mx.where(known, mx.array(groups.teacher)[mx.where(known, targets.ids, 0)], groups.outside)
    order = mx.argsort(group, axis=1)
    group = mx.take_along_axis(group, order, axis=1)
    logprobs = mx.take_along_axis(mx.stop_gradient(targets.logprobs).astype(mx.float32), order, axis=1)
    # Equal groups are neighbours now; each run of equal groups gets one slot.
    starts_run = mx.concatenate(
        [mx.zeros((n, 1), dtype=mx.int32), (group[:, 1:] != group[:, :-1]).astype(mx.int32)], axis=1
    )
    slot = mx.cumsum(starts_run, axis=1)
    rows = mx.broadcast_to(mx.arange(n)[:, None], (n, k))
    mass = mx.zeros((n, k)).at[rows, slot].add(mx.exp(logprobs))
    ids = mx.full((n, k), groups.outside, dtype=mx.int32).at[rows, slot].minimum(group.astype(mx.int32))
    listed = mx.zeros((n, k), dtype=mx.int32).at[rows, slot].add(1)
    used = (ids != groups.outside) & (mass > 0)
    members = mx.array(np.bincount(groups.teacher, minlength=groups.count).astype(np.int32))
    ids = mx.where(used, ids, groups.outside)
    return ids, mx.where(used, mx.log(mx.maximum(mass, TINY)), LOWEST), used & (members[ids] > listed)


def _group_masses(logits: mx.array, groups: TokenGroups) -> mx.array:
    """The student's mass of every group ``[n, count]``, up to a factor a row."""
    z = mx.maximum(logits.astype(mx.float32), LOWEST)
    e = mx.exp(z - mx.stop_gradient(z.max(axis=1, keepdims=True)))
    index = np.full(logits.shape[1], groups.outside, dtype=np.int32)
    index[: len(groups.student)] = groups.student
    # Adding whole rows of the transpose is four times as fast as adding single numbers.
    return mx.zeros((groups.count, logits.shape[0])).at[mx.array(index)].add(e.T).T


def alm(
    student_span_logprobs: Float[mx.array, " n"],
    teacher_span_logprobs: Float[mx.array, " n"],
    *,
    tau: float = 100.0,
    eps: float = 1e-6,
) -> Float[mx.array, " n"]:
    """Approximate likelihood matching: KL between two Bernoulli distributions, the models' likelihoods of the
    same span of text.

    ``τ [a (log a - log b) + (1-a) (log(1-a) - log(1-b))]`` with ``a = exp(ℓ_t/τ - ε)`` and
    ``b = exp(ℓ_s/τ - ε)``. Zero at equality (the paper's binary cross-entropy keeps the teacher's entropy).
    The factor τ, which the paper leaves to the loss weight, plays the role of T²: the size of the gradient
    does not depend on τ. Source: Minixhofer et al. 2025, https://arxiv.org/abs/2503.20083.

    Args:
        student_span_logprobs: Sums of the student's log-probabilities over each span's tokens
            (:func:`span_sums`), nats.
        teacher_span_logprobs: The same for the teacher's tokens of the same bytes.
        tau: τ, the temperature of the span likelihoods, which keeps those of long spans away from zero.
        eps: ε, which keeps ``log(1 - a)`` finite for a span of probability 1.

    Returns:
        One number a span, not averaged.

    Raises:
        ConfigError: tau or eps is not positive.

    >>> alm(mx.array([-1.0]), mx.array([-1.0])).item()
    0.0
    """
    if tau <= 0 or eps <= 0:
        raise ConfigError(f"tau is {tau} and eps is {eps}", fix="give positive numbers")
    log_a = mx.minimum(mx.stop_gradient(teacher_span_logprobs).astype(mx.float32), 0.0) / tau - eps
    log_b = mx.minimum(student_span_logprobs.astype(mx.float32), 0.0) / tau - eps
    not_a = mx.exp(_log1mexp(log_a))
    return tau * (mx.exp(log_a) * (log_a - log_b) + not_a * (_log1mexp(log_a) - _log1mexp(log_b)))


def _log1mexp(x: mx.array) -> mx.array:
    """``log(1 - exp(x))`` for x < 0; on each side of -log 2 the accurate formula (Mächler 2012)."""
    near = x > -0.6931
    return mx.where(
        near, mx.log(-mx.expm1(mx.where(near, x, -0.5))), mx.log1p(-mx.exp(mx.where(near, -1.0, x)))
    )


def span_sums(logprobs: Float[mx.array, " l"], spans: Int[np.ndarray, "n 2"]) -> Float[mx.array, " n"]:
    """Sums of per-token log-probabilities over spans, differentiable.

    Args:
        logprobs: Of each token given the tokens before it, nats.
        spans: Start and end (exclusive) of each span: two columns of what
            :func:`~mlx_distill.losses.byte_alignment.align_bytes` returns.

    Returns:
        The log-likelihood of each span.

    Raises:
        DataError: A span ends after the last token.

    >>> span_sums(mx.array([-1.0, -2.0, -3.0]), np.array([[0, 1], [1, 3]])).tolist()
    [-1.0, -5.0]
    """
    lengths = spans[:, 1] - spans[:, 0]
    if len(spans) and (spans[:, 1].max() > logprobs.shape[0] or spans.min() < 0 or lengths.min() < 0):
        raise DataError(
            f"a span up to token {spans[:, 1].max()} of {logprobs.shape[0]}",
            fix="give spans of the same tokens as the log-probabilities",
        )
    owner = np.repeat(np.arange(len(spans)), lengths)
    if not len(owner):
        return mx.zeros((len(spans),))
    tokens = np.arange(len(owner)) + np.repeat(
        spans[:, 0] - np.concatenate([[0], np.cumsum(lengths)[:-1]]), lengths
    )
    return mx.zeros((len(spans),)).at[mx.array(owner)].add(logprobs.astype(mx.float32)[mx.array(tokens)])
