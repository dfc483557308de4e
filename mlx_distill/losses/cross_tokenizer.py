"""Losses between models with different tokenizers: KL over cells of tokens, and likelihoods of spans.

A *cell* is a set of tokens of either vocabulary that begin alike. Where both models start a token at the same
byte, each of their distributions over tokens becomes one over cells by adding up, and two distributions over
the same cells have a KL divergence.
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

__all__ = ["TokenGroups", "alm", "token_group_kl", "build_token_groups", "group_topk", "span_sums"]


def token_group_kl(
    student_logits: Float[mx.array, "n v"], targets: TopK, cells: TokenGroups, *, temperature: float = 1.0
) -> Float[mx.array, " n"]:
    """Forward KL over cells at positions where both models start a token at the same byte.

    ``KL(Σ_{t in cell} p_t ‖ Σ_{s in cell} q_s)`` over the cells that the teacher's top k reaches, with
    everything else of either side in one bucket; equal to the full KL when the tokenizers are the same and k
    is the whole vocabulary. A top k does not say how much of the teacher's remaining mass belongs to cells
    that it reaches (those with unlisted members). It is placed where it makes the divergence smallest: such
    cells in which the student has no more than the remaining mass explains are counted with the bucket. So at
    T = 1 the loss is a lower bound of the KL over all cells, and zero at equality at any k. T softens the
    distribution within the reached cells, as in :func:`~mlx_distill.losses.topk.sparse_forward_kl` (merging
    comes first: a temperature does not commute with adding up). How a cell's mass is spread *within* the cell
    is not trained: keep a cross-entropy term beside it.

    Args:
        student_logits: At the common starts; computed in float32. Columns beyond the tokenizer count as
            "outside".
        targets: The *teacher's* token ids ``[n, k]`` and their log-probabilities in nats over the teacher's
            whole vocabulary.
        cells: From :func:`build_token_groups`.
        temperature: T.

    Returns:
        Nats a position, not averaged.

    Raises:
        ModelError: The logits are narrower than the student's tokenizer.
        DataError: The targets belong to other positions.
        ConfigError: The temperature is not positive.

    >>> cells = TokenGroups(student=np.array([0, 1, 1]), teacher=np.array([0, 1]), cells=3, shared=2)
    >>> logits = mx.log(mx.array([[0.5, 0.3, 0.2]]))
    >>> round(abs(token_group_kl(logits, TopK(mx.array([[0, 1]]), mx.log(mx.array([[0.5, 0.5]]))), cells).item()), 5)
    0.0
    """
    check_temperature(temperature)
    n, width = student_logits.shape
    if targets.ids.shape != targets.logprobs.shape or targets.ids.shape[:-1] != (n,):
        raise DataError(
            f"targets of shape {targets.ids.shape} for {n} positions",
            fix="give the teacher's top k at the same common starts",
        )
    if width < len(cells.student):
        raise ModelError(
            f"student logits of {width} columns for a tokenizer of {len(cells.student)}",
            fix="make the cell map with the student's own tokenizer",
        )
    ids, logprobs, growing = group_topk(targets, cells)
    mass = _cell_masses(student_logits, cells)
    hit = mx.where(logprobs > LOWEST / 2, mx.take_along_axis(mass, ids, axis=1), 0.0)
    # Slots that hold no cell point at "outside", which no target reaches, so it must stay in the rest.
    covered = mx.put_along_axis(mx.zeros(mass.shape), ids, mx.array(1.0), axis=1)
    covered[:, cells.outside] = 0.0
    rest = row_sum(mx.where(covered > 0, 0.0, mass))
    folded = _folded(mx.exp(logprobs), mx.stop_gradient(hit), mx.stop_gradient(rest), growing)
    rest = rest + mx.where(folded, hit, 0.0).sum(axis=1)
    logprobs = mx.where(folded, LOWEST, logprobs)
    return bucket_kl(
        mx.log(mx.maximum(hit, TINY)), mx.log(mx.maximum(rest, TINY)), logprobs, temperature=temperature
    )


def _folded(p: mx.array, q: mx.array, rest: mx.array, growing: mx.array) -> mx.array:
    """The cells that the teacher's unlisted mass fills up, had it been placed to make the divergence
    smallest.

    That is water-filling: the unlisted mass raises the lowest ratios p/q to one level, beginning with the
    bucket's (whose p is 0). The level is that of the cells below it and the bucket taken together, so in
    order of p/q each cell is compared with those before it.
    """
    total = rest + q.sum(axis=1)
    unlisted = mx.maximum(1 - p.sum(axis=1, keepdims=True), 0.0)
    ratio = mx.where(growing, p / mx.maximum(q / total[:, None], TINY), -LOWEST)
    order = mx.argsort(ratio, axis=1)
    sorted_ratio, some = mx.take_along_axis(ratio, order, axis=1), mx.take_along_axis(growing, order, axis=1)
    p_before, q_before = (
        mx.cumsum(mx.where(some, mx.take_along_axis(x, order, axis=1), 0.0), axis=1, inclusive=False)
        for x in (p, q / total[:, None])
    )
    level = (unlisted + p_before) / mx.maximum(rest[:, None] / total[:, None] + q_before, TINY)
    below = some & (sorted_ratio < level) & (unlisted > RESOLUTION)
    return mx.put_along_axis(mx.zeros(p.shape, dtype=mx.bool_), order, below, axis=1)


def group_topk(
    targets: TopK, cells: TokenGroups
) -> tuple[Int[mx.array, "n k"], Float[mx.array, "n k"], Bool[mx.array, "n k"]]:
    """The teacher's top k as distinct cells, their log-masses, and whether the cell has teacher tokens that
    are not listed.

    Unused slots hold ``outside``, ``LOWEST`` and False.

    Args:
        targets: Teacher token ids ``[n, k]`` and log-probabilities.
        cells: From :func:`build_token_groups`.
    """
    n, k = targets.ids.shape
    width = len(cells.teacher)
    known = targets.ids < width
    cell = mx.where(known, mx.array(cells.teacher)[mx.where(known, targets.ids, 0)], cells.outside)
    order = mx.argsort(cell, axis=1)
    cell = mx.take_along_axis(cell, order, axis=1)
    logprobs = mx.take_along_axis(mx.stop_gradient(targets.logprobs).astype(mx.float32), order, axis=1)
    fresh = mx.concatenate(
        [mx.zeros((n, 1), dtype=mx.int32), (cell[:, 1:] != cell[:, :-1]).astype(mx.int32)], axis=1
    )
    slot = mx.cumsum(fresh, axis=1)
    rows = mx.broadcast_to(mx.arange(n)[:, None], (n, k))
    mass = mx.zeros((n, k)).at[rows, slot].add(mx.exp(logprobs))
    ids = mx.full((n, k), cells.outside, dtype=mx.int32).at[rows, slot].minimum(cell.astype(mx.int32))
    listed = mx.zeros((n, k), dtype=mx.int32).at[rows, slot].add(1)
    used = (ids != cells.outside) & (mass > 0)
    members = mx.array(np.bincount(cells.teacher, minlength=cells.cells).astype(np.int32))
    ids = mx.where(used, ids, cells.outside)
    return ids, mx.where(used, mx.log(mx.maximum(mass, TINY)), LOWEST), used & (members[ids] > listed)


def _cell_masses(logits: mx.array, cells: TokenGroups) -> mx.array:
    z = mx.maximum(logits.astype(mx.float32), LOWEST)
    e = mx.exp(z - mx.stop_gradient(z.max(axis=1, keepdims=True)))
    index = np.full(logits.shape[1], cells.outside, dtype=np.int32)
    index[: len(cells.student)] = cells.student
    # Whole rows of the transpose are added, four times as fast as single numbers.
    return mx.zeros((cells.cells, logits.shape[0])).at[mx.array(index)].add(e.T).T


def alm(
    student_span_logprobs: Float[mx.array, " n"],
    teacher_span_logprobs: Float[mx.array, " n"],
    *,
    tau: float = 100.0,
    eps: float = 1e-6,
) -> Float[mx.array, " n"]:
    """Approximate likelihood matching: the two models' likelihoods of the same span of text, compared as
    coins.

    ``τ [a (log a - log b) + (1-a) (log(1-a) - log(1-b))]`` with ``a = exp(ℓ_t/τ - ε)`` and
    ``b = exp(ℓ_s/τ - ε)``: a KL of two outcomes, so zero at equality (the original leaves the teacher's
    entropy in). The factor τ in front, which the original leaves to the weight, is the T² of this loss: it
    keeps the gradient's size when τ changes. Source: Minixhofer et al. 2025,
    https://arxiv.org/abs/2503.20083.

    Args:
        student_span_logprobs: Sums of the student's log-probabilities over each span's tokens
            (:func:`span_sums`), nats.
        teacher_span_logprobs: The same for the teacher's tokens of the same bytes.
        tau: τ, which spreads likelihoods of long spans away from zero.
        eps: ε, which keeps a certain span off log(0).

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
    no = mx.exp(_log1mexp(log_a))
    return tau * (mx.exp(log_a) * (log_a - log_b) + no * (_log1mexp(log_a) - _log1mexp(log_b)))


def _log1mexp(x: mx.array) -> mx.array:
    """``log(1 - exp(x))`` for x < 0, by the form that is exact on either side of -log 2 (Mächler 2012)."""
    near = x > -0.6931
    return mx.where(
        near, mx.log(-mx.expm1(mx.where(near, x, -0.5))), mx.log1p(-mx.exp(mx.where(near, -1.0, x)))
    )


def span_sums(logprobs: Float[mx.array, " l"], spans: Int[np.ndarray, "n 2"]) -> Float[mx.array, " n"]:
    """Sums of per-token log-probabilities over spans, differentiable.

    Args:
        logprobs: Of each token given what stands before it, nats.
        spans: From and to (exclusive) of each span: two columns of what
            :func:`~mlx_distill.losses.byte_alignment.align_bytes` returns.

    Returns:
        The log-likelihood of each span.

    Raises:
        DataError: A span that reaches past the last token.

    >>> span_sums(mx.array([-1.0, -2.0, -3.0]), np.array([[0, 1], [1, 3]])).tolist()
    [-1.0, -5.0]
    """
    lengths = spans[:, 1] - spans[:, 0]
    if len(spans) and (spans[:, 1].max() > logprobs.shape[0] or spans.min() < 0 or lengths.min() < 0):
        raise DataError(
            f"a span up to token {spans[:, 1].max()} of {logprobs.shape[0]}",
            fix="give the spans of these very tokens",
        )
    owner = np.repeat(np.arange(len(spans)), lengths)
    if not len(owner):
        return mx.zeros((len(spans),))
    tokens = np.arange(len(owner)) + np.repeat(
        spans[:, 0] - np.concatenate([[0], np.cumsum(lengths)[:-1]]), lengths
    )
    return mx.zeros((len(spans),)).at[mx.array(owner)].add(logprobs.astype(mx.float32)[mx.array(tokens)])
