"""The prediction of a calibration, for known models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlx_distill.models.calibrate_estimate import predict_calibration
from mlx_distill.models.rounding import SLICE_WEIGHTS

GOLDEN = Path(__file__).parents[1] / "golden"


def config(name: str, **changes: Any) -> dict[str, Any]:
    return {**json.loads((GOLDEN / f"models_{name}" / "config.json").read_text()), **changes}


def test_gpt_oss_20b_keeps_its_experts_and_holds_one_block() -> None:
    layers = 24
    sizes = {
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": layers,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "vocab_size": 201_088,
        "layer_types": ["sliding_attention", "full_attention"] * (layers // 2),
    }
    found = predict_calibration(config("gpt_oss_mxfp4", **sizes), 20_480)
    attention = layers * (2880 * 4096 * 2 + 2880 * 512 * 2)
    assert found.weights == attention + 201_088 * 2880
    # The inputs of o, and their differences between two models, in float32 and float64.
    assert found.hessian_bytes == 2 * 12 * 4096**2 + 32 * 4096**2
    assert found.states_bytes == 2 * 20_480 * (3 * 2880 + 2 * (2880 + 4096))
    # Experts of 4.25 bits, and the rest in bfloat16.
    ends = 2 * 201_088 * 2880
    assert found.resident_bytes == pytest.approx(2 * (attention + ends) + 19.11e9 * 4.25 / 8, rel=0.01)
    head = 201_088 * 2880  # rounded by slices; the packed tensors are joined
    assert found.rounding_bytes == 30 * SLICE_WEIGHTS + head * 5 // 4
    assert found.peak_bytes < 17e9
    all_experts = predict_calibration(config("gpt_oss", **sizes), 20_480)
    assert all_experts.weights > 19e9
    assert all_experts.seconds(1e12, 1e11) > found.seconds(1e12, 1e11)


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "qwen3_moe"])
def test_twice_the_tokens_are_twice_the_device_work_and_the_same_rounding(name: str) -> None:
    one, two = (predict_calibration(config(name), tokens) for tokens in (1000, 2000))
    assert two.device_flops == 2 * one.device_flops
    assert two.host_products == one.host_products
    assert two.hessian_bytes == one.hessian_bytes
