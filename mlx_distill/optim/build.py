"""An optimizer from the settings of a training."""

from __future__ import annotations

import mlx.optimizers as optim

from mlx_distill.optim.adamw import AdamW
from mlx_distill.optim.schedules import make_schedule
from mlx_distill.recipe import TrainConfig


def make_optimizer(config: TrainConfig, total_steps: int) -> optim.Optimizer:
    """The optimizer that the settings ask for, with its schedule inside."""
    rate = make_schedule(config.schedule, config.learning_rate, total_steps, warmup=config.warmup)
    return AdamW(rate, weight_decay=config.weight_decay)
