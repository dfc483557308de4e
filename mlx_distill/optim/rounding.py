"""Weights of 16 bits that keep what one step adds, though it is less than half of their last bit."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from jaxtyping import Float

# Bits of float32's fraction that a type does not have.
_DROPPED = {mx.bfloat16: 16, mx.float16: 13}


def round_stochastically(x: Float[mx.array, "*s"], dtype: mx.Dtype, key: mx.array) -> mx.array:
    r"""Round float32 numbers to the number of ``dtype`` below or above, so that the mean is right.

    With the neighbours :math:`a \le x < b`, :math:`P(b) = (x - a) / (b - a)`: what is exact stays, and what a rounding to the nearest
    would lose at every step is kept in the mean. A bfloat16 weight of 0.02 has neighbours 1.2e-4 apart, and Adam moves it by the learning
    rate, 2e-5: to the nearest it would never move. Source: Gupta et al., arXiv 1502.02551; for the weights alone, without a copy in
    float32, Zamirai et al., arXiv 2010.06192.

    Args:
        x: float32.
        dtype: ``bfloat16`` or ``float16`` (below 6e-5 to the nearest, where float16 has fewer bits); any other is a plain cast.
        key: Of the random numbers, as ``mx.random`` takes it; the same key rounds alike.

    >>> x, key = mx.full((4096,), 1.0 + 2.0**-9), mx.random.key(0)  # a quarter of the way from 1 to the next bfloat16
    >>> rounded = round_stochastically(x, mx.bfloat16, key)
    >>> sorted(set(rounded.tolist())), abs((rounded > 1).astype(mx.float32).mean().item() - 0.25) < 0.02
    ([1.0, 1.0078125], True)
    """
    dropped = _DROPPED.get(dtype)
    if dropped is None:
        return x.astype(dtype)
    noise = mx.random.randint(0, 1 << dropped, x.shape, mx.uint32, key=key)
    bits = (mx.view(x, mx.uint32) + noise) & (0xFFFFFFFF << dropped & 0xFFFFFFFF)
    return mx.where(mx.isfinite(x), mx.view(bits, mx.float32), x).astype(dtype)


class RoundingOptimizer(optim.Optimizer):
    """The base of our optimizers: arithmetic in float32, and :meth:`rounded` for the weights' own type.

    The random numbers come from ``seed``, the step and the place among the parameters: a run that goes on rounds as one that was never
    stopped, and so do all ranks.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed
        self._place = 0

    def apply_gradients(self, gradients: dict, parameters: dict) -> Any:
        """The updated parameters, a tree like ``gradients``."""
        self._place = 0
        return super().apply_gradients(gradients, parameters)

    def rounded(self, weight: mx.array, dtype: mx.Dtype) -> mx.array:
        """A new weight, float32, in the type ``dtype`` of the old one: once for each parameter, in their order."""
        self._place += 1
        key = mx.stack([mx.array((self.seed * 1_000_003 + self._place) % 2**32, mx.uint32), self.step.astype(mx.uint32)])
        return round_stochastically(weight, dtype, key)
