"""The gradient of one optimizer step: a window of micro-batches over all ranks, each term divided once by its
whole weight.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map_with_path

from mlx_distill.errors import ConfigError
from mlx_distill.recipe import TrainConfig
from mlx_distill.records import Batch
from mlx_distill.runtime import random_key, set_random_key
from mlx_distill.train.distributed import Ranks
from mlx_distill.train.objective import Objective, is_small
from mlx_distill.train.profiling import Stopwatch
from mlx_distill.train.trunk_head import Flat, Trunk, scaled, two_stage_grad


@dataclass(frozen=True)
class Window:
    """What one window gave.

    ``gradients`` by path, float32, summed over the ranks, empty where nothing was trained on (whoever applies
    them empties it); ``loss`` and ``terms`` over the window and all ranks; ``weights`` each term's weight;
    ``losses`` this rank's loss by micro-batch (its share of the window's), for the guard against NaN.
    """

    gradients: dict[str, mx.array]
    loss: float
    terms: Mapping[str, float]
    weights: Mapping[str, float]
    losses: Sequence[float]


# Gradients are evaluated in groups of about so many bytes, so that they need not all live at once.
_GROUP_BYTES = 1 << 23
_LAYER = re.compile(r"(.*\.\d+\.)?")  # of a path, up to the number of its layer

Compress = Callable[[str, mx.array], mx.array]


def window_gradients(
    model: nn.Module,
    window: Sequence[Batch],
    objective: Objective,
    ranks: Ranks | None = None,
    compress: Compress | None = None,
    watch: Stopwatch | None = None,
    trunk: Trunk | None = None,
) -> Window:
    r"""Loss and gradient over a window.

    .. math:: L = \sum_k c_k \frac{\sum_{b} S_k(b)}{\sum_{b} W_k(b)}

    with the sums over all micro-batches of all ranks. The weights :math:`W_k` come from the masks alone and
    are added up before the first backward pass, so that 8 batches of 1, 1 batch of 8 and two ranks give the
    same gradient. A micro-batch without weight is passed over, and a term without weight never enters the
    graph: neither can make a NaN.

    Args:
        model: Its trainable parameters are differentiated.
        window: This rank's micro-batches; may be empty while other ranks have some.
        objective: Terms, their weights and coefficients.
        ranks: Those that share the step.
        compress: A linear map of each gradient, by its path, to something smaller (GaLore's projection),
            applied before adding. Gradients are evaluated from the last layer to the first and dropped, so
            that only their images are alive together.
        watch: Where the time is added.
        trunk: As for :func:`differentiate`.
    """
    ranks, watch = ranks or Ranks(), watch or Stopwatch()
    names = list(objective.coefficients)
    own = [objective.weights(batch) for batch in window]
    totals = ranks.sum([sum(weights.get(name, 0.0) for weights in own) for name in names])
    weights = dict(zip(names, totals, strict=True))
    scales = {name: objective.coefficients[name] / weights[name] for name in names if weights[name] > 0}
    total: dict[str, mx.array] = {}
    sums = dict.fromkeys(names, 0.0)
    losses = []
    for batch, batch_weights in zip(window, own, strict=True):
        active = [name for name in scales if batch_weights.get(name, 0.0) > 0 and scales[name] != 0]
        if not active:
            losses.append(0.0)
            continue
        with watch.part("forward"):
            flat, found = differentiate(
                model, batch, objective, {name: scales[name] for name in active}, trunk
            )
        with watch.part("backward"):
            _add(flat, total, compress, watch)
        parts = {name: part.item() for name, part in found.items()}
        for name in active:
            sums[name] += parts[name]
        losses.append(sum(scales[name] * parts[name] for name in active))
    if not scales:
        return Window({}, 0.0, dict.fromkeys(names, 0.0), weights, losses)
    if not total:
        zeros = {
            path: mx.zeros(p.shape, mx.float32) for path, p in tree_flatten(model.trainable_parameters())
        }
        total = {path: compress(path, zero) if compress else zero for path, zero in zeros.items()}
    with watch.part("ranks"):
        ranks.sum_arrays(total)
        summed = dict(zip(names, ranks.sum([sums[name] for name in names]), strict=True))
    terms = {name: summed[name] / weights[name] if weights[name] > 0 else 0.0 for name in names}
    return Window(
        total, sum(objective.coefficients[name] * terms[name] for name in names), terms, weights, losses
    )


def differentiate(
    model: nn.Module,
    batch: Batch,
    objective: Objective,
    scales: Mapping[str, float],
    trunk: Trunk | None = None,
) -> tuple[Flat, dict[str, mx.array]]:
    """One micro-batch's gradient by path, not evaluated yet, and the terms' sums, evaluated.

    Args:
        model: Its trainable parameters are differentiated, and stay as they are.
        batch: The micro-batch.
        objective: Terms of the loss.
        scales: The factor on each term that counts.
        trunk: A compiled one, where the objective can be cut; by default all is in one piece where the logits
            are small.
    """
    cut = objective.head_split
    if cut is not None and (
        trunk is not None or not is_small(model, cut.positions(batch).size, cut.dense_limit)
    ):
        return two_stage_grad(model, batch, cut, scales, trunk)
    parameters = model.trainable_parameters()

    # Only the trainable parameters are arguments: every array argument is traced whole, and kept.
    def loss(current: Any) -> tuple[mx.array, dict[str, mx.array]]:
        model.update(current)
        return scaled(objective.sums(model, batch), scales)

    try:
        (_, parts), gradients = mx.value_and_grad(loss)(parameters)
    finally:
        model.update(parameters)
    mx.eval(parts)
    return tree_flatten(gradients), parts


def in_order(flat: Flat) -> Flat:
    """Gradients in an order in which they are known from the end on: the last layer's first, and of each
    layer the vectors last.

    The gradient of a layer's first norm is known only when all of the layer has been gone through: asked for
    before the matrices', it keeps alive what theirs are made of (24 layers of width 768, 512 tokens, GaLore:
    746 MB above the weights, and 727 in this order).

    >>> [path for path, _ in in_order([(f"layers.0.{name}", mx.zeros(shape)) for name, shape in (("a", (2, 2)), ("norm", (2,)))])]
    ['layers.0.norm', 'layers.0.a']
    """
    layers = groupby(flat, key=lambda item: _LAYER.match(item[0])[0])  # type: ignore[index]
    return [item for _, layer in layers for item in sorted(layer, key=lambda item: item[1].ndim > 1)]


def _add(flat: Flat, total: dict[str, mx.array], compress: Compress | None, watch: Stopwatch) -> None:
    """Empty ``flat`` from its end into ``total``, evaluating group by group."""
    flat[:] = in_order(flat)
    group, size = [], 0
    while flat:
        path, gradient = flat.pop()
        size += gradient.nbytes
        gradient = gradient.astype(mx.float32)
        if compress is not None:
            watch.settle(gradient)
            with watch.part("project"):
                gradient = compress(path, gradient)
                watch.settle(gradient)
        total[path] = total[path] + gradient if path in total else gradient
        del gradient
        group.append(total[path])
        if size >= _GROUP_BYTES or not flat:
            mx.eval(group)
            group, size = [], 0


def apply_update(
    model: nn.Module,
    optimizer: optim.Optimizer,
    gradients: dict[str, mx.array],
    scale: float = 1.0,
    beside: Mapping[str, mx.array] | None = None,
) -> None:
    """``optimizer.update`` with ``scale`` times the gradients, which are emptied.

    Evaluated group by group from the end, and each gradient is dropped when its weight has moved: the
    temporaries of all layers are never alive together, nor are the gradients where they come in unevaluated.
    ``beside`` holds what to evaluate with each weight.
    """

    def pick(path: str, _: mx.array) -> mx.array:
        gradient = gradients.pop(path)
        return gradient if scale == 1.0 else gradient * scale

    model.update(optimizer.apply_gradients(tree_map_with_path(pick, model.trainable_parameters()), model))
    group, size = [], 0
    for path, weight in reversed(in_order(tree_flatten(model.trainable_parameters()))):
        group += [weight] if beside is None else [weight, beside[path]]
        size += weight.nbytes
        if size >= _GROUP_BYTES:
            mx.eval(group)
            group, size = [], 0
    mx.eval(group, optimizer.state)


def evaluate(
    model: nn.Module, batches: Sequence[Batch], objective: Objective, ranks: Ranks | None = None
) -> dict[str, float]:
    """Loss and terms over a fixed set, without dropout; the random state and the model's mode stay as they
    were.

    Returns:
        ``{"loss": ..., term: ...}``, each term its sum over the whole set divided by its weight.
    """
    ranks = ranks or Ranks()
    names = list(objective.coefficients)
    mode, key = model.training, random_key()
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
        set_random_key(key)
    totals = ranks.sum([*own.values(), *sums.values()])
    terms = {
        name: totals[len(names) + i] / totals[i] if totals[i] > 0 else 0.0 for i, name in enumerate(names)
    }
    return {"loss": sum(objective.coefficients[name] * terms[name] for name in names), **terms}


def global_norm(gradients: Any) -> float:
    """The Euclidean norm of all arrays of a tree together, added in float32 by array and in double over the
    arrays.

    >>> global_norm({"a": mx.array([3.0]), "b": mx.array([[4.0]])})
    5.0
    """
    return drain_norm([gradient for _, gradient in tree_flatten(gradients)])


def drain_norm(gradients: list[mx.array]) -> float:
    """As :func:`global_norm`, of a list that is emptied from its end, so that what is not evaluated yet never
    lives together.

    >>> drain_norm([mx.array([3.0]), mx.array([4.0])])
    5.0
    """
    squares: list[float] = []
    while gradients:
        group, size = [], 0
        while gradients and size < _GROUP_BYTES:
            size += gradients[-1].nbytes
            group.append(mx.square(gradients.pop().astype(mx.float32)).sum())
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


Guard = Callable[[Window, float, bool], None]


def check_streaming(settings: TrainConfig, ranks: int = 1) -> None:
    """Refuse to stream where gradients are added up over micro-batches or ranks: the sum needs them all.

    Raises:
        ConfigError: with the setting that would have to change.

    >>> check_streaming(TrainConfig(stream_gradients=True, accumulate=1))
    """
    if settings.stream_gradients and settings.accumulate > 1:
        raise ConfigError(
            f"stream_gradients with accumulate: {settings.accumulate}",
            fix="accumulate: 1 and a larger batch_size with grad_checkpoint",
        )
    if settings.stream_gradients and ranks > 1:
        raise ConfigError(
            f"stream_gradients on {ranks} ranks", fix="stream_gradients: false, or launch one rank"
        )


def streamed_step(
    model: nn.Module,
    batch: Batch,
    objective: Objective,
    optimizer: optim.Optimizer,
    clip_norm: float,
    guard: Guard,
    watch: Stopwatch | None = None,
    trunk: Trunk | None = None,
) -> tuple[Window, float]:
    """Loss, gradient and update of one micro-batch, evaluated from the last layer to the first; the window
    and the gradient's norm.

    The global norm is known only when every gradient has been made. So with ``clip_norm`` they are made
    twice, from the same random
    state: once for their squares alone, once to move the weights by the scaled ones. The result is bitwise
        that of holding them all.

    Args:
        model: Its trainable parameters are moved.
        batch: The micro-batch.
        objective: Terms of the loss.
        optimizer: One whose state takes whole gradients.
        clip_norm: Largest norm; 0 makes one pass.
        guard: Given the window, the norm, and whether weights have moved already; raises where a number is
            not finite.
        watch: Where the time is added; the first of two passes counts as ``clip``.
        trunk: As for :func:`~mlx_distill.train.updates.differentiate`.
    """
    watch = watch or Stopwatch()
    weights = objective.weights(batch)
    scales = {
        name: c / weights[name]
        for name, c in objective.coefficients.items()
        if weights.get(name, 0.0) > 0 and c != 0
    }
    if not scales:
        nothing = dict.fromkeys(objective.coefficients, 0.0)
        return Window({}, 0.0, nothing, weights, [0.0]), 0.0
    norm = 0.0
    if clip_norm > 0:
        with watch.part("clip"):
            key = random_key()
            norm = drain_norm(
                [
                    gradient
                    for _, gradient in in_order(differentiate(model, batch, objective, scales, trunk)[0])
                ]
            )
            set_random_key(key)
    with watch.part("forward"):
        flat, parts = differentiate(model, batch, objective, scales, trunk)
    sums = {name: part.item() for name, part in parts.items()}
    terms = {
        name: sums.get(name, 0.0) / weights[name] if weights.get(name, 0.0) > 0 else 0.0
        for name in objective.coefficients
    }
    loss = sum(objective.coefficients[name] * term for name, term in terms.items())
    window = Window({}, loss, terms, weights, [loss])
    guard(window, norm, False)
    with watch.part("update"):
        gradients: dict[str, Any] = {path: gradient.astype(mx.float32) for path, gradient in flat}
        flat.clear()
        squares = (
            None
            if clip_norm > 0
            else {path: mx.square(gradient).sum() for path, gradient in gradients.items()}
        )
        apply_update(model, optimizer, gradients, clip_scale(norm, clip_norm), squares)
    if squares is not None:
        norm = math.sqrt(math.fsum(square.item() for square in squares.values()))
        guard(window, norm, True)
    return window, norm


# What may be whole at once: an eighth of all, and what nobody minds.
_SHARE, _LEAST_BYTES = 8, 1 << 26


def refresh_bases_in_groups(
    model: nn.Module, optimizer: Any, gradients: Callable[[], Window]
) -> dict[str, mx.array]:
    """The gradients of all but the last few matrices whose basis is due, in their new subspaces; empty where
    few are due.

    A sum over micro-batches or ranks stays whole where a basis is to be found in it. At the first step that
    is every matrix, in float32: 28 GB of 7 billion weights. So the window is gone through again for each
    eighth of them, the others frozen meanwhile, from the same random state: the same gradients in less
    memory, and a first step of up to eight times the length.

    Args:
        model: Its trainable parameters.
        optimizer: A :class:`~mlx_distill.optim.galore.GaLoreAdamW`, whose bases are found.
        gradients: Goes through the window; what is frozen gets no gradient.
    """
    parameters = dict(tree_flatten(model.trainable_parameters()))
    groups = _groups(
        {path: 4 * parameters[path].size for path in optimizer.due_whole(parameters)}, parameters
    )
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
