"""An optimizer from the settings of a training."""

from __future__ import annotations

import mlx.core as mx
import mlx.optimizers as optim

from mlx_distill.optim.adamw import AdamW
from mlx_distill.optim.apollo import APOLLO, MINI_SCALE, APOLLOMini
from mlx_distill.optim.base import by_modules
from mlx_distill.optim.galore import GaLoreAdamW
from mlx_distill.optim.schedules import make_schedule
from mlx_distill.recipe import TrainConfig
from mlx_distill.runtime import rank_and_size


def make_optimizer(config: TrainConfig, total_steps: int) -> optim.Optimizer:
    """The optimizer that the settings ask for, with its schedule inside.

    ``method: galore`` is :class:`~mlx_distill.optim.galore.GaLoreAdamW` on the matrices of
    ``target_modules``, ``apollo`` and ``apollo-mini`` are :class:`~mlx_distill.optim.apollo.APOLLO` on them;
    what else moves (``modules_to_save``) they leave to AdamW. Every other method is
    :class:`~mlx_distill.optim.adamw.AdamW`.

    Args:
        config: Method with its own settings, learning rate, schedule and decay.
        total_steps: Optimizer steps of the run, which the schedule spans.

    Raises:
        ConfigError: a schedule that makes no sense.

    >>> type(make_optimizer(TrainConfig(method="galore"), 100)).__name__
    'GaLoreAdamW'
    """
    rate = make_schedule(config.schedule, config.learning_rate, total_steps, warmup=config.warmup)
    decay, seed, chosen = config.weight_decay, config.seed, by_modules(config.target_modules)
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
            filter=chosen,
            group=mx.distributed.init() if rank_and_size()[1] > 1 else None,
            seed=seed,
        )
    scale = config.apollo_scale
    if config.method == "apollo":
        gap, scale = config.apollo_update_gap, 1.0 if scale is None else scale
        return APOLLO(rate, config.apollo_rank, gap, scale, weight_decay=decay, seed=seed, filter=chosen)
    if config.method == "apollo-mini":
        scale = MINI_SCALE if scale is None else scale
        return APOLLOMini(rate, config.apollo_update_gap, scale, weight_decay=decay, seed=seed, filter=chosen)
    return AdamW(rate, weight_decay=decay, seed=seed)
