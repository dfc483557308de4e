"""The gradient of one micro-batch in two stages: the trunk (embeddings to last hidden state), which may be
compiled, and the head (output projection and losses).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_distill.models.forward import head, hidden_size, hidden_states, is_tied, segment_caches
from mlx_distill.records import Batch
from mlx_distill.runtime import random_key, set_random_key
from mlx_distill.train.objective import HeadSplit, LogitReader

FlatGradients = list[tuple[str, mx.array]]
# (trainable parameters, cotangent [b, l, d], inputs [b, l], segments [b, l] where rows are packed) -> hidden
# states [b, l, d], gradients
Trunk = Callable[..., tuple[mx.array, Any]]


def make_trunk(model: nn.Module, compiled: bool = False) -> Trunk:
    """A function that builds the graph of a batch's hidden states and, for a cotangent, of the trunk's
    gradient.

    It evaluates nothing. A compiled trunk is traced once for each shape of batch; the frozen parameters and
    the model's mode are constants in it, so they must not change. Random numbers are the same as without
    compilation.

    Args:
        model: With mlx-lm's layout, ``model.model`` and a head. A call leaves tracers in its parameters: the
            caller puts the arrays back.
        compiled: Whether to use ``mx.compile``.
    """

    def trunk(
        parameters: Any, cotangent: mx.array, inputs: mx.array, *segments: mx.array
    ) -> tuple[mx.array, Any]:
        def inner_product(current: Any) -> tuple[mx.array, mx.array]:
            model.update(current)
            hidden = hidden_states(model, inputs, segment_caches(model, segments[0]) if segments else None)
            return (hidden.astype(mx.float32) * cotangent).sum(), hidden

        (_, hidden), gradients = mx.value_and_grad(inner_product)(parameters)
        return hidden, gradients

    if not compiled:
        return trunk
    mx.eval(model.parameters())  # an array that is not evaluated yet would be computed at each step
    return mx.compile(trunk, inputs=mx.random.state, outputs=mx.random.state)


def two_stage_grad(
    model: nn.Module,
    batch: Batch,
    split: HeadSplit,
    scales: Mapping[str, float],
    trunk: Trunk | None = None,
    *,
    in_place: bool | None = None,
) -> tuple[FlatGradients, dict[str, mx.array]]:
    """One micro-batch's gradient by path, not evaluated yet, and the terms' sums, evaluated, with trunk and
    head differentiated one after the other.

    The tiled head evaluates the hidden states, and an evaluation inside a differentiated function keeps every
    array that it computes, also those which the backward pass does not need or a checkpointed layer computes
    again (measured: 2.8 GB where 0.3 are needed). So three steps are taken: the hidden states are evaluated
    outside of any differentiated function; the head gives the terms and the cotangent of the hidden states;
    the trunk's gradient is that of ``(hidden * cotangent).sum()``.

    The plain way runs the trunk a second time for the last step, from the same random state. With
    ``in_place`` the graph of the first run is used: it was built with a cotangent of zeros, which
    :func:`fill_in_place` overwrites. Both give the same numbers.

    Args:
        model: Its trainable parameters are differentiated, and keep their values.
        batch: The micro-batch.
        split: Positions and terms.
        scales: The factor of each term that counts.
        trunk: From :func:`make_trunk`; by default one that is not compiled.
        in_place: Whether to overwrite the cotangent; by default where :func:`can_fill_in_place` says that
            this backend allows it.
    """
    if in_place is None:
        in_place = can_fill_in_place(str(mx.default_device()))
    trunk = trunk or make_trunk(model)
    parameters, layer, random_before = model.trainable_parameters(), head(model), mx.random.state[0]
    positions = split.positions(batch)
    inputs = [batch.inputs] if batch.segments is None else [batch.inputs, batch.segments]
    cotangent = mx.array(np.zeros((*batch.inputs.shape, hidden_size(model)), np.float32))

    def head_loss(learned: Any, hidden: mx.array) -> tuple[mx.array, dict[str, mx.array]]:
        layer.update(learned)
        reader = LogitReader(model, hidden.reshape(-1, hidden.shape[-1])[positions], split.dense_limit)
        return scaled(split.read(reader, batch), scales)

    try:
        hidden, gradients = trunk(parameters, cotangent, *inputs)
        model.update(parameters)
        mx.eval(hidden)
        (_, term_sums), (head_gradients, by_hidden) = mx.value_and_grad(head_loss, argnums=(0, 1))(
            layer.trainable_parameters(), hidden
        )
        by_hidden = by_hidden.astype(mx.float32)
        mx.eval(term_sums, head_gradients, by_hidden)
        if in_place:
            fill_in_place(cotangent, by_hidden)
        else:
            random_after = random_key()
            set_random_key(random_before.tolist())
            _, gradients = trunk(parameters, by_hidden, *inputs)
            set_random_key(random_after)
    finally:
        model.update(parameters)
    return _add_head(model, tree_flatten(gradients), tree_flatten(head_gradients)), term_sums


def fill_in_place(array: mx.array, values: mx.array) -> None:
    """Overwrite the numbers of an evaluated array that unevaluated graphs already use as an input.

    MLX has no such operation. numpy's view of an evaluated array shares its memory, and writing to the view
    changes what the graphs read later. MLX does not promise this: call it only where
    :func:`can_fill_in_place` is True.

    Args:
        array: float32, evaluated, made from a numpy array (so that no other array shares its memory).
        values: Of the same shape and type.
    """
    np.array(array, copy=False)[...] = np.array(values)


@cache
def can_fill_in_place(device: str) -> bool:
    """Whether :func:`fill_in_place` works on the default device: tried once, with a graph that is built
    before and evaluated after.

    Args:
        device: The name of ``mx.default_device()``, for which the answer is cached.
    """
    # Large enough not to come from an allocator's pool of small buffers.
    array, values = mx.array(np.zeros((256, 256), np.float32)), mx.full((256, 256), 2.0)
    graph = array + 1
    try:
        fill_in_place(array, values)
    except (RuntimeError, TypeError, ValueError):  # no view, or one that cannot be written to
        return False
    return bool((graph == 3.0).all().item())


def scaled(sums: Mapping[str, mx.array], scales: Mapping[str, float]) -> tuple[mx.array, dict[str, mx.array]]:
    """The loss, and the terms' sums of which it consists, in float32."""
    term_sums = {name: sums[name].astype(mx.float32) for name in scales}
    return sum((scales[name] * part for name, part in term_sums.items()), mx.array(0.0)), term_sums


def _add_head(model: nn.Module, trunk: FlatGradients, head_gradients: FlatGradients) -> FlatGradients:
    """The gradients of trunk and head together: a tied embedding gets the sum, an untied head, which the
    trunk does not use, its own.
    """
    if not head_gradients:
        return trunk
    layer = head(model)
    prefix = next(path for path, module in model.named_modules() if module is layer)
    tied = is_tied(model)
    own = {f"{prefix}.{name}": gradient for name, gradient in head_gradients}
    return [
        (path, (own[path] + gradient if tied else own[path]) if path in own else gradient)
        for path, gradient in trunk
    ]
