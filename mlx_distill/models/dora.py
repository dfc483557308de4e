"""DoRA on a stack of experts, which mlx-lm has for plain linear layers only."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from jaxtyping import Float, Integer

from mlx_distill.models.plain import dequantized


class DoRASwitchLinear(nn.Module):
    r"""Weight-decomposed low-rank adaptation (Liu et al., arXiv 2402.09353) of each expert :math:`e` of a stack.

    .. math:: W'_e = m_e \frac{W_e + s B_e A_e}{\|W_e + s B_e A_e\|}

    with the norm of each row, taken as a constant in the backward pass as in the paper (section 4.3). The norm is put together from
    :math:`\|W\|^2`, computed once, and two products of rank r; the experts stay packed.

    Args:
        linear: mlx-lm's stack of experts, plain or packed.
        r: Rank.
        dropout: On the adapter's input.
        scale: s.
    """

    def __init__(self, linear: Any, r: int = 8, dropout: float = 0.0, scale: float = 20.0) -> None:
        super().__init__()
        experts, outputs, inputs = linear.num_experts, linear.output_dims, linear.input_dims
        self.linear, self.dropout, self.scale, self.num_experts = linear, nn.Dropout(p=dropout), scale, experts
        bound = 1 / math.sqrt(inputs)
        self.lora_a = mx.random.uniform(-bound, bound, (experts, r, inputs))
        self.lora_b = mx.zeros((experts, outputs, r))
        # One expert at a time: packed ones are never all unpacked. No parameter, for it follows from the base.
        self._squares = mx.stack([mx.square(dequantized(linear, expert)).sum(axis=-1) for expert in range(experts)])
        self.m = mx.sqrt(self._squares)

    @classmethod
    def from_base(cls, linear: Any, r: int = 8, dropout: float = 0.0, scale: float = 20.0) -> DoRASwitchLinear:
        """As mlx-lm's adapters are made."""
        return cls(linear, r, dropout, scale)

    def norms(self) -> Float[mx.array, "e o"]:
        """The norm of each row of ``W + s B A``."""
        a, b = self.lora_a, self.lora_b
        along = self.linear(a.astype(self._base_type()), mx.arange(self.num_experts)).astype(mx.float32)
        if "bias" in self.linear:
            along = along - self.linear.bias[:, None]
        cross = (along.swapaxes(-1, -2) * b).sum(axis=-1)
        own = ((b @ (a @ a.swapaxes(-1, -2))) * b).sum(axis=-1)
        return mx.sqrt(mx.maximum(self._squares + 2 * self.scale * cross + self.scale**2 * own, 0.0))

    def _base_type(self) -> mx.Dtype:
        scales = self.linear.get("scales")
        kind = self.linear.weight.dtype if scales is None else scales.dtype
        return kind if mx.issubdtype(kind, mx.floating) else self.lora_a.dtype

    def __call__(self, x: Float[mx.array, "*b i"], indices: Integer[mx.array, "*k"], sorted_indices: bool = False) -> mx.array:
        """As ``SwitchLinear``: each ``x`` through the expert that its index names."""

        def through(x: mx.array, weight: mx.array) -> mx.array:
            return mx.gather_mm(x, weight.swapaxes(-1, -2), rhs_indices=indices, sorted_indices=sorted_indices)

        y = self.linear(x, indices, sorted_indices=sorted_indices)
        y = y + (self.scale * through(through(self.dropout(x), self.lora_a), self.lora_b)).astype(y.dtype)
        factor = mx.expand_dims((self.m / mx.stop_gradient(self.norms()))[indices], -2)
        out = factor * y
        if "bias" in self.linear:  # it was added by the base, and is not scaled
            out = out + (1 - factor) * mx.expand_dims(self.linear.bias[indices], -2)
        return out.astype(y.dtype)
