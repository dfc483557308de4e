"""Bases in which a gradient is nearly whole: which side, how to find one, in and out of it.

A gradient ``G [m, n]`` is written as ``Aᵀ G Bᵀ`` with ``A [m, r]`` (left) or ``B [r, n]`` (right), or both. A
leading axis (experts) is a
batch: one basis an expert. All decompositions run on the CPU stream, where alone MLX has them, and are
evaluated at once: GPU work queued behind a long decomposition is killed by Metal's watchdog.
"""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx
from jaxtyping import Float

from mlx_distill.errors import ConfigError

Basis = Mapping[str, mx.array]

PROJECTIONS = ("std", "reverse_std", "left", "right", "full")
METHODS = ("auto", "eigh", "svd", "subspace")

# Up to this size of the smaller side the full symmetric eigenproblem is quick: 0.4 s at 2048 on two cores.
_EIGH_LIMIT = 2048
_OVERSAMPLING = 16
# Beyond, LAPACK's symmetric solver states its workspace, 2n² + 6n + 1, in a float32 that cannot hold it
# (seen: OpenBLAS 0.3.21, n = 4096).
_EIGH_LARGEST = 2894


def sides_of(shape: tuple[int, ...], projection: str) -> tuple[str, ...]:
    """Which bases a gradient of that shape gets.

    ``std`` puts the basis on the shorter side (right where square), ``reverse_std`` on the longer.

    >>> sides_of((8, 4), "std"), sides_of((4, 8), "std"), sides_of((8, 4), "full")
    (('right',), ('left',), ('left', 'right'))
    """
    if projection not in PROJECTIONS:
        raise ConfigError(f"no projection {projection!r}", fix=f"one of {', '.join(PROJECTIONS)}")
    tall = shape[-2] >= shape[-1]
    if projection in ("std", "reverse_std"):
        return ("right",) if tall == (projection == "std") else ("left",)
    return ("left", "right") if projection == "full" else (projection,)


def basis_shapes(shape: tuple[int, ...], rank: int, projection: str) -> dict[str, tuple[int, ...]]:
    """The shapes of the bases; a rank above the smaller side is cut to it.

    >>> basis_shapes((8, 4), 2, "std")
    {'right': (2, 4)}
    """
    *batch, m, n = shape
    r = min(rank, m, n)
    shapes = {"left": (*batch, m, r), "right": (*batch, r, n)}
    return {side: shapes[side] for side in sides_of(shape, projection)}


def project(gradient: Float[mx.array, "*e m n"], basis: Basis) -> Float[mx.array, "*e p q"]:
    """Into the subspace: ``Aᵀ G Bᵀ``, leaving out the side without a basis.

    >>> project(mx.array([[1.0, 2.0], [3.0, 4.0]]), {"right": mx.array([[0.0, 1.0]])}).tolist()
    [[2.0], [4.0]]
    """
    if "left" in basis:
        gradient = basis["left"].swapaxes(-1, -2) @ gradient
    return gradient @ basis["right"].swapaxes(-1, -2) if "right" in basis else gradient


def project_back(low: Float[mx.array, "*e p q"], basis: Basis) -> Float[mx.array, "*e m n"]:
    """Out of the subspace: ``A N B``.

    >>> project_back(mx.array([[2.0], [4.0]]), {"right": mx.array([[0.0, 1.0]])}).tolist()
    [[0.0, 2.0], [0.0, 4.0]]
    """
    if "left" in basis:
        low = basis["left"] @ low
    return low @ basis["right"] if "right" in basis else low


def captured(gradient: Float[mx.array, "*e m n"], basis: Basis) -> float:
    r"""The share of a gradient's energy that lies in the subspace: :math:`\|R\|^2 / \|G\|^2`, 1 for a zero
    gradient.
    """
    inside, whole = (mx.square(x.astype(mx.float32)).sum() for x in (project(gradient, basis), gradient))
    mx.eval(inside, whole)
    return inside.item() / whole.item() if whole.item() > 0 else 1.0


def find_basis(
    gradient: Float[mx.array, "*e m n"],
    rank: int,
    projection: str,
    method: str = "auto",
    old: Basis | None = None,
) -> dict[str, mx.array]:
    """The leading singular vectors of a gradient, as GaLore takes them.

    ``svd`` is the reference's own way, slow because MLX has no thin form. ``eigh`` takes the eigenvectors of
    the smaller Gram matrix: the same subspace, ten times faster. ``subspace`` starts from the old basis and
    does two rounds of block power iteration with a small eigenproblem at the end: products of matrices
    otherwise. ``auto`` takes ``eigh`` up to 2048 and ``subspace`` above.

    Args:
        gradient: Computed in float32.
        rank: Vectors wanted; cut to the smaller side.
        projection: See :func:`sides_of`.
        method: One of :data:`METHODS`.
        old: The basis before, a warm start for ``subspace``.

    Returns:
        ``left [*e, m, r]``, ``right [*e, r, n]``, orthonormal, each vector's largest entry positive,
        evaluated.

    Raises:
        ConfigError: no such method, or ``eigh`` of a side that is too long for it.
    """
    if method not in METHODS:
        raise ConfigError(f"no method {method!r} for a basis", fix=f"one of {', '.join(METHODS)}")
    g = gradient.astype(mx.float32)
    m, n = g.shape[-2:]
    r = min(rank, m, n)
    if method == "auto":
        method = "eigh" if min(m, n) <= _EIGH_LIMIT else "subspace"
    out: dict[str, mx.array] = {}
    for side in sides_of(g.shape, projection):
        # Everything is done for the left; the right is the left of the transpose.
        matrix = g if side == "left" else g.swapaxes(-1, -2)
        start = None
        if old is not None and method == "subspace":
            start = old[side] if side == "left" else old[side].swapaxes(-1, -2)
        vectors = _fix_signs(_leading(matrix, r, method, start))
        out[side] = vectors if side == "left" else vectors.swapaxes(-1, -2)
    mx.eval(out)
    return out


def _leading(g: mx.array, r: int, method: str, start: mx.array | None) -> mx.array:
    """The ``r`` leading left singular vectors ``[*e, m, r]``."""
    m, n = g.shape[-2:]
    if method == "svd":
        return mx.linalg.svd(g, stream=mx.cpu)[0][..., :r]
    if method == "subspace":
        return _power_iteration(g, r, start)
    # A scale near 1 keeps the squares of small gradients out of float32's denormals.
    g = g / mx.maximum(mx.abs(g).max(axis=(-1, -2), keepdims=True), 1e-30)
    if m <= n:
        return _top(g @ g.swapaxes(-1, -2), r)
    return _orthonormal(g @ _top(g.swapaxes(-1, -2) @ g, r))


def _top(gram: mx.array, r: int) -> mx.array:
    """Eigenvectors of the ``r`` largest eigenvalues, the largest first."""
    if gram.shape[-1] > _EIGH_LARGEST:
        raise ConfigError(
            f"eigenvectors of {gram.shape[-1]} x {gram.shape[-1]} numbers",
            fix="basis: auto or svd, and a rank below 2,800",
        )
    mx.eval(gram)
    vectors = mx.linalg.eigh(gram, stream=mx.cpu)[1]
    mx.eval(vectors)
    return vectors[..., ::-1][..., :r]


def _orthonormal(x: mx.array) -> mx.array:
    mx.eval(x)
    q = mx.linalg.qr(x, stream=mx.cpu)[0]
    mx.eval(q)
    return q


def _power_iteration(g: mx.array, r: int, start: mx.array | None, rounds: int = 2) -> mx.array:
    """Block power iteration with oversampling and Rayleigh-Ritz (Halko et al., arXiv 0909.4061), warm where
    there is a start.
    """
    *batch, m, n = g.shape
    g = g / mx.maximum(mx.abs(g).max(axis=(-1, -2), keepdims=True), 1e-30)
    k = min(r + _OVERSAMPLING, m, n)
    # A key of its own: the global random state belongs to dropout.
    fresh = k - (start.shape[-1] if start is not None and start.shape[-1] <= k else 0)
    x = mx.random.normal((*batch, n, fresh), key=mx.random.key(m * 1_000_003 + n))
    x = g @ x
    if fresh < k and start is not None:
        x = mx.concatenate([start, x], axis=-1)
    q = _orthonormal(x)
    for _ in range(rounds):
        q = _orthonormal(g @ (g.swapaxes(-1, -2) @ q))
    low = q.swapaxes(-1, -2) @ g
    return q @ _top(low @ low.swapaxes(-1, -2), r)


def _fix_signs(vectors: mx.array) -> mx.array:
    """Each column's largest entry positive: the sign of a singular vector is the library's whim."""
    place = mx.argmax(mx.abs(vectors), axis=-2, keepdims=True)
    return vectors * mx.where(mx.take_along_axis(vectors, place, axis=-2) < 0, -1.0, 1.0)


def carry_moments(
    m: Float[mx.array, "*e p q"],
    v: Float[mx.array, "*e p q"],
    old: Basis,
    new: Basis,
    betas: tuple[float, float],
    step: int,
) -> tuple[mx.array, mx.array]:
    r"""Both moments of Adam, read in the old basis, written in the new one.

    With :math:`C` the change of coordinates, :math:`M \leftarrow C M` and, with :math:`\hat m, \hat v` free
    of bias,
    :math:`V \leftarrow (1-\beta_2^t)\,|C^{\circ 2}(\hat v - \hat m^{\circ 2}) + (C \hat m)^{\circ 2}|`: the
    variance turns like a variance, the mean like a mean (LDAdam, arXiv 2410.16103). Left untouched, a sign
    flip of a basis vector alone scrambles the momentum.

    Args:
        m, v: First and second moment, with their bias.
        old, new: The bases before and after.
        betas: Adam's decay rates.
        step: Updates that the moments have seen.
    """
    if step == 0:
        return m, v
    c1, c2 = 1 - betas[0] ** step, 1 - betas[1] ** step
    mean = m / c1
    spread = v / c2 - mx.square(mean)
    turns = {}
    if "left" in old:
        turns["left"] = new["left"].swapaxes(-1, -2) @ old["left"]
    if "right" in old:
        turns["right"] = old["right"] @ new["right"].swapaxes(-1, -2)
    turned, turned_spread = (
        _turn(mean, turns),
        _turn(spread, {side: mx.square(c) for side, c in turns.items()}),
    )
    return turned * c1, mx.abs(turned_spread + mx.square(turned)) * c2


def _turn(x: mx.array, turns: Mapping[str, mx.array]) -> mx.array:
    if "left" in turns:
        x = turns["left"] @ x
    return x @ turns["right"] if "right" in turns else x
