"""The gradient of one micro-batch in two parts: the trunk, laid out at once and compiled where that is
wanted, and the head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_distill.models.forward import head, hidden_states, segment_caches
from mlx_distill.records import Batch
from mlx_distill.runtime import random_key, set_random_key
from mlx_distill.train.objective import HeadSplit, LogitReader

Flat = list[tuple[str, mx.array]]
# (trainable parameters, cotangent [b, l, d], inputs [b, l], segments [b, l] where rows are packed) -> hidden
# states [b, l, d], gradients
Trunk = Callable[..., tuple[mx.array, Any]]


def make_trunk(model: nn.Module, compiled: bool = False) -> Trunk:
    """A function that lays out the hidden states of a batch and, for a cotangent, the gradient of the trunk's
    parameters.

    Nothing of what it gives is evaluated. Compiled, it is traced once for each shape of batch; the parameters
    that do not move and the model's mode are constants then, so they have to be what they were. What is
    random comes out the same.

    Args:
        model: Of mlx-lm's cut. A call leaves tracers in its parameters: whoever calls puts them back.
        compiled: Whether ``mx.compile`` fuses it.
    """

    def trunk(
        parameters: Any, cotangent: mx.array, inputs: mx.array, *segments: mx.array
    ) -> tuple[mx.array, Any]:
        def lower(current: Any) -> tuple[mx.array, mx.array]:
            model.update(current)
            hidden = hidden_states(model, inputs, segment_caches(model, segments[0]) if segments else None)
            return (hidden.astype(mx.float32) * cotangent).sum(), hidden

        (_, hidden), gradients = mx.value_and_grad(lower)(parameters)
        return hidden, gradients

    if not compiled:
        return trunk
    mx.eval(model.parameters())  # what is not computed yet would be computed in each step
    return mx.compile(trunk, inputs=mx.random.state, outputs=mx.random.state)


def two_stage_grad(
    model: nn.Module, batch: Batch, cut: HeadSplit, scales: Mapping[str, float], trunk: Trunk | None = None
) -> tuple[Flat, dict[str, mx.array]]:
    """One micro-batch's gradient by path, not evaluated yet, and the terms' sums, evaluated, with the head
    apart from the trunk.

    The tiled head evaluates the hidden states, and an evaluation inside a differentiated function keeps every
    array that it makes, also what the backward pass does not need, also inside a recomputed layer (measured:
    2.8 GB where 0.3 are needed). So the trunk's gradient is laid out first, lazily, from a cotangent that is
    still empty; then the hidden states are evaluated, the head gives value and cotangent, and the cotangent
    is filled in. The trunk runs forward once.

    Args:
        model: Its trainable parameters are differentiated, and stay as they are.
        batch: The micro-batch.
        cut: Positions and terms.
        scales: The factor on each term that counts.
        trunk: From :func:`make_trunk`; by default a plain one.
    """
    parameters, layer, before = model.trainable_parameters(), head(model), mx.random.state[0]
    where, lay_out = cut.positions(batch), trunk or make_trunk(model)
    inputs = [batch.inputs] if batch.segments is None else [batch.inputs, batch.segments]
    cotangent = mx.array(np.zeros((*batch.inputs.shape, _width(model)), np.float32))

    def upper(learns: Any, hidden: mx.array) -> tuple[mx.array, dict[str, mx.array]]:
        layer.update(learns)
        reader = LogitReader(model, hidden.reshape(-1, hidden.shape[-1])[where], cut.dense_limit)
        return scaled(cut.read(reader, batch), scales)

    try:
        hidden, gradients = lay_out(parameters, cotangent, *inputs)
        model.update(parameters)
        mx.eval(hidden)
        (_, parts), (by_head, by_hidden) = mx.value_and_grad(upper, argnums=(0, 1))(
            layer.trainable_parameters(), hidden
        )
        by_hidden = by_hidden.astype(mx.float32)
        mx.eval(parts, by_head, by_hidden)
        if not _fill(cotangent, by_hidden):
            after = random_key()
            set_random_key(before.tolist())
            _, gradients = lay_out(parameters, by_hidden, *inputs)
            set_random_key(after)
    finally:
        model.update(parameters)
    return _joined(model, tree_flatten(gradients), tree_flatten(by_head)), parts


def _fill(array: mx.array, values: mx.array) -> bool:
    """Write ``values`` into an array that a graph holds already; False where the array did not take them.

    numpy's view of an array shares its memory, for writing too: seen on the CPU, and true by construction
    where memory is unified. A backend that hands out a copy would train on zeros, so the array is read again,
    and the trunk is run a second time there.
    """
    np.array(array, copy=False)[...] = np.array(values)
    return bool(mx.array_equal(array, values, equal_nan=True).item())


def _width(model: Any) -> int:
    """Numbers of a hidden state; a packed embedding tells it on its own."""
    embedding = model.model.embed_tokens
    return int(embedding.dims if hasattr(embedding, "dims") else embedding.weight.shape[-1])


def scaled(sums: Mapping[str, mx.array], scales: Mapping[str, float]) -> tuple[mx.array, dict[str, mx.array]]:
    """The loss, and the terms' sums that it is made of, in float32."""
    parts = {name: sums[name].astype(mx.float32) for name in scales}
    return sum((scales[name] * part for name, part in parts.items()), mx.array(0.0)), parts


def _joined(model: nn.Module, trunk: Flat, head_alone: Flat) -> Flat:
    """The gradients of both parts; an embedding that is the head too gets the sum, a head of its own is not
    in the trunk.
    """
    if not head_alone:
        return trunk
    layer = head(model)
    prefix = next(path for path, module in model.named_modules() if module is layer)
    tied = "lm_head" not in model
    own = {f"{prefix}.{name}": gradient for name, gradient in head_alone}
    return [
        (path, (own[path] + gradient if tied else own[path]) if path in own else gradient)
        for path, gradient in trunk
    ]
