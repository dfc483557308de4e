"""GaLore: Adam's moments in the leading subspace of the gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx

from mlx_distill.errors import ConfigError
from mlx_distill.optim.base import Filter, NamedOptimizer
from mlx_distill.optim.subspace import (
    METHODS,
    Basis,
    basis_shapes,
    captured,
    carry_moments,
    find_basis,
    project,
    project_back,
    sides_of,
)

BasisFinder = Callable[..., dict[str, mx.array]]

MOMENTS = ("keep", "reset", "project")


class GaLoreAdamW(NamedOptimizer):
    r"""AdamW whose moments live in a low-rank subspace of each matrix's gradient.

    Every ``update_gap`` steps the leading singular vectors :math:`Q` of the gradient become the basis;
    between,

    .. math::
        R &= G Q^\top, \quad M = \beta_1 M + (1-\beta_1) R, \quad V = \beta_2 V + (1-\beta_2) R^2 \\
        W &\leftarrow W - \eta \frac{\sqrt{1-\beta_2^t}}{1-\beta_1^t}\, s\, \frac{M}{\sqrt V + \epsilon} Q, \quad
        W \leftarrow W - \eta \lambda W

    (and correspondingly :math:`Q^\top G` for wide matrices). The state of an m x n matrix, b the longer side,
    a the shorter, is :math:`ar + 2br` numbers where AdamW has :math:`2ab`. What ``filter`` does not choose
    moves by plain AdamW: embeddings and head (a row a token, most of them without a gradient), norms and
    biases (no matrices). Their moments cost 8 bytes a weight, so that of 150,000 tokens times a width of
    4,096 the embedding alone has 4.9 GB. A recipe projects ``target_modules``, moves ``modules_to_save`` so,
    and freezes the rest.

    Formulas, defaults and order of operations are galore-torch's (Zhao et al., arXiv 2403.03507), with which
    trajectories agree to 1e-5 where the bases are the same. Beyond it: ``moments``, fast bases, ``stagger``,
    ``refresh_below``. A basis is found on the host, so an update cannot stand inside ``mx.compile``; the
    model's part of a step can.

    Args:
        learning_rate: :math:`\eta`, a number or a function of the step.
        rank: Of the projection; cut to a matrix's shorter side.
        update_gap: Steps between refreshes of a basis; the first step makes the first.
        scale: :math:`s`, on the update alone.
        projection: ``std`` (basis on the shorter side), ``reverse_std``, ``left``, ``right`` or ``full``
            (both).
        betas: :math:`(\beta_1, \beta_2)`.
        eps: :math:`\epsilon`, added before the bias is corrected.
        weight_decay: :math:`\lambda`, applied after the update, in full space.
        moments: At a refresh: ``keep`` reads the old numbers in the new basis as the reference does;
            ``reset`` begins anew; ``project`` turns them (:func:`~mlx_distill.optim.subspace.carry_moments`).
        basis: How one is found: ``auto``, ``eigh``, ``svd``, ``subspace``, or a function
            ``(gradient, rank, projection, old) -> {side: array}``.
        stagger: Spread the refreshes over the gap, matrix by matrix, where otherwise one step pays for all.
        refresh_below: Skip a refresh while the old basis captures at least this share of what it captured
            when it was new; 0 never skips.
        filter: ``(path, array) -> bool``: which matrices are projected. An optimizer sees names and no
            modules, so the default, :func:`~mlx_distill.optim.base.is_projected`, goes by the names that
            mlx-lm gives embeddings, norms, head, router and adapters; for others say it yourself, or by
            :func:`~mlx_distill.optim.base.by_modules`. The path is the dotted name in the tree given.
        group: Ranks that share the work: each matrix's basis is computed by one of them and sent to all.
        seed: Of the rounding of weights of 16 bits, which is stochastic.

    >>> optimizer = GaLoreAdamW(0.1, rank=1)
    >>> new = optimizer.apply_gradients({"w": mx.array([[3.0, 0.0], [0.0, 1.0]])}, {"w": mx.ones((2, 2))})
    >>> [[round(x, 3) for x in row] for row in new["w"].tolist()]
    [[0.975, 1.0], [1.0, 1.0]]
    """

    def __init__(
        self,
        learning_rate: float | Callable[[mx.array], mx.array],
        rank: int,
        update_gap: int = 200,
        scale: float = 0.25,
        projection: str = "std",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        moments: str = "keep",
        basis: str | BasisFinder = "auto",
        stagger: bool = False,
        refresh_below: float = 0.0,
        filter: Filter | None = None,
        group: Any = None,
        seed: int = 0,
    ) -> None:
        super().__init__(learning_rate, betas, eps, weight_decay, filter, seed)
        if not all(isinstance(number, int) and number >= 1 for number in (rank, update_gap)):
            raise ConfigError(
                f"GaLore with rank {rank!r} and gap {update_gap!r}", fix="both are whole numbers, at least 1"
            )
        if scale < 0 or not 0 <= refresh_below <= 1:
            raise ConfigError(
                f"GaLore with scale {scale} and refresh_below {refresh_below}",
                fix="at least 0, and between 0 and 1",
            )
        if isinstance(basis, str) and basis not in METHODS:
            raise ConfigError(f"no method {basis!r} for a basis", fix=f"one of {', '.join(METHODS)}")
        if moments not in MOMENTS:
            raise ConfigError(f"no way {moments!r} to treat the moments", fix=f"one of {', '.join(MOMENTS)}")
        sides_of((1, 1), projection)
        self.rank, self.update_gap, self.scale, self.projection = rank, update_gap, scale, projection
        self.moments, self.basis, self.stagger, self.refresh_below, self.group = (
            moments,
            basis,
            stagger,
            refresh_below,
            group,
        )
        self._refreshed: dict[str, int] = {}  # the update before which a basis was looked at last

    def init(self, parameters: dict) -> None:
        """Make the state of each parameter that has none yet."""
        self._refreshed.clear()
        super().init(parameters)

    def init_named(self, path: str, parameter: mx.array, state: dict) -> None:
        """Zero bases (the first step fills them) and zero moments; ``age`` counts the updates that the
        moments have seen.
        """
        shapes = basis_shapes(parameter.shape, self.rank, self.projection)
        for side, shape in shapes.items():
            state[side] = mx.zeros(shape, mx.float32)
        *batch, m, n = parameter.shape
        rows = shapes["left"][-1] if "left" in shapes else m
        columns = shapes["right"][-2] if "right" in shapes else n
        state["m"] = mx.zeros((*batch, rows, columns), mx.float32)
        state["v"] = mx.zeros((*batch, rows, columns), mx.float32)
        state["age"] = mx.array(0, mx.uint32)
        state["fresh"] = mx.array(0.0)

    def step_named(self, path: str, gradient: mx.array, state: dict) -> mx.array:
        """Refresh where it is due, project, move the moments, project back."""
        # At full rank the two forms cannot be told apart, but then no gradient comes in its subspace.
        low = gradient if self._is_low(gradient, state) else self._enter(path, gradient, state)
        state["age"] = state["age"] + 1
        return (
            self.corrected_rate(state["age"])
            * self.scale
            * project_back(self.adam(low, state), basis_of(state))
        )

    def due(self, path: str) -> bool:
        """Whether the next update of that matrix begins with a refresh of its basis that is still to be done."""
        if self._refreshed.get(path) == self.count:
            return False
        if self.count == 0:
            return True
        phase = self.chosen[path] * self.update_gap // max(len(self.chosen), 1) if self.stagger else 0
        return (self.count - phase) % self.update_gap == 0

    def due_whole(self, parameters: Mapping[str, mx.array]) -> list[str]:
        """The matrices whose gradient the next update needs whole, to find a basis in it."""
        self.count = int(self.step.item())
        return [
            path
            for path, p in parameters.items()
            if path in self.chosen and self.due(path) and self._shrinks(path, p)
        ]

    def compress(self, path: str, gradient: mx.array) -> mx.array:
        """A gradient in its subspace, to be added up over micro-batches and ranks: exact, because projecting
        is linear.

        What has no basis yet, or is to get a new one, stays whole. Give the sum to :meth:`enter`, then to
        ``update``.
        """
        self.count = int(self.step.item())
        if path not in self.chosen or self.due(path) or not self._shrinks(path, gradient):
            return gradient
        return project(gradient.astype(mx.float32), basis_of(self.states[path]))

    def enter(self, path: str, gradient: mx.array) -> mx.array:
        """The summed gradient in its subspace, after the refresh of the basis where it is due: for clipping,
        then ``update``.
        """
        self.count = int(self.step.item())
        if path not in self.chosen or not self._shrinks(path, gradient):
            return gradient
        return self._enter(path, gradient.astype(mx.float32), self.states[path])

    def _is_low(self, gradient: mx.array, state: dict) -> bool:
        rows = state["left"].shape[-2] if "left" in state else gradient.shape[-2]
        columns = state["right"].shape[-1] if "right" in state else gradient.shape[-1]
        return tuple(gradient.shape[-2:]) != (rows, columns)

    def _shrinks(self, path: str, gradient: mx.array) -> bool:
        """Whether the subspace's form differs from this one. At full rank both are alike, and nothing is ever
        compressed.
        """
        return gradient.shape != self.states[path]["m"].shape

    def _enter(self, path: str, gradient: mx.array, state: dict) -> mx.array:
        # A gradient that is not finite has no basis; projected as it is, it stops whoever looks at its norm.
        if self.due(path) and mx.isfinite(gradient.sum()).item():
            self._refresh(path, gradient, state)
        return project(gradient, basis_of(state))

    def _refresh(self, path: str, gradient: mx.array, state: dict) -> None:
        self._refreshed[path] = self.count
        old = basis_of(state) if self.count else None
        fresh = state["fresh"].item() if self.refresh_below > 0 else 0.0
        if old is not None and fresh > 0 and captured(gradient, old) >= self.refresh_below * fresh:
            return
        new = self._find(path, gradient, old)
        if old is not None and gradient.ndim == 3:
            # An expert that saw no token has no gradient to find a basis in, and would keep whatever came out
            # for a whole gap.
            seen = mx.abs(gradient).max(axis=(-2, -1), keepdims=True) > 0
            new = {side: mx.where(seen, array, old[side]) for side, array in new.items()}
        if old is not None and self.moments == "reset":
            state["m"], state["v"], state["age"] = (
                mx.zeros_like(state["m"]),
                mx.zeros_like(state["v"]),
                mx.array(0, mx.uint32),
            )
        elif old is not None and self.moments == "project":
            state["m"], state["v"] = carry_moments(
                state["m"], state["v"], old, new, self.betas, int(state["age"].item())
            )
        state.update(new)
        if self.refresh_below > 0:
            state["fresh"] = mx.array(captured(gradient, new))

    def _find(self, path: str, gradient: mx.array, old: Basis | None) -> dict[str, mx.array]:
        size = self.group.size() if self.group is not None else 1
        shapes = basis_shapes(gradient.shape, self.rank, self.projection)
        if size > 1 and self.chosen[path] % size != self.group.rank():
            new = {side: mx.zeros(shape, mx.float32) for side, shape in shapes.items()}
        elif callable(self.basis):
            new = self.basis(gradient, self.rank, self.projection, old)
        else:
            new = find_basis(gradient, self.rank, self.projection, self.basis, old)
        if size > 1:
            new = {side: mx.distributed.all_sum(array, group=self.group) for side, array in new.items()}
        # Laid out as a checkpoint gives them back: BLAS rounds a transposed view otherwise. (mx.contiguous
        # would leave the strides of one with a side of 1 as they are.)
        new = {side: array.reshape(-1).reshape(array.shape) for side, array in new.items()}
        mx.eval(new)
        return new


def basis_of(state: dict) -> dict[str, mx.array]:
    """The bases in a matrix's state."""
    return {side: state[side] for side in ("left", "right") if side in state}
