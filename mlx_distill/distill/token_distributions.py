"""What is kept of the teacher's distribution at every token of an answer: the top k or samples, the mass of
the tail, the partitions of temperatures.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from jaxtyping import Float, Int

from mlx_distill.losses.numerics import LOWEST

_BLOCK = 64  # columns


@dataclass(frozen=True)
class Kept:
    """What is kept of a distribution.

    Args:
        top_k: The most probable tokens.
        temperatures: T of each partition ``log(sum over v of p_v^(1/T))``.
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
    partitions: Float[np.ndarray, "n t"]


def top_k(z: Float[mx.array, "n v"], k: int) -> Int[mx.array, "n k"]:
    """The ids of the k largest numbers of each row, descending.

    They stand in the k blocks of columns with the largest maxima, so only these are sorted.

    >>> top_k(mx.array([[0.5, 3.0, -1.0, 2.0]]), 2).tolist()
    [[1, 3]]
    """
    n, columns = z.shape
    blocks = -(-columns // _BLOCK)
    if blocks <= k or not n:
        best = mx.argpartition(-z, kth=min(k, columns) - 1, axis=-1)[:, :k]
    else:
        if columns % _BLOCK:
            z = mx.pad(z, ((0, 0), (0, blocks * _BLOCK - columns)), constant_values=-mx.inf)
        z = z.reshape(n, blocks, _BLOCK)
        largest = mx.argpartition(-z.max(axis=-1), kth=k - 1, axis=-1)[:, :k]
        within = mx.take_along_axis(z, largest[..., None], axis=1).reshape(n, k * _BLOCK)
        at = mx.argpartition(-within, kth=k - 1, axis=-1)[:, :k]
        best = mx.take_along_axis(largest, at // _BLOCK, axis=1) * _BLOCK + at % _BLOCK
        z = z.reshape(n, blocks * _BLOCK)
    order = mx.argsort(-mx.take_along_axis(z, best, axis=-1), axis=-1)
    return mx.take_along_axis(best, order, axis=-1).astype(mx.int32)


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
    if uniform is not None:
        log_z = mx.logsumexp(z, axis=-1, keepdims=True)
        ids, logs = sample_shares(np.array(mx.exp(z - log_z)), uniform)
        tail = np.full(len(tokens), LOWEST, dtype=np.float32)
    else:
        best = top_k(z, min(kept.top_k, z.shape[-1]))
        values = mx.take_along_axis(z, best, axis=-1)
        # Without the k, not as 1 - sum: of a confident teacher that would be rounding. The sum of all is made
        # of both, so that the whole vocabulary is read once.
        rest = mx.put_along_axis(z, best, mx.array(-mx.inf, dtype=z.dtype), axis=-1)
        out = mx.logsumexp(rest, axis=-1, keepdims=True)
        log_z = mx.logaddexp(out, mx.logsumexp(values, axis=-1, keepdims=True))
        mx.eval(best, log_z)
        ids, logs = np.array(best), np.array(values - log_z)
        tail = np.maximum(np.array((out - log_z)[:, 0]), LOWEST)
    own = mx.take_along_axis(z, mx.array(tokens)[:, None], axis=-1) - log_z
    # p^(1/T) is exp(z / T) over Z^(1/T).
    partitions = [(mx.logsumexp(z / t, axis=-1) - log_z[:, 0] / t) for t in kept.temperatures]
    stacked = [np.array(one) for one in partitions]
    return Distributions(
        np.array(own[:, 0]),
        ids,
        logs,
        tail,
        np.stack(stacked, axis=1) if stacked else np.zeros((len(tokens), 0), np.float32),
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
    names = ("logprobs", "topk_ids", "topk_logprobs", "tail_logprobs", "partitions")
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
            whole.partitions[at],
        )
        start += length
