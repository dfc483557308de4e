"""Quantized layers in place of a model's own, one or all, for as long as they are measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
from mlx.utils import tree_unflatten

from mlx_distill.models.grids import quantize
from mlx_distill.models.modules import dequantized_weight, unquantized_like
from mlx_distill.models.quantization import Quantization

# The tensors of a quantized layer: weight, scales, and in the affine modes biases.
Parts = Mapping[str, mx.array]


def quantized_layer(
    module: Any, quantization: Quantization, parts: Parts, *, dequantize: bool = False
) -> Any:
    """A layer of the kind of ``module`` (linear, embedding or stack of experts) with these quantized tensors.

    Args:
        module: An unquantized layer; its bias is kept.
        quantization: Mode, bits and group size of the tensors.
        parts: ``weight``, ``scales``, and in the affine modes ``biases``.
        dequantize: Give an unquantized layer with the dequantized weight, in the type of the module's: the
            same up to rounding, and faster on a CPU.
    """
    q = quantization
    layer = module.to_quantized(q.group_size, q.bits, mode=q.mode)
    for name, value in parts.items():
        # As a model is loaded in the type that it computes in: with other scales the products are less exact.
        is_float = mx.issubdtype(value.dtype, mx.floating)
        layer[name] = value.astype(module.weight.dtype) if is_float else value
    layer.freeze()
    if not dequantize:
        return layer
    return unquantized_like(layer, dequantized_weight(layer).astype(module.weight.dtype))


@contextmanager
def replaced_layers(model: Any, layers: Mapping[str, Any]) -> Iterator[None]:
    """Put layers into a model, by path, and the model's own back at the end.

    >>> import mlx.nn as nn
    >>> model = nn.Sequential(nn.Linear(2, 2, bias=False))
    >>> with replaced_layers(model, {"layers.0": nn.Identity()}):
    ...     model(mx.ones((1, 2))).tolist()
    [[1.0, 1.0]]
    >>> type(model.layers[0]).__name__
    'Linear'
    """
    modules = dict(model.named_modules())
    own = {path: modules[path] for path in layers}
    model.update_modules(tree_unflatten(list(layers.items())))
    try:
        yield
    finally:
        model.update_modules(tree_unflatten(list(own.items())))


def rounded_parts(module: Any, quantization: Quantization, dtype: mx.Dtype) -> dict[str, mx.array]:
    """The tensors of a layer that is quantized without rows, as the writer of folders computes them.

    Args:
        module: An unquantized layer.
        quantization: Mode, bits and group size.
        dtype: In which the weight, or the scales and biases of the affine modes, are stored.
    """
    return quantize(module.weight, quantization, dtype)
