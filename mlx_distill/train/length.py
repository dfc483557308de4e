"""How long a run is: in steps, or in passes over the rows."""

from __future__ import annotations

import math

from mlx_distill.recipe import TrainConfig


def total_steps(settings: TrainConfig, batches_per_epoch: int) -> int:
    """Optimizer steps of a run: ``steps``, or what ``epochs`` passes over the micro-batches come to; the tail is a step too.

    >>> total_steps(TrainConfig(accumulate=4, epochs=1.0), 10)
    3
    """
    if settings.steps:
        return settings.steps
    return max(math.ceil(epoch_batches(settings, batches_per_epoch) / settings.accumulate), 1)


def epoch_batches(settings: TrainConfig, batches_per_epoch: int) -> int:
    """Micro-batches of a run by epochs; a share of an epoch is rounded.

    >>> epoch_batches(TrainConfig(epochs=1.5), 10)
    15
    """
    return max(round(settings.epochs * batches_per_epoch), 1)
