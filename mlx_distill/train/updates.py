"""One optimizer step on a window of micro-batches, in one of three ways that :func:`make_updater` chooses
once for a run: accumulated, projected or streamed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map_with_path

from mlx_distill.errors import ConfigError
from mlx_distill.optim.base import Gradient, ProjectingOptimizer, array_of
from mlx_distill.recipe import TrainConfig
from mlx_distill.records import Batch
from mlx_distill.runtime import random_key, set_random_key
from mlx_distill.train.distributed import Ranks
from mlx_distill.train.gradients import (
    GROUP_BYTES,
    WindowGradients,
    clip_scale,
    differentiate,
    drain_norm,
    global_norm,
    in_order,
    loss_of_sums,
    window_gradients,
)
from mlx_distill.train.objective import Objective
from mlx_distill.train.profiling import Stopwatch
from mlx_distill.train.trunk_head import Trunk

# Whole gradients of matrices whose basis is refreshed: at most an eighth of all gradients at once, or 64 MiB
# where that is more.
_WHOLE_SHARE = 8
WHOLE_BYTES = 1 << 26

# Called with the window, its loss and gradients, the gradient's norm, and whether weights were updated
# already; raises where the loss or the norm is not finite.
FiniteCheck = Callable[[Sequence[Batch], WindowGradients, float, bool], None]


def _no_check(window: Sequence[Batch], result: WindowGradients, norm: float, updated: bool) -> None:
    """Accept every result."""


@dataclass(frozen=True)
class UpdateContext:
    """What every update of a run needs.

    Args:
        model: Its trainable parameters are updated.
        objective: Terms of the loss.
        optimizer: A :class:`~mlx_distill.optim.base.ProjectingOptimizer` has its gradients projected.
        clip_norm: Largest global norm of the gradient; 0 turns clipping off.
        ranks: The ranks that share the step.
        watch: Gets the time of each part.
        trunk: A compiled one, or None.
        check_finite: Called before the weights are updated, and after a streamed update without clipping.
        group_bytes: Gradients and weights of about this size are evaluated together.
        whole_bytes: Size of the gradients that may be whole at once where bases are refreshed.
    """

    model: nn.Module
    objective: Objective
    optimizer: optim.Optimizer
    clip_norm: float = 0.0
    ranks: Ranks = Ranks()
    watch: Stopwatch = field(default_factory=Stopwatch)
    trunk: Trunk | None = None
    check_finite: FiniteCheck = _no_check
    group_bytes: int = GROUP_BYTES
    whole_bytes: int = WHOLE_BYTES


@dataclass(frozen=True)
class StepResult:
    """Loss and terms of a step over all its micro-batches and ranks, and the gradient's norm before clipping
    (0 where there was no token to train on).
    """

    loss: float
    terms: Mapping[str, float]
    grad_norm: float


Updater = Callable[[Sequence[Batch]], StepResult]


def make_updater(context: UpdateContext, settings: TrainConfig) -> Updater:
    """The function that takes a window of micro-batches and does one optimizer step.

    - An optimizer that projects gradients (GaLore): :func:`projected_update`.
    - ``stream_gradients``: :func:`streamed_update`.
    - Otherwise: :func:`accumulated_update`.
    """
    if isinstance(context.optimizer, ProjectingOptimizer):
        single = settings.accumulate == 1 and context.ranks.size == 1
        return partial(projected_update, context, context.optimizer, single=single)
    if settings.stream_gradients:
        return partial(streamed_update, context)
    return partial(accumulated_update, context)


def accumulated_update(context: UpdateContext, window: Sequence[Batch]) -> StepResult:
    """Add up the window's gradients, clip the sum by its norm, update."""
    result = _window_gradients(context, window, None, context.trunk)
    if not result.gradients:
        return StepResult(result.loss, result.terms, 0.0)
    with context.watch.part("clip"):
        norm = global_norm(result.gradients)
    context.check_finite(window, result, norm, False)
    return _finish(context, result, norm)


def projected_update(
    context: UpdateContext, optimizer: ProjectingOptimizer, window: Sequence[Batch], *, single: bool
) -> StepResult:
    """Add up the window's gradients in the optimizer's subspaces, clip the sum by the norm of the projected
    gradients, update.

    Args:
        context: Of the run.
        optimizer: That of the context.
        window: The micro-batches of this rank.
        single: The window is one micro-batch of one rank, so each gradient is complete as soon as it is
            known, and bases are refreshed at once.
    """
    model = context.model
    project = optimizer.project_and_refresh if single else optimizer.project
    refreshed: dict[str, Gradient] = {}
    if not single:
        refreshed = refresh_bases_in_groups(
            model,
            optimizer,
            lambda: _window_gradients(context, window, project, None),
            context.whole_bytes,
        )
    with frozen(model, refreshed):
        # A compiled trunk treats frozen parameters as constants: it can be used only where the same
        # parameters are trainable as when it was compiled.
        result = _window_gradients(context, window, project, None if refreshed else context.trunk)
    if not result.gradients:
        return StepResult(result.loss, result.terms, 0.0)
    result.gradients.update(refreshed)
    with context.watch.part("clip"):
        norm = global_norm(result.gradients)
    context.check_finite(window, result, norm, False)
    if not single:
        with context.watch.part("project"):
            for path in list(result.gradients):
                result.gradients[path] = _projected(optimizer, path, result.gradients.pop(path))
        with context.watch.part("clip"):
            norm = global_norm(result.gradients)  # of the projected gradients, which make the update
    return _finish(context, result, norm)


def streamed_update(context: UpdateContext, window: Sequence[Batch]) -> StepResult:
    """Gradient and update of one micro-batch, layer by layer from the last to the first, so that the
    gradients are never in memory together.

    The global norm is known only when every gradient has been computed. So with clipping they are computed
    twice, from the same random state: once for the norm, once for the update. The result is bitwise that of
    :func:`accumulated_update`.

    Args:
        context: Of the run; one rank. The first of two passes counts as ``clip``. Without clipping,
            ``check_finite`` gets the norm after the weights were updated.
        window: One micro-batch.
    """
    (batch,) = window
    model, objective, watch, limit = context.model, context.objective, context.watch, context.clip_norm
    weights = objective.weights(batch)
    scales = {
        name: c / weights[name]
        for name, c in objective.coefficients.items()
        if weights.get(name, 0.0) > 0 and c != 0
    }
    if not scales:
        return StepResult(0.0, dict.fromkeys(objective.coefficients, 0.0), 0.0)
    norm = 0.0
    if limit > 0:
        with watch.part("clip"):
            key = random_key()
            flat, _ = differentiate(model, batch, objective, scales, context.trunk)
            flat[:] = in_order(flat)
            norm = drain_norm(_arrays(flat), context.group_bytes)
            set_random_key(key)
    with watch.part("forward"):
        flat, term_sums = differentiate(model, batch, objective, scales, context.trunk)
    sums = dict.fromkeys(objective.coefficients, 0.0)
    sums |= {name: array.item() for name, array in term_sums.items()}
    loss, terms = loss_of_sums(objective, sums, weights)
    result = WindowGradients({}, loss, terms, weights, [loss])
    context.check_finite(window, result, norm, False)
    with watch.part("update"):
        gradients: dict[str, Any] = {path: gradient.astype(mx.float32) for path, gradient in flat}
        flat.clear()
        squares = {path: mx.square(g).sum() for path, g in gradients.items()} if limit <= 0 else None
        scale = clip_scale(norm, limit)
        apply_update(model, context.optimizer, gradients, scale, squares, context.group_bytes)
    if squares is not None:
        norm = math.sqrt(math.fsum(square.item() for square in squares.values()))
        context.check_finite(window, result, norm, True)
    return StepResult(loss, terms, norm)


def _arrays(flat: list[tuple[str, mx.array]]) -> list[Gradient]:
    """The gradients alone; the list with their paths is emptied."""
    arrays: list[Gradient] = [array for _, array in flat]
    flat.clear()
    return arrays


def _window_gradients(
    context: UpdateContext,
    window: Sequence[Batch],
    project: Callable[[str, mx.array], Gradient] | None,
    trunk: Trunk | None,
) -> WindowGradients:
    return window_gradients(
        context.model,
        window,
        context.objective,
        context.ranks,
        project,
        context.watch,
        trunk,
        context.group_bytes,
    )


def _finish(context: UpdateContext, result: WindowGradients, norm: float) -> StepResult:
    """Clip and update."""
    with context.watch.part("update"):
        scale = clip_scale(norm, context.clip_norm)
        apply_update(
            context.model, context.optimizer, result.gradients, scale, group_bytes=context.group_bytes
        )
    return StepResult(result.loss, result.terms, norm)


def _projected(optimizer: ProjectingOptimizer, path: str, gradient: Gradient) -> Gradient:
    """The projected gradient, evaluated."""
    gradient = optimizer.project_and_refresh(path, gradient)
    mx.eval(array_of(gradient))
    return gradient


def apply_update(
    model: nn.Module,
    optimizer: optim.Optimizer,
    gradients: dict[str, Gradient],
    scale: float = 1.0,
    extra: Mapping[str, mx.array] | None = None,
    group_bytes: int = GROUP_BYTES,
) -> None:
    """``optimizer.update`` with ``scale`` times the gradients.

    The new weights are evaluated group by group from the last layer, and the dictionary of gradients is
    emptied, so that a gradient is freed with its update: neither the temporary arrays of all layers nor,
    where they come unevaluated, the gradients are in memory together.

    Args:
        model: Its trainable parameters are updated.
        optimizer: Its state is updated.
        gradients: One for each trainable parameter, by path.
        scale: A factor for clipping.
        extra: Arrays by path to evaluate together with the weights.
        group_bytes: Weights of about this size are evaluated together.
    """

    def take(path: str, _: mx.array) -> Gradient:
        gradient = gradients.pop(path)
        return gradient if scale == 1.0 else gradient * scale

    model.update(optimizer.apply_gradients(tree_map_with_path(take, model.trainable_parameters()), model))
    group, size = [], 0
    for path, weight in reversed(in_order(tree_flatten(model.trainable_parameters()))):
        group += [weight] if extra is None else [weight, extra[path]]
        size += weight.nbytes
        if size >= group_bytes:
            mx.eval(group)
            group, size = [], 0
    mx.eval(group, optimizer.state)


def check_streaming(settings: TrainConfig, ranks: int = 1) -> None:
    """Refuse ``stream_gradients`` where gradients are added up over micro-batches or ranks: the sum needs all
    of them.

    Raises:
        ConfigError: naming the setting to change.

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


def refresh_bases_in_groups(
    model: nn.Module,
    optimizer: ProjectingOptimizer,
    gradients: Callable[[], WindowGradients],
    whole_bytes: int = WHOLE_BYTES,
) -> dict[str, Gradient]:
    """The projected gradients of the matrices whose basis is refreshed at this step, except those of the last
    group; empty where one group is enough.

    A basis is computed from the whole gradient, summed over micro-batches and ranks. At the first step that
    is the gradient of every matrix, in float32: 28 GB for 7 billion weights. So the window is differentiated
    once for each eighth of them, with all other parameters frozen and from the same random state: the same
    gradients in less memory, and a first step that takes up to eight times as long.

    Args:
        model: Its trainable parameters.
        optimizer: Computes the bases.
        gradients: Differentiates the window with respect to the trainable parameters.
        whole_bytes: Size of the gradients that may be whole at once in any case.
    """
    parameters = dict(tree_flatten(model.trainable_parameters()))
    sizes = {path: 4 * parameters[path].size for path in optimizer.paths_to_refresh(parameters)}
    all_bytes = 4 * sum(p.size for p in parameters.values())
    groups = _groups(sizes, max(all_bytes // _WHOLE_SHARE, whole_bytes))
    refreshed: dict[str, Gradient] = {}
    key = random_key()
    for group in groups[:-1]:  # the last group is differentiated with the other parameters
        with frozen(model, parameters.keys() - group):
            result = gradients().gradients
        for path in list(result):
            refreshed[path] = _projected(optimizer, path, result.pop(path))
        set_random_key(key)
    return refreshed


def _groups(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """Paths in groups of at most ``limit`` bytes, or of one path."""
    groups: list[list[str]] = [[]]
    for path, size in sizes.items():
        if groups[-1] and sum(sizes[other] for other in groups[-1]) + size > limit:
            groups.append([])
        groups[-1].append(path)
    return groups


@contextmanager
def frozen(model: nn.Module, paths: Collection[str]) -> Iterator[None]:
    """Inside, these parameters, trainable otherwise, are frozen."""
    modules: dict[str, Any] = dict(model.named_modules())
    leaves: Sequence[tuple[str, str, str]] = [path.rpartition(".") for path in paths]
    for module, _, leaf in leaves:
        modules[module].freeze(keys=[leaf], recurse=False)
    try:
        yield
    finally:
        for module, _, leaf in leaves:
            modules[module].unfreeze(keys=[leaf], recurse=False)
