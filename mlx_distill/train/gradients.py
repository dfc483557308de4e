"""Loss and gradient of one optimizer step: a window of micro-batches over all ranks, each term divided once
by its weight in the whole window.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_distill.optim.base import Gradient, ProjectedGradient, array_of
from mlx_distill.records import Batch
from mlx_distill.train.distributed import Ranks
from mlx_distill.train.objective import Objective, is_small
from mlx_distill.train.profiling import Stopwatch
from mlx_distill.train.trunk_head import FlatGradients, Trunk, scaled, two_stage_grad

# Gradients are evaluated in groups of about this many bytes, so that not all of them are in memory at once.
GROUP_BYTES = 1 << 23
_LAYER = re.compile(r"(.*\.\d+\.)?")  # a path up to the number of its layer

Project = Callable[[str, mx.array], Gradient]


@dataclass(frozen=True)
class WindowGradients:
    """Loss and gradient of a window.

    ``gradients`` by path, float32, summed over the ranks; empty where no token was trained on, and emptied by
    the update. ``loss`` and ``terms`` over the window and all ranks; ``weights`` each term's weight;
    ``losses`` each of this rank's micro-batches' share of the loss.
    """

    gradients: dict[str, Gradient]
    loss: float
    terms: Mapping[str, float]
    weights: Mapping[str, float]
    losses: Sequence[float]


def window_gradients(
    model: nn.Module,
    window: Sequence[Batch],
    objective: Objective,
    ranks: Ranks | None = None,
    project: Project | None = None,
    watch: Stopwatch | None = None,
    trunk: Trunk | None = None,
    group_bytes: int = GROUP_BYTES,
) -> WindowGradients:
    r"""Loss and gradient over a window.

    .. math:: L = \sum_k c_k \frac{\sum_{b} S_k(b)}{\sum_{b} W_k(b)}

    with the sums over all micro-batches of all ranks. The weights :math:`W_k` come from the masks alone and
    are added up before the first backward pass, so that 8 batches of 1, 1 batch of 8 and two ranks give the
    same gradient. A micro-batch without weight is skipped, and a term without weight is not in the graph, so
    neither can produce a NaN.

    Args:
        model: Its trainable parameters are differentiated.
        window: This rank's micro-batches; may be empty while other ranks have some.
        objective: Terms, their weights and coefficients.
        ranks: The ranks that share the step; by default one.
        project: A linear map of each gradient, by its path, to something smaller (GaLore's projection),
            applied before the gradients are added up. Gradients are evaluated from the last layer to the
            first and dropped, so that only the projected ones are in memory together.
        watch: Gets the time of each part.
        trunk: As for :func:`differentiate`.
        group_bytes: Gradients of about this size are evaluated together.
    """
    ranks, watch = ranks or Ranks(), watch or Stopwatch()
    names = list(objective.coefficients)
    batch_weights = [objective.weights(batch) for batch in window]
    totals = ranks.sum([sum(weights.get(name, 0.0) for weights in batch_weights) for name in names])
    weights = dict(zip(names, totals, strict=True))
    scales = {name: objective.coefficients[name] / weights[name] for name in names if weights[name] > 0}
    total: dict[str, Gradient] = {}
    sums = dict.fromkeys(names, 0.0)
    losses = []
    for batch, own in zip(window, batch_weights, strict=True):
        active = {name: s for name, s in scales.items() if own.get(name, 0.0) > 0 and s != 0}
        if not active:
            losses.append(0.0)
            continue
        with watch.part("forward"):
            flat, term_sums = differentiate(model, batch, objective, active, trunk)
        with watch.part("backward"):
            _accumulate(flat, total, project, watch, group_bytes)
        values = {name: array.item() for name, array in term_sums.items()}
        for name in active:
            sums[name] += values[name]
        losses.append(sum(scale * values[name] for name, scale in active.items()))
    if not scales:
        return WindowGradients({}, 0.0, dict.fromkeys(names, 0.0), weights, losses)
    if not total:
        total = _zero_gradients(model, project)
    with watch.part("ranks"):
        total = _sum_over_ranks(total, ranks)
        summed = dict(zip(names, ranks.sum([sums[name] for name in names]), strict=True))
    loss, terms = loss_of_sums(objective, summed, weights)
    return WindowGradients(total, loss, terms, weights, losses)


def loss_of_sums(
    objective: Objective, sums: Mapping[str, float], weights: Mapping[str, float]
) -> tuple[float, dict[str, float]]:
    """The loss and its terms: each term's sum divided by its weight, 0 for a term without weight."""
    terms = {
        name: sums[name] / weights[name] if weights.get(name, 0.0) > 0 else 0.0
        for name in objective.coefficients
    }
    return sum(objective.coefficients[name] * term for name, term in terms.items()), terms


def differentiate(
    model: nn.Module,
    batch: Batch,
    objective: Objective,
    scales: Mapping[str, float],
    trunk: Trunk | None = None,
) -> tuple[FlatGradients, dict[str, mx.array]]:
    """One micro-batch's gradient by path, not evaluated yet, and the terms' sums, evaluated.

    Args:
        model: Its trainable parameters are differentiated, and keep their values.
        batch: The micro-batch.
        objective: Terms of the loss.
        scales: The factor of each term that counts.
        trunk: A compiled one, for an objective with a ``head_split``. Without it, trunk and head are
            differentiated apart only where the logits are too large to be made at once.
    """
    split = objective.head_split
    if split is not None and (
        trunk is not None or not is_small(model, split.positions(batch).size, split.dense_limit)
    ):
        return two_stage_grad(model, batch, split, scales, trunk)
    parameters = model.trainable_parameters()

    # Only the trainable parameters are arguments: every array argument is traced whole, and kept.
    def loss(current: Any) -> tuple[mx.array, dict[str, mx.array]]:
        model.update(current)
        return scaled(objective.sums(model, batch), scales)

    try:
        (_, term_sums), gradients = mx.value_and_grad(loss)(parameters)
    finally:
        model.update(parameters)
    mx.eval(term_sums)
    return tree_flatten(gradients), term_sums


def in_order(flat: FlatGradients) -> FlatGradients:
    """Gradients in the order of their layers, the vectors of each layer first: read from the end, that is the
    order in which the backward pass completes them.

    The gradient of a layer's first norm is complete only after all of the layer's backward pass. Evaluated
    before the matrices' gradients, it keeps the arrays alive that these are computed from (24 layers of width
    768, 512 tokens, GaLore: 746 MB above the weights, and 727 in this order).

    >>> flat = [("layers.0.a", mx.zeros((2, 2))), ("layers.0.norm", mx.zeros((2,)))]
    >>> [path for path, _ in in_order(flat)]
    ['layers.0.norm', 'layers.0.a']
    """
    layers = groupby(flat, key=lambda item: _LAYER.match(item[0])[0])  # type: ignore[index]
    return [item for _, layer in layers for item in sorted(layer, key=lambda item: item[1].ndim > 1)]


def _accumulate(
    flat: FlatGradients,
    total: dict[str, Gradient],
    project: Project | None,
    watch: Stopwatch,
    group_bytes: int,
) -> None:
    """Add gradients to ``total``, emptying ``flat`` from its end and evaluating group by group."""
    flat[:] = in_order(flat)
    group, size = [], 0
    while flat:
        path, array = flat.pop()
        size += array.nbytes
        gradient: Gradient = array.astype(mx.float32)
        del array
        if project is not None:
            watch.settle(gradient)
            with watch.part("project"):
                gradient = project(path, array_of(gradient))
                watch.settle(array_of(gradient))
        total[path] = total[path] + gradient if path in total else gradient
        del gradient
        group.append(array_of(total[path]))
        if size >= group_bytes or not flat:
            mx.eval(group)
            group, size = [], 0


def _zero_gradients(model: nn.Module, project: Project | None) -> dict[str, Gradient]:
    """What a rank without trained tokens adds: zeros in the shapes of the other ranks' gradients."""
    parameters = tree_flatten(model.trainable_parameters())
    zeros = {path: mx.zeros(p.shape, mx.float32) for path, p in parameters}
    return {path: project(path, zero) if project else zero for path, zero in zeros.items()}


def _sum_over_ranks(gradients: dict[str, Gradient], ranks: Ranks) -> dict[str, Gradient]:
    """Gradients added over the ranks, in the same order on all of them; the dictionary is emptied."""
    projected = {path for path, gradient in gradients.items() if isinstance(gradient, ProjectedGradient)}
    arrays = {path: array_of(gradients.pop(path)) for path in list(gradients)}
    ranks.sum_arrays(arrays)
    return {path: ProjectedGradient(a) if path in projected else a for path, a in arrays.items()}


def global_norm(gradients: Any) -> float:
    """The Euclidean norm of all gradients of a tree together: squares are added in float32 within an array
    and in double precision over the arrays.

    >>> global_norm({"a": mx.array([3.0]), "b": mx.array([[4.0]])})
    5.0
    """
    return drain_norm([gradient for _, gradient in tree_flatten(gradients)])


def drain_norm(gradients: list[Gradient], group_bytes: int = GROUP_BYTES) -> float:
    """As :func:`global_norm`, of a list that is emptied from its end, so that gradients that are not
    evaluated yet are never in memory together.

    >>> drain_norm([mx.array([3.0]), mx.array([4.0])])
    5.0
    """
    squares: list[float] = []
    while gradients:
        group, size = [], 0
        while gradients and size < group_bytes:
            array = array_of(gradients.pop())
            size += array.nbytes
            group.append(mx.square(array.astype(mx.float32)).sum())
            del array
        mx.eval(group)
        squares += [square.item() for square in group]
    return math.sqrt(math.fsum(squares)) if all(map(math.isfinite, squares)) else math.nan


def clip_scale(norm: float, limit: float) -> float:
    r""":math:`\min(1, \mathrm{limit} / (\mathrm{norm} + 10^{-6}))`, as in PyTorch; a limit of 0 turns
    clipping off.

    >>> clip_scale(5.0, 0.0), clip_scale(0.5, 1.0), round(clip_scale(5.0, 1.0), 4)
    (1.0, 1.0, 0.2)
    """
    return 1.0 if limit <= 0 or norm <= limit else limit / (norm + 1e-6)
