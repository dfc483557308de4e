"""AdamW with its moments in float32, whatever the type of the weights."""

from __future__ import annotations

import math
from collections.abc import Callable

import mlx.core as mx

from mlx_distill.optim.rounding import RoundingOptimizer


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


class AdamW(RoundingOptimizer):
    r"""Adam with decoupled weight decay and bias correction (Loshchilov and Hutter, arXiv 1711.05101), as in PyTorch.

    .. math::
        m &= \beta_1 m + (1-\beta_1) g, \quad v = \beta_2 v + (1-\beta_2) g^2 \\
        w &= (1 - \eta\lambda) w - \eta \frac{m / (1-\beta_1^t)}{\sqrt{v / (1-\beta_2^t)} + \epsilon}

    ``mlx.optimizers.AdamW`` keeps the moments in the type of the weights, and in bfloat16 :math:`v` never decays; here they and
    the arithmetic are float32, and a weight of 16 bits is rounded stochastically
    (:func:`~mlx_distill.optim.rounding.round_stochastically`), so that small steps are not lost.

    Args:
        learning_rate: :math:`\eta`, a number or a function of the step.
        betas: :math:`(\beta_1, \beta_2)`.
        eps: :math:`\epsilon`.
        weight_decay: :math:`\lambda`.
        seed: Of the rounding.

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
