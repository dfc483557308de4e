"""The loss over the validation batches."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from jaxtyping import Float

from mlx_distill.records import Batch
from mlx_distill.runtime import random_key, set_random_key
from mlx_distill.train.distributed import Ranks
from mlx_distill.train.gradients import loss_of_sums
from mlx_distill.train.objective import LogitReader, Objective, trunk


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


def sequence_losses(model: nn.Module, batch: Batch) -> Float[np.ndarray, "b 3"]:
    """Of each sequence of a batch the negative log-likelihood of its trained tokens in nats, how many of them
    are the most probable token, and how many there are.

    Args:
        model: In evaluation mode.
        batch: One row a sequence.
    """
    mask = np.array(batch.mask)
    positions = np.flatnonzero(mask)
    out = np.zeros((len(mask), 3))
    if not len(positions):
        return out
    where = mx.array(positions.astype(np.int32))
    labels = batch.labels.reshape(-1)[where]
    reader = LogitReader(model, trunk(model, batch, where))

    def is_likeliest(logits: mx.array, at: slice) -> mx.array:
        return (mx.argmax(logits, axis=1) == labels[at]).astype(mx.float32)

    columns = (reader.cross_entropy(labels), reader.row_losses(is_likeliest, None), mx.ones(len(positions)))
    for number, values in enumerate(columns):
        np.add.at(out[:, number], positions // mask.shape[1], np.array(values, dtype=np.float64))
    return out
