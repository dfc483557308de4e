"""Signed gradient descent within bounds."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.optimizers as optim


class SignDescent(optim.Optimizer):
    r"""Each number moves by the learning rate against the sign of its gradient, and stays within bounds.

    .. math:: v \leftarrow \mathrm{clip}(v - \eta_t\, \mathrm{sign}(g), -b, b)

    It has no state besides the step. With rounding offsets as the parameters, a rate of 1 / steps that falls
    linearly, and b = 1/2, it is the optimizer of SignRound: Cheng et al. 2023, arXiv 2309.05516.

    Args:
        learning_rate: :math:`\eta`, a number or a function of the step.
        bound: b.

    >>> optimizer = SignDescent(0.3, bound=0.5)
    >>> v = {"v": mx.array([0.0, 0.4, 0.1])}
    >>> [round(x, 1) for x in optimizer.apply_gradients({"v": mx.array([2.0, -9.0, 0.0])}, v)["v"].tolist()]
    [-0.3, 0.5, 0.1]
    """

    def __init__(self, learning_rate: float | Callable[[mx.array], mx.array], bound: float = 0.5) -> None:
        super().__init__()
        self._maybe_schedule("learning_rate", learning_rate)
        self.bound = bound

    def init_single(self, parameter: mx.array, state: dict) -> None:
        """No state of its own."""

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict) -> mx.array:
        """The updated parameter, in its own type."""
        moved = parameter - self.learning_rate.astype(parameter.dtype) * mx.sign(gradient)
        return mx.clip(moved, -self.bound, self.bound).astype(parameter.dtype)
