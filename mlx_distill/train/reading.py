"""What an objective reads off a model: logits at the positions that count, at once where they are small, tile by tile where not."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
from jaxtyping import Float, Int
from mlx.utils import tree_flatten

from mlx_distill.losses.cross_tokenizer import CellMap, cell_kl
from mlx_distill.losses.linear import linear_cross_entropy, linear_rows, sparse_linear_kl
from mlx_distill.losses.numerics import row_logsumexp
from mlx_distill.losses.sparse import sparse_forward_kl
from mlx_distill.models.load import head, hidden_states, project
from mlx_distill.models.packed import segment_caches
from mlx_distill.records import Batch, TopK

# Logits of at most so many numbers are made at once (64 MiB in float32); of more, no two tiles exist together.
DENSE_LIMIT = 1 << 24


def trunk(model: nn.Module, batch: Batch, positions: Int[mx.array, " a"]) -> Float[mx.array, "a d"]:
    """The hidden states after the final norm at some places of the flattened inputs, none of a line's rows seeing another."""
    caches = None if batch.segments is None else segment_caches(model, batch.segments)
    hidden = hidden_states(model, batch.inputs, caches)
    return hidden.reshape(-1, hidden.shape[-1])[positions]


def is_small(model: nn.Module, count: int, dense_limit: int = DENSE_LIMIT) -> bool:
    """Whether the logits at ``count`` positions are made at once, by a plain head or by one that is made of parts."""
    plain, _, small = _form(head(model), count, dense_limit)
    return small or not plain


def _form(layer: nn.Module, count: int, dense_limit: int) -> tuple[bool, bool, bool]:
    plain = isinstance(layer, nn.Linear | nn.Embedding | nn.QuantizedLinear | nn.QuantizedEmbedding)
    learns = bool(tree_flatten(layer.trainable_parameters()))
    return plain, learns, plain and count * layer.weight.shape[0] <= dense_limit


class Reader:
    """The hidden states of a batch at the ``a`` positions that count, and the losses there.

    Dense and tiled agree in value and gradient to rounding. A head that learns needs a gradient of its own, which of the tiled losses only
    the cross-entropy gives, to a plain weight without a bias: the others read it densely.

    Args:
        model: Of mlx-lm's cut: ``lm_head`` or the tied embedding is the head.
        hidden: From :func:`trunk`.
        dense_limit: Numbers in the logits up to which they are made at once.
    """

    def __init__(self, model: nn.Module, hidden: Float[mx.array, "a d"], dense_limit: int = DENSE_LIMIT) -> None:
        self.hidden = hidden
        self.head = head(model)
        self.plain, self.learns, self.small = _form(self.head, hidden.shape[0], dense_limit)
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
        simple = self.plain and "scales" not in self.head and "bias" not in self.head
        if not self.small and (simple if self.learns else self.plain):
            return linear_cross_entropy(self.hidden, self.head, labels, train_head=self.learns)
        z = self.logits()
        return row_logsumexp(z) - mx.take_along_axis(z, labels[:, None], axis=1)[:, 0]

    @property
    def _dense(self) -> bool:
        return self.small or self.learns or not self.plain

    def sparse_kl(self, index: Int[mx.array, " n"], targets: TopK, temperature: float) -> Float[mx.array, " n"]:
        """:func:`~mlx_distill.losses.sparse.sparse_forward_kl` at ``index``."""
        if not self._dense:
            return sparse_linear_kl(self.hidden[index], self.head, targets, temperature=temperature)
        return sparse_forward_kl(self.logits(index), targets, temperature=temperature)

    def cell_kl(self, index: Int[mx.array, " n"], targets: TopK, cells: CellMap, temperature: float) -> Float[mx.array, " n"]:
        """:func:`~mlx_distill.losses.cross_tokenizer.cell_kl` at ``index``."""
        if self._dense:
            return cell_kl(self.logits(index), targets, cells, temperature=temperature)

        def some(logits: mx.array, at: slice) -> mx.array:
            return cell_kl(logits, TopK(targets.ids[at], targets.logprobs[at]), cells, temperature=temperature)

        return linear_rows(some, self.hidden[index], self.head)
