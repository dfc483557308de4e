"""Output head and loss in one: the ``[positions, vocabulary]`` logits never exist as a whole.

The projection and the loss are computed a tile of 2048 columns at a time, and the gradient by the hidden
state together with the value, so memory does not grow with the vocabulary. These functions are *eager*: they
evaluate tile by tile, so keep them outside ``mx.compile`` and ``mx.checkpoint`` (the trunk may be inside
either), and let a frozen head reach the differentiated function by closure: as an argument of
``mx.value_and_grad`` it would be traced, and every tile of it kept.

:func:`linear_divergence` and :func:`linear_cross_entropy` are for frozen heads. :func:`linear_rows` takes any
loss of whole rows of logits and any head, also one that trains or has an adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from jaxtyping import Float, Int
from mlx.utils import tree_flatten

from mlx_distill.errors import ConfigError, DataError, ModelError
from mlx_distill.losses.divergences import Pointwise, pointwise_form, summand_and_derivative
from mlx_distill.losses.numerics import LOWEST, TILE, check_temperature, check_widths, eager_exp
from mlx_distill.losses.output_head import (
    Head,
    HeadTile,
    HeadWeight,
    by_uncapped,
    head_weight,
    is_constant,
    project,
    soft_capped,
)
from mlx_distill.runtime import random_key, set_random_key

BLOCK_ROWS = 512  # positions whose logits of one tile exist at the same time
# How many numbers of gathered weight rows may be held at once.
GATHERED = 2**22

# From logits [r, v] in float32 and the slice of the positions that they belong to, to one number a row.
RowLoss: TypeAlias = Callable[[mx.array, slice], mx.array]
Sums = dict[str, mx.array]


def linear_divergence(
    student_hidden: Float[mx.array, "*b d"],
    student_head: Head,
    teacher_hidden: Float[mx.array, "*b e"],
    teacher_head: Head,
    *,
    divergence: str = "forward_kl",
    temperature: float = 1.0,
    block_rows: int = BLOCK_ROWS,
    **options: float,
) -> Float[mx.array, "*b"]:
    """A divergence of :mod:`mlx_distill.losses.divergences` from hidden states and heads, equal in value and
    gradient.

    ``divergence(h_s W_sᵀ, h_t W_tᵀ)``, one pass over the vocabulary for the two KLs and two for the others.
    Source of the online normaliser: Milakov and Gimelshein 2018, https://arxiv.org/abs/1805.02867.

    Args:
        student_hidden: The student's last hidden states, any float type; the gradient goes here.
        student_head: ``[v, d]`` array, ``nn.Linear``, ``nn.Embedding`` (tied), their quantized forms, or a
            ``HeadWeight``; constant.
        teacher_hidden: The teacher's, for the same positions; constant.
        teacher_head: As the student's, with as many columns; its hidden width may differ.
        divergence: A key of ``DIVERGENCES``.
        temperature: T, by which both models' logits are divided; T² is inside.
        block_rows: Positions whose logits of one tile exist at the same time.
        options: Those of the divergence: ``beta`` of ``js_divergence``, ``lam`` of ``skew_kl``.

    Returns:
        Nats (times T²) a position, not averaged.

    Raises:
        ModelError: The heads' widths differ, or a head does not fit its hidden state.
        ConfigError: An unknown divergence or an impossible setting.

    >>> h, w = mx.array([[1.0, 2.0]]), mx.array([[0.5, 0.0], [0.0, 0.5], [1.0, 1.0]])
    >>> round(abs(linear_divergence(h, w, h, w).item()), 5)
    0.0
    """
    check_temperature(temperature)
    name, pointwise = pointwise_form(divergence, options)
    student, teacher = head_weight(student_head), head_weight(teacher_head)
    check_widths(student.columns, teacher.columns)
    check_hidden(student_hidden, student)
    check_hidden(teacher_hidden, teacher)
    if student_hidden.shape[:-1] != teacher_hidden.shape[:-1]:
        raise DataError(
            f"the student has positions {student_hidden.shape[:-1]}, the teacher {teacher_hidden.shape[:-1]}",
            fix="give both models' hidden states of the same tokens",
        )
    rows = flat_rows(student_hidden)
    if rows.shape[0] == 0:
        return mx.zeros(student_hidden.shape[:-1])
    models = ModelPair(
        detached(rows) / temperature,
        student.over(temperature),
        detached(flat_rows(teacher_hidden)) / temperature,
        teacher.over(temperature),
        block_rows,
    )
    if name in ("forward_kl", "reverse_kl"):
        value, gradient = _kl_one_pass(models, reverse=name == "reverse_kl")
    else:
        value, gradient = _two_pass(models, pointwise)
    # The hidden state was divided by T, so one factor of T² is in the derivative already.
    value, gradient = temperature**2 * value, temperature * gradient
    return with_gradient(value, gradient, rows).reshape(student_hidden.shape[:-1])


def linear_cross_entropy(
    hidden: Float[mx.array, "*b d"],
    head: Head,
    labels: Int[mx.array, "*b"],
    *,
    block_rows: int = BLOCK_ROWS,
) -> Float[mx.array, "*b"]:
    """Cross-entropy of the labels from the hidden state and the head: ``logsumexp(h Wᵀ) - h W[label]``.

    Source: the same scheme as Wijmans et al. 2024 (cut cross-entropy), https://arxiv.org/abs/2411.09009.

    Args:
        hidden: Last hidden states, any float type; the gradient goes here.
        head: As in :func:`linear_divergence`; constant.
        labels: Token ids. Masked positions need some valid id too; multiply their loss by 0 afterwards.
        block_rows: Positions whose logits of one tile exist at the same time.

    Returns:
        Nats a position, not averaged.

    Raises:
        DataError: A label outside the vocabulary.
        ModelError: The head does not fit the hidden state.

    >>> round(linear_cross_entropy(mx.array([[0.0]]), mx.array([[1.0], [2.0]]), mx.array([1])).item(), 4)
    0.6931
    """
    weight = head_weight(head)
    check_hidden(hidden, weight)
    rows, ids = flat_rows(hidden), labels.reshape(-1, 1)
    if rows.shape[0] == 0:
        return mx.zeros(hidden.shape[:-1])
    lowest, highest = (int(extreme) for extreme in np.array([ids.min(), ids.max()]))
    if lowest < 0 or highest >= weight.columns:
        raise DataError(
            f"label {lowest if lowest < 0 else highest} for a vocabulary of {weight.columns} columns",
            fix="give masked positions any valid token id and multiply their loss by 0",
        )
    x = detached(rows)
    log_z, by_log_z = tail_logsumexp(x, weight, block_rows=block_rows)
    z = gathered_logits(x, weight, ids)
    gradient = by_log_z - gathered_gradient(mx.ones_like(z), z, weight, ids)
    value = log_z - z[:, 0]
    mx.eval(value, gradient)
    return with_gradient(value, gradient, rows).reshape(hidden.shape[:-1])


def linear_rows(
    loss: RowLoss, hidden: Float[mx.array, "*b d"], head: Head, *, rows: int = 64
) -> Float[mx.array, "*b"]:
    """Any loss of whole rows of logits through any head, a few rows at a time: value and gradient equal the
    dense form, and memory is ``rows x v``.

    For losses that need the whole vocabulary at once, such as
    :func:`~mlx_distill.losses.cross_tokenizer.token_group_kl`, and for heads that train or have an adapter:
    their parameters get a gradient too. Through a constant head the gradient by the hidden state is computed
    with the value. Through any other module the logits of a slice are dropped after its value is known, and
    computed again in the backward pass, with the same random numbers for dropout.

    Args:
        loss: From logits ``[r, v]`` in float32 and the slice of the flattened positions that they belong to,
            to one number a row; a row's loss may depend on its own logits only.
        hidden: Last hidden states, any float type.
        head: As in :func:`linear_divergence`, or a module with trainable parameters or adapters.
        rows: Positions whose logits exist at the same time.

    Returns:
        What ``loss`` gives, a position.

    Raises:
        ModelError: The head does not fit the hidden state.

    >>> w = mx.array([[1.0], [2.0]])
    >>> round(linear_rows(lambda logits, at: mx.logsumexp(logits, axis=-1), mx.zeros((1, 1)), w).item(), 4)
    0.6931
    """
    if rows < 1:
        raise ConfigError(f"rows is {rows}", fix="give a positive number")
    flat = hidden.reshape(-1, hidden.shape[-1])
    if flat.shape[0] == 0:
        return mx.zeros(hidden.shape[:-1])
    if isinstance(head, nn.Module) and not is_constant(head):
        return _rows_of_module(loss, flat, head, rows).reshape(hidden.shape[:-1])
    weight = head_weight(head)
    check_hidden(hidden, weight)
    flat = flat_rows(hidden)
    x = detached(flat)
    parts = [_rows_of_tiles(loss, x[at], at, weight) for at in row_blocks(x, rows)]
    return with_gradient(*_concatenated(parts), flat).reshape(hidden.shape[:-1])


def _rows_of_tiles(loss: RowLoss, hidden: mx.array, at: slice, head: HeadWeight) -> tuple[mx.array, mx.array]:
    """A row loss of one slice through a constant head, and its gradient by the hidden state."""
    columns = []
    for start, stop in column_tiles(head.columns):
        columns.append(head.tile(start, stop).logits(hidden))
        mx.eval(columns[-1])
    logits = mx.concatenate(columns, axis=1)
    del columns
    (value,), (by_logit,) = mx.vjp(lambda z: loss(z, at), [logits], [mx.ones((hidden.shape[0],))])
    mx.eval(value, by_logit)
    gradient = mx.zeros(hidden.shape)
    for start, stop in column_tiles(head.columns):
        tile = head.tile(start, stop)
        gradient = gradient + tile.gradient(by_logit[:, start:stop], logits[:, start:stop])
        mx.eval(gradient)
    return value, gradient


def _rows_of_module(
    loss: RowLoss, hidden: Float[mx.array, "n d"], head: nn.Module, rows: int
) -> Float[mx.array, " n"]:
    """A row loss through a module; the gradient by its own parameters needs each row's cotangent, so the
    slices are computed again in the backward pass.
    """
    own = tree_flatten(head.trainable_parameters())
    blocks = row_blocks(hidden, rows)
    keys: list[list[int]] = []

    def logits(x: mx.array, *weights: mx.array) -> mx.array:
        head.load_weights(
            [(name, weight) for (name, _), weight in zip(own, weights, strict=True)], strict=False
        )
        return project(head, x).astype(mx.float32)

    @mx.custom_function
    def node(arrays: list[mx.array]) -> mx.array:
        x, *weights = map(detached, arrays)
        values = []
        for at in blocks:
            keys.append(random_key())
            z = detached(logits(x[at], *weights))
            values.append(detached(loss(z, at)))
        head.load_weights(own, strict=False)
        return mx.concatenate(values)

    @node.vjp
    def backward(arrays: list[mx.array], cotangent: mx.array, _: mx.array) -> list[mx.array]:
        (x, *weights), by_value, key_after = map(detached, arrays), detached(cotangent), random_key()
        by_hidden, by_weights = [], [mx.zeros(weight.shape) for weight in weights]
        for at, key in zip(blocks, keys, strict=True):
            set_random_key(key)
            z = detached(logits(x[at], *weights))
            by_logit = detached(mx.vjp(lambda z, at=at: loss(z, at), [z], [by_value[at]])[1][0])
            del z
            set_random_key(key)
            gradients = mx.vjp(logits, [x[at], *weights], [by_logit])[1]
            by_hidden.append(detached(gradients[0]))
            by_weights = [
                detached(total + part) for total, part in zip(by_weights, gradients[1:], strict=True)
            ]
            del gradients
        set_random_key(key_after)
        head.load_weights(own, strict=False)
        return [
            mx.concatenate(by_hidden),
            *(total.astype(weight.dtype) for total, weight in zip(by_weights, weights, strict=True)),
        ]

    out = node([hidden, *(weight for _, weight in own)])
    assert isinstance(out, mx.array)
    return out


def check_hidden(hidden: mx.array, head: HeadWeight) -> None:
    """Refuse hidden states of another width than the head's."""
    if hidden.shape[-1] != head.hidden:
        raise ModelError(
            f"hidden states of width {hidden.shape[-1]} for a head of width {head.hidden}",
            fix="give the hidden state after the final norm and the head of the same model",
        )


def flat_rows(hidden: Float[mx.array, "*b d"]) -> Float[mx.array, "n d"]:
    """Hidden states as rows in float32; the cast is differentiated, so a bfloat16 trunk gets its gradient."""
    return hidden.reshape(-1, hidden.shape[-1]).astype(mx.float32)


def detached(x: mx.array) -> mx.array:
    """The same numbers, evaluated, in no graph.

    A copy through numpy: ``stop_gradient`` and copies in mlx keep the graph of the differentiated function,
    and with it every tile.
    """
    return mx.array(np.array(x.astype(mx.float32), copy=False)).astype(x.dtype)


def with_gradient(
    value: Float[mx.array, " n"], gradient: Float[mx.array, "n d"], hidden: Float[mx.array, "n d"]
) -> Float[mx.array, " n"]:
    """The value as a function of the hidden state: exactly ``value``, with exactly ``gradient`` as its
    derivative.
    """
    return value + ((hidden - mx.stop_gradient(hidden)) * gradient).sum(axis=-1)


# The kernels. They take detached float32 hidden states [n, d], already divided by the temperature, and never
# build more than BLOCK_ROWS x TILE logits. Every tile is evaluated before the next one is built: a lazy graph
# would keep them all alive.


@dataclass(frozen=True)
class ModelPair:
    """Both models at the same positions: hidden states and heads, divided by T; rows per block."""

    student: mx.array
    student_head: HeadWeight
    teacher: mx.array
    teacher_head: HeadWeight
    block_rows: int

    def tiles(self) -> Iterator[tuple[int, slice, HeadTile, mx.array, mx.array]]:
        """For each tile of columns and block of rows: the block's number and rows, the student's tile, and
        the logits of student and teacher.
        """
        for start, stop in column_tiles(self.student_head.columns):
            student, teacher = self.student_head.tile(start, stop), self.teacher_head.tile(start, stop)
            for block, at in enumerate(row_blocks(self.student, self.block_rows)):
                yield block, at, student, student.logits(self.student[at]), teacher.logits(self.teacher[at])


def tail_logsumexp(
    hidden: Float[mx.array, "n d"],
    head: HeadWeight,
    without: Int[mx.array, "n k"] | None = None,
    *,
    block_rows: int = BLOCK_ROWS,
) -> tuple[Float[mx.array, " n"], Float[mx.array, "n d"]]:
    """``logsumexp`` over all columns but ``without``, and its gradient by the hidden state: without a soft
    cap the expected row of the weight under that softmax.
    """
    blocks = row_blocks(hidden, block_rows)
    states: list[Sums] = []
    for at in blocks:
        n, d = hidden[at].shape
        states.append({"top": mx.full((n, 1), LOWEST), "z": mx.zeros((n, 1)), "w": mx.zeros((n, d))})
    for start, stop in column_tiles(head.columns):
        tile = head.tile(start, stop)
        for i, at in enumerate(blocks):
            logits = tile.logits(hidden[at])
            kept = logits if without is None else _masked(logits, without[at] - start)
            states[i] = _add_tail(states[i], logits, kept, tile)
            mx.eval(states[i])
    return _concatenated([(s["top"][:, 0] + mx.log(s["z"][:, 0]), s["w"] / s["z"]) for s in states])


def _masked(logits: mx.array, local: mx.array) -> mx.array:
    inside = (local >= 0) & (local < logits.shape[1])
    # Adding, not setting: ids outside this tile all point at column 0 and must change nothing there.
    rows = mx.arange(logits.shape[0])[:, None]
    return logits.at[rows, mx.where(inside, local, 0)].add(mx.where(inside, LOWEST, 0.0))


def _add_tail(s: Sums, logits: mx.array, kept: mx.array, tile: HeadTile) -> Sums:
    top = mx.maximum(s["top"], kept.max(axis=1, keepdims=True))
    decay, e = mx.exp(s["top"] - top), eager_exp(kept - top)
    return {
        "top": top,
        "z": s["z"] * decay + e.sum(axis=1, keepdims=True),
        "w": s["w"] * decay + tile.gradient(e, logits),
    }


def _kl_one_pass(models: ModelPair, *, reverse: bool) -> tuple[mx.array, mx.array]:
    """Forward or reverse KL of the logits (already over T) and its gradient by the student's hidden state
    (over T), in one pass over the tiles.

    With ``D = z_p - z_q`` and w the derivative of a logit by the hidden state: forward
    ``E_p[D] - log Z_p + log Z_q`` with gradient ``E_q[w] - E_p[w]``; reverse ``E_q[-D] + log Z_p - log Z_q``
    with gradient ``E_q[-D w] - E_q[-D] E_q[w]``. The expectations are running sums under a running maximum.
    """
    states: list[Sums] = []
    for at in row_blocks(models.student, models.block_rows):
        n, d = models.student[at].shape
        low, one, wide = mx.full((n, 1), LOWEST), mx.zeros((n, 1)), mx.zeros((n, d))
        states.append(
            {"top_p": low, "top_q": low, "z_p": one, "z_q": one, "d": one, "w_q": wide, "w_x": wide}
        )
    for block, _, tile, z_q, z_p in models.tiles():
        states[block] = _add_kl(states[block], z_p, z_q, tile, reverse)
        mx.eval(states[block])
    return _concatenated([_finish_kl(s, reverse) for s in states])


def _add_kl(s: Sums, z_p: mx.array, z_q: mx.array, tile: HeadTile, reverse: bool) -> Sums:
    top_p = mx.maximum(s["top_p"], z_p.max(axis=1, keepdims=True))
    top_q = mx.maximum(s["top_q"], z_q.max(axis=1, keepdims=True))
    decay_p, decay_q = mx.exp(s["top_p"] - top_p), mx.exp(s["top_q"] - top_q)
    e_p, e_q = eager_exp(z_p - top_p), eager_exp(z_q - top_q)
    weighted = e_q * (z_q - z_p) if reverse else e_p * (z_p - z_q)
    decay = decay_q if reverse else decay_p
    return {
        "top_p": top_p,
        "top_q": top_q,
        "z_p": s["z_p"] * decay_p + e_p.sum(axis=1, keepdims=True),
        "z_q": s["z_q"] * decay_q + e_q.sum(axis=1, keepdims=True),
        "d": s["d"] * decay + weighted.sum(axis=1, keepdims=True),
        "w_q": s["w_q"] * decay_q + tile.gradient(e_q, z_q),
        "w_x": s["w_x"] * decay + tile.gradient(weighted if reverse else e_p, z_q),
    }


def _finish_kl(s: Sums, reverse: bool) -> tuple[mx.array, mx.array]:
    log_z_q, log_z_p = s["top_q"] + mx.log(s["z_q"]), s["top_p"] + mx.log(s["z_p"])
    if reverse:
        mean = s["d"] / s["z_q"]
        value, gradient = mean + log_z_p - log_z_q, s["w_x"] / s["z_q"] - mean * (s["w_q"] / s["z_q"])
    else:
        value, gradient = s["d"] / s["z_p"] + log_z_q - log_z_p, s["w_q"] / s["z_q"] - s["w_x"] / s["z_p"]
    return value[:, 0], gradient


def _two_pass(models: ModelPair, pointwise: Pointwise) -> tuple[mx.array, mx.array]:
    """A divergence ``Σ f(log q, log p)`` of the logits (already over T) and its gradient by the student's
    hidden state (over T).

    The first pass gives both normalisers; the second sums f, its derivative g by ``log q``, and ``g w``, with
    w the derivative of a logit by the hidden state. The gradient is ``Σ g w - E_q[w] Σ g``.
    """
    log_z_q, mean_w = tail_logsumexp(models.student, models.student_head, block_rows=models.block_rows)
    log_z_p, _ = tail_logsumexp(models.teacher, models.teacher_head, block_rows=models.block_rows)
    states: dict[int, tuple[mx.array, mx.array, mx.array]] = {}
    for block, at, tile, z_q, z_p in models.tiles():
        log_q, log_p = z_q - log_z_q[at][:, None], z_p - log_z_p[at][:, None]
        del z_q, z_p  # else two more tiles would be in memory
        f, g = summand_and_derivative(pointwise, log_q, log_p)
        sums = (f.sum(axis=1), g.sum(axis=1), tile.gradient(g, log_q + log_z_q[at][:, None]))
        if block in states:
            sums = tuple(old + new for old, new in zip(states[block], sums, strict=True))
        # Inside a differentiated function the vjp keeps what it was made of, unless the sums leave its graph.
        states[block] = tuple(map(detached, sums))
    value, total, weighted = (mx.concatenate(list(part)) for part in zip(*states.values(), strict=True))
    return value, weighted - total[:, None] * mean_w


def gathered_logits(
    hidden: Float[mx.array, "n d"], head: HeadWeight, ids: Int[mx.array, "n k"]
) -> Float[mx.array, "n k"]:
    """The logits of k tokens a row, from the rows of the weight that belong to them; a few rows at a time."""
    out = []
    for at in row_blocks(hidden, max(1, GATHERED // (ids.shape[1] * head.hidden))):
        w = head.rows(ids[at].reshape(-1)).reshape(*ids[at].shape, -1)
        bias = 0.0 if head.bias is None else head.bias[ids[at]].astype(mx.float32)
        z = (w @ hidden[at][:, :, None])[:, :, 0] + bias
        out.append(z if head.softcap is None else soft_capped(z, head.softcap))
        mx.eval(out[-1])
    return mx.concatenate(out)


def gathered_gradient(
    by_logit: Float[mx.array, "n k"],
    logits: Float[mx.array, "n k"],
    head: HeadWeight,
    ids: Int[mx.array, "n k"],
) -> Float[mx.array, "n d"]:
    """The gradient by the hidden state, from that by the logits of :func:`gathered_logits` and the logits."""
    weights, out = by_uncapped(by_logit, logits, head.softcap), []
    for at in row_blocks(weights, max(1, GATHERED // (ids.shape[1] * head.hidden))):
        w = head.rows(ids[at].reshape(-1)).reshape(*ids[at].shape, -1)
        out.append((weights[at][:, None, :] @ w)[:, 0])
        mx.eval(out[-1])
    return mx.concatenate(out)


def row_blocks(x: mx.array, size: int) -> list[slice]:
    """Slices of at most ``size`` rows that cover x."""
    return [slice(i, min(i + size, x.shape[0])) for i in range(0, x.shape[0], size)]


def column_tiles(width: int) -> list[tuple[int, int]]:
    """Start and stop of each tile of columns."""
    return [(i, min(i + TILE, width)) for i in range(0, width, TILE)]


def _concatenated(parts: list[tuple[mx.array, mx.array]]) -> tuple[mx.array, mx.array]:
    """Values and gradients of the blocks, evaluated."""
    value, gradient = (mx.concatenate(list(column)) for column in zip(*parts, strict=True))
    mx.eval(value, gradient)
    return value, gradient
