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
    allowed: Bool[mx.array, "#b v"] | None = None,
) -> Integer[mx.array, " b"]:
    """The next token of each row.

    Args:
        logits: Of each row.
        temperatures: 0 for the most probable token, else the logits are divided by it and a token is drawn.
        uniforms: For each row a number in [0, 1), which draws the token by inverse transform sampling.
        allowed: The tokens that may be chosen; None for all.

    >>> choose(mx.array([[0.0, 2.0, 1.0]]), [0.0], [0.0], mx.array([[True, False, True]])).tolist()
    [2]
    """
    if allowed is not None:
        logits = mx.where(allowed, logits, -mx.inf)
    best = mx.argmax(logits, axis=-1)
    if not any(temperatures):
        return best
    divisors = mx.array([temperature or 1.0 for temperature in temperatures])[:, None]
    cumulative = mx.cumsum(mx.softmax(logits.astype(mx.float32) / divisors, axis=-1), axis=-1)
    target = mx.array(np.array(uniforms, dtype=np.float32))[:, None] * cumulative[:, -1:]
    drawn = mx.minimum((cumulative <= target).sum(axis=-1), logits.shape[-1] - 1)
    return mx.where(mx.array([temperature > 0 for temperature in temperatures]), drawn, best)


def unpack_masks(masks: Int[np.ndarray, "b w"], width: int) -> Bool[np.ndarray, "b v"]:
    """Bits to booleans: token ``i`` of a row is bit ``i % 32`` of its word ``i // 32``.

    Args:
        masks: 32 tokens a word.
        width: Of the logits.

    >>> unpack_masks(np.array([[5]], dtype=np.int32), 4).tolist()
    [[True, False, True, False]]
    """
    bits = np.unpackbits(masks.astype("<i4", copy=False).view(np.uint8), axis=1, bitorder="little")
    return bits[:, :width].view(np.bool_)
