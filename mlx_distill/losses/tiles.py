"""The kernels under :mod:`mlx_distill.losses.tiled`: one look at every vocabulary tile, values and gradients
at once.

All of them take *detached* float32 hidden states ``[n, d]``, already divided by the temperature, and never
build more than ``ROWS x TILE`` logits. Every tile is evaluated before the next one is built: a lazy graph
would keep them all alive, and so would ``mx.compile`` or ``mx.checkpoint`` around the caller. A divergence
comes back with what its gradient by a logit needs (:class:`Normals`); that gradient is
``T² (g_j - q_j Σ g)``, where ``g`` is the derivative of a column's share by ``log q``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import mlx.core as mx
from jaxtyping import Float, Int

from mlx_distill.losses.numerics import LOWEST, TILE
from mlx_distill.losses.output_head import HeadWeight

ROWS = 512
# How many numbers of gathered weight rows may be held at once.
GATHERED = 2**22

# One column's share of a divergence, and its derivative by the student's log-probability: (log_q, log_p) ->
# (f, g).
Pointwise = Callable[[mx.array, mx.array], tuple[mx.array, mx.array]]
Sums = dict[str, mx.array]


@dataclass(frozen=True)
class Sides:
    """Both models at the positions: detached float32 hidden states over T, and heads whose biases are over T."""

    student: mx.array
    student_head: HeadWeight
    teacher: mx.array
    teacher_head: HeadWeight


@dataclass(frozen=True)
class Normals:
    """Log-normalisers of both sides and ``Σ g``, each ``[n]``."""

    log_z_q: mx.array
    log_z_p: mx.array
    total: mx.array


def pointwise_of(divergence: str, beta: float, lam: float) -> Pointwise:
    """The column-wise form of a divergence by name."""

    def forward(log_q: mx.array, log_p: mx.array) -> tuple[mx.array, mx.array]:
        p = mx.exp(log_p)
        return p * (log_p - log_q), -p

    def reverse(log_q: mx.array, log_p: mx.array) -> tuple[mx.array, mx.array]:
        q = mx.exp(log_q)
        f = q * (log_q - log_p)
        return f, f + q

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

    forms = {
        "forward_kl": forward,
        "reverse_kl": reverse,
        "js_divergence": js,
        "skew_kl": skew,
        "total_variation": variation,
    }
    return forms[divergence]


def tail_logsumexp(
    hidden: Float[mx.array, "n d"], head: HeadWeight, without: Int[mx.array, "n k"] | None = None
) -> tuple[Float[mx.array, " n"], Float[mx.array, "n d"]]:
    """``logsumexp`` over all columns but ``without``, and its gradient: the expected row of the weight under
    that softmax.
    """
    states: list[Sums] = []
    for rows in split(hidden):
        n, d = hidden[rows].shape
        states.append({"top": mx.full((n, 1), LOWEST), "z": mx.zeros((n, 1)), "w": mx.zeros((n, d))})
    for start, stop in tiles(head.columns):
        w, bias = head.tile(start, stop), head.bias_tile(start, stop)
        for i, rows in enumerate(split(hidden)):
            z = hidden[rows] @ w.T + bias
            states[i] = _add_tail(states[i], z if without is None else _masked(z, without[rows] - start), w)
            mx.eval(states[i])
    return _join([(s["top"][:, 0] + mx.log(s["z"][:, 0]), s["w"] / s["z"]) for s in states])


def _masked(z: mx.array, local: mx.array) -> mx.array:
    inside = (local >= 0) & (local < z.shape[1])
    # Adding, not setting: ids outside this tile all point at column 0 and must change nothing there.
    return z.at[mx.arange(z.shape[0])[:, None], mx.where(inside, local, 0)].add(mx.where(inside, LOWEST, 0.0))


def _add_tail(s: Sums, z: mx.array, w: mx.array) -> Sums:
    top = mx.maximum(s["top"], z.max(axis=1, keepdims=True))
    old, e = mx.exp(s["top"] - top), mx.exp(z - top)
    return {"top": top, "z": s["z"] * old + e.sum(axis=1, keepdims=True), "w": s["w"] * old + e @ w}


def kl_one_pass(sides: Sides, *, temperature: float, reverse: bool) -> tuple[mx.array, mx.array, Normals]:
    """Forward or reverse KL (with T²), its gradient by the student's hidden state and its normals, in one
    pass over the tiles.

    With ``D = z_p - z_q`` (tempered logits): forward ``E_p[D] - log Z_p + log Z_q`` with gradient
    ``T (E_q[w] - E_p[w])``; reverse ``E_q[-D] + log Z_p - log Z_q`` with gradient
    ``T (E_q[-D w] - E_q[-D] E_q[w])``. The expectations are running sums under a running maximum.
    """
    states: list[Sums] = []
    for rows in split(sides.student):
        n, d = sides.student[rows].shape
        low, one, wide = mx.full((n, 1), LOWEST), mx.zeros((n, 1)), mx.zeros((n, d))
        states.append(
            {"top_p": low, "top_q": low, "z_p": one, "z_q": one, "d": one, "w_q": wide, "w_x": wide}
        )
    for start, stop in tiles(sides.student_head.columns):
        w, bias = sides.student_head.tile(start, stop), sides.student_head.bias_tile(start, stop)
        u, bias_u = sides.teacher_head.tile(start, stop), sides.teacher_head.bias_tile(start, stop)
        for i, rows in enumerate(split(sides.student)):
            states[i] = _add_kl(
                states[i], sides.teacher[rows] @ u.T + bias_u, sides.student[rows] @ w.T + bias, w, reverse
            )
            mx.eval(states[i])
    done = [_finish_kl(s, temperature, reverse) for s in states]
    value, grad = _join([(value, grad) for value, grad, _ in done])
    return value, grad, _join_normals([normals for _, _, normals in done])


def _add_kl(s: Sums, z_p: mx.array, z_q: mx.array, w: mx.array, reverse: bool) -> Sums:
    top_p = mx.maximum(s["top_p"], z_p.max(axis=1, keepdims=True))
    top_q = mx.maximum(s["top_q"], z_q.max(axis=1, keepdims=True))
    old_p, old_q = mx.exp(s["top_p"] - top_p), mx.exp(s["top_q"] - top_q)
    e_p, e_q = mx.exp(z_p - top_p), mx.exp(z_q - top_q)
    weighted = e_q * (z_q - z_p) if reverse else e_p * (z_p - z_q)
    old = old_q if reverse else old_p
    return {
        "top_p": top_p,
        "top_q": top_q,
        "z_p": s["z_p"] * old_p + e_p.sum(axis=1, keepdims=True),
        "z_q": s["z_q"] * old_q + e_q.sum(axis=1, keepdims=True),
        "d": s["d"] * old + weighted.sum(axis=1, keepdims=True),
        "w_q": s["w_q"] * old_q + e_q @ w,
        "w_x": s["w_x"] * old + (weighted if reverse else e_p) @ w,
    }


def _finish_kl(s: Sums, temperature: float, reverse: bool) -> tuple[mx.array, mx.array, Normals]:
    log_z_q, log_z_p = s["top_q"] + mx.log(s["z_q"]), s["top_p"] + mx.log(s["z_p"])
    if reverse:
        mean = s["d"] / s["z_q"]
        value, grad = mean + log_z_p - log_z_q, s["w_x"] / s["z_q"] - mean * (s["w_q"] / s["z_q"])
        total = value + 1
    else:
        value, grad = s["d"] / s["z_p"] + log_z_q - log_z_p, s["w_q"] / s["z_q"] - s["w_x"] / s["z_p"]
        total = -mx.ones_like(value)
    return (
        temperature**2 * value[:, 0],
        temperature * grad,
        Normals(log_z_q[:, 0], log_z_p[:, 0], total[:, 0]),
    )


def two_pass(sides: Sides, pointwise: Pointwise, *, temperature: float) -> tuple[mx.array, mx.array, Normals]:
    """Any divergence that is a sum over columns of ``f(log q, log p)`` (with T²), its gradient by the
    student's hidden state, its normals.

    The first pass finds both normalisers; the second sums ``f``, ``g`` and ``g w``. The gradient is
    ``T (Σ g w - E_q[w] Σ g)``.
    """
    log_z_q, mean_w = tail_logsumexp(sides.student, sides.student_head)
    log_z_p, _ = tail_logsumexp(sides.teacher, sides.teacher_head)
    n = sides.student.shape[0]
    value, normals = mx.zeros((n,)), Normals(log_z_q, log_z_p, mx.zeros((n,)))
    states: dict[int, tuple[mx.array, mx.array, mx.array]] = {}
    for _, rows, w, log_q, log_p in _log_prob_tiles(sides, normals):
        f, g = pointwise(log_q, log_p)
        zero = (
            mx.zeros((log_q.shape[0],)),
            mx.zeros((log_q.shape[0],)),
            mx.zeros((log_q.shape[0], w.shape[1])),
        )
        value, total, weighted = states.get(rows.start, zero)
        states[rows.start] = (value + f.sum(axis=1), total + g.sum(axis=1), weighted + g @ w)
        mx.eval(states[rows.start])
    value, total, weighted = (mx.concatenate(list(part)) for part in zip(*states.values(), strict=True))
    return (
        temperature**2 * value,
        temperature * (weighted - total[:, None] * mean_w),
        Normals(log_z_q, log_z_p, total),
    )


def weight_gradient(
    sides: Sides,
    normals: Normals,
    pointwise: Pointwise,
    cotangent: Float[mx.array, " n"],
    *,
    temperature: float,
) -> Float[mx.array, "v d"]:
    """Gradient of ``Σ cotangent · divergence`` by the student's dense head; the logits are built a second
    time, tile by tile.
    """
    scale = temperature**2 * cotangent[:, None]
    parts: dict[int, mx.array] = {}
    for start, rows, _, log_q, log_p in _log_prob_tiles(sides, normals):
        _, g = pointwise(log_q, log_p)
        by_logit = scale[rows] * (g - mx.exp(log_q) * normals.total[rows][:, None])
        part = by_logit.T @ sides.student[rows]
        parts[start] = parts[start] + part if start in parts else part
        mx.eval(parts[start])
    return mx.concatenate(list(parts.values()))


def _log_prob_tiles(
    sides: Sides, normals: Normals
) -> Iterator[tuple[int, slice, mx.array, mx.array, mx.array]]:
    for start, stop in tiles(sides.student_head.columns):
        w, bias = sides.student_head.tile(start, stop), sides.student_head.bias_tile(start, stop)
        u, bias_u = sides.teacher_head.tile(start, stop), sides.teacher_head.bias_tile(start, stop)
        for rows in split(sides.student):
            log_q = sides.student[rows] @ w.T + bias - normals.log_z_q[rows][:, None]
            log_p = sides.teacher[rows] @ u.T + bias_u - normals.log_z_p[rows][:, None]
            yield start, rows, w, log_q, log_p


def softmax_weight_gradient(
    hidden: Float[mx.array, "n d"],
    head: HeadWeight,
    log_z: Float[mx.array, " n"],
    cotangent: Float[mx.array, " n"],
) -> Float[mx.array, "v d"]:
    """Gradient of ``Σ cotangent · logsumexp(logits)`` by a dense head."""
    parts = []
    for start, stop in tiles(head.columns):
        w, bias = head.tile(start, stop), head.bias_tile(start, stop)
        part = mx.zeros(w.shape)
        for rows in split(hidden):
            q = mx.exp(hidden[rows] @ w.T + bias - log_z[rows][:, None])
            part = part + (cotangent[rows][:, None] * q).T @ hidden[rows]
            mx.eval(part)
        parts.append(part)
    return mx.concatenate(parts)


def gathered_logits(
    hidden: Float[mx.array, "n d"], head: HeadWeight, ids: Int[mx.array, "n k"]
) -> Float[mx.array, "n k"]:
    """The logits of k tokens a row, through the rows of the weight that belong to them; a few rows at a time."""
    out = []
    for rows in split(hidden, max(1, GATHERED // (ids.shape[1] * head.hidden))):
        w = head.rows(ids[rows].reshape(-1)).reshape(*ids[rows].shape, -1)
        z = (w @ hidden[rows][:, :, None])[:, :, 0]
        out.append(z if head.bias is None else z + head.bias[ids[rows]].astype(mx.float32))
        mx.eval(out[-1])
    return mx.concatenate(out)


def gathered_rows(
    weights: Float[mx.array, "n k"], head: HeadWeight, ids: Int[mx.array, "n k"]
) -> Float[mx.array, "n d"]:
    """``Σ_k weights · W[ids]``: the gradient by the hidden state of anything whose gradient by
    :func:`gathered_logits` is ``weights``.
    """
    out = []
    for rows in split(weights, max(1, GATHERED // (ids.shape[1] * head.hidden))):
        w = head.rows(ids[rows].reshape(-1)).reshape(*ids[rows].shape, -1)
        out.append((weights[rows][:, None, :] @ w)[:, 0])
        mx.eval(out[-1])
    return mx.concatenate(out)


def split(x: mx.array, size: int = ROWS) -> list[slice]:
    """Blocks of rows."""
    return [slice(i, i + size) for i in range(0, x.shape[0], size)]


def tiles(width: int) -> list[tuple[int, int]]:
    """Blocks of columns."""
    return [(i, min(i + TILE, width)) for i in range(0, width, TILE)]


def _join(parts: list[tuple[mx.array, mx.array]]) -> tuple[mx.array, mx.array]:
    value, grad = (mx.concatenate(list(column)) for column in zip(*parts, strict=True))
    mx.eval(value, grad)
    return value, grad


def _join_normals(parts: list[Normals]) -> Normals:
    return Normals(
        *(mx.concatenate([getattr(part, name) for part in parts]) for name in ("log_z_q", "log_z_p", "total"))
    )
