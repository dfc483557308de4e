"""Packed and plain frozen weights compute the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_distill.config import ASSETS
from mlx_distill.models.adapters import LoraSettings, add_lora
from mlx_distill.models.convert import convert
from mlx_distill.models.load import load, unpack


@pytest.mark.parametrize("quantize", [None, "affine4"])
def test_unpacked_weights_give_the_same_logits_and_gradients(tmp_path: Path, quantize: str | None) -> None:
    convert(ASSETS / "models" / "tiny-gpt-oss", tmp_path / "model", quantize=quantize)
    tokens = mx.array([[5, 17, 200, 33, 8, 91, 400, 12]])
    results = []
    for plain in (False, True):
        model, _ = load(tmp_path / "model", dtype="float32")
        if plain:
            paths = unpack(model)
            assert any("experts" in path for path in paths)
            assert any("q_proj" in path for path in paths) == (quantize is not None)
        add_lora(model, LoraSettings(4, 8.0, 0.0, ["q_proj"]))

        def loss(trainable: Any, model: Any = model) -> mx.array:
            model.update(trainable)
            return mx.square(model(tokens)).mean()

        value, gradient = mx.value_and_grad(loss)(model.trainable_parameters())
        results.append((model(tokens), value, gradient["model"]["layers"][1]["self_attn"]["q_proj"]["lora_b"]))
    for packed, plain in zip(*results, strict=True):
        assert mx.abs(packed - plain).max().item() <= 2e-5 * max(mx.abs(plain).max().item(), 1e-3)
    assert mx.abs(results[1][2]).max().item() > 0
