"""Head and loss in one: ``[positions, vocabulary]`` logits never exist, and memory does not know the
vocabulary.

The projection and the loss are computed a tile of 2048 columns at a time, and the gradient by the hidden
state together with the value. These functions are *eager*: they evaluate tile by tile, so keep them outside
``mx.compile`` and ``mx.checkpoint`` (the trunk may be inside either), and let a frozen head reach the
differentiated function by closure: as an argument of ``mx.value_and_grad`` it would be traced, and every tile
of it kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from jaxtyping import Float, Int
from mlx.utils import tree_flatten

from mlx_distill.errors import ConfigError, DataError, ModelError
from mlx_distill.losses import tiles
from mlx_distill.losses.numerics import check_fraction, check_temperature, check_widths
from mlx_distill.losses.output_head import Head, HeadWeight, head_weight, project
from mlx_distill.losses.topk import bucket_kl, check_targets
from mlx_distill.records import TopK
from mlx_distill.runtime import random_key, set_random_key

DIVERGENCES = ("forward_kl", "reverse_kl", "js_divergence", "skew_kl", "total_variation")


def linear_divergence(
    student_hidden: Float[mx.array, "*b d"],
    student_head: Head,
    teacher_hidden: Float[mx.array, "*b e"],
    teacher_head: Head,
    *,
    divergence: str = "forward_kl",
    temperature: float = 1.0,
    beta: float = 0.5,
    lam: float = 0.1,
    train_head: bool = False,
) -> Float[mx.array, "*b"]:
    """A divergence of :mod:`mlx_distill.losses.divergences` from hidden states and heads, equal in value and
    gradient.

    ``divergence(h_s W_sᵀ, h_t W_tᵀ)``, one pass over the vocabulary for the two KLs and two for the others.
    Source of the
    online normaliser: Milakov and Gimelshein 2018, https://arxiv.org/abs/1805.02867.

    Args:
        student_hidden: The student's last hidden states, any float type; the gradient goes here.
        student_head: ``[v, d]`` array, ``nn.Linear``, ``nn.Embedding`` (tied) or their quantised form;
            constant unless ``train_head``.
        teacher_hidden: The teacher's, for the same positions; constant.
        teacher_head: As the student's, with as many columns; its hidden width may differ.
        divergence: One of ``forward_kl``, ``reverse_kl``, ``js_divergence``, ``skew_kl``,
            ``total_variation``.
        temperature: T, by which both sides' logits are divided; T² is inside.
        beta: Of ``js_divergence``.
        lam: Of ``skew_kl``.
        train_head: Give a gradient to the student's dense head weight as well; builds the logits a second
            time in the backward pass.

    Returns:
        Nats (times T²) a position, not averaged.

    Raises:
        ModelError: The heads' widths differ, a head does not fit its hidden state, or a quantised head is to
            be trained.
        ConfigError: An unknown divergence or an impossible setting.

    >>> h, w = mx.array([[1.0, 2.0]]), mx.array([[0.5, 0.0], [0.0, 0.5], [1.0, 1.0]])
    >>> round(abs(linear_divergence(h, w, h, w).item()), 5)
    0.0
    """
    check_temperature(temperature)
    name = _divergence_name(divergence, beta, lam)
    head, other = head_weight(student_head), head_weight(teacher_head)
    check_widths(head.columns, other.columns)
    _check_hidden(student_hidden, head)
    _check_hidden(teacher_hidden, other)
    if student_hidden.shape[:-1] != teacher_hidden.shape[:-1]:
        raise DataError(
            f"the student has positions {student_hidden.shape[:-1]} and the teacher {teacher_hidden.shape[:-1]}",
            fix="give both models' hidden states of the same tokens",
        )
    flat = _flat(student_hidden)
    if flat.shape[0] == 0:
        return mx.zeros(student_hidden.shape[:-1])
    sides = tiles.Sides(
        _detach(flat) / temperature,
        head.over(temperature),
        _detach(_flat(teacher_hidden)) / temperature,
        other.over(temperature),
    )
    pointwise = tiles.pointwise_of(name, beta, lam)
    if name in ("forward_kl", "reverse_kl"):
        value, grad, normals = tiles.kl_one_pass(sides, temperature=temperature, reverse=name == "reverse_kl")
    else:
        value, grad, normals = tiles.two_pass(sides, pointwise, temperature=temperature)

    def by_weight(cotangent: mx.array) -> mx.array:
        return tiles.weight_gradient(sides, normals, pointwise, cotangent, temperature=temperature)

    out = _attach_head(value, grad, flat, head, by_weight) if train_head else _attach(value, grad, flat)
    return out.reshape(student_hidden.shape[:-1])


def sparse_linear_kl(
    student_hidden: Float[mx.array, "*b d"],
    student_head: Head,
    targets: TopK,
    *,
    temperature: float = 1.0,
) -> Float[mx.array, "*b"]:
    """:func:`~mlx_distill.losses.topk.sparse_forward_kl` from the hidden state and the head, equal in value
    and gradient.

    The k target columns are gathered, the rest is one online ``logsumexp`` over the tiles that leaves them
    out.

    Args:
        student_hidden: The student's last hidden states, any float type; the gradient goes here.
        student_head: As in :func:`linear_divergence`; constant.
        targets: ``ids [*b, k]`` and ``logprobs [*b, k]`` in nats over the whole vocabulary at temperature 1.
        temperature: T, for the distribution within the top k.

    Returns:
        Nats a position, not averaged.

    Raises:
        DataError: The targets belong to other positions, or to a wider vocabulary.
        ModelError: The head does not fit the hidden state.

    >>> h, w = mx.array([[1.0, 2.0]]), mx.array([[0.5, 0.0], [0.0, 0.5], [1.0, 1.0]])
    >>> logits = h @ w.T
    >>> logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    >>> round(abs(sparse_linear_kl(h, w, TopK(mx.array([[2]]), logprobs[:, 2:])).item()), 5)
    0.0
    """
    check_temperature(temperature)
    head = head_weight(student_head)
    _check_hidden(student_hidden, head)
    check_targets(student_hidden.shape[:-1], head.columns, targets)
    flat = _flat(student_hidden)
    n, k = flat.shape[0], targets.ids.shape[-1]
    if n == 0:
        return mx.zeros(student_hidden.shape[:-1])
    hidden, ids, logprobs = (
        _detach(flat),
        targets.ids.reshape(n, k),
        mx.stop_gradient(targets.logprobs).reshape(n, k),
    )
    z = tiles.gathered_logits(hidden, head, ids)
    if k == head.columns:
        values, (dz,) = mx.vjp(
            lambda z: bucket_kl(z, None, logprobs, temperature=temperature), [z], [mx.ones((n,))]
        )
        grad = tiles.gathered_rows(dz, head, ids)
    else:
        tail, mean_w = tiles.tail_logsumexp(hidden, head, ids)
        values, (dz, dtail) = mx.vjp(
            lambda z, tail: bucket_kl(z, tail, logprobs, temperature=temperature), [z, tail], [mx.ones((n,))]
        )
        grad = tiles.gathered_rows(dz, head, ids) + dtail[:, None] * mean_w
    mx.eval(values, grad)
    return _attach(values[0], grad, flat).reshape(student_hidden.shape[:-1])


def linear_cross_entropy(
    hidden: Float[mx.array, "*b d"], head: Head, labels: Int[mx.array, "*b"], *, train_head: bool = False
) -> Float[mx.array, "*b"]:
    """Cross-entropy of the labels from the hidden state and the head: ``logsumexp(h Wᵀ) - h W[label]``.

    Source: the same scheme as Wijmans et al. 2024 (cut cross-entropy), https://arxiv.org/abs/2411.09009.

    Args:
        hidden: Last hidden states, any float type; the gradient goes here.
        head: As in :func:`linear_divergence`; constant unless ``train_head``.
        labels: Token ids. Masked positions need some valid id too; weigh them with 0 afterwards.
        train_head: Give a gradient to the dense head weight as well.

    Returns:
        Nats a position, not averaged.

    Raises:
        DataError: A label outside the vocabulary.
        ModelError: The head does not fit the hidden state, or a quantised head is to be trained.

    >>> round(linear_cross_entropy(mx.array([[0.0]]), mx.array([[1.0], [2.0]]), mx.array([1])).item(), 4)
    0.6931
    """
    weight = head_weight(head)
    _check_hidden(hidden, weight)
    flat, ids = _flat(hidden), labels.reshape(-1, 1)
    if flat.shape[0] == 0:
        return mx.zeros(hidden.shape[:-1])
    low, high = (int(extreme) for extreme in np.array([ids.min(), ids.max()]))
    if low < 0 or high >= weight.columns:
        raise DataError(
            f"label {low if low < 0 else high} for a vocabulary of {weight.columns} columns",
            fix="give masked positions any valid token id and weigh them with 0",
        )
    rows = _detach(flat)
    log_z, mean_w = tiles.tail_logsumexp(rows, weight)
    value = log_z - tiles.gathered_logits(rows, weight, ids)[:, 0]
    grad = mean_w - tiles.gathered_rows(mx.ones((flat.shape[0], 1)), weight, ids)
    mx.eval(value, grad)

    def by_weight(cotangent: mx.array) -> mx.array:
        dense = tiles.softmax_weight_gradient(rows, weight, log_z, cotangent)
        return dense.at[ids[:, 0]].add(-cotangent[:, None] * rows)

    out = _attach_head(value, grad, flat, weight, by_weight) if train_head else _attach(value, grad, flat)
    return out.reshape(hidden.shape[:-1])


def linear_rows(
    loss: Callable[[mx.array, slice], mx.array],
    hidden: Float[mx.array, "*b d"],
    head: Head,
    *,
    rows: int = 64,
) -> Float[mx.array, "*b"]:
    """Any loss of whole logit rows, a few rows at a time: value and gradient equal the dense form, memory is
    ``rows x v``.

    For losses that must see the whole vocabulary at once, such as
    :func:`~mlx_distill.losses.cross_tokenizer.token_group_kl`.

    Args:
        loss: From logits ``[r, v]`` (float32) and the slice of the flattened positions that they belong to,
            to one number a row; a row's loss may depend on its own logits only.
        hidden: Last hidden states, any float type; the gradient goes here.
        head: As in :func:`linear_divergence`; constant.
        rows: Positions whose logits exist at the same time.

    Returns:
        What ``loss`` gives, a position.

    Raises:
        ModelError: The head does not fit the hidden state.

    >>> w = mx.array([[1.0], [2.0]])
    >>> linear_rows(lambda logits, at: mx.logsumexp(logits, axis=-1), mx.zeros((1, 1)), w).item() == mx.log(mx.array(2.0)).item()
    True
    """
    weight = head_weight(head)
    _check_hidden(hidden, weight)
    if rows < 1:
        raise ConfigError(f"rows is {rows}", fix="give a positive number")
    flat = _flat(hidden)
    if flat.shape[0] == 0:
        return mx.zeros(hidden.shape[:-1])
    detached, values, grads = _detach(flat), [], []
    for at in tiles.split(detached, rows):
        value, grad = _rows_at(loss, detached[at], slice(at.start, min(at.stop, flat.shape[0])), weight)
        values.append(value)
        grads.append(grad)
    return _attach(mx.concatenate(values), mx.concatenate(grads), flat).reshape(hidden.shape[:-1])


def _rows_at(
    loss: Callable[[mx.array, slice], mx.array], hidden: mx.array, at: slice, head: HeadWeight
) -> tuple[mx.array, mx.array]:
    parts = []
    for start, stop in tiles.tiles(head.columns):
        parts.append(hidden @ head.tile(start, stop).T + head.bias_tile(start, stop))
        mx.eval(parts[-1])
    logits = mx.concatenate(parts, axis=1)
    del parts
    (value,), (by_logit,) = mx.vjp(lambda z: loss(z, at), [logits], [mx.ones((hidden.shape[0],))])
    mx.eval(value, by_logit)
    grad = mx.zeros(hidden.shape)
    for start, stop in tiles.tiles(head.columns):
        grad = grad + by_logit[:, start:stop] @ head.tile(start, stop)
        mx.eval(grad)
    return value, grad


def _divergence_name(divergence: str, beta: float, lam: float) -> str:
    if divergence not in DIVERGENCES:
        raise ConfigError(f"unknown divergence {divergence!r}", fix=f"one of {', '.join(DIVERGENCES)}")
    check_fraction("beta", beta)
    check_fraction("lam", lam)
    if divergence == "js_divergence" and beta in (0, 1):
        return "forward_kl" if beta == 0 else "reverse_kl"
    return "forward_kl" if divergence == "skew_kl" and lam == 0 else divergence


def _check_hidden(hidden: mx.array, head: HeadWeight) -> None:
    if hidden.shape[-1] != head.hidden:
        raise ModelError(
            f"hidden states of width {hidden.shape[-1]} for a head of width {head.hidden}",
            fix="give the hidden state after the final norm and the head of the same model",
        )


def _flat(hidden: mx.array) -> mx.array:
    # The cast stays in the graph, so that the gradient goes back to bfloat16 by itself.
    return hidden.reshape(-1, hidden.shape[-1]).astype(mx.float32)


def _detach(x: mx.array) -> mx.array:
    # Only a way through numpy cuts the graph: stop_gradient and copies keep it, and with it every tile.
    return mx.array(np.array(x))


def _attach(value: mx.array, grad: mx.array, hidden: mx.array) -> mx.array:
    """The value as a function of the hidden state: exactly ``value``, with exactly ``grad`` as its
    derivative.
    """
    return value + ((hidden - mx.stop_gradient(hidden)) * grad).sum(axis=-1)


def _attach_head(
    value: mx.array,
    grad: mx.array,
    hidden: mx.array,
    head: HeadWeight,
    by_weight: Callable[[mx.array], mx.array],
) -> mx.array:
    if head.scales is not None or head.bias is not None:
        raise ModelError(
            "train_head needs a dense head without a bias",
            fix="dequantize the head, or train adapters on the trunk and keep the head frozen",
        )
    weight = head.weight

    @mx.custom_function
    def node(hidden: mx.array, weight: mx.array) -> mx.array:
        return value

    @node.vjp
    def back(
        primals: tuple[mx.array, ...], cotangent: mx.array, output: mx.array
    ) -> tuple[mx.array, mx.array]:
        return cotangent[:, None] * grad, by_weight(_detach(cotangent)).astype(weight.dtype)

    out = node(hidden, weight)
    assert isinstance(out, mx.array)
    return out


# Of a head that has no tiles, at least so many positions are read together. In the backward pass some eight
# arrays as large as their logits exist at once, so the logits of more positions are no more than an eighth of
# the limit, or of what learns in the head.
ROWS = 32


# From logits [r, v] and the slice of the positions that they belong to, to one number a row.
RowLoss: TypeAlias = Callable[[mx.array, slice], mx.array]


def in_slices(
    loss: RowLoss, hidden: Float[mx.array, "n d"], layer: nn.Module, rows: int = ROWS
) -> Float[mx.array, " n"]:
    """Any loss of whole logit rows through any head, one that learns or has an adapter too; memory is
    ``rows x v``.

    Value and gradient, that of the head's own parameters included, equal the dense form. The logits of a
    slice are dropped after its value is known, and computed again in the backward pass, where the head draws
    the same random numbers. *Eager*, as all that is in :mod:`mlx_distill.losses.tiled`: keep it outside
    ``mx.compile`` and ``mx.checkpoint``.

    Args:
        loss: From logits ``[r, v]`` (float32) and the slice of the positions that they belong to, to one
            number a row; a row's loss may depend on its own logits only.
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
        layer.load_weights(
            [(name, weight) for (name, _), weight in zip(own, weights, strict=True)], strict=False
        )
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
        return [
            mx.concatenate(by_hidden),
            *(total.astype(weight.dtype) for total, weight in zip(by_weights, weights, strict=True)),
        ]

    out = node([hidden, *(weight for _, weight in own)])
    assert isinstance(out, mx.array)
    return out


def _detached(x: mx.array) -> mx.array:
    """The same numbers, evaluated, in no graph: what is computed inside a differentiated function keeps all
    that it was made of.
    """
    return mx.array(np.array(x.astype(mx.float32), copy=False)).astype(x.dtype)
