"""The base of the optimizers that treat some matrices in a subspace: MLX's protocol, with the parameter's
path.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map_with_path

from mlx_distill.optim.adamw import RoundingOptimizer, bias_corrections

Filter = Callable[[str, mx.array], bool]

# Parts of a path whose matrices stay in full space: embeddings and heads have a row a token, most of them
# without a gradient, and adapters are of low rank already.
FULL_SPACE = ("embed", "wte", "wpe", "lm_head", "norm", "router", "lora_", "sinks", "bias")
_STACKED = ("experts", "switch")
_ROUTER = (
    "gate"  # mlx-lm's name for it in most models of experts, and no part of a longer one such as gate_proj
)


def is_projected(path: str, parameter: mx.array) -> bool:
    """The default choice, by names alone: matrices and stacks of experts whose path has none of
    ``FULL_SPACE`` in it.

    So not embeddings, norms, head, router or adapters as they are called in mlx-lm. A module of your own with
    other names wants a filter.

    >>> w = mx.zeros((4, 4))
    >>> is_projected("layers.0.self_attn.q_proj.weight", w), is_projected("embed_tokens.weight", w)
    (True, False)
    """
    parts = path.lower().split(".")
    if _ROUTER in parts or any(word in part for word in FULL_SPACE for part in parts):
        return False
    return parameter.ndim == 2 or (
        parameter.ndim == 3 and any(word in part for word in _STACKED for part in parts)
    )


def by_modules(names: Sequence[str]) -> Filter:
    """A filter for the weights of modules of these names (``q_proj``, or a tail such as ``mlp.up_proj``).

    >>> by_modules(["q_proj"])("layers.0.self_attn.q_proj.weight", mx.zeros((4, 4)))
    True
    """

    def chosen(path: str, parameter: mx.array) -> bool:
        module = path.rpartition(".")[0]
        return parameter.ndim in (2, 3) and any(
            module == name or module.endswith("." + name) for name in names
        )

    return chosen


class NamedOptimizer(RoundingOptimizer):
    """An MLX optimizer whose rule knows the path of each parameter and whether ``filter`` chose it.

    What the filter does not choose moves by AdamW as the reference of GaLore has it: epsilon before the
    correction of the bias, decay after the update. State and arithmetic are float32; a weight of 16 bits is
    rounded stochastically.
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
        self.chosen: dict[str, int] = {}
        self.states: dict[str, dict] = {}
        self.count = 0

    def init(self, parameters: dict) -> None:
        """Make the state of each parameter that has none yet."""
        super().init(parameters)
        flat = [path for path, p in tree_flatten(parameters) if self.filter(path, p)]
        self.chosen, self.states = {path: place for place, path in enumerate(flat)}, {}
        tree_map_with_path(self._init_named, parameters, self.state)
        self.count = int(self.step.item())

    def init_single(self, parameter: mx.array, state: dict) -> None:
        """Nothing: the path decides, see :meth:`init_named`."""

    def _init_named(self, path: str, parameter: mx.array, state: dict) -> None:
        self.states[path] = state
        if state:
            return
        if path in self.chosen:
            self.init_named(path, parameter, state)
        else:
            state["m"] = mx.zeros(parameter.shape, mx.float32)
            state["v"] = mx.zeros(parameter.shape, mx.float32)

    def apply_gradients(self, gradients: dict, parameters: dict) -> Any:
        """The updated parameters, a tree like ``gradients``."""
        if not self._initialized:
            self.init(gradients)
        for name, schedule in self._schedulers.items():
            self.state[name] = schedule(self.step)
        self.count, self._place = int(self.step.item()), 0
        self.state["step"] = self.step + 1
        return tree_map_with_path(self._apply_named, gradients, parameters, self.state)

    def _apply_named(self, path: str, gradient: mx.array, parameter: mx.array, state: dict) -> mx.array:
        g, w = gradient.astype(mx.float32), parameter.astype(mx.float32)
        if path in self.chosen:
            w = w - self.step_named(path, g, state)
        else:
            w = w - self.corrected_rate() * self.adam(g, state)
        if self.weight_decay > 0:
            w = w * (1 - self.learning_rate * self.weight_decay)
        return self.rounded(w, parameter.dtype)

    def adam(self, g: mx.array, state: dict) -> mx.array:
        r"""Move both moments; :math:`M / (\sqrt V + \epsilon)`, the bias not corrected yet."""
        b1, b2 = self.betas
        m = state["m"] = b1 * state["m"] + (1 - b1) * g
        v = state["v"] = b2 * state["v"] + (1 - b2) * mx.square(g)
        return m / (mx.sqrt(v) + self.eps)

    def corrected_rate(self, step: mx.array | None = None) -> mx.array:
        r""":math:`\eta \sqrt{1-\beta_2^t} / (1-\beta_1^t)` at this update, or at the ``step``-th since the
        moments began.
        """
        c1, c2 = bias_corrections(self.step if step is None else step, self.betas)
        return self.learning_rate * mx.sqrt(c2) / c1

    def init_named(self, path: str, parameter: mx.array, state: dict) -> None:
        """To be given: the state of a chosen matrix."""
        raise NotImplementedError

    def step_named(self, path: str, gradient: mx.array, state: dict) -> mx.array:
        """To be given: what to take off a chosen matrix, learning rate included."""
        raise NotImplementedError


def state_bytes(optimizer: optim.Optimizer, chosen: Filter | None = None) -> int:
    """Bytes of an optimizer's arrays, of all parameters or of those whose path is chosen.

    >>> from mlx_distill.optim.adamw import AdamW
    >>> o = AdamW(0.1); o.init({"w": mx.zeros((4, 4))}); state_bytes(o, lambda path, _: path.startswith("w."))
    128
    """
    return sum(
        array.nbytes for path, array in tree_flatten(optimizer.state) if chosen is None or chosen(path, array)
    )
