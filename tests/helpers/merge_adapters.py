"""Merging adapters in memory: the oracle of the streamed merge of quantize and export."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx.utils import tree_unflatten

from mlx_distill.models.forward import compute_dtype
from mlx_distill.models.modules import dequantized_weight, unquantized_like


@dataclass(frozen=True)
class MergedModule:
    """A merged module.

    ``update`` is the Frobenius norm of the update, ``error`` that of the rounding error divided by it.
    """

    path: str
    was_quantized: bool
    update: float
    error: float


def has_adapter(model: Any) -> bool:
    """Whether a module of the model has an adapter."""
    return any("lora_a" in module for _, module in model.named_modules())


def merge(model: Any) -> list[MergedModule]:
    """Add every adapter to its weights, in place.

    The sum is computed in float32 and rounded once, to the type of the weights. Quantized weights become
    unquantized ones, in the type in which the model computes.
    """
    reports, modules = [], []
    for path, layer in sorted(model.named_modules()):
        if "lora_a" in layer:
            module, report = _merged(path, layer, compute_dtype(model))
            reports.append(report)
            modules.append((path, module))
    model.update_modules(tree_unflatten(modules))
    return reports


def _low_rank_product(layer: Any) -> mx.array:
    """``scale * B A`` in float32, ``[out, in]`` or ``[experts, out, in]``."""
    a, b = layer.lora_a.astype(mx.float32), layer.lora_b.astype(mx.float32)
    return layer.scale * (b @ a) if a.ndim == 3 else layer.scale * (a @ b).T


def _merged(path: str, layer: Any, model_dtype: mx.Dtype) -> tuple[Any, MergedModule]:
    base = layer.linear
    quantized = hasattr(base, "bits")
    weight = dequantized_weight(base) if quantized else base.weight
    exact = weight.astype(mx.float32) + _low_rank_product(layer)
    if "m" in layer:  # DoRA: the norms of the rows are parameters
        exact = exact * (layer.m / mx.sqrt(mx.sum(mx.square(exact), axis=-1)))[..., None]
    rounded = exact.astype(model_dtype if quantized else weight.dtype)
    update = mx.sqrt(mx.sum(mx.square(exact - weight.astype(mx.float32)))).item()
    error = mx.sqrt(mx.sum(mx.square(exact - rounded.astype(mx.float32)))).item() / max(update, 1e-30)
    return unquantized_like(base, rounded), MergedModule(path, quantized, float(update), float(error))
