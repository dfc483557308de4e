"""GaLore: Adam's moments in the leading subspace of the gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx

from mlx_distill.errors import ConfigError
from mlx_distill.optim.base import Filter, Gradient, PathOptimizer, ProjectedGradient
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


class GaLoreAdamW(PathOptimizer):
    r"""AdamW whose moments live in a low-rank subspace of each matrix's gradient.

    Every ``update_gap`` steps the leading singular vectors :math:`Q` of the gradient become the basis. With
    that basis, a step is

    .. math::
        R &= G Q^\top, \quad M = \beta_1 M + (1-\beta_1) R, \quad V = \beta_2 V + (1-\beta_2) R^2 \\
        W &\leftarrow W - \eta \frac{\sqrt{1-\beta_2^t}}{1-\beta_1^t}\, s\, \frac{M}{\sqrt V + \epsilon} Q,
        \quad W \leftarrow W - \eta \lambda W

    (and correspondingly :math:`Q^\top G` for wide matrices). The state of an m x n matrix, b the longer side,
    a the shorter, is :math:`ar + 2br` numbers where AdamW has :math:`2ab`. The parameters that ``filter``
    does not choose are updated by plain AdamW: embeddings and head (one row a token, most rows without a
    gradient), norms and biases (no matrices). Their moments take 8 bytes a weight, 4.9 GB for an embedding of
    150,000 tokens and width 4,096. A recipe projects ``target_modules``, trains ``modules_to_save`` by AdamW,
    and freezes everything else.

    Formulas, defaults and order of operations are those of galore-torch (Zhao et al., arXiv 2403.03507);
    trajectories agree to 1e-5 with the same bases. It lacks ``moments``, ``basis``, ``stagger`` and
    ``refresh_below``. A basis is computed on the host, so ``update`` cannot be inside ``mx.compile``; the
    model's part of a step can.

    ``update`` takes plain gradients. To add up gradients of several micro-batches or ranks in little memory,
    give it what :meth:`project` and :meth:`project_and_refresh` return.

    Args:
        learning_rate: :math:`\eta`, a number or a function of the step.
        rank: Of the projection; at most a matrix's shorter side.
        update_gap: Steps between refreshes of a basis; the first step computes the first basis.
        scale: :math:`s`, a factor on the update.
        projection: ``std`` (basis on the shorter side), ``reverse_std``, ``left``, ``right`` or ``full``
            (both).
        betas: :math:`(\beta_1, \beta_2)`.
        eps: :math:`\epsilon`, added before the bias correction.
        weight_decay: :math:`\lambda`, applied after the update, in full space.
        moments: At a refresh, ``keep`` leaves the moments' numbers as they are, as the reference does;
            ``reset`` sets them to zero; ``project`` transforms them to the new basis
            (:func:`~mlx_distill.optim.subspace.carry_moments`).
        basis: How a basis is computed: ``auto``, ``eigh``, ``svd``, ``subspace``, or a function
            ``(gradient, rank, projection, old) -> {side: array}``.
        stagger: Distribute the matrices' refreshes over the gap instead of doing all of them at one step.
        refresh_below: Skip a refresh while the old basis captures at least this share of what it captured
            when it was new; 0 never skips.
        filter: ``(path, array) -> bool``: which matrices are projected. An optimizer sees names and no
            modules, so the default, :func:`~mlx_distill.optim.base.is_projected`, goes by the names that
            mlx-lm gives embeddings, norms, head, router and adapters; for other names use
            :func:`~mlx_distill.optim.base.by_modules` or a function of your own. The path is the dotted name
            in the tree of parameters.
        group: Ranks that share the work: each matrix's basis is computed by one rank and sent to all.
        seed: Of the stochastic rounding of 16-bit weights.

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
        self.moments, self.basis, self.group = moments, basis, group
        self.stagger, self.refresh_below = stagger, refresh_below

    def init_projected(self, path: str, parameter: mx.array, state: dict) -> None:
        """Zero bases (the first step fills them) and zero moments; ``age`` counts the updates that the
        moments have seen, ``fresh`` is the share that the basis captured when it was new.
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

    def step_projected(self, path: str, gradient: Gradient, state: dict, updates: int) -> mx.array:
        """Refresh the basis where that is due, project, update the moments, project back."""
        if not isinstance(gradient, ProjectedGradient):
            gradient = self._refresh_and_project(path, gradient, state, updates)
        state["age"] = state["age"] + 1
        step = project_back(self.adam(gradient.array, state), basis_of(state))
        return self.corrected_rate(state["age"]) * self.scale * step

    def needs_refresh(self, path: str, updates: int) -> bool:
        """Whether the update that follows ``updates`` finished ones computes a new basis for that matrix."""
        if updates == 0:
            return True
        phase = self.projected[path] * self.update_gap // len(self.projected) if self.stagger else 0
        return (updates - phase) % self.update_gap == 0

    def paths_to_refresh(self, parameters: Mapping[str, mx.array]) -> list[str]:
        """The matrices whose whole gradient the next update needs, to compute a new basis from it."""
        updates = int(self.step.item())
        return [
            path
            for path in parameters
            if path in self.projected and not self._full_rank(path) and self.needs_refresh(path, updates)
        ]

    def project(self, path: str, gradient: mx.array) -> Gradient:
        """The gradient of one micro-batch or rank in its subspace, so that sums over them take less memory:
        exact, because projecting is linear.

        A gradient whose sum is needed whole is returned as it is: that of a matrix which the filter does not
        choose, or whose basis the next update refreshes. Give the sum to :meth:`project_and_refresh`, then to
        ``update``.
        """
        if path not in self.projected or self._full_rank(path):
            return gradient
        if self.needs_refresh(path, int(self.step.item())):
            return gradient
        return ProjectedGradient(project(gradient.astype(mx.float32), basis_of(self.states[path])))

    def project_and_refresh(self, path: str, gradient: Gradient) -> Gradient:
        """The whole step's gradient in its subspace, after a refresh of the basis where that is due. Call it
        once a step for each path; what it returns can be clipped and given to ``update``.

        A gradient that is projected already is returned as it is.
        """
        if isinstance(gradient, ProjectedGradient) or path not in self.projected or self._full_rank(path):
            return gradient
        updates, state = int(self.step.item()), self.states[path]
        return self._refresh_and_project(path, gradient.astype(mx.float32), state, updates)

    def _full_rank(self, path: str) -> bool:
        """Whether the subspace is the whole space. Its gradients are projected in ``update`` alone: done
        earlier, that would save nothing.
        """
        state = self.states[path]
        rows = state["left"].shape[-2] if "left" in state else state["m"].shape[-2]
        columns = state["right"].shape[-1] if "right" in state else state["m"].shape[-1]
        return tuple(state["m"].shape[-2:]) == (rows, columns)

    def _refresh_and_project(
        self, path: str, gradient: mx.array, state: dict, updates: int
    ) -> ProjectedGradient:
        # A gradient that is not finite has no basis. It is projected as it is: the caller's check of its norm
        # stops the run.
        if self.needs_refresh(path, updates) and mx.isfinite(gradient.sum()).item():
            self._refresh(path, gradient, state, first=updates == 0)
        return ProjectedGradient(project(gradient, basis_of(state)))

    def _refresh(self, path: str, gradient: mx.array, state: dict, *, first: bool) -> None:
        """Compute a new basis from a gradient; treat the moments as ``moments`` says."""
        old = None if first else basis_of(state)
        fresh = state["fresh"].item() if self.refresh_below > 0 else 0.0
        if old is not None and fresh > 0 and captured(gradient, old) >= self.refresh_below * fresh:
            return
        new = self._compute_basis(path, gradient, old)
        if old is not None and gradient.ndim == 3:
            # An expert that saw no token has a zero gradient, whose basis would be arbitrary for a whole gap.
            seen = mx.abs(gradient).max(axis=(-2, -1), keepdims=True) > 0
            new = {side: mx.where(seen, array, old[side]) for side, array in new.items()}
        if old is not None and self.moments == "reset":
            state["m"], state["v"] = mx.zeros_like(state["m"]), mx.zeros_like(state["v"])
            state["age"] = mx.array(0, mx.uint32)
        elif old is not None and self.moments == "project":
            age = int(state["age"].item())
            state["m"], state["v"] = carry_moments(state["m"], state["v"], old, new, self.betas, age)
        state.update(new)
        if self.refresh_below > 0:
            state["fresh"] = mx.array(captured(gradient, new))

    def _compute_basis(self, path: str, gradient: mx.array, old: Basis | None) -> dict[str, mx.array]:
        """The new basis, the same on all ranks of the group; evaluated."""
        size = self.group.size() if self.group is not None else 1
        shapes = basis_shapes(gradient.shape, self.rank, self.projection)
        if size > 1 and self.projected[path] % size != self.group.rank():
            new = {side: mx.zeros(shape, mx.float32) for side, shape in shapes.items()}
        elif callable(self.basis):
            new = self.basis(gradient, self.rank, self.projection, old)
        else:
            new = find_basis(gradient, self.rank, self.projection, self.basis, old)
        if size > 1:
            new = {side: mx.distributed.all_sum(array, group=self.group) for side, array in new.items()}
        # Contiguous, as they will be when read from a checkpoint: BLAS rounds a transposed view differently.
        # (mx.contiguous keeps the strides of an array with a side of 1.)
        new = {side: array.reshape(-1).reshape(array.shape) for side, array in new.items()}
        mx.eval(new)
        return new


def basis_of(state: dict) -> dict[str, mx.array]:
    """The bases in the state of a matrix."""
    return {side: state[side] for side in ("left", "right") if side in state}
