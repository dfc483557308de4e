"""The blocks of a model, each of which can be run on its own: for work on one block's weights at a time."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from jaxtyping import Float, Int

from mlx_distill.errors import ModelError
from mlx_distill.models.architectures.registry import module_names
from mlx_distill.models.forward import get_module

_TOLERANCE = 1e-3  # of the largest number that the trunk gives


class Blocks:
    """The blocks of a model: ``run`` of one after the other, from ``embedded`` on and ``finished`` at the
    end, is what the trunk computes.

    What the trunk passes to a block besides the hidden states (masks) may depend on the length of the
    sequences, and on nothing else; :meth:`check` finds models where that is not so.

    Args:
        model: mlx-lm's: a trunk that has ``layers``, whose first argument and result are hidden states.

    Attributes:
        layers: The blocks.
        prefix: The path of the list of blocks.
    """

    def __init__(self, model: Any) -> None:
        names = module_names(model)
        self.model, self.prefix = model, f"{names.trunk}.layers"
        self._trunk = get_module(model, names.trunk)
        self.layers = list(self._trunk.layers)
        self._arguments: dict[int, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}

    def __len__(self) -> int:
        return len(self.layers)

    def embedded(self, tokens: Int[mx.array, "b l"]) -> Float[mx.array, "b l d"]:
        """The hidden states that the first block gets."""
        states: mx.array = self._through(tokens)[1][0].states
        return states

    def run(self, block: int, hidden: Float[mx.array, "b l d"]) -> Float[mx.array, "b l d"]:
        """The output of a block."""
        length = hidden.shape[1]
        if length not in self._arguments:
            _, stubs = self._through(mx.zeros((1, length), mx.int32))
            self._arguments[length] = [stub.arguments for stub in stubs]
        args, kwargs = self._arguments[length][block]
        output: mx.array = self.layers[block](hidden, *args, **kwargs)
        return output

    def finished(self, hidden: Float[mx.array, "b l d"]) -> Float[mx.array, "b l d"]:
        """What the trunk makes of the output of its last block: the input of the output head."""
        return self._through(mx.zeros(hidden.shape[:2], mx.int32), hidden)[0]

    def check(self, tokens: Int[mx.array, "b l"]) -> None:
        """Compare the blocks, run alone, with the whole trunk.

        Raises:
            ModelError: they do not compute the same.
        """
        states = self.embedded(tokens)
        for block in range(len(self)):
            states = self.run(block, states)
        found, wanted = (x.astype(mx.float32) for x in (self.finished(states), self._trunk(tokens)))
        difference = mx.max(mx.abs(found - wanted)).item()
        if not difference <= _TOLERANCE * mx.max(mx.abs(wanted)).item():
            raise ModelError(
                f"the blocks of {type(self.model).__name__} do not run one after another",
                fix="refine: none",
            )

    def _through(self, tokens: mx.array, result: mx.array | None = None) -> tuple[mx.array, list[_Stub]]:
        """The trunk with stubs for blocks, the last of which returns ``result``."""
        stubs = [_Stub(layer, None) for layer in self.layers]
        stubs[-1] = _Stub(self.layers[-1], result)
        own = self._trunk.layers
        self._trunk.layers = stubs
        try:
            return self._trunk(tokens), stubs
        finally:
            self._trunk.layers = own


class _Stub:
    """Stands for a block: keeps what it is called with, and returns given states or its input."""

    def __init__(self, layer: Any, result: mx.array | None) -> None:
        self._layer, self._result = layer, result
        self.states: Any = None
        self.arguments: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        self.states, self.arguments = x, (args, kwargs)
        return x if self._result is None else self._result
