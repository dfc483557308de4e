"""A whole model from memory to a folder: what is loaded again is what was saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_distill.models.convert import convert
from mlx_distill.models.export import to_hf
from mlx_distill.models.load import load_model, save_model
from mlx_distill.models.modules import dequantize_model


def saved(
    folder: Path, name: str, quantize: str | None, golden: Any, *, plain: bool = False, trains: bool = True
) -> Any:
    """Convert, load, change a norm as training would, save; returns the model in memory."""
    convert(golden(name), folder / "base", quantize)
    model, _ = load_model(folder / "base", dtype="float32")
    if plain:
        dequantize_model(model)
    if plain and trains:
        model.unfreeze()
    model.model.norm.weight = model.model.norm.weight * 1.5
    save_model(model, folder / "base", folder / "out", max_shard_bytes=20_000)
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "quantize"),
    [("qwen2", None), ("qwen3", "mixed4"), ("gpt_oss_mxfp4", None), ("gpt_oss_mxfp4", "affine8")],
)
def test_what_is_loaded_again_is_what_was_saved(
    name: str, quantize: str | None, golden: Any, logits: Any, tmp_path: Path
) -> None:
    from mlx_lm.utils import load_model as stock_load

    model = saved(tmp_path, name, quantize, golden)
    again, config = load_model(tmp_path / "out")
    prompt, _ = logits(name)
    assert mx.array_equal(again(prompt), model(prompt))
    assert config["dtype"] == "float32"
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    stock, _ = stock_load(tmp_path / "out")
    assert type(stock.layers[0].self_attn.q_proj) is type(again.layers[0].self_attn.q_proj)


@pytest.mark.slow
def test_a_dequantized_model_is_saved_unquantized(golden: Any, logits: Any, tmp_path: Path) -> None:
    model = saved(tmp_path, "gpt_oss_mxfp4", None, golden, plain=True)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization" not in config
    assert "quantization_config" not in config
    prompt, _ = logits("gpt_oss_mxfp4")
    to_hf(tmp_path / "out", tmp_path / "theirs")
    for name in ("out", "theirs"):
        assert mx.array_equal(load_model(tmp_path / name)[0](prompt), model(prompt))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "quantize"),
    [("gpt_oss_mxfp4", None), ("qwen3", "affine4"), ("qwen3", "mxfp4"), ("qwen3_yarn", "affine8")],
)
def test_dequantized_modules_that_were_not_trained_are_saved_quantized_bit_for_bit(
    name: str, quantize: str | None, golden: Any, tmp_path: Path
) -> None:
    saved(tmp_path, name, quantize, golden, plain=True, trains=False)
    base, out = (
        dict(tree_flatten(load_model(tmp_path / folder)[0].parameters())) for folder in ("base", "out")
    )
    assert base.keys() == out.keys()
    assert ("model.embed_tokens.scales" in base) == (quantize is not None)
    quantized = [name for name in base if name.endswith(".scales")]
    for name in quantized:
        assert mx.array_equal(base[name], out[name]) and mx.array_equal(
            *(x[name.replace("scales", "weight")] for x in (base, out))
        )
    assert quantized and not mx.array_equal(base["model.norm.weight"], out["model.norm.weight"])


@pytest.mark.slow
def test_an_embedding_that_trained_is_saved_plain_beside_what_did_not(
    golden: Any, logits: Any, tmp_path: Path
) -> None:
    convert(golden("qwen3"), tmp_path / "base", "affine8")
    model, _ = load_model(tmp_path / "base", dtype="float32")
    dequantize_model(model)
    model.model.embed_tokens.unfreeze()
    model.model.embed_tokens.weight = model.model.embed_tokens.weight * 1.5
    save_model(model, tmp_path / "base", tmp_path / "out")
    again, _ = load_model(tmp_path / "out", dtype="float32")
    assert mx.array_equal(again.model.embed_tokens.weight, model.model.embed_tokens.weight)
    assert "scales" in again.layers[0].self_attn.q_proj
    prompt, _ = logits("qwen3")
    wanted = model(prompt)
    assert mx.abs(again(prompt) - wanted).max().item() <= 2e-5 * mx.abs(wanted).max().item()
