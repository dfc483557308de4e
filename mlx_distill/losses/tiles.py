"""The kernels under :mod:`mlx_distill.losses.linear`: one look at every vocabulary tile, values and gradients at once.

All of them take *detached* float32 hidden states ``[n, d]`` and never build more than ``ROWS x TILE`` logits. Every tile is evaluated
before the next one is built: a lazy graph would keep them all alive, and so would ``mx.compile`` or ``mx.checkpoint`` around
the caller.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import mlx.core as mx
from jaxtyping import Float, Int

from mlx_distill.losses.heads import HeadWeight
from mlx_distill.losses.numerics import LOWEST, TILE

ROWS = 512

# One column's share of a separable divergence, and its derivative by the student's log-probability: (log_q, log_p) -> both.
Pointwise = Callable[[mx.array, mx.array], tuple[mx.array, mx.array]]


@dataclass
class _Rows:
    """Running sums of one block of rows. ``top`` is the running maximum that every sum is scaled by."""

    student: mx.array
    teacher: mx.array | None = None
    ids: mx.array | None = None
    sums: dict[str, mx.array] = field(default_factory=dict)


def tail_logsumexp(
    hidden: Float[mx.array, "n d"], head: HeadWeight, without: Int[mx.array, "n k"] | None
) -> tuple[Float[mx.array, " n"], Float[mx.array, "n d"]]:
    """``logsumexp`` over all columns but ``without`` and its gradient, the expected row of the weight under that softmax."""
    blocks = [_Rows(rows, ids=None if without is None else without[at]) for at, rows in _split(hidden)]
    for block in blocks:
        n, d = block.student.shape
        block.sums = {"top": mx.full((n, 1), LOWEST), "z": mx.zeros((n, 1)), "w": mx.zeros((n, d))}
    for start, stop in _tiles(head.columns):
        w, bias = head.tile(start, stop), head.bias_tile(start, stop)
        for block in blocks:
            _add_tail(block, w, bias, start)
    done = [(b.sums["top"][:, 0] + mx.log(b.sums["z"][:, 0]), b.sums["w"] / b.sums["z"]) for b in blocks]
    return _join(done)


def _add_tail(block: _Rows, w: mx.array, bias: mx.array | float, start: int) -> None:
    z = block.student @ w.T + bias
    if block.ids is not None:
        local = block.ids - start
        inside = (local >= 0) & (local < z.shape[1])
        rows = mx.arange(z.shape[0])[:, None]
        # Adding, not setting: ids outside this tile all point at column 0 and add nothing there.
        z = z.at[rows, mx.where(inside, local, 0)].add(mx.where(inside, LOWEST, 0.0))
    s = block.sums
    top = mx.maximum(s["top"], z.max(axis=1, keepdims=True))
    old, e = mx.exp(s["top"] - top), mx.exp(z - top)
    block.sums = {"top": top, "z": s["z"] * old + e.sum(axis=1, keepdims=True), "w": s["w"] * old + e @ w}
    mx.eval(block.sums)


def kl_one_pass(
    student: Float[mx.array, "n d"],
    student_head: HeadWeight,
    teacher: Float[mx.array, "n e"],
    teacher_head: HeadWeight,
    *,
    temperature: float,
    reverse: bool,
) -> tuple[Float[mx.array, " n"], Float[mx.array, "n d"]]:
    """Forward or reverse KL (with T²) and its gradient by the student's hidden state, in one pass over the tiles.

    With ``D = z_p - z_q`` (tempered logits): forward ``E_p[D] - log Z_p + log Z_q`` with gradient ``E_q[w] - E_p[w]``; reverse
    ``E_q[-D] + log Z_p - log Z_q`` with gradient ``E_q[-D w] - E_q[-D] E_q[w]``. Expectations are running sums under a running maximum.
    """
    blocks = [_Rows(a / temperature, b / temperature) for (_, a), (_, b) in zip(_split(student), _split(teacher), strict=True)]
    for block in blocks:
        n, d = block.student.shape
        one, wide = mx.zeros((n, 1)), mx.zeros((n, d))
        low = mx.full((n, 1), LOWEST)
        block.sums = {"top_p": low, "top_q": low, "z_p": one, "z_q": one, "d": one, "w_q": wide, "w_x": wide}
    add = _add_reverse if reverse else _add_forward
    for start, stop in _tiles(student_head.columns):
        w, bias = student_head.tile(start, stop), student_head.bias_tile(start, stop)
        u, bias_u = teacher_head.tile(start, stop), teacher_head.bias_tile(start, stop)
        for block in blocks:
            assert block.teacher is not None
            z_q = block.student @ w.T + _scale(bias, temperature)
            z_p = block.teacher @ u.T + _scale(bias_u, temperature)
            block.sums = add(block.sums, z_p, z_q, w)
            mx.eval(block.sums)
    return _join([_finish(b.sums, temperature, reverse) for b in blocks])


def _add_forward(s: dict[str, mx.array], z_p: mx.array, z_q: mx.array, w: mx.array) -> dict[str, mx.array]:
    top_p, top_q, old_p, old_q, e_p, e_q = _exps(s, z_p, z_q)
    return {
        "top_p": top_p,
        "top_q": top_q,
        "z_p": s["z_p"] * old_p + e_p.sum(axis=1, keepdims=True),
        "z_q": s["z_q"] * old_q + e_q.sum(axis=1, keepdims=True),
        "d": s["d"] * old_p + (e_p * (z_p - z_q)).sum(axis=1, keepdims=True),
        "w_q": s["w_q"] * old_q + e_q @ w,
        "w_x": s["w_x"] * old_p + e_p @ w,
    }


def _add_reverse(s: dict[str, mx.array], z_p: mx.array, z_q: mx.array, w: mx.array) -> dict[str, mx.array]:
    top_p, top_q, old_p, old_q, e_p, e_q = _exps(s, z_p, z_q)
    ed = e_q * (z_q - z_p)
    return {
        "top_p": top_p,
        "top_q": top_q,
        "z_p": s["z_p"] * old_p + e_p.sum(axis=1, keepdims=True),
        "z_q": s["z_q"] * old_q + e_q.sum(axis=1, keepdims=True),
        "d": s["d"] * old_q + ed.sum(axis=1, keepdims=True),
        "w_q": s["w_q"] * old_q + e_q @ w,
        "w_x": s["w_x"] * old_q + ed @ w,
    }


def _exps(s: dict[str, mx.array], z_p: mx.array, z_q: mx.array) -> tuple[mx.array, ...]:
    top_p = mx.maximum(s["top_p"], z_p.max(axis=1, keepdims=True))
    top_q = mx.maximum(s["top_q"], z_q.max(axis=1, keepdims=True))
    return top_p, top_q, mx.exp(s["top_p"] - top_p), mx.exp(s["top_q"] - top_q), mx.exp(z_p - top_p), mx.exp(z_q - top_q)


def _finish(s: dict[str, mx.array], temperature: float, reverse: bool) -> tuple[mx.array, mx.array]:
    gap = (s["top_q"] + mx.log(s["z_q"])) - (s["top_p"] + mx.log(s["z_p"]))
    if reverse:
        mean = s["d"] / s["z_q"]
        value, grad = mean - gap, s["w_x"] / s["z_q"] - mean * (s["w_q"] / s["z_q"])
    else:
        value, grad = s["d"] / s["z_p"] + gap, s["w_q"] / s["z_q"] - s["w_x"] / s["z_p"]
    return temperature**2 * value[:, 0], temperature * grad


def two_pass(
    student: Float[mx.array, "n d"],
    student_head: HeadWeight,
    teacher: Float[mx.array, "n e"],
    teacher_head: HeadWeight,
    pointwise: Pointwise,
    *,
    temperature: float,
) -> tuple[Float[mx.array, " n"], Float[mx.array, "n d"]]:
    """Any divergence that is a sum over columns of ``f(log_q, log_p)`` (with T²), and its gradient by the student's hidden state.

    The first pass finds both normalisers. With ``g = df/dlog_q`` the gradient by a logit is ``(g_j - q_j Σ g) / T``, so the second
    pass needs the sums of ``f``, ``g``, ``g w`` and ``q w``.
    """
    log_z_q, mean_w = tail_logsumexp(student / temperature, _tempered(student_head, temperature), None)
    log_z_p, _ = tail_logsumexp(teacher / temperature, _tempered(teacher_head, temperature), None)
    out = []
    for at, rows in _split(student):
        value, total, weighted = mx.zeros((rows.shape[0],)), mx.zeros((rows.shape[0], 1)), mx.zeros(rows.shape)
        for start, stop in _tiles(student_head.columns):
            w = student_head.tile(start, stop)
            z_q = (rows @ w.T + student_head.bias_tile(start, stop)) / temperature
            z_p = (teacher[at] @ teacher_head.tile(start, stop).T + teacher_head.bias_tile(start, stop)) / temperature
            f, g = pointwise(z_q - log_z_q[at][:, None], z_p - log_z_p[at][:, None])
            value, total, weighted = value + f.sum(axis=1), total + g.sum(axis=1, keepdims=True), weighted + g @ w
            mx.eval(value, total, weighted)
        out.append((temperature**2 * value, temperature * (weighted - total * mean_w[at])))
    return _join(out)


def pointwise_of(divergence: str, beta: float, lam: float) -> Pointwise:
    """The column-wise form of a divergence by name, for :func:`two_pass`."""

    def js(log_q: mx.array, log_p: mx.array) -> tuple[mx.array, mx.array]:
        log_m = mx.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
        g = (1 - beta) * mx.exp(log_q) * (log_q - log_m)
        return beta * mx.exp(log_p) * (log_p - log_m) + g, g

    def skew(log_q: mx.array, log_p: mx.array) -> tuple[mx.array, mx.array]:
        log_m = mx.logaddexp(log_p + math.log(lam), log_q + (math.log1p(-lam) if lam < 1 else -math.inf))
        p = mx.exp(log_p)
        return p * (log_p - log_m), -(1 - lam) * p * mx.exp(log_q - log_m)

    def variation(log_q: mx.array, log_p: mx.array) -> tuple[mx.array, mx.array]:
        q = mx.exp(log_q)
        gap = q - mx.exp(log_p)
        return 0.5 * mx.abs(gap), 0.5 * mx.sign(gap) * q

    return {"js_divergence": js, "skew_kl": skew, "total_variation": variation}[divergence]


def gathered_logits(
    hidden: Float[mx.array, "n d"], head: HeadWeight, ids: Int[mx.array, "n k"]
) -> Float[mx.array, "n k"]:
    """The logits of k tokens a row, through the rows of the weight that belong to them; a few rows at a time."""
    out = []
    for at, rows in _split(hidden, max(1, 2**22 // (ids.shape[1] * head.hidden))):
        w = head.rows(ids[at].reshape(-1)).reshape(*ids[at].shape, -1)
        z = (w @ rows[:, :, None])[:, :, 0]
        if head.bias is not None:
            z = z + head.bias[ids[at]].astype(mx.float32)
        mx.eval(z)
        out.append(z)
    return mx.concatenate(out)


def gathered_rows(
    weights: Float[mx.array, "n k"], head: HeadWeight, ids: Int[mx.array, "n k"]
) -> Float[mx.array, "n d"]:
    """``Σ_k weights · W[ids]``: the gradient of :func:`gathered_logits` by the hidden state."""
    out = []
    for at, rows in _split(weights, max(1, 2**22 // (ids.shape[1] * head.hidden))):
        w = head.rows(ids[at].reshape(-1)).reshape(*ids[at].shape, -1)
        g = (rows[:, None, :] @ w)[:, 0]
        mx.eval(g)
        out.append(g)
    return mx.concatenate(out)


def _split(x: mx.array, size: int = ROWS) -> list[tuple[slice, mx.array]]:
    return [(slice(i, i + size), x[i : i + size]) for i in range(0, x.shape[0], size)]


def _tiles(width: int) -> list[tuple[int, int]]:
    return [(i, min(i + TILE, width)) for i in range(0, width, TILE)]


def _scale(bias: mx.array | float, temperature: float) -> mx.array | float:
    return bias / temperature


def _join(parts: list[tuple[mx.array, mx.array]]) -> tuple[mx.array, mx.array]:
    value, grad = (mx.concatenate(column) for column in zip(*parts, strict=True))
    mx.eval(value, grad)
    return value, grad
