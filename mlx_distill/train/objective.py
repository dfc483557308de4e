"""Training objectives: terms as sums, with weights from the masks alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from jaxtyping import Float, Int
from mlx.utils import tree_flatten

from mlx_distill.losses.numerics import row_logsumexp
from mlx_distill.losses.output_head import HeadWeight, head_weight, is_constant, project, soft_capped
from mlx_distill.losses.tiled import RowLoss, linear_cross_entropy, linear_rows
from mlx_distill.models.forward import head, head_columns, hidden_states, segment_caches, softcap
from mlx_distill.records import Batch

# Up to so many numbers (64 MiB in float32) the logits of a batch are computed at once, above tile by tile.
DENSE_LIMIT = 1 << 24


# Through a head that trains or has an adapter, at least so many positions are projected together; more only
# while their logits are at most an eighth of the dense limit, or of the head's trainable parameters: in the
# backward pass some eight arrays as large as those logits exist at once.
MIN_ROWS = 32


def trunk(model: nn.Module, batch: Batch, positions: Int[mx.array, " a"]) -> Float[mx.array, "a d"]:
    """The hidden states after the final norm at the given positions of the flattened inputs; packed rows do
    not attend to each other.
    """
    caches = None if batch.segments is None else segment_caches(model, batch.segments)
    hidden = hidden_states(model, batch.inputs, caches)
    return hidden.reshape(-1, hidden.shape[-1])[positions]


def is_small(model: nn.Module, count: int, dense_limit: int = DENSE_LIMIT) -> bool:
    """Whether the logits at ``count`` positions are computed at once."""
    return count * head_columns(model) <= dense_limit


class LogitReader:
    """Losses of the logits at the ``a`` positions of a batch that count.

    Below ``dense_limit`` the logits are computed once and shared by the losses. Above it each loss is
    computed tile by tile or a few rows at a time, and the logits never exist as a whole. Dense and tiled
    agree in value and gradient to rounding.

    Args:
        model: An mlx-lm model: its head is ``lm_head`` or the tied embedding.
        hidden: From :func:`trunk`.
        dense_limit: Numbers in the logits up to which they are computed at once.
    """

    def __init__(
        self, model: nn.Module, hidden: Float[mx.array, "a d"], dense_limit: int = DENSE_LIMIT
    ) -> None:
        self.hidden = hidden
        self.head, self.softcap = head(model), softcap(model)
        self.small = is_small(model, hidden.shape[0], dense_limit)
        self._constant = head_weight(self.head, self.softcap) if is_constant(self.head) else None
        trainable = sum(weight.size for _, weight in tree_flatten(self.head.trainable_parameters()))
        self.rows = max(MIN_ROWS, max(dense_limit, trainable) // (8 * max(head_columns(model), 1)))
        self._logits: mx.array | None = None

    @property
    def tiled_head(self) -> HeadWeight | None:
        """The head for the tiled losses; None where the logits are computed at once, or where the head trains
        or has an adapter.
        """
        return None if self.small else self._constant

    def logits(self, index: Int[mx.array, " n"] | None = None) -> Float[mx.array, "n v"]:
        """Logits in float32 at all positions, or at ``index`` among them."""
        if not self.small and index is not None:
            return self._project(self.hidden[index])
        if self._logits is None:
            self._logits = self._project(self.hidden)
        return self._logits if index is None else self._logits[index]

    def _project(self, hidden: mx.array) -> mx.array:
        return project(self.head, hidden, self.softcap).astype(mx.float32)

    def cross_entropy(self, labels: Int[mx.array, " a"]) -> Float[mx.array, " a"]:
        """Cross-entropy of the label at each position, in nats."""
        if self.tiled_head is not None:
            return linear_cross_entropy(self.hidden, self.tiled_head, labels)

        def nats(z: mx.array, at: slice) -> mx.array:
            return row_logsumexp(z) - mx.take_along_axis(z, labels[at, None], axis=1)[:, 0]

        return self.row_losses(nats, None)

    def row_losses(self, loss: RowLoss, index: Int[mx.array, " n"] | None) -> Float[mx.array, " n"]:
        """A loss of whole rows of logits (:func:`~mlx_distill.losses.tiled.linear_rows`), at all positions or
        at ``index`` among them.
        """
        if self.small:
            return loss(self.logits(index), slice(None))
        hidden = self.hidden if index is None else self.hidden[index]
        if self.tiled_head is not None:
            return linear_rows(loss, hidden, self.tiled_head)
        cap = self.softcap
        capped = loss if cap is None else lambda z, at: loss(soft_capped(z, cap), at)
        return linear_rows(capped, hidden, self.head, rows=self.rows)


@dataclass(frozen=True)
class HeadSplit:
    """An objective in two parts, trunk and head: ``positions`` of the hidden states, and ``read``, which
    computes the terms' sums from them.
    """

    positions: Callable[[Batch], mx.array]
    read: Callable[[LogitReader, Batch], Mapping[str, mx.array]]
    dense_limit: int = DENSE_LIMIT


@dataclass(frozen=True)
class Objective:
    """Terms of a loss.

    Args:
        weights: Each term's weight in a micro-batch, from the masks alone, on the host. A term's loss is its
            sum over the accumulation window divided by its weight over the window.
        sums: Each term's sum over a micro-batch, a differentiable scalar. Called only if a weight is above
            zero.
        coefficients: Each term's factor in the loss; its keys are the terms.
        head_split: The same sums in two steps, trunk and head: see :func:`read_objective`.
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
    """An objective computed from the hidden states at some positions, in one graph or with head and trunk
    separate.

    Args:
        weights, coefficients: As for :class:`Objective`.
        positions: The positions ``[a]`` of a batch's flattened inputs that are projected to logits.
        read: Each term's sum, from a reader of those positions.
        dense_limit: Up to so many numbers the logits are computed at once, above tile by tile, with equal
            results.
    """

    def sums(model: nn.Module, batch: Batch) -> Mapping[str, mx.array]:
        return read(LogitReader(model, trunk(model, batch, positions(batch)), dense_limit), batch)

    return Objective(weights, sums, coefficients, HeadSplit(positions, read, dense_limit))


def trained_tokens(batch: Batch) -> float:
    """The number of trained labels of a batch."""
    return float(np.array(batch.mask).sum(dtype=np.float64))


def sft(*, dense_limit: int = DENSE_LIMIT) -> Objective:
    r"""Supervised fine-tuning: :math:`-\sum \log q(\mathrm{token})` over the trained tokens, in nats; one
    term, ``text``.

    Only the trained positions are projected to logits.

    Args:
        dense_limit: Up to so many numbers the logits are computed at once, above tile by tile, with equal
            results.
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
