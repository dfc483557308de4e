"""Layers whose weights train through the grid of a quantization: the forward pass sees the rounded values,
the backward pass the weights themselves.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from jaxtyping import Float
from mlx.utils import tree_unflatten

from mlx_distill.models.grids import Scales, pack, straight_through
from mlx_distill.models.modules import unquantized_like
from mlx_distill.models.quantization import Quantization


@dataclass(frozen=True)
class GridWeight:
    """A weight that trains through a grid.

    Args:
        weight: ``[*lead, out, in]``: the latent weight, or with ``learns_offset`` the weight that is rounded.
        scales: Fixed.
        quantization: Of the module.
        learns_offset: Whether the weight is fixed, and an offset of at most half a step that is added before
            it is rounded is learned; otherwise the weight itself is.
    """

    weight: Float[mx.array, "*o i"]
    scales: Scales
    quantization: Quantization
    learns_offset: bool = False


@contextmanager
def grid_layers(model: Any, weights: Mapping[str, GridWeight], dtype: mx.Dtype) -> Iterator[dict[str, Any]]:
    """Inside, modules of a model are layers that train through a grid, and all other parameters are frozen.

    Args:
        model: mlx-lm's, or a part of it; the modules are linear layers, embeddings or stacks of experts.
        weights: By the module's path.
        dtype: Of the rounded weights in the forward pass.

    Yields:
        The layers, by path. At the end the model has its own modules again, all of them frozen.
    """
    modules = dict(model.named_modules())
    own = {path: modules[path] for path in weights}
    layers = {path: _grid_layer(own[path], weight, dtype) for path, weight in weights.items()}
    model.freeze()
    model.update_modules(tree_unflatten(list(layers.items())))
    try:
        yield layers
    finally:
        model.update_modules(tree_unflatten(list(own.items())))


def trained_values(layer: Any) -> Float[mx.array, "*o i"]:
    """The latent weight of a layer, or where an offset is learned the values on the grid."""
    grid: GridWeight = layer.grid
    if not grid.learns_offset:
        latent: mx.array = layer["weight"]
        return latent
    return straight_through(layer["weight"], grid.scales, grid.quantization, layer["offset"])


def packed_grid_layer(layer: Any) -> dict[str, mx.array]:
    """The tensors of the quantized module that a trained layer becomes; ``mx.dequantize`` reads exactly the
    values of its forward pass.
    """
    return pack(trained_values(layer), layer.grid.scales, layer.grid.quantization)


def _grid_layer(module: Any, weight: GridWeight, dtype: mx.Dtype) -> Any:
    layer = unquantized_like(module, weight.weight)
    layer.grid, layer.grid_dtype = weight, dtype
    learned = "weight"
    if weight.learns_offset:
        learned, layer.offset = "offset", mx.zeros(weight.weight.shape)
        layer.freeze()
    else:
        layer.weight = weight.weight.astype(mx.float32)
    layer.unfreeze(keys=[learned], recurse=False)
    cls: Any = type(layer)
    object.__setattr__(layer, "__class__", _grid_class(cls))
    return layer


@functools.cache
def _grid_class(cls: Any) -> type:
    """A subclass of a layer's class whose calls see the rounded weight."""

    def rounding(name: str) -> Any:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            with _rounded(self):
                return getattr(cls, name)(self, *args, **kwargs)

        return call

    methods = {name: rounding(name) for name in ("__call__", "as_linear") if hasattr(cls, name)}
    return type(cls.__name__, (cls,), {**methods, "__module__": cls.__module__})


@contextmanager
def _rounded(layer: Any) -> Iterator[None]:
    weight, grid = layer["weight"], layer.grid
    values = straight_through(weight, grid.scales, grid.quantization, layer.get("offset"))
    layer["weight"] = values.astype(layer.grid_dtype)
    try:
        yield
    finally:
        layer["weight"] = weight
