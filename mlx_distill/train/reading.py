"""What an objective reads off a model: logits at the positions that count, at once where they are small, tile by tile where not."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from jaxtyping import Float, Int
from mlx.utils import tree_flatten

from mlx_distill.losses.cross_tokenizer import CellMap, cell_kl
from mlx_distill.losses.numerics import row_logsumexp
from mlx_distill.losses.tiled import linear_cross_entropy, linear_rows, sparse_linear_kl
from mlx_distill.losses.topk import sparse_forward_kl
from mlx_distill.models.forward import segment_caches
from mlx_distill.models.load import head, hidden_states, project
from mlx_distill.records import Batch, TopK
from mlx_distill.train.randomness import random_key, set_random_key

# Logits of at most so many numbers are made at once (64 MiB in float32); of more, no two tiles exist together.
DENSE_LIMIT = 1 << 24
# Of a head that has no tiles, at least so many positions are read together. In the backward pass some eight arrays as large as their
# logits exist at once, so the logits of more positions are no more than an eighth of the limit, or of what learns in the head.
ROWS = 32

# From logits [r, v] and the slice of the positions that they belong to, to one number a row.
RowLoss: TypeAlias = Callable[[mx.array, slice], mx.array]


def trunk(model: nn.Module, batch: Batch, positions: Int[mx.array, " a"]) -> Float[mx.array, "a d"]:
    """The hidden states after the final norm at some places of the flattened inputs, none of a line's rows seeing another."""
    caches = None if batch.segments is None else segment_caches(model, batch.segments)
    hidden = hidden_states(model, batch.inputs, caches)
    return hidden.reshape(-1, hidden.shape[-1])[positions]


def is_small(model: nn.Module, count: int, dense_limit: int = DENSE_LIMIT) -> bool:
    """Whether the logits at ``count`` positions are made at once."""
    return count * _columns(head(model)) <= dense_limit


def _columns(layer: nn.Module) -> int:
    """Width of a head's logits; an adapter has that of what it stands on, and nothing is known of other kinds."""
    base = layer.get("linear", layer.get("embedding", layer))
    return int(base.weight.shape[0]) if "weight" in base else 0


class Reader:
    """The hidden states of a batch at the ``a`` positions that count, and the losses there.

    Dense and tiled agree in value and gradient to rounding. A head that learns, or has an adapter, has no tiles and goes through
    :func:`in_slices`.

    Args:
        model: Of mlx-lm's cut: ``lm_head`` or the tied embedding is the head.
        hidden: From :func:`trunk`.
        dense_limit: Numbers in the logits up to which they are made at once.
    """

    def __init__(self, model: nn.Module, hidden: Float[mx.array, "a d"], dense_limit: int = DENSE_LIMIT) -> None:
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

    def sparse_kl(self, index: Int[mx.array, " n"], targets: TopK, temperature: float) -> Float[mx.array, " n"]:
        """:func:`~mlx_distill.losses.topk.sparse_forward_kl` at ``index``."""
        if not self.small and self.tiled:
            return sparse_linear_kl(self.hidden[index], self.head, targets, temperature=temperature)
        return self._whole(lambda z, at: sparse_forward_kl(z, _some(targets, at), temperature=temperature), index)

    def cell_kl(self, index: Int[mx.array, " n"], targets: TopK, cells: CellMap, temperature: float) -> Float[mx.array, " n"]:
        """:func:`~mlx_distill.losses.cross_tokenizer.cell_kl` at ``index``."""
        return self._whole(lambda z, at: cell_kl(z, _some(targets, at), cells, temperature=temperature), index)

    def _whole(self, loss: RowLoss, index: mx.array | None) -> mx.array:
        """A loss of whole rows of logits, at all positions or at some."""
        if self.small:
            return loss(self.logits(index), slice(None))
        hidden = self.hidden if index is None else self.hidden[index]
        return linear_rows(loss, hidden, self.head) if self.tiled else in_slices(loss, hidden, self.head, self.rows)


def _some(targets: TopK, at: slice) -> TopK:
    return TopK(targets.ids[at], targets.logprobs[at])


def in_slices(loss: RowLoss, hidden: Float[mx.array, "n d"], layer: nn.Module, rows: int = ROWS) -> Float[mx.array, " n"]:
    """Any loss of whole logit rows through any head, one that learns or has an adapter too; memory is ``rows x v``.

    Value and gradient, that of the head's own parameters included, equal the dense form. The logits of a slice are dropped after its value
    is known, and computed again in the backward pass, where the head draws the same random numbers. *Eager*, as all that is in
    :mod:`mlx_distill.losses.tiled`: keep it outside ``mx.compile`` and ``mx.checkpoint``.

    Args:
        loss: From logits ``[r, v]`` (float32) and the slice of the positions that they belong to, to one number a row; a row's loss may
            depend on its own logits only.
        hidden: Last hidden states, any float type.
        layer: The head; its trainable parameters get a gradient, and stay as they are.
        rows: Positions whose logits exist at the same time.
    """
    if hidden.shape[0] == 0:
        return mx.zeros((0,))
    own = tree_flatten(layer.trainable_parameters())
    slices = [slice(i, min(i + rows, hidden.shape[0])) for i in range(0, hidden.shape[0], rows)]
    keys: list[list[int]] = []

    def logits(some: mx.array, *weights: mx.array) -> mx.array:
        layer.load_weights([(name, weight) for (name, _), weight in zip(own, weights, strict=True)], strict=False)
        return project(layer, some).astype(mx.float32)

    @mx.custom_function
    def node(arrays: list[mx.array]) -> mx.array:
        some, *weights = map(_detached, arrays)
        values = []
        for at in slices:
            keys.append(random_key())
            z = _detached(logits(some[at], *weights))
            values.append(_detached(loss(z, at)))
        layer.load_weights(own, strict=False)
        return mx.concatenate(values)

    @node.vjp
    def back(arrays: list[mx.array], cotangent: mx.array, _: mx.array) -> list[mx.array]:
        (some, *weights), by_value, after = map(_detached, arrays), _detached(cotangent), random_key()
        by_hidden, by_weights = [], [mx.zeros(weight.shape) for weight in weights]
        for at, key in zip(slices, keys, strict=True):
            set_random_key(key)
            z = _detached(logits(some[at], *weights))
            by_logit = _detached(mx.vjp(lambda z, at=at: loss(z, at), [z], [by_value[at]])[1][0])
            del z
            set_random_key(key)
            found = mx.vjp(logits, [some[at], *weights], [by_logit])[1]
            by_hidden.append(_detached(found[0]))
            by_weights = [_detached(total + part) for total, part in zip(by_weights, found[1:], strict=True)]
            del found
        set_random_key(after)
        layer.load_weights(own, strict=False)
        return [mx.concatenate(by_hidden), *(total.astype(weight.dtype) for total, weight in zip(by_weights, weights, strict=True))]

    out = node([hidden, *(weight for _, weight in own)])
    assert isinstance(out, mx.array)
    return out


def _detached(x: mx.array) -> mx.array:
    """The same numbers, evaluated, in no graph: what is computed inside a differentiated function keeps all that it was made of."""
    return mx.array(np.array(x.astype(mx.float32), copy=False)).astype(x.dtype)
