"""What a training minimizes: terms as sums, their weights from the masks alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from jaxtyping import Float, Int
from mlx.utils import tree_flatten

from mlx_distill.losses.cross_tokenizer import TokenGroups, token_group_kl
from mlx_distill.losses.numerics import row_logsumexp
from mlx_distill.losses.output_head import project
from mlx_distill.losses.tiled import (
    ROWS,
    RowLoss,
    in_slices,
    linear_cross_entropy,
    linear_rows,
    sparse_linear_kl,
)
from mlx_distill.losses.topk import sparse_forward_kl
from mlx_distill.models.forward import head, hidden_states, segment_caches
from mlx_distill.records import Batch, TopK

# Logits of at most so many numbers are made at once (64 MiB in float32); of more, no two tiles exist
# together.
DENSE_LIMIT = 1 << 24


def trunk(model: nn.Module, batch: Batch, positions: Int[mx.array, " a"]) -> Float[mx.array, "a d"]:
    """The hidden states after the final norm at some places of the flattened inputs, none of a line's rows
    seeing another.
    """
    caches = None if batch.segments is None else segment_caches(model, batch.segments)
    hidden = hidden_states(model, batch.inputs, caches)
    return hidden.reshape(-1, hidden.shape[-1])[positions]


def is_small(model: nn.Module, count: int, dense_limit: int = DENSE_LIMIT) -> bool:
    """Whether the logits at ``count`` positions are made at once."""
    return count * _columns(head(model)) <= dense_limit


def _columns(layer: nn.Module) -> int:
    """Width of a head's logits; an adapter has that of what it stands on, and nothing is known of other
    kinds.
    """
    base = layer.get("linear", layer.get("embedding", layer))
    return int(base.weight.shape[0]) if "weight" in base else 0


class LogitReader:
    """The hidden states of a batch at the ``a`` positions that count, and the losses there.

    Dense and tiled agree in value and gradient to rounding. A head that learns, or has an adapter, has no
    tiles and goes through :func:`in_slices`.

    Args:
        model: Of mlx-lm's cut: ``lm_head`` or the tied embedding is the head.
        hidden: From :func:`trunk`.
        dense_limit: Numbers in the logits up to which they are made at once.
    """

    def __init__(
        self, model: nn.Module, hidden: Float[mx.array, "a d"], dense_limit: int = DENSE_LIMIT
    ) -> None:
        self.hidden = hidden
        self.head = head(model)
        self.small = is_small(model, hidden.shape[0], dense_limit)
        learns = sum(weight.size for _, weight in tree_flatten(self.head.trainable_parameters()))
        self.rows = max(ROWS, max(dense_limit, learns) // (8 * max(_columns(self.head), 1)))
        plain = isinstance(self.head, nn.Linear | nn.Embedding | nn.QuantizedLinear | nn.QuantizedEmbedding)
        self.tiled = plain and not learns
        self._logits: mx.array | None = None

    def logits(self, index: Int[mx.array, " n"] | None = None) -> Float[mx.array, "n v"]:
        """Logits in float32 at all positions, or at ``index`` among them."""
        if not self.small and index is not None:
            return project(self.head, self.hidden[index]).astype(mx.float32)
        if self._logits is None:
            self._logits = project(self.head, self.hidden).astype(mx.float32)
        return self._logits if index is None else self._logits[index]

    def cross_entropy(self, labels: Int[mx.array, " a"]) -> Float[mx.array, " a"]:
        """Nats of each label, at all positions."""
        if not self.small and self.tiled:
            return linear_cross_entropy(self.hidden, self.head, labels)

        def nats(z: mx.array, at: slice) -> mx.array:
            return row_logsumexp(z) - mx.take_along_axis(z, labels[at, None], axis=1)[:, 0]

        return self._whole(nats, None)

    def sparse_kl(
        self, index: Int[mx.array, " n"], targets: TopK, temperature: float
    ) -> Float[mx.array, " n"]:
        """:func:`~mlx_distill.losses.topk.sparse_forward_kl` at ``index``."""
        if not self.small and self.tiled:
            return sparse_linear_kl(self.hidden[index], self.head, targets, temperature=temperature)
        return self._whole(
            lambda z, at: sparse_forward_kl(z, _some(targets, at), temperature=temperature), index
        )

    def token_group_kl(
        self, index: Int[mx.array, " n"], targets: TopK, groups: TokenGroups, temperature: float
    ) -> Float[mx.array, " n"]:
        """:func:`~mlx_distill.losses.cross_tokenizer.token_group_kl` at ``index``."""
        return self._whole(
            lambda z, at: token_group_kl(z, _some(targets, at), groups, temperature=temperature), index
        )

    def _whole(self, loss: RowLoss, index: mx.array | None) -> mx.array:
        """A loss of whole rows of logits, at all positions or at some."""
        if self.small:
            return loss(self.logits(index), slice(None))
        hidden = self.hidden if index is None else self.hidden[index]
        return (
            linear_rows(loss, hidden, self.head)
            if self.tiled
            else in_slices(loss, hidden, self.head, self.rows)
        )


def _some(targets: TopK, at: slice) -> TopK:
    return TopK(targets.ids[at], targets.logprobs[at])


@dataclass(frozen=True)
class HeadSplit:
    """Where an objective's graph can be cut: ``positions`` of the hidden states that ``read`` turns into
    sums.
    """

    positions: Callable[[Batch], mx.array]
    read: Callable[[LogitReader, Batch], Mapping[str, mx.array]]
    dense_limit: int = DENSE_LIMIT


@dataclass(frozen=True)
class Objective:
    """Terms of a loss.

    Args:
        weights: Each term's weight in a micro-batch, from the masks alone, on the host. A term's loss is its
            sum over the whole window divided by its weight over the whole window.
        sums: Each term's sum over a micro-batch, a differentiable scalar. Called only where a weight is above
            zero.
        coefficients: What each term counts in the loss; its keys are the terms.
        head_split: The same sums in two steps, trunk and head, where they are read off hidden states: see
            :func:`read_objective`.
    """

    weights: Callable[[Batch], Mapping[str, float]]
    sums: Callable[[nn.Module, Batch], Mapping[str, mx.array]]
    coefficients: Mapping[str, float] = field(default_factory=lambda: {"text": 1.0})
    head_split: HeadSplit | None = None


def read_objective(
    weights: Callable[[Batch], Mapping[str, float]],
    positions: Callable[[Batch], mx.array],
    read: Callable[[LogitReader, Batch], Mapping[str, mx.array]],
    coefficients: Mapping[str, float],
    dense_limit: int = DENSE_LIMIT,
) -> Objective:
    """An objective whose terms are read off the hidden states at some positions, at once or with the head
    apart from the trunk.

    Args:
        weights, coefficients: As for :class:`Objective`.
        positions: The places ``[a]`` in the flattened inputs of a batch that meet the head.
        read: Each term's sum, from a reader of those positions.
        dense_limit: Logits of at most so many numbers are made at once, more tile by tile; both give the same
            numbers.
    """

    def sums(model: nn.Module, batch: Batch) -> Mapping[str, mx.array]:
        return read(LogitReader(model, trunk(model, batch, positions(batch)), dense_limit), batch)

    return Objective(weights, sums, coefficients, HeadSplit(positions, read, dense_limit))


def trained_tokens(batch: Batch) -> float:
    """How many labels of a batch are trained on."""
    return float(np.array(batch.mask).sum(dtype=np.float64))


def sft(*, dense_limit: int = DENSE_LIMIT) -> Objective:
    r"""Supervised fine-tuning: :math:`-\sum \log q(\mathrm{token})` over the trained tokens, in nats; one
    term, ``text``.

    Only the positions that are trained on meet the head.

    Args:
        dense_limit: Logits of at most so many numbers are made at once, more tile by tile; both give the same
            numbers.
    """

    def positions(batch: Batch) -> mx.array:
        # On the host, because a shape depends on it.
        return mx.array(np.flatnonzero(np.array(batch.mask)).astype(np.int32))

    def read(reader: LogitReader, batch: Batch) -> dict[str, mx.array]:
        where = positions(batch)
        return {
            "text": (
                reader.cross_entropy(batch.labels.reshape(-1)[where]) * batch.mask.reshape(-1)[where]
            ).sum()
        }

    return read_objective(
        lambda batch: {"text": trained_tokens(batch)}, positions, read, {"text": 1.0}, dense_limit
    )
