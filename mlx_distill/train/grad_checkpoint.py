"""Gradient checkpointing: a layer's activations are freed after the forward pass and computed again in the
backward pass.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn


@contextmanager
def checkpointed_layers(model: nn.Module) -> Iterator[None]:
    """Inside, each layer of ``model.layers`` recomputes its activations in the backward pass; values and
    gradients are the same, dropout included.

    The class of each layer *object* is replaced and restored at the end, so other models of the same class
    are not affected. In the second pass dropout draws the random numbers of the first pass again. They are
    read as arrays and never on the host, so that a checkpointed layer can be inside ``mx.compile``.
    """
    layers = getattr(model, "layers", None) or getattr(getattr(model, "model", None), "layers", [])
    classes: list[tuple[Any, Any]] = [(layer, type(layer)) for layer in layers]
    try:
        for layer, cls in classes:
            object.__setattr__(layer, "__class__", _checkpointed_class(cls))
        yield
    finally:
        for layer, cls in classes:
            object.__setattr__(layer, "__class__", cls)


@functools.cache
def _checkpointed_class(cls: Any) -> type:
    """A subclass of a layer's class whose call is an ``mx.checkpoint``."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        key = mx.random.state[0]
        first = True

        def inner(parameters: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal first
            recomputing, first = not first, False
            self.update(parameters)
            if not recomputing:
                return cls.__call__(self, *args, **kwargs)
            with _dropout_from(key, self):
                return cls.__call__(self, *args, **kwargs)

        return mx.checkpoint(inner)(self.trainable_parameters(), *args, **kwargs)

    return type(cls.__name__, (cls,), {"__call__": call, "__module__": cls.__module__})


class _KeyedDropout(nn.Dropout):
    """A dropout that draws from its own sequence of keys, split as MLX splits its random state, which does
    not change.
    """

    def __call__(self, x: mx.array) -> mx.array:
        if self._p_1 == 1 or not self.training:
            return x
        keys = self._keys
        keys[0], key = mx.random.split(keys[0])
        return (mx.random.bernoulli(self._p_1, x.shape, key=key) * x) * (1 / self._p_1)


@contextmanager
def _dropout_from(key: mx.array, layer: nn.Module) -> Iterator[None]:
    """Inside, the dropouts of a layer draw the random numbers that follow the random state ``key``."""
    dropouts: list[Any] = [module for module in layer.modules() if type(module) is nn.Dropout]
    keys = [key]
    try:
        for module in dropouts:
            object.__setattr__(module, "_keys", keys)
            object.__setattr__(module, "__class__", _KeyedDropout)
        yield
    finally:
        for module in dropouts:
            object.__setattr__(module, "__class__", nn.Dropout)
            object.__delattr__(module, "_keys")
