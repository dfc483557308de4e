"""Gradient checkpointing: a layer's activations are dropped after the forward pass and computed again in the backward pass."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_distill.train.randomness import random_key, set_random_key


@contextmanager
def recomputed_layers(model: nn.Module) -> Iterator[None]:
    """Inside, each layer of ``model.layers`` recomputes its activations; values and gradients stay the same, dropout included.

    Each layer *object* gets a class of its own and gives it back at the end: other models of the same class never notice, and a second
    use does not nest. What is random inside a layer is drawn again from the same key: left alone, the second pass would drop other units.
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
        key = random_key() if _draws(self) else None
        first = True

        def inner(parameters: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal first
            later = None if first or key is None else random_key()
            if key is not None:
                set_random_key(key)
            first = False
            self.update(parameters)
            out = cls.__call__(self, *args, **kwargs)
            if later is not None:
                set_random_key(later)
            return out

        return mx.checkpoint(inner)(self.trainable_parameters(), *args, **kwargs)

    return type(cls.__name__, (cls,), {"__call__": call, "__module__": cls.__module__})


def _draws(layer: nn.Module) -> bool:
    # Dropout(p) keeps 1 - p under a private name; without one it is the identity.
    return layer.training and any(isinstance(m, nn.Dropout) and getattr(m, "_p_1", 0.0) < 1 for m in layer.modules())
