"""What a training measures of its validation rows: their loss, and what the model answers."""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from jaxtyping import Float

from mlx_distill.recipe import VALIDATION_METRICS
from mlx_distill.records import Batch
from mlx_distill.runtime import random_key, set_random_key
from mlx_distill.train.distributed import Ranks
from mlx_distill.train.gradients import loss_of_sums
from mlx_distill.train.objective import LogitReader, Objective, trunk

# Figures of the model in training, by name, None where there is nothing to measure them on.
Measure = Callable[[nn.Module], Mapping[str, float | None]]


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Inside, nothing drops out; behind it the model's mode and the random state are what they were."""
    mode, key = model.training, random_key()
    model.eval()
    try:
        yield
    finally:
        model.train(mode)
        set_random_key(key)


def measure_answers(model: nn.Module, measure: Measure, ranks: Ranks | None = None) -> dict[str, float]:
    """The figures of a model in training, without a trace in it: see :func:`evaluation_mode`. MLX's buffers
    are freed before and after, so that those of a step of training and of the answers are not held at once.

    Every rank calls it; rank 0 measures. Figures that are no finite number are left out.
    """
    ranks, text = ranks or Ranks(), ""
    if ranks.rank == 0:
        mx.clear_cache()
        with evaluation_mode(model):
            figures = measure(model)
        text = json.dumps({k: v for k, v in figures.items() if v is not None and math.isfinite(v)})
        gc.collect()  # an engine's rows refer to each other, and hold its caches
        mx.clear_cache()
    return dict(json.loads(ranks.broadcast_text(text)))


def is_better(value: float, best: float | None, metric: str) -> bool:
    """Whether a value of one of :data:`~mlx_distill.recipe.VALIDATION_METRICS` is better than the best so
    far; the first one is.

    >>> is_better(0.3, 0.4, "loss"), is_better(0.3, 0.4, "accuracy"), is_better(0.4, 0.4, "accuracy")
    (True, False, False)
    """
    if best is None:
        return True
    return value > best if VALIDATION_METRICS[metric] == "higher" else value < best


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
    weights, sums = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    with evaluation_mode(model):
        for batch in batches[ranks.rank :: ranks.size]:
            own = {name: w for name, w in objective.weights(batch).items() if w > 0}
            if own:
                term_sums = objective.sums(model, batch)
                for name in own:
                    weights[name] += own[name]
                    sums[name] += term_sums[name].astype(mx.float32).item()
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
