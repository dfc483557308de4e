"""Gradient checkpointing: a layer's activations are dropped after the forward pass and computed again in the
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
    """Inside, each layer of ``model.layers`` recomputes its activations; values and gradients stay the same,
    dropout included.

    Each layer *object* gets a class of its own and gives it back at the end: other models of the same class
    never notice, and a second use does not nest. What a layer drops is dropped again in the second pass: left
    alone, that pass would drop other units. Random numbers are read as arrays and never on the host, so that
    a recomputed layer may stand inside ``mx.compile``.
    """
    layers = getattr(model, "layers", None) or getattr(getattr(model, "model", None), "layers", [])
    plain: list[tuple[Any, Any]] = [(layer, type(layer)) for layer in layers]
    try:
        for layer, cls in plain:
            object.__setattr__(layer, "__class__", _recomputing(cls))
        yield
    finally:
        for layer, cls in plain:
            object.__setattr__(layer, "__class__", cls)


@functools.cache
def _recomputing(cls: Any) -> type:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        key = mx.random.state[0]
        first = True

        def inner(parameters: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal first
            again, first = not first, False
            self.update(parameters)
            if not again:
                return cls.__call__(self, *args, **kwargs)
            with _dropping_as_from(key, self):
                return cls.__call__(self, *args, **kwargs)

        return mx.checkpoint(inner)(self.trainable_parameters(), *args, **kwargs)

    return type(cls.__name__, (cls,), {"__call__": call, "__module__": cls.__module__})


class _DropsAgain(nn.Dropout):
    """A dropout that draws from a chain of keys of its own, split as MLX splits its random state, which stays
    where it is.
    """

    def __call__(self, x: mx.array) -> mx.array:
        if self._p_1 == 1 or not self.training:
            return x
        chain = self._chain
        chain[0], key = mx.random.split(chain[0])
        return (mx.random.bernoulli(self._p_1, x.shape, key=key) * x) * (1 / self._p_1)


@contextmanager
def _dropping_as_from(key: mx.array, layer: nn.Module) -> Iterator[None]:
    """Inside, the dropouts of a layer draw what they drew when the random state was ``key``."""
    found: list[Any] = [module for module in layer.modules() if type(module) is nn.Dropout]
    chain = [key]
    try:
        for module in found:
            object.__setattr__(module, "_chain", chain)
            object.__setattr__(module, "__class__", _DropsAgain)
        yield
    finally:
        for module in found:
            object.__setattr__(module, "__class__", nn.Dropout)
            object.__delattr__(module, "_chain")
