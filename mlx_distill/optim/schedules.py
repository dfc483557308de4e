"""Learning-rate schedules as plain functions of the step."""

from __future__ import annotations

import math
from collections.abc import Callable

import mlx.core as mx
import mlx.optimizers as optim

from mlx_distill.errors import ConfigError

Schedule = Callable[[int | mx.array], mx.array]

SCHEDULES = ("cosine", "linear", "constant", "wsd")
_WSD_DECAY = 0.2


def make_schedule(name: str, peak: float, steps: int, *, warmup: float = 0.0, floor: float = 0.0) -> Schedule:
    r"""The learning rate at each optimizer step, the first step being 0.

    Over the first :math:`w = \lceil \mathrm{warmup} \cdot \mathrm{steps} \rceil` steps it rises as
    :math:`(t+1)/(w+1)`, so that no step has a learning rate of zero; after that, with
    :math:`p = (t-w)/(\mathrm{steps}-w)`, it is

    - ``cosine``: :math:`(1+\cos \pi p)/2` (Loshchilov and Hutter, arXiv 1608.03983),
    - ``linear``: :math:`1-p`,
    - ``constant``: 1,
    - ``wsd``: 1, then linear decay over the last fifth of the steps (warm-up, stable, decay; Hu et al., arXiv
      2404.06395),

    between ``floor`` and 1 times ``peak``.

    Args:
        name: One of :data:`SCHEDULES`.
        peak: Largest learning rate.
        steps: Optimizer steps of the run.
        warmup: Fraction of the steps over which the rate rises, 0 to 1.
        floor: Smallest rate after the peak, as a fraction of the peak.

    Returns:
        A function of the step, a number or a scalar array; after the last step it keeps its last value.

    Raises:
        ConfigError: an unknown name, or a warm-up and decay that are longer than the run.

    >>> rate = make_schedule("linear", 1.0, 10, warmup=0.2)
    >>> [round(rate(t).item(), 3) for t in (0, 1, 2, 6, 10)]
    [0.333, 0.667, 1.0, 0.5, 0.0]
    """
    check_schedule(name, warmup)
    if steps < 1:
        raise ConfigError(f"a schedule over {steps} steps", fix="train for at least one step")
    rise = math.ceil(warmup * steps)
    fall = max(steps - rise, 1)

    def schedule(step: int | mx.array) -> mx.array:
        t = mx.array(step).astype(mx.float32)
        p = mx.clip((t - rise) / fall, 0.0, 1.0)
        if name == "cosine":
            shape = 0.5 * (1.0 + mx.cos(math.pi * p))
        elif name == "linear":
            shape = 1.0 - p
        elif name == "wsd":
            shape = mx.clip((steps - t) / max(_WSD_DECAY * steps, 1.0), 0.0, 1.0)
        else:
            shape = mx.ones_like(p)
        shape = floor + (1.0 - floor) * shape
        return peak * mx.where(t < rise, (t + 1.0) / (rise + 1.0), shape)

    schedule.steps = steps  # type: ignore[attr-defined]
    return schedule


def check_schedule(name: str, warmup: float) -> None:
    """Refuse a schedule whose warm-up and decay together are longer than the run, whatever the run's length.

    Raises:
        ConfigError: an unknown name, or a warm-up that leaves no steps for what follows it.

    >>> check_schedule("wsd", 0.1)
    """
    if name not in SCHEDULES:
        raise ConfigError(f"no schedule {name!r}", fix=f"one of {', '.join(SCHEDULES)}")
    if not 0 <= warmup <= 1:
        raise ConfigError(
            f"a warm-up over {warmup:g} of the run", fix="warmup is a share of the steps, 0 to 1"
        )
    if warmup + (_WSD_DECAY if name == "wsd" else 0) > 1 or (warmup == 1 and name != "constant"):
        most = "at most 0.8, as wsd falls over the last fifth" if name == "wsd" else "below 1"
        raise ConfigError(
            f"schedule: {name} with warmup: {warmup:g} is longer than the run",
            fix=f"warmup is a share of the steps: {most}",
        )


def scheduled_steps(optimizer: optim.Optimizer) -> int | None:
    """The number of steps of an optimizer's schedule from :func:`make_schedule`; None for any other schedule.

    >>> scheduled_steps(optim.SGD(make_schedule("cosine", 0.1, 30))), scheduled_steps(optim.SGD(0.1))
    (30, None)
    """
    return getattr(getattr(optimizer, "_schedulers", {}).get("learning_rate"), "steps", None)
