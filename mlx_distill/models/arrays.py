"""Raw bits of safetensors to MLX arrays and back: no bit changes."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlx_distill.errors import ModelError
from mlx_distill.models.checkpoint.layout import Planned
from mlx_distill.models.checkpoint.safetensors import FLOATS

MLX_TYPES = {
    "F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16, "U8": mx.uint8, "U16": mx.uint16, "U32": mx.uint32, "U64": mx.uint64,
    "I8": mx.int8, "I16": mx.int16, "I32": mx.int32, "I64": mx.int64,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in MLX_TYPES.items()}


def to_mlx(plan: Planned) -> mx.array:
    """A planned tensor as an array, bit for bit."""
    if plan.dtype not in MLX_TYPES:
        raise ModelError(
            f"{plan.where} has the type {plan.dtype}, which MLX lacks", fix="convert it with a tool that knows this type first"
        )
    return from_raw(plan.read(0, plan.rows), plan.dtype).reshape(plan.shape)


def from_raw(block: np.ndarray, dtype: str) -> mx.array:
    """Raw bits ``[n, c]`` of a safetensors type as an MLX array of that type."""
    return mx.array(block).view(MLX_TYPES[dtype])


def to_raw(value: mx.array) -> np.ndarray:
    """The bits of an array as unsigned integers."""
    name = _NAMES[value.dtype]
    if name in FLOATS:
        value = value.view(mx.uint32 if name == "F32" else mx.uint16)
    return np.array(value)
