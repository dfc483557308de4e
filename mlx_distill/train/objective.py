"""What a training minimizes: terms as sums, their weights from the masks alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_distill.records import Batch
from mlx_distill.train.reading import DENSE_LIMIT, Reader, trunk


@dataclass(frozen=True)
class Cut:
    """Where an objective's graph can be cut: ``positions`` of the hidden states that ``read`` turns into sums."""

    positions: Callable[[Batch], mx.array]
    read: Callable[[Reader, Batch], Mapping[str, mx.array]]
    dense_limit: int = DENSE_LIMIT


@dataclass(frozen=True)
class Objective:
    """Terms of a loss.

    Args:
        weights: Each term's weight in a micro-batch, from the masks alone, on the host. A term's loss is its sum over the whole
            window divided by its weight over the whole window.
        sums: Each term's sum over a micro-batch, a differentiable scalar. Called only where a weight is above zero.
        coefficients: What each term counts in the loss; its keys are the terms.
        cut: The same sums in two steps, trunk and head, where they are read off hidden states: see :func:`read_objective`.
    """

    weights: Callable[[Batch], Mapping[str, float]]
    sums: Callable[[nn.Module, Batch], Mapping[str, mx.array]]
    coefficients: Mapping[str, float] = field(default_factory=lambda: {"text": 1.0})
    cut: Cut | None = None


def read_objective(
    weights: Callable[[Batch], Mapping[str, float]],
    positions: Callable[[Batch], mx.array],
    read: Callable[[Reader, Batch], Mapping[str, mx.array]],
    coefficients: Mapping[str, float],
    dense_limit: int = DENSE_LIMIT,
) -> Objective:
    """An objective whose terms are read off the hidden states at some positions, at once or with the head apart from the trunk.

    Args:
        weights, coefficients: As for :class:`Objective`.
        positions: The places ``[a]`` in the flattened inputs of a batch that meet the head.
        read: Each term's sum, from a reader of those positions.
        dense_limit: Logits of at most so many numbers are made at once, more tile by tile; both give the same numbers.
    """

    def sums(model: nn.Module, batch: Batch) -> Mapping[str, mx.array]:
        return read(Reader(model, trunk(model, batch, positions(batch)), dense_limit), batch)

    return Objective(weights, sums, coefficients, Cut(positions, read, dense_limit))


def trained_tokens(batch: Batch) -> float:
    """How many labels of a batch are trained on."""
    return float(np.array(batch.mask).sum(dtype=np.float64))


def sft(*, dense_limit: int = DENSE_LIMIT) -> Objective:
    r"""Supervised fine-tuning: :math:`-\sum \log q(\mathrm{token})` over the trained tokens, in nats; one term, ``text``.

    Only the positions that are trained on meet the head.

    Args:
        dense_limit: Logits of at most so many numbers are made at once, more tile by tile; both give the same numbers.
    """

    def positions(batch: Batch) -> mx.array:
        # On the host, because a shape depends on it.
        return mx.array(np.flatnonzero(np.array(batch.mask)).astype(np.int32))

    def read(reader: Reader, batch: Batch) -> dict[str, mx.array]:
        where = positions(batch)
        return {"text": (reader.cross_entropy(batch.labels.reshape(-1)[where]) * batch.mask.reshape(-1)[where]).sum()}

    return read_objective(lambda batch: {"text": trained_tokens(batch)}, positions, read, {"text": 1.0}, dense_limit)
