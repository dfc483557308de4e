"""The optimizer that a training's settings choose."""

from __future__ import annotations

import mlx.core as mx
import mlx.optimizers as optim

from mlx_distill.errors import ConfigError
from mlx_distill.optim.adamw import AdamW
from mlx_distill.optim.apollo import APOLLO, MINI_SCALE, APOLLOMini
from mlx_distill.optim.base import by_modules
from mlx_distill.optim.galore import GaLoreAdamW
from mlx_distill.optim.schedules import make_schedule
from mlx_distill.recipe import TrainConfig
from mlx_distill.runtime import rank_and_size
from mlx_distill.text import counted


def make_optimizer(config: TrainConfig, total_steps: int) -> optim.Optimizer:
    """The optimizer that the settings choose, with its learning-rate schedule.

    ``method: galore`` is :class:`~mlx_distill.optim.galore.GaLoreAdamW` on the matrices of
    ``target_modules``, ``apollo`` and ``apollo-mini`` are :class:`~mlx_distill.optim.apollo.APOLLO` on them;
    all three update other trainable parameters (``modules_to_save``) by AdamW. Every other method is
    :class:`~mlx_distill.optim.adamw.AdamW`.

    Args:
        config: Method with its own settings, learning rate, schedule and weight decay.
        total_steps: Optimizer steps of the run, which the schedule spans.

    Raises:
        ConfigError: an invalid schedule, or warm-up steps that leave no step after them.

    >>> type(make_optimizer(TrainConfig(method="galore"), 100)).__name__
    'GaLoreAdamW'
    """
    warmup = config.warmup
    if config.warmup_steps:
        if config.warmup_steps >= total_steps:
            raise ConfigError(
                f"warmup_steps: {config.warmup_steps:,} in a training of {counted(total_steps, 'step')}",
                fix="fewer warm-up steps, more rows or epochs, or warmup, a share of the steps, "
                "instead of warmup_steps",
            )
        # The schedule rounds up; the half keeps the quotient from being rounded to a step more.
        warmup = (config.warmup_steps - 0.5) / total_steps
    rate = make_schedule(config.schedule, config.learning_rate, total_steps, warmup=warmup)
    decay, seed, targets = config.weight_decay, config.seed, by_modules(config.target_modules)
    if config.method == "galore":
        return GaLoreAdamW(
            rate,
            config.galore_rank,
            config.galore_update_gap,
            config.galore_scale,
            config.galore_projection,
            weight_decay=decay,
            moments=config.galore_moments,
            stagger=config.galore_stagger,
            refresh_below=config.galore_refresh_below,
            filter=targets,
            group=mx.distributed.init() if rank_and_size()[1] > 1 else None,
            seed=seed,
        )
    scale = config.apollo_scale
    if config.method == "apollo":
        gap, scale = config.apollo_update_gap, 1.0 if scale is None else scale
        return APOLLO(rate, config.apollo_rank, gap, scale, weight_decay=decay, seed=seed, filter=targets)
    if config.method == "apollo-mini":
        scale = MINI_SCALE if scale is None else scale
        return APOLLOMini(
            rate, config.apollo_update_gap, scale, weight_decay=decay, seed=seed, filter=targets
        )
    return AdamW(rate, weight_decay=decay, seed=seed)
