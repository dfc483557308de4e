"""A model's blocks, run one by one, are its trunk; where they are not, that is refused."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_distill.errors import ModelError
from mlx_distill.models.blocks import Blocks
from mlx_distill.models.forward import hidden_states
from mlx_distill.models.load import load_model


def tokens(length: int) -> mx.array:
    return mx.array(np.random.default_rng(length).integers(1, 64, (2, length)))


@pytest.mark.parametrize("name", ["qwen2", "qwen3_moe", "gpt_oss"])
def test_blocks_one_after_another_are_the_trunk(golden: Any, name: str) -> None:
    model, _ = load_model(golden(name), dtype="float32")
    blocks = Blocks(model)
    for length in (1, 49):  # one token has no mask; 49 are more than the sliding window
        hidden = blocks.embedded(tokens(length))
        for block in range(len(blocks)):
            hidden = blocks.run(block, hidden)
        expected = hidden_states(model, tokens(length))
        assert mx.allclose(blocks.finished(hidden), expected, atol=2e-5).item()
        blocks.check(tokens(length))


def test_blocks_that_depend_on_the_tokens_are_refused(golden: Any) -> None:
    model, _ = load_model(golden("qwen3"), dtype="float32")
    plain = type(model.model.layers[0])

    class Scaled(plain):  # type: ignore[misc, valid-type]
        """A block that gets something of each token beside the hidden states."""

        def __call__(self, x: mx.array, mask: Any, cache: Any = None, scale: Any = 1.0) -> mx.array:
            return scale * plain.__call__(self, x, mask, cache)

    class Trunk(type(model.model)):  # type: ignore[misc]
        def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:
            hidden = self.embed_tokens(inputs)
            for layer in self.layers:
                hidden = layer(hidden, "causal", None, 1.0 + inputs[..., None] / 64)
            return self.norm(hidden)

    for layer in model.model.layers:
        layer.__class__ = Scaled
    model.model.__class__ = Trunk
    with pytest.raises(ModelError, match="do not run one after another"):
        Blocks(model).check(tokens(9))
