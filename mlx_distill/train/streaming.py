"""A step whose gradients never live together: each is made, moves its weight, and is dropped."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

from mlx_distill.errors import ConfigError
from mlx_distill.recipe import TrainConfig
from mlx_distill.records import Batch
from mlx_distill.train.objective import Objective
from mlx_distill.train.randomness import random_key, set_random_key
from mlx_distill.train.stopwatch import Stopwatch
from mlx_distill.train.trunk_head import Trunk
from mlx_distill.train.updates import Window, apply_update, clip_scale, differentiate, drain_norm, in_order

Guard = Callable[[Window, float, bool], None]


def check_streaming(settings: TrainConfig, ranks: int = 1) -> None:
    """Refuse to stream where gradients are added up over micro-batches or ranks: the sum needs them all.

    Raises:
        ConfigError: with the setting that would have to change.

    >>> check_streaming(TrainConfig(stream_gradients=True, accumulate=1))
    """
    if settings.stream_gradients and settings.accumulate > 1:
        raise ConfigError(
            f"stream_gradients with accumulate: {settings.accumulate}", fix="accumulate: 1 and a larger batch_size with grad_checkpoint"
        )
    if settings.stream_gradients and ranks > 1:
        raise ConfigError(f"stream_gradients on {ranks} ranks", fix="stream_gradients: false, or launch one rank")


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
    """Loss, gradient and update of one micro-batch, evaluated from the last layer to the first; the window and the gradient's norm.

    The global norm is known only when every gradient has been made. So with ``clip_norm`` they are made twice, from the same random
    state: once for their squares alone, once to move the weights by the scaled ones. The result is bitwise that of holding them all.

    Args:
        model: Its trainable parameters are moved.
        batch: The micro-batch.
        objective: Terms of the loss.
        optimizer: One whose state takes whole gradients.
        clip_norm: Largest norm; 0 makes one pass.
        guard: Given the window, the norm, and whether weights have moved already; raises where a number is not finite.
        watch: Where the time is added; the first of two passes counts as ``clip``.
        trunk: As for :func:`~mlx_distill.train.updates.differentiate`.
    """
    watch = watch or Stopwatch()
    weights = objective.weights(batch)
    scales = {name: c / weights[name] for name, c in objective.coefficients.items() if weights.get(name, 0.0) > 0 and c != 0}
    if not scales:
        nothing = dict.fromkeys(objective.coefficients, 0.0)
        return Window({}, 0.0, nothing, weights, [0.0]), 0.0
    norm = 0.0
    if clip_norm > 0:
        with watch.part("clip"):
            key = random_key()
            norm = drain_norm([gradient for _, gradient in in_order(differentiate(model, batch, objective, scales, trunk)[0])])
            set_random_key(key)
    with watch.part("forward"):
        flat, parts = differentiate(model, batch, objective, scales, trunk)
    sums = {name: part.item() for name, part in parts.items()}
    terms = {name: sums.get(name, 0.0) / weights[name] if weights.get(name, 0.0) > 0 else 0.0 for name in objective.coefficients}
    loss = sum(objective.coefficients[name] * term for name, term in terms.items())
    window = Window({}, loss, terms, weights, [loss])
    guard(window, norm, False)
    with watch.part("update"):
        gradients: dict[str, Any] = {path: gradient.astype(mx.float32) for path, gradient in flat}
        flat.clear()
        squares = None if clip_norm > 0 else {path: mx.square(gradient).sum() for path, gradient in gradients.items()}
        apply_update(model, optimizer, gradients, clip_scale(norm, clip_norm), squares)
    if squares is not None:
        norm = math.sqrt(math.fsum(square.item() for square in squares.values()))
        guard(window, norm, True)
    return window, norm
