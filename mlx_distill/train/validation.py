"""The loss over the validation batches."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from mlx_distill.records import Batch
from mlx_distill.runtime import random_key, set_random_key
from mlx_distill.train.distributed import Ranks
from mlx_distill.train.gradients import loss_of_sums
from mlx_distill.train.objective import Objective


def evaluate(
    model: nn.Module, batches: Sequence[Batch], objective: Objective, ranks: Ranks | None = None
) -> dict[str, float]:
    """Loss and terms over a fixed set of batches, in evaluation mode; the random state and the model's mode
    are restored.

    Returns:
        ``{"loss": ..., term: ...}``, each term its sum over the whole set divided by its weight.
    """
    ranks = ranks or Ranks()
    names = list(objective.coefficients)
    mode, key = model.training, random_key()
    model.eval()
    try:
        weights, sums = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
        for batch in batches[ranks.rank :: ranks.size]:
            own = {name: w for name, w in objective.weights(batch).items() if w > 0}
            if own:
                term_sums = objective.sums(model, batch)
                for name in own:
                    weights[name] += own[name]
                    sums[name] += term_sums[name].astype(mx.float32).item()
    finally:
        model.train(mode)
        set_random_key(key)
    totals = ranks.sum([*weights.values(), *sums.values()])
    weights = dict(zip(names, totals[: len(names)], strict=True))
    loss, terms = loss_of_sums(objective, dict(zip(names, totals[len(names) :], strict=True)), weights)
    return {"loss": loss, **terms}
