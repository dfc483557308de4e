"""An optimizer from the settings of a training."""

from __future__ import annotations

import mlx.core as mx
import mlx.optimizers as optim

from mlx_distill.optim.adamw import AdamW
from mlx_distill.optim.galore import GaLoreAdamW
from mlx_distill.optim.named import by_modules
from mlx_distill.optim.schedules import make_schedule
from mlx_distill.recipe import TrainConfig
from mlx_distill.runtime import rank_and_size


def make_optimizer(config: TrainConfig, total_steps: int) -> optim.Optimizer:
    """The optimizer that the settings ask for, with its schedule inside.

    ``method: galore`` is :class:`~mlx_distill.optim.galore.GaLoreAdamW` on the matrices of ``target_modules``, its moments turned with the
    basis and the refreshes spread over the gap; every other method is :class:`~mlx_distill.optim.adamw.AdamW`.

    Args:
        config: Method, learning rate, schedule and decay.
        total_steps: Optimizer steps of the run, which the schedule spans.

    Raises:
        ConfigError: a schedule that makes no sense.

    >>> type(make_optimizer(TrainConfig(method="galore"), 100)).__name__
    'GaLoreAdamW'
    """
    rate = make_schedule(config.schedule, config.learning_rate, total_steps, warmup=config.warmup)
    if config.method != "galore":
        return AdamW(rate, weight_decay=config.weight_decay)
    return GaLoreAdamW(
        rate,
        config.galore_rank,
        config.galore_update_gap,
        config.galore_scale,
        weight_decay=config.weight_decay,
        moments="project",
        stagger=True,
        filter=by_modules(config.target_modules),
        group=mx.distributed.init() if rank_and_size()[1] > 1 else None,
    )
