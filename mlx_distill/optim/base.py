"""The base class of the low-rank optimizers: an ``mlx.optimizers.Optimizer`` whose rule knows each
parameter's path, and the filters that choose which matrices are projected.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map_with_path

from mlx_distill.optim.adamw import RoundingOptimizer, bias_corrections

Filter = Callable[[str, mx.array], bool]

# Matrices with one of these in their path are not projected: embeddings and heads have one row a token, most
# of which get no gradient, and adapters are of low rank already.
FULL_SPACE = ("embed", "wte", "wpe", "lm_head", "norm", "router", "lora_", "sinks", "bias")
_STACKED = ("experts", "switch")
# mlx-lm's name of the router in most mixture-of-experts models; a whole part of the path, since gate_proj is
# no router.
_ROUTER = "gate"


def is_projected(path: str, parameter: mx.array) -> bool:
    """The default filter, by names alone: matrices and stacks of experts whose path has none of
    ``FULL_SPACE`` in it.

    It leaves out embeddings, norms, head, router and adapters under the names that mlx-lm gives them. A model
    with other names needs a filter of its own.

    >>> w = mx.zeros((4, 4))
    >>> is_projected("layers.0.self_attn.q_proj.weight", w), is_projected("embed_tokens.weight", w)
    (True, False)
    """
    parts = path.lower().split(".")
    if _ROUTER in parts or any(word in part for word in FULL_SPACE for part in parts):
        return False
    if parameter.ndim == 3:
        return any(word in part for word in _STACKED for part in parts)
    return parameter.ndim == 2


def by_modules(names: Sequence[str]) -> Filter:
    """A filter for the weights of the modules with these names (``q_proj``, or a suffix such as
    ``mlp.up_proj``).

    >>> by_modules(["q_proj"])("layers.0.self_attn.q_proj.weight", mx.zeros((4, 4)))
    True
    """

    def matches(path: str, parameter: mx.array) -> bool:
        module = path.rpartition(".")[0]
        return parameter.ndim in (2, 3) and any(
            module == name or module.endswith("." + name) for name in names
        )

    return matches


@dataclass(frozen=True)
class ProjectedGradient:
    """A gradient in its matrix's low-rank subspace, as :meth:`ProjectingOptimizer.project` returns it.

    A leaf of a tree of gradients: ``tree_map`` keeps it whole, it can be added up over micro-batches and
    scaled for clipping, and ``optimizer.update`` takes it in place of the plain gradient.

    >>> (ProjectedGradient(mx.array([1.0])) + ProjectedGradient(mx.array([2.0])) * 0.5).array.tolist()
    [2.0]
    """

    array: mx.array

    def __add__(self, other: ProjectedGradient) -> ProjectedGradient:
        return ProjectedGradient(self.array + other.array)

    def __mul__(self, scale: float) -> ProjectedGradient:
        return ProjectedGradient(self.array * scale)


Gradient: TypeAlias = mx.array | ProjectedGradient


def array_of(gradient: Gradient) -> mx.array:
    """The numbers of a plain or a projected gradient."""
    return gradient.array if isinstance(gradient, ProjectedGradient) else gradient


@runtime_checkable
class ProjectingOptimizer(Protocol):
    """An optimizer whose ``update`` also takes gradients that it has projected to a smaller space itself."""

    def paths_to_refresh(self, parameters: Mapping[str, mx.array]) -> list[str]:
        """The matrices whose whole gradient the next update needs, to compute a new basis from it."""

    def project(self, path: str, gradient: mx.array) -> Gradient:
        """Project a part of a sum of gradients, unless the next update needs that sum whole."""

    def project_and_refresh(self, path: str, gradient: Gradient) -> Gradient:
        """Project the summed gradient, after computing a new basis from it where that is due."""


class PathOptimizer(RoundingOptimizer):
    """An MLX optimizer whose rule knows the path of each parameter and whether ``filter`` chose it.

    The parameters that the filter does not choose are updated by AdamW as GaLore's reference implementation
    has it: epsilon before the bias correction, decay after the update. State and arithmetic are float32; a
    16-bit weight is rounded stochastically.
    """

    def __init__(
        self,
        learning_rate: float | Callable[[mx.array], mx.array],
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        filter: Filter | None,
        seed: int,
    ) -> None:
        super().__init__(seed)
        self._maybe_schedule("learning_rate", learning_rate)
        self.betas, self.eps, self.weight_decay = (betas[0], betas[1]), eps, weight_decay
        self.filter = filter or is_projected
        self.projected: dict[str, int] = {}  # each chosen path's index among the chosen
        self.states: dict[str, dict] = {}

    def init(self, parameters: dict) -> None:
        """Make the state of each parameter that has none yet."""
        super().init(parameters)
        paths = [path for path, p in tree_flatten(parameters) if self.filter(path, p)]
        self.projected, self.states = {path: index for index, path in enumerate(paths)}, {}
        tree_map_with_path(self._init_path, parameters, self.state)

    def init_single(self, parameter: mx.array, state: dict) -> None:
        """Nothing: the state depends on the path, see :meth:`init_projected`."""

    def _init_path(self, path: str, parameter: mx.array, state: dict) -> None:
        self.states[path] = state
        if state:
            return
        if path in self.projected:
            self.init_projected(path, parameter, state)
        else:
            state["m"] = mx.zeros(parameter.shape, mx.float32)
            state["v"] = mx.zeros(parameter.shape, mx.float32)

    def apply_gradients(self, gradients: dict, parameters: dict) -> Any:
        """The updated parameters, a tree like ``gradients``."""
        if not self._initialized:
            self.init(gradients)
        for name, schedule in self._schedulers.items():
            self.state[name] = schedule(self.step)
        updates, self._index = int(self.step.item()), 0
        self.state["step"] = self.step + 1

        def apply(path: str, gradient: Gradient, parameter: mx.array, state: dict) -> mx.array:
            w = parameter.astype(mx.float32)
            if isinstance(gradient, ProjectedGradient):
                w = w - self.step_projected(path, gradient, state, updates)
            elif path in self.projected:
                w = w - self.step_projected(path, gradient.astype(mx.float32), state, updates)
            else:
                w = w - self.corrected_rate() * self.adam(gradient.astype(mx.float32), state)
            if self.weight_decay > 0:
                w = w * (1 - self.learning_rate * self.weight_decay)
            return self.rounded(w, parameter.dtype)

        return tree_map_with_path(apply, gradients, parameters, self.state)

    def adam(self, g: mx.array, state: dict) -> mx.array:
        r"""Update both moments; :math:`M / (\sqrt V + \epsilon)`, not corrected for bias yet."""
        b1, b2 = self.betas
        m = state["m"] = b1 * state["m"] + (1 - b1) * g
        v = state["v"] = b2 * state["v"] + (1 - b2) * mx.square(g)
        return m / (mx.sqrt(v) + self.eps)

    def corrected_rate(self, step: mx.array | None = None) -> mx.array:
        r""":math:`\eta \sqrt{1-\beta_2^t} / (1-\beta_1^t)` with t the number of this update, or ``step``, the
        number of updates that the moments have seen.
        """
        c1, c2 = bias_corrections(self.step if step is None else step, self.betas)
        return self.learning_rate * mx.sqrt(c2) / c1

    def init_projected(self, path: str, parameter: mx.array, state: dict) -> None:
        """Make the state of a chosen matrix. Subclasses implement it."""
        raise NotImplementedError

    def step_projected(self, path: str, gradient: Gradient, state: dict, updates: int) -> mx.array:
        """What to subtract from a chosen matrix, learning rate included. Subclasses implement it.

        Args:
            path: Of the matrix.
            gradient: float32, plain or projected already.
            state: Of the matrix.
            updates: Finished updates before this one.
        """
        raise NotImplementedError


def state_bytes(optimizer: optim.Optimizer, filter: Filter | None = None) -> int:
    """Bytes of an optimizer's arrays, of all parameters or of those that ``filter`` chooses.

    >>> from mlx_distill.optim.adamw import AdamW
    >>> o = AdamW(0.1); o.init({"w": mx.zeros((4, 4))}); state_bytes(o, lambda path, _: path.startswith("w."))
    128
    """
    return sum(
        array.nbytes for path, array in tree_flatten(optimizer.state) if filter is None or filter(path, array)
    )
