"""Low-rank subspaces of gradients: computing a basis, projecting to it and back, carrying moments over.

A gradient ``G [m, n]`` is projected to ``Aᵀ G Bᵀ`` with ``A [m, r]`` (left) or ``B [r, n]`` (right), or both.
A leading axis (experts) is a batch: one basis for each expert. All decompositions run on the CPU stream, the
only one on which MLX has them, and are evaluated at once: Metal's watchdog kills GPU work that is queued
behind a long decomposition.
"""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx
from jaxtyping import Float

from mlx_distill.errors import ConfigError

Basis = Mapping[str, mx.array]

PROJECTIONS = ("std", "reverse_std", "left", "right", "full")
METHODS = ("auto", "eigh", "svd", "subspace")

# ``auto`` solves the symmetric eigenproblem up to this size of the smaller side: 0.4 s at 2048 on two cores.
EIGH_LIMIT = 2048
_OVERSAMPLING = 16
# Above this size LAPACK's symmetric solver gives its workspace, 2n² + 6n + 1, in a float32 that cannot hold
# it (measured: OpenBLAS 0.3.21, n = 4096).
_EIGH_LARGEST = 2894


def sides_of(shape: tuple[int, ...], projection: str) -> tuple[str, ...]:
    """The sides on which a gradient of that shape gets a basis.

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
    """The shapes of the bases; the rank is at most the smaller side.

    >>> basis_shapes((8, 4), 2, "std")
    {'right': (2, 4)}
    """
    *batch, m, n = shape
    r = min(rank, m, n)
    shapes = {"left": (*batch, m, r), "right": (*batch, r, n)}
    return {side: shapes[side] for side in sides_of(shape, projection)}


def project(gradient: Float[mx.array, "*e m n"], basis: Basis) -> Float[mx.array, "*e p q"]:
    """Project a gradient to the subspace: ``Aᵀ G Bᵀ``, without the factor of a side that has no basis.

    >>> project(mx.array([[1.0, 2.0], [3.0, 4.0]]), {"right": mx.array([[0.0, 1.0]])}).tolist()
    [[2.0], [4.0]]
    """
    if "left" in basis:
        gradient = basis["left"].swapaxes(-1, -2) @ gradient
    return gradient @ basis["right"].swapaxes(-1, -2) if "right" in basis else gradient


def project_back(low: Float[mx.array, "*e p q"], basis: Basis) -> Float[mx.array, "*e m n"]:
    """Project back to the whole space: ``A N B``.

    >>> project_back(mx.array([[2.0], [4.0]]), {"right": mx.array([[0.0, 1.0]])}).tolist()
    [[0.0, 2.0], [0.0, 4.0]]
    """
    if "left" in basis:
        low = basis["left"] @ low
    return low @ basis["right"] if "right" in basis else low


def captured(gradient: Float[mx.array, "*e m n"], basis: Basis) -> float:
    r"""The share of a gradient's squared norm that lies in the subspace: :math:`\|R\|^2 / \|G\|^2`, 1 for a
    zero gradient.
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
    eigh_limit: int = EIGH_LIMIT,
) -> dict[str, mx.array]:
    """The leading singular vectors of a gradient, on the sides that GaLore projects.

    ``svd`` is the method of the reference, slow because MLX has no thin form. ``eigh`` takes the eigenvectors
    of the smaller Gram matrix: the same subspace, ten times faster. ``subspace`` starts from the old basis
    and does two rounds of block power iteration, which is matrix products and a small eigenproblem at the
    end. ``auto`` is ``eigh`` up to a smaller side of ``eigh_limit`` and ``subspace`` above.

    Args:
        gradient: Of any float type; computed in float32.
        rank: Number of vectors, at most the smaller side.
        projection: See :func:`sides_of`.
        method: One of :data:`METHODS`.
        old: The previous basis, a warm start for ``subspace``.
        eigh_limit: Largest smaller side for which ``auto`` chooses ``eigh``.

    Returns:
        ``left [*e, m, r]``, ``right [*e, r, n]``, orthonormal, each vector's largest entry positive,
        evaluated.

    Raises:
        ConfigError: an unknown method, or ``eigh`` of a side that is too long for it.
    """
    if method not in METHODS:
        raise ConfigError(f"no method {method!r} for a basis", fix=f"one of {', '.join(METHODS)}")
    g = gradient.astype(mx.float32)
    m, n = g.shape[-2:]
    r = min(rank, m, n)
    if method == "auto":
        method = "eigh" if min(m, n) <= eigh_limit else "subspace"
    out: dict[str, mx.array] = {}
    for side in sides_of(g.shape, projection):
        # The right singular vectors are the left ones of the transpose.
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
    """Block power iteration with oversampling and Rayleigh-Ritz (Halko et al., arXiv 0909.4061), from
    ``start`` where there is one.
    """
    *batch, m, n = g.shape
    g = g / mx.maximum(mx.abs(g).max(axis=(-1, -2), keepdims=True), 1e-30)
    k = min(r + _OVERSAMPLING, m, n)
    # With its own key, so that the global random state, which dropout uses, does not change.
    missing = k - (start.shape[-1] if start is not None and start.shape[-1] <= k else 0)
    x = mx.random.normal((*batch, n, missing), key=mx.random.key(m * 1_000_003 + n))
    x = g @ x
    if missing < k and start is not None:
        x = mx.concatenate([start, x], axis=-1)
    q = _orthonormal(x)
    for _ in range(rounds):
        q = _orthonormal(g @ (g.swapaxes(-1, -2) @ q))
    low = q.swapaxes(-1, -2) @ g
    return q @ _top(low @ low.swapaxes(-1, -2), r)


def _fix_signs(vectors: mx.array) -> mx.array:
    """Make each column's largest entry positive, since the sign of a singular vector is arbitrary."""
    largest = mx.argmax(mx.abs(vectors), axis=-2, keepdims=True)
    return vectors * mx.where(mx.take_along_axis(vectors, largest, axis=-2) < 0, -1.0, 1.0)


def carry_moments(
    m: Float[mx.array, "*e p q"],
    v: Float[mx.array, "*e p q"],
    old: Basis,
    new: Basis,
    betas: tuple[float, float],
    step: int,
) -> tuple[mx.array, mx.array]:
    r"""Transform both moments of Adam from the old basis to the new one.

    With :math:`C` the change of coordinates, :math:`M \leftarrow C M` and, with :math:`\hat m, \hat v`
    corrected for bias,
    :math:`V \leftarrow (1-\beta_2^t)\,|C^{\circ 2}(\hat v - \hat m^{\circ 2}) + (C \hat m)^{\circ 2}|`: the
    variance transforms as a variance and the mean as a mean (LDAdam, arXiv 2410.16103). Left as they are, the
    moments would no longer fit: a sign flip of one basis vector already reverses its momentum.

    Args:
        m, v: First and second moment, with their bias.
        old, new: The bases before and after.
        betas: Adam's decay rates.
        step: Number of updates that the moments have seen.
    """
    if step == 0:
        return m, v
    c1, c2 = 1 - betas[0] ** step, 1 - betas[1] ** step
    mean = m / c1
    variance = v / c2 - mx.square(mean)
    changes = {}
    if "left" in old:
        changes["left"] = new["left"].swapaxes(-1, -2) @ old["left"]
    if "right" in old:
        changes["right"] = old["right"] @ new["right"].swapaxes(-1, -2)
    new_mean = _transform(mean, changes)
    new_variance = _transform(variance, {side: mx.square(c) for side, c in changes.items()})
    return new_mean * c1, mx.abs(new_variance + mx.square(new_mean)) * c2


def _transform(x: mx.array, changes: Mapping[str, mx.array]) -> mx.array:
    if "left" in changes:
        x = changes["left"] @ x
    return x @ changes["right"] if "right" in changes else x
