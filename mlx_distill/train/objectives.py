"""What a training minimizes: terms as sums, their weights from the masks alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_distill.records import Batch
from mlx_distill.train.reading import DENSE_LIMIT, Reader


@dataclass(frozen=True)
class Objective:
    """Terms of a loss.

    Args:
        weights: Each term's weight in a micro-batch, from the masks alone, on the host. A term's loss is its sum over the whole
            window divided by its weight over the whole window.
        sums: Each term's sum over a micro-batch, a differentiable scalar. Called only where a weight is above zero.
        coefficients: What each term counts in the loss; its keys are the terms.
    """

    weights: Callable[[Batch], Mapping[str, float]]
    sums: Callable[[nn.Module, Batch], Mapping[str, mx.array]]
    coefficients: Mapping[str, float] = field(default_factory=lambda: {"text": 1.0})


def trained_tokens(batch: Batch) -> float:
    """How many labels of a batch are trained on."""
    return float(np.array(batch.mask).sum(dtype=np.float64))


def sft(*, dense_limit: int = DENSE_LIMIT) -> Objective:
    r"""Supervised fine-tuning: :math:`-\sum \log q(\mathrm{token})` over the trained tokens, in nats; one term, ``text``.

    Only the positions that are trained on meet the head.

    Args:
        dense_limit: Logits of at most so many numbers are made at once, more tile by tile; both give the same numbers.
    """

    def sums(model: nn.Module, batch: Batch) -> dict[str, mx.array]:
        # On the host, because a shape depends on it.
        where = mx.array(np.flatnonzero(np.array(batch.mask)).astype(np.int32))
        reader = Reader(model, batch, where, dense_limit)
        return {"text": (reader.cross_entropy(batch.labels.reshape(-1)[where]) * batch.mask.reshape(-1)[where]).sum()}

    return Objective(weights=lambda batch: {"text": trained_tokens(batch)}, sums=sums, coefficients={"text": 1.0})
