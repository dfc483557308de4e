"""The gradient of one optimizer step: a window of micro-batches over all ranks, each term divided once by its whole weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from mlx_distill.records import Batch
from mlx_distill.train.objectives import Objective
from mlx_distill.train.ranks import Ranks


@dataclass(frozen=True)
class Window:
    """What one window gave.

    ``gradients`` a tree like the trainable parameters, float32, summed over the ranks, or None where nothing was trained on;
    ``loss`` and ``terms`` over the window and all ranks; ``weights`` each term's weight; ``losses`` this rank's loss by
    micro-batch (its share of the window's), for the guard against NaN.
    """

    gradients: Any
    loss: float
    terms: Mapping[str, float]
    weights: Mapping[str, float]
    losses: Sequence[float]


def window_gradients(model: nn.Module, window: Sequence[Batch], objective: Objective, ranks: Ranks | None = None) -> Window:
    r"""Loss and gradient over a window.

    .. math:: L = \sum_k c_k \frac{\sum_{b} S_k(b)}{\sum_{b} W_k(b)}

    with the sums over all micro-batches of all ranks. The weights :math:`W_k` come from the masks alone and are added up before
    the first backward pass, so that 8 batches of 1, 1 batch of 8 and two ranks give the same gradient. A micro-batch without weight is
    passed over, and a term without weight never enters the graph: neither can make a NaN.

    Args:
        model: Its trainable parameters are differentiated.
        window: This rank's micro-batches; may be empty while other ranks have some.
        objective: Terms, their weights and coefficients.
        ranks: Those that share the step.
    """
    ranks = ranks or Ranks()
    names = list(objective.coefficients)
    own = [objective.weights(batch) for batch in window]
    totals = ranks.sum([sum(weights.get(name, 0.0) for weights in own) for name in names])
    weights = dict(zip(names, totals, strict=True))
    scales = {name: objective.coefficients[name] / weights[name] for name in names if weights[name] > 0}
    gradients: Any = None
    sums = dict.fromkeys(names, 0.0)
    losses = []
    for batch, batch_weights in zip(window, own, strict=True):
        active = [name for name in scales if batch_weights.get(name, 0.0) > 0 and scales[name] != 0]
        if not active:
            losses.append(0.0)
            continue
        parts, gradients = _backward(model, batch, objective, {name: scales[name] for name in active}, gradients)
        for name in active:
            sums[name] += parts[name]
        losses.append(sum(scales[name] * parts[name] for name in active))
    if not scales:
        return Window(None, 0.0, dict.fromkeys(names, 0.0), weights, losses)
    if gradients is None:
        gradients = tree_map(lambda p: mx.zeros(p.shape, mx.float32), model.trainable_parameters())
    gradients = ranks.sum_tree(gradients)
    summed = dict(zip(names, ranks.sum([sums[name] for name in names]), strict=True))
    terms = {name: summed[name] / weights[name] if weights[name] > 0 else 0.0 for name in names}
    return Window(gradients, sum(objective.coefficients[name] * terms[name] for name in names), terms, weights, losses)


def _backward(
    model: nn.Module, batch: Batch, objective: Objective, scales: Mapping[str, float], total: Any
) -> tuple[dict[str, float], Any]:
    """Add one micro-batch's gradient to ``total``; return the terms' sums and the new total, both evaluated."""
    parameters = model.trainable_parameters()

    # Only the trainable parameters are arguments: every array argument is traced whole, and kept.
    def loss(current: Any) -> tuple[mx.array, dict[str, mx.array]]:
        model.update(current)
        sums = objective.sums(model, batch)
        parts = {name: sums[name].astype(mx.float32) for name in scales}
        return sum((scales[name] * part for name, part in parts.items()), mx.array(0.0)), parts

    try:
        (_, parts), gradients = mx.value_and_grad(loss)(parameters)
    finally:
        model.update(parameters)
    gradients = tree_map(lambda g: g.astype(mx.float32), gradients)
    if total is not None:
        gradients = tree_map(mx.add, total, gradients)
    mx.eval(gradients, parts)
    return {name: part.item() for name, part in parts.items()}, gradients


def evaluate(model: nn.Module, batches: Sequence[Batch], objective: Objective, ranks: Ranks | None = None) -> dict[str, float]:
    """Loss and terms over a fixed set, without dropout; the random state and the model's mode stay as they were.

    Returns:
        ``{"loss": ..., term: ...}``, each term its sum over the whole set divided by its weight.
    """
    ranks = ranks or Ranks()
    names = list(objective.coefficients)
    mode, key = model.training, mx.array(mx.random.state[0])
    mx.eval(key)
    model.eval()
    try:
        own, sums = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
        for batch in batches[ranks.rank :: ranks.size]:
            weights = {name: w for name, w in objective.weights(batch).items() if w > 0}
            if weights:
                parts = objective.sums(model, batch)
                for name in weights:
                    own[name] += weights[name]
                    sums[name] += parts[name].astype(mx.float32).item()
    finally:
        model.train(mode)
        set_random_key(key.tolist())
    totals = ranks.sum([*own.values(), *sums.values()])
    terms = {name: totals[len(names) + i] / totals[i] if totals[i] > 0 else 0.0 for i, name in enumerate(names)}
    return {"loss": sum(objective.coefficients[name] * terms[name] for name in names), **terms}


def random_key() -> list[int]:
    """The two words of MLX's random state on this thread."""
    return [int(word) for word in mx.random.state[0].tolist()]


def set_random_key(key: Sequence[int]) -> None:
    """Put MLX's random state back to what :func:`random_key` gave; the state itself cannot be assigned to."""
    mx.random.seed((int(key[0]) << 32) | int(key[1]))


def global_norm(gradients: Any) -> float:
    """The Euclidean norm of all arrays of a tree together, added in float32 by array and in double over the arrays."""
    squares = [mx.square(g.astype(mx.float32)).sum() for _, g in tree_flatten(gradients)]
    mx.eval(squares)
    return float(sum(s.item() for s in squares) ** 0.5)


def clip(gradients: Any, norm: float, limit: float) -> Any:
    r"""Gradients times :math:`\min(1, \mathrm{limit} / (\mathrm{norm} + 10^{-6}))`, as in PyTorch; a limit of 0 turns it off."""
    if limit <= 0 or norm <= limit:
        return gradients
    scale = limit / (norm + 1e-6)
    return tree_map(lambda g: g * scale, gradients)
