"""The next tokens of several rows, from their logits: the most probable ones, or sampled."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
from jaxtyping import Bool, Float, Int, Integer


def choose(
    logits: Float[mx.array, "b v"],
    temperatures: Sequence[float],
    uniforms: Sequence[float],
    top_ps: Sequence[float] | None = None,
) -> Integer[mx.array, " b"]:
    """The next token of each row.

    Args:
        logits: Of each row.
        temperatures: 0 for the most probable token, else the logits are divided by it and a token is drawn.
        uniforms: For each row a number in [0, 1), which draws the token by inverse transform sampling.
        top_ps: Only the most probable tokens are drawn from whose probabilities sum to at least that
            (Holtzman et al. 2020, https://arxiv.org/abs/1904.09751); 1 for all, as where None.

    >>> choose(mx.array([[0.0, 2.0, 1.0]]), [0.0], [0.0]).tolist()
    [1]
    """
    best = mx.argmax(logits, axis=-1)
    if not any(temperatures):
        return best
    divisors = mx.array([temperature or 1.0 for temperature in temperatures])[:, None]
    probabilities = mx.softmax(logits.astype(mx.float32) / divisors, axis=-1)
    if top_ps is not None and min(top_ps) < 1:
        probabilities = _nucleus(probabilities, mx.array(np.array(top_ps, dtype=np.float32))[:, None])
    cumulative = mx.cumsum(probabilities, axis=-1)
    total = cumulative[:, -1:]
    target = mx.array(np.array(uniforms, dtype=np.float32))[:, None] * total
    # A product that is rounded up to the total draws the last token that has a probability.
    drawn = mx.minimum((cumulative <= target).sum(axis=-1), (cumulative < total).sum(axis=-1))
    return mx.where(mx.array([temperature > 0 for temperature in temperatures]), drawn, best)


def _nucleus(probabilities: Float[mx.array, "b v"], top_ps: Float[mx.array, "b 1"]) -> Float[mx.array, "b v"]:
    """The probabilities with 0 for tokens behind those that sum to at least ``top_ps``."""
    order = mx.argsort(-probabilities, axis=-1)
    falling = mx.take_along_axis(probabilities, order, axis=-1)
    before = mx.cumsum(falling, axis=-1) - falling
    kept = mx.where((before < top_ps) | (top_ps >= 1), falling, 0.0)
    return mx.put_along_axis(mx.zeros_like(probabilities), order, kept, axis=-1)


def token_logprobs(
    logits: Float[mx.array, "b v"], tokens: Integer[mx.array, " b"], count: int
) -> tuple[Float[mx.array, " b"], Integer[mx.array, "b k"], Float[mx.array, "b k"]]:
    """The log-probabilities of the rows' tokens, and the ids and log-probabilities of the ``count`` most
    probable ones, in any order.

    Args:
        logits: Of each row; minus infinity where there is no token.
        tokens: One of each row.
        count: How many of the most probable ones, at least 1.
    """
    wide = logits.astype(mx.float32)
    table = wide - mx.logsumexp(wide, axis=-1, keepdims=True)
    count = min(count, table.shape[-1])
    best = mx.argpartition(-table, kth=count - 1, axis=-1)[:, :count]
    own = mx.take_along_axis(table, tokens[:, None].astype(mx.int32), axis=-1)[:, 0]
    return own, best, mx.take_along_axis(table, best, axis=-1)


def allow_tokens(logits: Float[mx.array, "b v"], masks: Int[np.ndarray, "b w"]) -> Float[mx.array, "b v"]:
    """The logits with minus infinity where a mask has no bit: token ``i`` of a row is bit ``i % 32`` of its
    word ``i // 32``.

    Args:
        logits: Of each row.
        masks: 32 tokens a word, int32.

    >>> allow_tokens(mx.array([[0.0, 2.0, 1.0]]), np.array([[5]], dtype=np.int32)).tolist()
    [[0.0, -inf, 1.0]]
    """
    return _allow(logits, mx.array(masks))


@mx.compile
def _allow(logits: mx.array, words: mx.array) -> mx.array:
    # One fused kernel: unpacked on the host, or into an array of its own, it took three times as long.
    bits = (words[:, :, None] >> mx.arange(32, dtype=mx.int32)) & 1
    return mx.where(bits.reshape(words.shape[0], -1)[:, : logits.shape[1]].astype(mx.bool_), logits, -mx.inf)


def column_words(used: Bool[np.ndarray, " u"], width: int) -> Int[np.ndarray, "1 w"]:
    """:func:`padded_columns` in words of 32 bits."""
    bits = np.zeros((1, -(-width // 32) * 32), dtype=bool)
    bits[:, :width] = padded_columns(used, width)
    return np.packbits(bits, axis=1, bitorder="little").view("<i4")


def padded_columns(used: Bool[np.ndarray, " u"], width: int) -> Bool[np.ndarray, "1 v"]:
    """Which columns of the logits are tokens."""
    out = np.zeros((1, width), dtype=bool)
    out[0, : len(used)] = used[:width]
    return out
