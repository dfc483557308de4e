"""Gradients that an optimizer needs whole, made a few at a time: GaLore's, where it finds its bases."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_distill.train.randomness import random_key, set_random_key
from mlx_distill.train.updates import Window

# What may be whole at once: an eighth of all, and what nobody minds.
_SHARE, _LEAST_BYTES = 8, 1 << 26


def entered_in_groups(model: nn.Module, optimizer: Any, gradients: Callable[[], Window]) -> dict[str, mx.array]:
    """The gradients of all but the last few matrices whose basis is due, in their new subspaces; empty where few are due.

    A sum over micro-batches or ranks stays whole where a basis is to be found in it. At the first step that is every matrix, in float32:
    28 GB of 7 billion weights. So the window is gone through again for each eighth of them, the others frozen meanwhile, from the same
    random state: the same gradients in less memory, and a first step of up to eight times the length.

    Args:
        model: Its trainable parameters.
        optimizer: A :class:`~mlx_distill.optim.galore.GaLoreAdamW`, whose bases are found.
        gradients: Goes through the window; what is frozen gets no gradient.
    """
    parameters = dict(tree_flatten(model.trainable_parameters()))
    groups = _groups({path: 4 * parameters[path].size for path in optimizer.due_whole(parameters)}, parameters)
    entered, key = {}, random_key()
    for group in groups[:-1]:  # the last goes with all that is not due
        with frozen(model, parameters.keys() - group):
            found = gradients().gradients
        for path in list(found):
            entered[path] = optimizer.enter(path, found.pop(path))
            mx.eval(entered[path])
        set_random_key(key)
    return entered


def _groups(sizes: dict[str, int], parameters: dict[str, mx.array]) -> list[list[str]]:
    """Paths cut where their bytes reach what may be whole at once."""
    limit = max(4 * sum(p.size for p in parameters.values()) // _SHARE, _LEAST_BYTES)
    groups: list[list[str]] = [[]]
    for path, size in sizes.items():
        if groups[-1] and sum(sizes[other] for other in groups[-1]) + size > limit:
            groups.append([])
        groups[-1].append(path)
    return groups


@contextmanager
def frozen(model: nn.Module, paths: Collection[str]) -> Iterator[None]:
    """Inside, some trainable parameters are none."""
    modules: dict[str, Any] = dict(model.named_modules())
    leaves: Sequence[tuple[str, str, str]] = [path.rpartition(".") for path in paths]
    for module, _, leaf in leaves:
        modules[module].freeze(keys=[leaf], recurse=False)
    try:
        yield
    finally:
        for module, _, leaf in leaves:
            modules[module].unfreeze(keys=[leaf], recurse=False)
