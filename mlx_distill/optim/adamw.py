"""AdamW with its moments in float32, whatever the type of the weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from jaxtyping import Float


def bias_corrections(step: mx.array, betas: tuple[float, float]) -> tuple[mx.array, mx.array]:
    r""":math:`1-\beta_1^t` and :math:`1-\beta_2^t`, as :math:`-\mathrm{expm1}(t \log \beta)`.

    In float32 the plain form loses four digits at the first steps, where :math:`\beta_2^t` is nearly 1.

    Args:
        step: Scalar, the number of this update, from 1.
        betas: Decay rates of the two moments.

    >>> [round(c.item(), 6) for c in bias_corrections(mx.array(1), (0.9, 0.999))]
    [0.1, 0.001]
    """
    t = step.astype(mx.float32)
    first, second = (-mx.expm1(t * math.log(beta)) if beta > 0 else mx.ones_like(t) for beta in betas)
    return first, second


# Bits of float32's fraction that a 16-bit type lacks.
_DROPPED = {mx.bfloat16: 16, mx.float16: 13}


def round_stochastically(x: Float[mx.array, "*s"], dtype: mx.Dtype, key: mx.array) -> mx.array:
    r"""Round float32 numbers to the number of ``dtype`` below or above, so that the mean is right.

    With the neighbours :math:`a \le x < b`, :math:`P(b) = (x - a) / (b - a)`: a number that ``dtype`` has is
    unchanged, and the expected value of any other is the number itself. A bfloat16 weight of 0.02 has
    neighbours 1.2e-4 apart, and Adam changes it by the learning rate, 2e-5: rounded to the nearest it would
    never change. Source: Gupta et al., arXiv 1502.02551; for weights without a float32 copy, Zamirai et al.,
    arXiv 2010.06192.

    Args:
        x: float32.
        dtype: ``bfloat16`` or ``float16`` (numbers below 6e-5 to the nearest, where float16 has fewer bits);
            any other is a plain cast.
        key: A random key of ``mx.random``; the same key rounds the same way.

    >>> x = mx.full((4096,), 1.0 + 2.0**-9)  # a quarter of the way from 1 to the next bfloat16
    >>> key = mx.random.key(0)
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
    """The base class of our optimizers: float32 arithmetic, and :meth:`rounded` to the weights' own type.

    The random numbers depend on ``seed``, the step and the parameter's index alone, so a resumed run rounds
    as an uninterrupted one, and all ranks round alike.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed
        self._index = 0

    def apply_gradients(self, gradients: dict, parameters: dict) -> Any:
        """The updated parameters, a tree like ``gradients``."""
        self._index = 0
        return super().apply_gradients(gradients, parameters)

    def rounded(self, weight: mx.array, dtype: mx.Dtype) -> mx.array:
        """A new float32 weight rounded to ``dtype``, the type of the old one. Called once for each parameter,
        in order.
        """
        self._index += 1
        key = mx.stack(
            [mx.array((self.seed * 1_000_003 + self._index) % 2**32, mx.uint32), self.step.astype(mx.uint32)]
        )
        return round_stochastically(weight, dtype, key)


class AdamW(RoundingOptimizer):
    r"""Adam with decoupled weight decay and bias correction (Loshchilov and Hutter, arXiv 1711.05101), as in
    PyTorch.

    .. math::
        m &= \beta_1 m + (1-\beta_1) g, \quad v = \beta_2 v + (1-\beta_2) g^2 \\
        w &= (1 - \eta\lambda) w - \eta \frac{m / (1-\beta_1^t)}{\sqrt{v / (1-\beta_2^t)} + \epsilon}

    ``mlx.optimizers.AdamW`` keeps the moments in the type of the weights, and in bfloat16 :math:`v` never
    decays; here they and the arithmetic are float32, and a 16-bit weight is rounded stochastically
    (:func:`~mlx_distill.optim.adamw.round_stochastically`), so that small updates are not lost.

    Args:
        learning_rate: :math:`\eta`, a number or a function of the step.
        betas: :math:`(\beta_1, \beta_2)`.
        eps: :math:`\epsilon`.
        weight_decay: :math:`\lambda`.
        seed: Of the stochastic rounding.

    >>> optimizer = AdamW(0.1)
    >>> round(optimizer.apply_gradients({"w": mx.array([2.0])}, {"w": mx.array([1.0])})["w"].item(), 5)
    0.9
    """

    def __init__(
        self,
        learning_rate: float | Callable[[mx.array], mx.array],
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        seed: int = 0,
    ) -> None:
        super().__init__(seed)
        self._maybe_schedule("learning_rate", learning_rate)
        self.betas, self.eps, self.weight_decay = (betas[0], betas[1]), eps, weight_decay

    def init_single(self, parameter: mx.array, state: dict) -> None:
        """Two moments of the parameter's shape, float32."""
        state["m"] = mx.zeros(parameter.shape, mx.float32)
        state["v"] = mx.zeros(parameter.shape, mx.float32)

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict) -> mx.array:
        """The updated parameter, in its own type."""
        (b1, b2), rate = self.betas, self.learning_rate
        g, w = gradient.astype(mx.float32), parameter.astype(mx.float32)
        m = state["m"] = b1 * state["m"] + (1 - b1) * g
        v = state["v"] = b2 * state["v"] + (1 - b2) * mx.square(g)
        c1, c2 = bias_corrections(self.step, self.betas)
        w = w * (1 - rate * self.weight_decay)
        return self.rounded(w - (rate / c1) * m / (mx.sqrt(v) * mx.rsqrt(c2) + self.eps), parameter.dtype)
