"""Packed and plain frozen weights compute the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_distill.config import ASSETS
from mlx_distill.models.adapters import LoraSettings, add_lora
from mlx_distill.models.convert import convert
from mlx_distill.models.load import load, load_model
from mlx_distill.models.modules import dequantize_model, dequantized_weight
from mlx_distill.recipe import TrainConfig
from mlx_distill.train import make_trainable
from mlx_distill.train.preflight import check_model


@pytest.mark.slow
@pytest.mark.parametrize("quantize", [None, "affine4"])
def test_dequantized_weights_give_the_same_logits_and_gradients(tmp_path: Path, quantize: str | None) -> None:
    convert(ASSETS / "models" / "tiny-gpt-oss", tmp_path / "model", quantize=quantize)
    tokens = mx.array([[5, 17, 200, 33, 8, 91, 400, 12]])
    results = []
    for plain in (False, True):
        model, _ = load(tmp_path / "model", dtype="float32")
        if plain:
            paths = dequantize_model(model)
            assert any("experts" in path for path in paths)
            assert any("q_proj" in path for path in paths) == (quantize is not None)
        add_lora(model, LoraSettings(4, 8.0, 0.0, ["q_proj"]))

        def loss(trainable: Any, model: Any = model) -> mx.array:
            model.update(trainable)
            return mx.square(model(tokens)).mean()

        value, gradient = mx.value_and_grad(loss)(model.trainable_parameters())
        results.append(
            (model(tokens), value, gradient["model"]["layers"][1]["self_attn"]["q_proj"]["lora_b"])
        )
    for quantized, plain in zip(*results, strict=True):
        assert mx.abs(quantized - plain).max().item() <= 2e-5 * max(mx.abs(plain).max().item(), 1e-3)
    assert mx.abs(results[1][2]).max().item() > 0


@pytest.mark.slow
@pytest.mark.parametrize("quantize", ["affine4", "affine8", "mxfp4"])
@pytest.mark.parametrize("name", ["qwen3", "qwen3_yarn"])  # a tied head, and one of its own
def test_a_dequantized_embedding_computes_the_same(
    name: str, quantize: str, golden: Any, logits: Any, tmp_path: Path
) -> None:
    convert(golden(name), tmp_path / "model", quantize=quantize)
    quantized, plain = (load_model(tmp_path / "model", dtype="float32")[0] for _ in range(2))
    assert isinstance(quantized.model.embed_tokens, nn.QuantizedEmbedding)
    assert "model.embed_tokens" in dequantize_model(plain)
    assert isinstance(plain.model.embed_tokens, nn.Embedding) and not any(
        "scales" in module for module in plain.modules()
    )
    prompt, _ = logits(name)
    wanted, found = quantized(prompt), plain(prompt)
    assert found.dtype == wanted.dtype == mx.float32
    assert mx.abs(found - wanted).max().item() <= 2e-5 * mx.abs(wanted).max().item()


def test_weights_are_dequantized_to_the_given_type(golden: Any, logits: Any, tmp_path: Path) -> None:
    convert(golden("qwen3"), tmp_path / "model", "affine8", dtype="bfloat16")
    quantized, plain = (load_model(tmp_path / "model")[0] for _ in range(2))
    dequantize_model(plain, "bfloat16")
    prompt, _ = logits("qwen3")
    wanted, found = quantized(prompt), plain(prompt)
    assert found.dtype == wanted.dtype == plain.model.embed_tokens.weight.dtype == mx.bfloat16
    assert mx.abs(found - wanted).mean().item() < 0.05 * mx.abs(wanted).mean().item()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora", "galore"])
def test_a_dequantized_embedding_can_be_trained(method: str, golden: Any, tmp_path: Path) -> None:
    """The fix that the error for quantized weights suggests works."""
    convert(golden("qwen3"), tmp_path / "model", quantize="affine8")
    whole = [] if method == "full" else ["embed_tokens"]
    settings = TrainConfig(
        method=method, lora_rank=2, galore_rank=2, target_modules=["q_proj"], modules_to_save=whole
    )
    check_model(tmp_path / "model", settings, dequantize=True)
    model, _ = load_model(tmp_path / "model", dtype="float32")
    dequantize_model(model)
    make_trainable(model, settings)
    assert "weight" in model.model.embed_tokens.trainable_parameters()


def test_a_dequantized_weight_is_computed_in_float32_whatever_the_type_of_the_scales() -> None:
    layer = nn.Linear(64, 8, bias=False)
    layer.weight = layer.weight.astype(mx.bfloat16)
    found = dequantized_weight(layer.to_quantized(64, 4))
    words, scales, biases = mx.quantize(layer.weight, 64, 4)
    exact = mx.dequantize(words, scales.astype(mx.float32), biases.astype(mx.float32), 64, 4)
    assert mx.array_equal(found, exact).item()
    # If MLX does so by itself one day, dequantized_weight need not.
    assert not mx.array_equal(mx.dequantize(words, scales, biases, 64, 4, dtype=mx.float32), exact).item()
