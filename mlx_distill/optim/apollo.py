"""APOLLO: the plain gradient, scaled by the step sizes of Adam in a random subspace."""

from __future__ import annotations

import math
from collections.abc import Callable

import mlx.core as mx

from mlx_distill.errors import ConfigError
from mlx_distill.optim.base import Filter, Gradient, PathOptimizer
from mlx_distill.optim.subspace import basis_shapes, project

MINI_SCALE = math.sqrt(128.0)
_GROWTH = 1.01
_TINY = 1e-8


def random_basis(
    shape: tuple[int, ...], rank: int, seed: int, index: int, period: int
) -> dict[str, mx.array]:
    r"""A Gaussian projection, entries :math:`\mathcal N(0, 1/r)`, of the shorter side. It is not stored: the
    same arguments give the same projection.

    Args:
        shape: Of the matrix.
        rank: r, at most the shorter side.
        seed: Of the optimizer.
        index: Of the matrix among the projected ones.
        period: How many projections the matrix has had before.

    >>> random_basis((6, 4), 2, seed=0, index=3, period=1)["right"].shape
    (2, 4)
    """
    (side, form), *_ = basis_shapes(shape, rank, "std").items()
    key = mx.random.key(((seed * 1_000_003 + index) * 1_000_033 + period) % 2**64)
    return {side: mx.random.normal(form, key=key) / math.sqrt(min(rank, *shape[-2:]))}


class APOLLO(PathOptimizer):
    r"""Approximated gradient scaling for memory-efficient optimization (Zhu et al., arXiv 2412.05270). No
    singular value decomposition is needed.

    With a random projection :math:`P` and Adam's moments of :math:`R = G P^\top` alone,

    .. math::
        N &= \frac{M}{\sqrt V + \epsilon}, \quad s_j = \frac{\|N_j\|}{\|R_j\| + 10^{-8}}, \quad
        D = G \,\mathrm{diag}(s), \\
        W &\leftarrow W - \eta \frac{\sqrt{1-\beta_2^t}}{1-\beta_1^t}\, \alpha\, D, \quad
        W \leftarrow W - \eta \lambda W

    with one :math:`s_j` for each channel j (of the longer side) or, with ``channels=False``, one for the
    whole matrix. The norm of :math:`D` grows by at most 1 % a step. The state of an m x n matrix is 2br
    numbers, b the longer side.

    Args:
        learning_rate: :math:`\eta`, a number or a function of the step.
        rank: r, of the projection.
        update_gap: Steps after which a new projection is drawn.
        scale: :math:`\alpha`.
        channels: One factor for each channel, or one for each matrix.
        betas: :math:`(\beta_1, \beta_2)`.
        eps: :math:`\epsilon`.
        weight_decay: :math:`\lambda`, after the update.
        seed: Of the projections and of the stochastic rounding.
        filter: Which matrices are scaled this way; AdamW updates the others. See
            :class:`~mlx_distill.optim.galore.GaLoreAdamW`.

    >>> optimizer = APOLLO(0.1, rank=1)
    >>> optimizer.apply_gradients({"w": mx.ones((4, 2))}, {"w": mx.zeros((4, 2))})["w"].shape
    (4, 2)
    """

    def __init__(
        self,
        learning_rate: float | Callable[[mx.array], mx.array],
        rank: int,
        update_gap: int = 200,
        scale: float = 1.0,
        channels: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        seed: int = 0,
        filter: Filter | None = None,
    ) -> None:
        super().__init__(learning_rate, betas, eps, weight_decay, filter, seed)
        if rank < 1 or update_gap < 1:
            raise ConfigError(f"APOLLO with rank {rank} and gap {update_gap}", fix="both are at least 1")
        self.rank, self.update_gap, self.scale, self.channels = rank, update_gap, scale, channels

    def init_projected(self, path: str, parameter: mx.array, state: dict) -> None:
        """Moments in the subspace, and the norm of the last direction (0 before the first)."""
        *batch, m, n = parameter.shape
        r = min(self.rank, m, n)
        shape = (*batch, m, r) if m >= n else (*batch, r, n)
        state["m"], state["v"] = mx.zeros(shape, mx.float32), mx.zeros(shape, mx.float32)
        state["norm"] = mx.zeros((*batch, 1, 1), mx.float32)

    def step_projected(self, path: str, gradient: Gradient, state: dict, updates: int) -> mx.array:
        """Scale the gradient by what Adam does in the subspace, and limit the growth of its norm."""
        assert isinstance(gradient, mx.array)
        index, period = self.projected[path], updates // self.update_gap
        basis = random_basis(gradient.shape, self.rank, self.seed, index, period)
        low = project(gradient, basis)
        step = self.adam(low, state)
        axis: int | tuple[int, int] = (-2, -1)
        if self.channels:
            axis = -1 if "right" in basis else -2
        factor = _norm(step, axis) / (_norm(low, axis) + _TINY)
        direction = gradient * factor
        norm, last = _norm(direction, (-2, -1)), state["norm"]
        limit = mx.where(last > 0, mx.maximum(norm / (last + _TINY), _GROWTH) / _GROWTH, 1.0)
        state["norm"] = norm / limit
        return self.corrected_rate() * self.scale * direction / limit


def APOLLOMini(  # noqa: N802 - named like the class that it makes
    learning_rate: float | Callable[[mx.array], mx.array],
    update_gap: int = 200,
    scale: float = MINI_SCALE,
    **options: object,
) -> APOLLO:
    r"""APOLLO of rank 1 with one factor for each matrix, so that it needs nearly no state;
    :math:`\alpha = \sqrt{128}` as in the paper.

    >>> APOLLOMini(0.1).rank
    1
    """
    return APOLLO(learning_rate, 1, update_gap, scale, False, **options)  # type: ignore[arg-type]


def _norm(x: mx.array, axis: int | tuple[int, int]) -> mx.array:
    return mx.sqrt(mx.square(x).sum(axis=axis, keepdims=True))
