"""Plain modules in the place of packed ones, with the same values."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from jaxtyping import Float


def dequantized(module: Any, expert: int | None = None) -> Float[mx.array, "*e o i"]:
    """The weight of a linear layer or of a stack of experts (or of one of them) in float32, unpacked where it is packed.

    >>> dequantized(nn.Linear(3, 2)).shape
    (2, 3)
    """
    parts = {name: module.get(name) for name in ("weight", "scales", "biases", "global_scale")}
    parts = {name: part if part is None or expert is None else part[expert] for name, part in parts.items()}
    if parts["scales"] is None:
        return parts["weight"].astype(mx.float32)
    return mx.dequantize(
        parts["weight"], parts["scales"], parts["biases"], group_size=module.group_size, bits=module.bits, mode=module.mode,
        global_scale=parts["global_scale"], dtype=mx.float32,
    )  # fmt: skip


def plain_like(module: Any, weight: Float[mx.array, "*e o i"]) -> Any:
    """A frozen plain layer of the same kind (linear, embedding or stack of experts) with that weight and the module's own bias.

    >>> plain_like(nn.Linear(32, 2).to_quantized(32, 4), mx.ones((2, 32)))
    Linear(input_dims=32, output_dims=2, bias=True)
    """
    from mlx_lm.models.switch_layers import SwitchLinear

    if isinstance(module, nn.Embedding | nn.QuantizedEmbedding):
        out: Any = nn.Embedding(1, 1)
    else:
        out = SwitchLinear(1, 1, 1, bias=False) if weight.ndim == 3 else nn.Linear(1, 1, bias=False)
    out.weight = weight
    if "bias" in module:
        out.bias = module.bias
    out.freeze()
    return out
