"""Quantizing a finished student: adapter merged or kept, experts untouched, errors stated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.merge_adapters import merge
from mlx.utils import tree_flatten, tree_map

from mlx_distill.errors import ConfigError
from mlx_distill.models.adapters import LoraSettings, add_lora, save_adapter
from mlx_distill.models.convert import convert
from mlx_distill.models.export import to_hf
from mlx_distill.models.load import load_model
from mlx_distill.models.quantize import quantize_folder, quantize_into


def student(
    name: str, golden: Any, folder: Path, targets: tuple[str, ...] = ("q_proj", "o_proj"), kind: str = "lora"
) -> Any:
    """Base and adapter folders as a run leaves them; returns the adapted model."""
    convert(golden(name), folder / "base")
    model, _ = load_model(folder / "base", dtype="float32")
    settings = LoraSettings(4, 8.0, 0.0, targets, kind)
    add_lora(model, settings)
    for path, module in sorted(model.named_modules()):
        if "lora_b" in module:
            module.lora_b = 0.05 * mx.random.normal(module.lora_b.shape, key=mx.random.key(len(path)))
    save_adapter(model, folder / "student", settings, folder / "base")
    return model


def distance(found: mx.array, wanted: mx.array) -> float:
    """Root mean squared difference over root mean square."""
    return (mx.sqrt(mx.mean(mx.square(found - wanted))) / mx.sqrt(mx.mean(mx.square(wanted)))).item()


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["merge", "keep"])
@pytest.mark.parametrize(("name", "kind"), [("qwen3", "dora"), ("qwen3", "lora"), ("gpt_oss_mxfp4", "lora")])
def test_eight_bits_stay_near_the_adapted_model_and_far_from_its_base(
    name: str, kind: str, adapter: str, golden: Any, logits: Any, tmp_path: Path
) -> None:
    model = student(name, golden, tmp_path, kind=kind)
    prompt, plain = logits(name)
    report = quantize_folder(tmp_path / "student", tmp_path / "quantized", "affine8", adapter=adapter)
    quantized, _ = load_model(tmp_path / "quantized", dtype="float32")
    adapted = model(prompt)
    # Routers choose other experts now and then, so the mixture is not as near.
    assert distance(quantized(prompt), adapted) < (0.35 if name == "gpt_oss_mxfp4" else 0.1)
    assert distance(quantized(prompt), adapted) < distance(plain, adapted)
    assert report.adapter == {"merge": "merged", "keep": "kept"}[adapter]
    assert 0 < report.largest_error < 0.02
    assert (tmp_path / "quantized" / "adapters.safetensors").exists() is (adapter == "keep")


@pytest.mark.slow
def test_merging_while_quantizing_equals_quantizing_the_merged_weight(golden: Any, tmp_path: Path) -> None:
    """The twin: merge in memory, then mx.quantize."""
    student("qwen3", golden, tmp_path)
    quantize_folder(tmp_path / "student", tmp_path / "quantized", "affine4")
    quantized = load_model(tmp_path / "quantized")[0].model.layers[0].self_attn.o_proj
    plain, _ = load_model(tmp_path / "student")
    merge(plain)
    want = mx.quantize(
        plain.model.layers[0].self_attn.o_proj.weight,
        quantized.group_size,
        quantized.bits,
        mode=quantized.mode,
    )
    assert mx.array_equal(quantized.weight, want[0])
    assert mx.array_equal(quantized.scales, want[1])
    assert mx.array_equal(quantized.biases, want[2])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "targets"), [("gpt_oss", ("down_proj", "q_proj")), ("qwen3_moe", ("gate_proj",))]
)
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_adapters_on_experts_merged_in_blocks_equal_those_merged_in_memory(
    name: str, targets: tuple[str, ...], kind: str, golden: Any, logits: Any, tmp_path: Path
) -> None:
    model = student(name, golden, tmp_path, targets, kind)
    to_hf(tmp_path / "student", tmp_path / "merged", memory_bytes=4096)
    merge(model)
    prompt, _ = logits(name)
    found, _ = load_model(tmp_path / "merged", dtype="float32")
    wanted = model.update(tree_map(lambda x: x.astype(mx.bfloat16).astype(mx.float32), model.parameters()))(
        prompt
    )
    assert distance(found(prompt), wanted) < 0.05
    parts = [dict(tree_flatten(m.parameters())) for m in (found, model)]
    assert all(
        mx.abs(value - parts[1][key]).max().item() <= 2.0**-7 * mx.abs(value).max().item()
        for key, value in parts[0].items()
    )


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["merge", "keep"])
@pytest.mark.parametrize("mode", ["affine4", "mxfp4"])
def test_experts_and_router_are_untouched_bit_for_bit(
    mode: str, adapter: str, golden: Any, tmp_path: Path, tools: Any
) -> None:
    student("gpt_oss_mxfp4", golden, tmp_path)
    report = quantize_folder(tmp_path / "student", tmp_path / "quantized", mode, adapter=adapter)
    before, after = (
        tools.all(tmp_path / "base"),
        tools.all(tmp_path / "quantized" / ("base" if adapter == "keep" else "")),
    )
    same = [
        n
        for n in before
        if ".experts." in n or ".router." in n or n.endswith(("norm.weight", "sinks", "bias"))
    ]
    assert len(same) > 20
    assert all(before[n] == after[n] for n in same)
    rows = {row.name: row for row in report.rows}
    assert rows["model.layers.0.mlp.experts.up_proj.weight"].bits == 4.25
    assert rows["model.layers.0.self_attn.q_proj.weight"].bits < 6
    assert rows["lm_head.weight"].bits < 6


@pytest.mark.slow
def test_an_update_of_quantized_experts_requantizes_them_and_reports_the_error(
    golden: Any, tmp_path: Path, tools: Any
) -> None:
    model = student("gpt_oss_mxfp4", golden, tmp_path, ("down_proj",))
    layer = model.model.layers[0].mlp.experts.down_proj
    report = quantize_folder(tmp_path / "student", tmp_path / "quantized", "affine4")
    row = next(r for r in report.rows if r.name == "model.layers.0.mlp.experts.down_proj.weight")
    assert row.note == "requantized; adapter merged"
    assert 0.02 < row.error < 0.3
    assert any("requantized" in line for line in report.lines())
    assert (
        f"{max(r.error / r.update for r in report.rows if r.update):.0%} of the adapter's update"
        in report.lines()[-1]
    )
    quantized = load_model(tmp_path / "quantized")[0].model.layers[0].mlp.experts.down_proj
    assert (quantized.mode, quantized.bits, quantized.group_size) == ("mxfp4", 4, 32)
    base = mx.dequantize(layer.linear.weight, layer.linear.scales, None, 32, 4, "mxfp4", dtype=mx.float32)
    exact = np.array(base + 2.0 * (layer.lora_b @ layer.lora_a))
    back = np.array(mx.dequantize(quantized.weight, quantized.scales, None, 32, 4, "mxfp4", dtype=mx.float32))
    assert row.update == pytest.approx(
        np.sqrt(np.square(exact - np.array(base)).sum() / np.square(exact).sum()), rel=1e-3
    )
    assert row.error == pytest.approx(
        np.sqrt(np.square(back - exact).sum() / np.square(exact).sum()), rel=1e-3
    )


def test_quantized_weights_are_not_changed(golden: Any, tmp_path: Path, tools: Any) -> None:
    convert(golden("qwen3"), tmp_path / "eight", "affine8")
    quantize_folder(tmp_path / "eight", tmp_path / "four", "affine4")
    assert tools.all(tmp_path / "eight") == tools.all(tmp_path / "four")


def test_rows_that_do_not_divide_fall_back_or_stay_and_the_report_says_so(
    golden: Any, tmp_path: Path
) -> None:
    report = quantize_folder(golden("qwen2"), tmp_path / "out", "affine4", group_size=128)
    by_name = {row.name: row for row in report.rows}
    assert by_name["model.layers.0.mlp.down_proj.weight"].stored == "affine 4 bits, groups of 64"
    assert by_name["model.layers.0.self_attn.q_proj.weight"].stored == "affine 4 bits, groups of 32"
    assert any("q_proj" in line and "no multiple of 128" in line for line in report.stayed)
    model, _ = load_model(tmp_path / "out")
    assert model.model.layers[0].mlp.down_proj.group_size == 64
    kept = quantize_folder(golden("qwen2"), tmp_path / "kept", "affine4", keep=("q_proj", "embed"))
    stored = {row.name: row.stored for row in kept.rows}
    assert stored["model.layers.0.self_attn.q_proj.weight"] == "BF16"
    assert stored["model.embed_tokens.weight"] == "BF16"
    assert any("kept by 'embed'" in line for line in kept.stayed)


def test_the_router_of_qwen3_moe_is_kept_and_its_experts_are_quantized(golden: Any, tmp_path: Path) -> None:
    quantize_folder(golden("qwen3_moe"), tmp_path / "out", "affine4")
    mlp = load_model(tmp_path / "out")[0].model.layers[0].mlp
    assert not hasattr(mlp.gate, "bits")
    assert mlp.switch_mlp.gate_proj.bits == 4


@pytest.mark.slow
def test_a_moved_folder_with_a_kept_adapter_still_loads(golden: Any, logits: Any, tmp_path: Path) -> None:
    student("qwen3", golden, tmp_path)
    quantize_folder(tmp_path / "student", tmp_path / "quantized", "mxfp8", adapter="keep")
    prompt, _ = logits("qwen3")
    first = load_model(tmp_path / "quantized", dtype="float32")[0](prompt)
    (tmp_path / "far" / "away").mkdir(parents=True)
    (tmp_path / "quantized").rename(tmp_path / "far" / "away" / "q")
    assert mx.array_equal(load_model(tmp_path / "far" / "away" / "q", dtype="float32")[0](prompt), first)
    assert json.loads((tmp_path / "far" / "away" / "q" / "adapter_config.json").read_text())["base"] == "base"


@pytest.mark.slow
def test_a_stage_folder_resumes_and_a_new_adapter_starts_anew(golden: Any, tmp_path: Path) -> None:
    student("qwen3", golden, tmp_path)
    assert quantize_into(tmp_path / "student", tmp_path / "part", "affine4").resumed == 0
    assert quantize_into(tmp_path / "student", tmp_path / "part", "affine4").resumed == 1
    student("qwen3", golden, tmp_path, ("v_proj",))
    assert quantize_into(tmp_path / "student", tmp_path / "part", "affine4").resumed == 0


def test_unknown_ways_are_refused(golden: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="merge or keep"):
        quantize_folder(golden("qwen3"), tmp_path / "out", "affine4", adapter="drop")
    with pytest.raises(ConfigError, match="groups of 48"):
        quantize_folder(golden("qwen3"), tmp_path / "out", "affine4", group_size=48)
    with pytest.raises(ConfigError, match="groups of 64"):
        quantize_folder(golden("qwen3"), tmp_path / "out", "mxfp4", group_size=64)
    assert not (tmp_path / "out").exists()
