"""What is kept of the teacher's distribution at every token of an answer: the top k or samples, and the mass
outside of the top k at each temperature.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from jaxtyping import Float, Int

from mlx_distill.losses.numerics import LOWEST, row_logsumexp

_BLOCK = 64  # columns


@dataclass(frozen=True)
class Kept:
    """What is kept of a distribution.

    Args:
        top_k: The most probable tokens.
        temperatures: Those at which the mass outside of them is found too.
        draws: Samples that are kept instead of the most probable tokens; 0: none.
        seed: Of the samples.
    """

    top_k: int
    temperatures: tuple[float, ...] = ()
    draws: int = 0
    seed: int = 0


@dataclass(frozen=True)
class Distributions:
    """The distributions at n tokens, in the arrays of
    :class:`~mlx_distill.distill.teacher_cache.TeacherTargets`.
    """

    logprobs: Float[np.ndarray, " n"]
    topk_ids: Int[np.ndarray, "n k"]
    topk_logprobs: Float[np.ndarray, "n k"]
    tail_logprobs: Float[np.ndarray, " n"]
    tempered_tails: Float[np.ndarray, "n t"]


@dataclass(frozen=True)
class _Largest:
    """The k largest numbers of each row, and all others in blocks of columns, none of which is copied.

    Args:
        ids: ``[n, k]`` the columns of the k, descending.
        values: ``[n, k]``.
        blocks: ``[n, b, 64]`` all columns.
        chosen: ``[n, c]`` the blocks with the largest maxima, in which the k stand.
        others: ``[n, c, 64]`` the columns of these blocks without the k.
    """

    ids: mx.array
    values: mx.array
    blocks: mx.array
    chosen: mx.array
    others: mx.array

    def sums(self, temperature: float = 1.0) -> tuple[mx.array, mx.array]:
        """The logarithms ``[n]`` of the sums of ``exp(z / T)``: over all columns, and over those outside of
        the k, which are summed by themselves: as one minus the k's share, a confident teacher's would be
        rounding.
        """
        by_block = mx.put_along_axis(
            block_logsumexp(self.blocks, temperature),
            self.chosen,
            mx.logsumexp(self.others / temperature, axis=-1),
            axis=-1,
        )
        outside = mx.logsumexp(by_block, axis=-1)
        return mx.logaddexp(outside, mx.logsumexp(self.values / temperature, axis=-1)), outside


def block_logsumexp(blocks: Float[mx.array, "n b c"], temperature: float = 1.0) -> Float[mx.array, "n b"]:
    """``log(sum(exp(z / T)))`` of each block of columns.

    On the CPU by numpy, row by row: mlx's ``exp`` takes five times as long there (mlx 0.32.4, x86), and this
    is the only pass over the vocabulary that has one.
    """
    if mx.default_device() != mx.cpu:
        return mx.logsumexp(blocks if temperature == 1 else blocks / temperature, axis=-1)
    z = np.array(blocks, copy=False)
    out = np.empty(z.shape[:2], dtype=np.float32)
    with np.errstate(divide="ignore"):  # a block of nothing but minus infinity
        for sums, row in zip(out, z, strict=True):
            top = np.maximum(row.max(axis=-1), LOWEST)
            scaled = (row - top[:, None]) * np.float32(1 / temperature)
            np.add(np.log(np.exp(scaled, out=scaled).sum(axis=-1)), top / np.float32(temperature), out=sums)
    return mx.array(out)


def _largest(z: Float[mx.array, "n v"], k: int) -> _Largest:
    n, columns = z.shape
    missing = -columns % _BLOCK
    if missing:
        z = mx.pad(z, ((0, 0), (0, missing)), constant_values=LOWEST)
    blocks = z.reshape(n, -1, _BLOCK)
    count = min(k, blocks.shape[1])
    chosen = mx.argpartition(-blocks.max(axis=-1), kth=count - 1, axis=-1)[:, :count]
    within = mx.take_along_axis(blocks, chosen[..., None], axis=1).reshape(n, count * _BLOCK)
    at = mx.argpartition(-within, kth=k - 1, axis=-1)[:, :k]
    at = mx.take_along_axis(at, mx.argsort(-mx.take_along_axis(within, at, axis=-1), axis=-1), axis=-1)
    others = mx.put_along_axis(within, at, mx.array(LOWEST, dtype=z.dtype), axis=-1)
    ids = mx.take_along_axis(chosen, at // _BLOCK, axis=1) * _BLOCK + at % _BLOCK
    return _Largest(
        ids.astype(mx.int32),
        mx.take_along_axis(within, at, axis=-1),
        blocks,
        chosen,
        others.reshape(n, count, _BLOCK),
    )


def top_k(z: Float[mx.array, "n v"], k: int) -> Int[mx.array, "n k"]:
    """The ids of the k largest numbers of each row, descending.

    They stand in the k blocks of columns with the largest maxima, so only these are sorted.

    >>> top_k(mx.array([[0.5, 3.0, -1.0, 2.0]]), 2).tolist()
    [[1, 3]]
    """
    return _largest(z, min(k, z.shape[-1])).ids


def distributions(
    z: Float[mx.array, "n v"], tokens: Int[np.ndarray, " n"], kept: Kept, uniform: np.ndarray | None = None
) -> Distributions:
    """What is kept of the distributions of some logits.

    Args:
        z: Logits.
        tokens: The token that follows at each position.
        kept: What is kept.
        uniform: ``[n, draws]`` numbers from 0 to 1 that the samples are made from; None for the top k.
    """
    own = mx.take_along_axis(z, mx.array(tokens)[:, None], axis=-1)[:, 0]
    if uniform is not None:
        log_z = row_logsumexp(z)
        ids, logs = sample_shares(np.array(mx.exp(z - log_z[:, None])), uniform)
        tail = np.full(len(tokens), LOWEST, dtype=np.float32)
        return Distributions(np.array(own - log_z), ids, logs, tail, np.zeros((len(tokens), 0), np.float32))
    best = _largest(z, min(kept.top_k, z.shape[-1]))
    log_z, outside = best.sums()
    tails = [outside - log_z]
    for temperature in kept.temperatures:
        total, rest = best.sums(temperature)
        tails.append(rest - total)
    out = mx.maximum(mx.stack(tails, axis=1), LOWEST)
    logs = best.values - log_z[:, None]
    own = own - log_z
    mx.eval(own, best.ids, logs, out)
    return Distributions(
        np.array(own), np.array(best.ids), np.array(logs), np.array(out[:, 0]), np.array(out[:, 1:])
    )


def sample_shares(
    p: Float[np.ndarray, "n v"], uniform: Float[np.ndarray, "n d"]
) -> tuple[Int[np.ndarray, "n d"], Float[np.ndarray, "n d"]]:
    """Samples of each distribution by its inverse, as distinct ids with the logarithms of their shares.

    The shares ``count / d`` have the probabilities as their expectation, so the gradient of
    ``KL(shares || q)`` by q is that of the full forward KL in expectation, whatever is left out by a top k.
    Source: Anshumann et al. 2025, https://arxiv.org/abs/2503.16870 (section 3, proposal distribution p).

    Args:
        p: Probabilities; computed in float64.
        uniform: Numbers from 0 to 1, one a sample.

    Returns:
        Distinct ids, the most frequent first; ``LOWEST`` marks an unused slot.

    >>> ids, logs = sample_shares(np.array([[0.5, 0.0, 0.5]]), np.array([[0.1, 0.9, 0.2, 0.3]]))
    >>> ids[0, :2].tolist(), np.exp(logs[0]).round(2).tolist()
    ([0, 2], [0.75, 0.25, 0.0, 0.0])
    """
    n, draws = uniform.shape
    out_ids = np.zeros((n, draws), dtype=np.int32)
    out_logs = np.full((n, draws), LOWEST, dtype=np.float32)
    for row in range(n):
        steps = np.cumsum(p[row], dtype=np.float64)
        # From the right, and below the end: a sample is never a token of probability 0.
        below = np.minimum(uniform[row] * steps[-1], np.nextafter(steps[-1], 0))
        ids, counts = np.unique(np.searchsorted(steps, below, side="right"), return_counts=True)
        order = np.argsort(-counts, kind="stable")
        out_ids[row] = ids[order[0]]
        out_ids[row, : len(ids)] = ids[order]
        out_logs[row, : len(ids)] = np.log(counts[order] / draws)
    return out_ids, out_logs


def joined(parts: Sequence[Distributions]) -> Distributions:
    """The distributions of several parts, one after the other."""
    names = ("logprobs", "topk_ids", "topk_logprobs", "tail_logprobs", "tempered_tails")
    return Distributions(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


def each(whole: Distributions, lengths: Sequence[int]) -> Iterator[Distributions]:
    """The inverse of :func:`joined`."""
    start = 0
    for length in lengths:
        at = slice(start, start + length)
        yield Distributions(
            whole.logprobs[at],
            whole.topk_ids[at],
            whole.topk_logprobs[at],
            whole.tail_logprobs[at],
            whole.tempered_tails[at],
        )
        start += length
