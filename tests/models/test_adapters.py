"""Adapters: added, saved, loaded, merged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.merge_adapters import has_adapter, merge
from mlx.utils import tree_flatten

from mlx_distill.errors import ConfigError, ModelError
from mlx_distill.models.adapters import (
    DoRASwitchLinear,
    LoraSettings,
    adapter_settings,
    add_lora,
    load_adapter,
    save_adapter,
)
from mlx_distill.models.convert import convert
from mlx_distill.models.load import load_model
from mlx_distill.models.modules import cast_model, dequantized_weight

ATTENTION = ("q_proj", "o_proj")
CASES = [
    ("qwen2", ("q_proj", "down_proj"), "lora"),
    ("qwen3", ("q_proj", "down_proj"), "dora"),
    ("qwen3_moe", ("q_proj", "gate_proj"), "lora"),
    ("gpt_oss", (*ATTENTION, "up_proj"), "lora"),
    ("gpt_oss_mxfp4", ATTENTION, "lora"),
    ("gpt_oss_mxfp4", ("down_proj",), "lora"),
    ("qwen3_moe", ("v_proj", "down_proj"), "dora"),
    ("gpt_oss", ("k_proj", "gate_proj"), "dora"),
    ("gpt_oss_mxfp4", ("down_proj",), "dora"),
]


def trained(model: Any, settings: LoraSettings, seed: int = 1) -> list[str]:
    """Put an adapter on and give it values, as training would."""
    paths = add_lora(model, settings, seed)
    key = mx.random.key(seed + 1)
    for path, module in sorted(model.named_modules()):
        if path in paths:
            key, now = mx.random.split(key)
            module.lora_b = 0.2 * mx.random.normal(module.lora_b.shape, key=now)
    return paths


@pytest.mark.slow
@pytest.mark.parametrize(("name", "targets", "kind"), CASES)
def test_an_adapter_survives_the_disk_and_merging_changes_no_logit(
    name: str, targets: tuple[str, ...], kind: str, golden: Any, logits: Any, tmp_path: Path
) -> None:
    model, _ = load_model(golden(name), dtype="float32")
    prompt, plain = logits(name)
    settings = LoraSettings(4, 8.0, 0.1, targets, kind, rslora=name == "gpt_oss")
    paths = add_lora(model, settings, seed=3)
    model.eval()
    scale = mx.abs(plain).max().item()
    assert mx.abs(model(prompt) - plain).max().item() < 2e-5 * scale, "a fresh adapter changes nothing"
    trained_paths = trained(load_model(golden(name))[0], settings)
    assert paths == trained_paths

    model, _ = load_model(golden(name), dtype="float32")
    trained(model, settings)
    model.eval()
    adapted = model(prompt)
    assert mx.abs(adapted - plain).max().item() > 0.1
    save_adapter(model, tmp_path / "adapter", settings, golden(name))
    again, _ = load_model(tmp_path / "adapter", dtype="float32")
    assert mx.array_equal(again(prompt), adapted)
    rows = merge(again)
    assert not has_adapter(again)
    assert [row.path for row in rows] == paths
    assert {row.was_quantized for row in rows} == {targets == ("down_proj",)}
    assert all(row.error == 0.0 and row.update > 0 for row in rows)
    assert mx.abs(again(prompt) - adapted).max().item() < 2e-5 * scale


def test_only_the_adapter_is_trained_and_its_start_depends_on_the_seed_alone(golden: Any) -> None:
    def start(seed: int) -> dict[str, mx.array]:
        model, _ = load_model(golden("gpt_oss_mxfp4"))
        mx.random.uniform()  # the global state must not matter
        add_lora(model, LoraSettings(2, 4.0, 0.0, ("q_proj",)), seed)
        return dict(tree_flatten(model.trainable_parameters()))

    one, same, other = start(5), start(5), start(6)
    assert set(one) == {f"model.layers.{i}.self_attn.q_proj.lora_{m}" for i in (0, 1) for m in "ab"}
    assert all(mx.array_equal(one[n], same[n]) for n in one)
    assert not mx.array_equal(
        one["model.layers.0.self_attn.q_proj.lora_a"], other["model.layers.0.self_attn.q_proj.lora_a"]
    )
    a = one["model.layers.0.self_attn.q_proj.lora_a"]
    assert mx.abs(a).max().item() <= 32**-0.5
    assert a.dtype == mx.float32


def test_merging_rounds_once_and_says_how_much(golden: Any) -> None:
    model, _ = load_model(golden("qwen3"))
    trained(model, LoraSettings(4, 8.0, 0.0, ("q_proj",)))
    layer = model.model.layers[0].self_attn.q_proj
    exact = (
        np.array(layer.linear.weight.astype(mx.float32))
        + 2.0 * (np.array(layer.lora_a) @ np.array(layer.lora_b)).T
    )
    row = merge(model)[0]
    merged = np.array(model.model.layers[0].self_attn.q_proj.weight.astype(mx.float32))
    assert model.model.layers[0].self_attn.q_proj.weight.dtype == mx.bfloat16
    assert np.abs(merged - exact).max() <= np.abs(exact).max() * 2.0**-8
    assert 0 < row.error < 0.01


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_the_adapter_keeps_its_type_when_the_model_is_cast(kind: str, golden: Any) -> None:
    model, _ = load_model(golden("qwen3"))
    add_lora(model, LoraSettings(2, 4.0, 0.0, ("q_proj",), kind))
    cast_model(model, "bfloat16")
    assert {array.dtype for array in dict(tree_flatten(model.trainable_parameters())).values()} == {
        mx.float32
    }


def test_rank_stabilized_adapters_are_plain_ones_of_a_larger_alpha(
    golden: Any, logits: Any, tmp_path: Path
) -> None:
    prompt, _ = logits("qwen3")
    out = []
    for settings in (
        LoraSettings(4, 8.0, 0.0, ("q_proj",), rslora=True),
        LoraSettings(4, 16.0, 0.0, ("q_proj",)),
    ):
        model, _ = load_model(golden("qwen3"), dtype="float32")
        trained(model, settings)
        out.append(model(prompt))
        save_adapter(model, tmp_path / str(settings.rslora), settings, golden("qwen3"))
        assert adapter_settings(tmp_path / str(settings.rslora)) == settings
    assert mx.array_equal(*out)


def quantized_linear(mode: str, experts: int) -> tuple[Any, list[Any]]:
    """A stack of experts with biases, quantized or not, and the same experts one by one as linear layers."""
    import mlx.nn as nn
    from mlx_lm.models.switch_layers import SwitchLinear

    mx.random.seed(3)
    stack = SwitchLinear(64, 32, experts)
    stack.bias = mx.random.normal((experts, 32))
    singles = []
    for expert in range(experts):
        single = nn.Linear(64, 32)
        single.weight, single.bias = stack.weight[expert], stack.bias[expert]
        singles.append(
            single if mode == "plain" else nn.QuantizedLinear.from_linear(single, 32, 4, mode=mode)
        )
    return (stack if mode == "plain" else stack.to_quantized(32, 4, mode)), singles


@pytest.mark.parametrize("mode", ["plain", "affine", "mxfp4"])
def test_dora_on_experts_is_dora_on_each_of_them(mode: str) -> None:
    """Outputs and gradients are those of mlx-lm's layer, expert by expert."""
    import mlx.nn as nn
    from mlx_lm.tuner.dora import DoRALinear

    stack, singles = quantized_linear(mode, 3)
    ours = DoRASwitchLinear.from_base(stack, r=4, scale=0.5)
    theirs = [DoRALinear.from_base(single, r=4, scale=0.5) for single in singles]
    ours.lora_b = 0.3 * mx.random.normal(ours.lora_b.shape)
    ours.m = ours.m * mx.random.uniform(0.5, 1.5, ours.m.shape)
    for expert, layer in enumerate(theirs):
        layer.lora_a, layer.lora_b, layer.m = ours.lora_a[expert].T, ours.lora_b[expert].T, ours.m[expert]
    x, experts = mx.random.normal((5, 1, 1, 64)), mx.array([[0, 1], [2, 0], [1, 1], [2, 2], [0, 2]])
    for layer in (ours, *theirs):
        layer.freeze()
        layer.unfreeze(keys=["lora_a", "lora_b", "m"], recurse=False)

    def run(layer: Any) -> mx.array:
        return layer(x, experts)

    wanted = mx.stack([mx.stack([theirs[e](x[i, 0]) for e in row]) for i, row in enumerate(experts.tolist())])
    assert mx.allclose(run(ours), wanted, atol=1e-4)
    _, gradients = nn.value_and_grad(ours, lambda layer: mx.square(run(layer)).sum())(ours)
    for expert, layer in enumerate(theirs):
        seen = mx.concatenate([x[i, 0] for i, row in enumerate(experts.tolist()) for e in row if e == expert])
        _, single = nn.value_and_grad(layer, lambda layer, seen=seen: mx.square(layer(seen)).sum())(layer)
        assert mx.allclose(gradients["lora_a"][expert], single["lora_a"].T, rtol=1e-3, atol=1e-3)
        assert mx.allclose(gradients["lora_b"][expert], single["lora_b"].T, rtol=1e-3, atol=1e-3)
        assert mx.allclose(gradients["m"][expert], single["m"], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("mode", ["affine", "mxfp4", "affine3"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_adapters_on_quantized_layers_compute_as_on_dequantized_ones(kind: str, mode: str) -> None:
    """Attention and MLP alike: output, then merged."""
    import mlx.nn as nn

    class Holder(nn.Module):
        def __init__(self, linear: Any) -> None:
            super().__init__()
            self.q_proj, self.model = linear, nn.Module()
            self.model.norm = nn.RMSNorm(4)

    if mode == "affine3":
        quantized = Holder(nn.QuantizedLinear.from_linear(quantized_linear("plain", 1)[1][0], 32, 3))
    else:
        quantized = Holder(quantized_linear(mode, 1)[1][0])
    plain = Holder(nn.Linear(64, 32))
    plain.q_proj.weight, plain.q_proj.bias = dequantized_weight(quantized.q_proj), quantized.q_proj.bias
    settings, x = LoraSettings(4, 8.0, 0.0, ("q_proj",), kind), mx.random.normal((7, 64))
    for holder in (quantized, plain):
        trained(holder, settings)
    adapted = quantized.q_proj(x)
    assert mx.allclose(adapted, plain.q_proj(x), atol=1e-4)
    assert [row.was_quantized for row in merge(quantized)] == [True]
    assert mx.allclose(quantized.q_proj(x), adapted, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "error", "named"),
    [
        (LoraSettings(4, 8.0, 0.0, ("q_proj", "qq_proj")), ModelError, "qq_proj"),
        (LoraSettings(33, 8.0, 0.0, ("q_proj",)), ConfigError, "lora_rank 33"),
        (LoraSettings(0, 8.0, 0.0, ("q_proj",)), ConfigError, "lora_rank 0"),
        (LoraSettings(4, 8.0, 0.0, ()), ModelError, "no target"),
        (LoraSettings(4, 8.0, 0.0, ("q_proj",), "vera"), ModelError, "vera"),
    ],
)
def test_settings_that_fit_nothing_are_refused(
    settings: LoraSettings, error: type[Exception], named: str, golden: Any
) -> None:
    model, _ = load_model(golden("gpt_oss"))
    with pytest.raises(error, match=named) as caught:
        add_lora(model, settings)
    assert getattr(caught.value, "fix", None)
    assert not has_adapter(model)


@pytest.mark.parametrize("quantize", [None, "affine4"])
def test_the_suggested_rank_fits_every_matrix(quantize: str | None, golden: Any, tmp_path: Path) -> None:
    """Not the first matrix's most, which the next one refuses again."""
    convert(golden("qwen3"), tmp_path / "base", quantize=quantize)
    model, _ = load_model(tmp_path / "base")
    targets = ("down_proj", "q_proj", "v_proj")
    with pytest.raises(ConfigError, match="lora_rank 500 for a matrix of") as caught:
        add_lora(model, LoraSettings(500, 8.0, 0.0, targets))
    least = int(str(caught.value.fix).removeprefix("at most "))
    with pytest.raises(ConfigError, match=f"lora_rank {least + 1} "):
        add_lora(model, LoraSettings(least + 1, 8.0, 0.0, targets))
    assert add_lora(model, LoraSettings(least, 8.0, 0.0, targets))


def test_a_moved_run_still_finds_its_base(golden: Any, logits: Any, tmp_path: Path) -> None:
    shutil.copytree(golden("qwen3"), tmp_path / "run" / "teacher_base")
    model, _ = load_model(tmp_path / "run" / "teacher_base")
    settings = LoraSettings(2, 4.0, 0.0, ("q_proj",))
    trained(model, settings)
    save_adapter(model, tmp_path / "run" / ".teacher.partial", settings, tmp_path / "run" / "teacher_base")
    (tmp_path / "run" / ".teacher.partial").rename(tmp_path / "run" / "teacher")
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    moved, _ = load_model(tmp_path / "elsewhere" / "teacher")
    assert mx.array_equal(moved(logits("qwen3")[0]), model(logits("qwen3")[0]))
    shutil.rmtree(tmp_path / "elsewhere" / "teacher_base")
    with pytest.raises(ModelError, match="does not exist"):
        load_model(tmp_path / "elsewhere" / "teacher")


def test_an_adapter_on_the_wrong_base_is_refused(golden: Any, tmp_path: Path) -> None:
    model, _ = load_model(golden("qwen3"))
    settings = LoraSettings(2, 4.0, 0.0, ("q_proj",))
    trained(model, settings)
    save_adapter(model, tmp_path / "adapter", settings, golden("qwen3"))
    other, _ = load_model(golden("qwen2"))
    with pytest.raises(ModelError, match=r"adapters\.safetensors"):
        load_adapter(other, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    del config["base"]
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="no base"):
        load_model(tmp_path / "adapter")


def test_stock_mlx_lm_reads_the_adapter(golden: Any, logits: Any, tmp_path: Path) -> None:
    from mlx_lm.utils import load_adapters
    from mlx_lm.utils import load_model as stock_load

    model, _ = load_model(golden("qwen3"), dtype="float32")
    settings = LoraSettings(4, 8.0, 0.0, ("q_proj", "down_proj"))
    trained(model, settings)
    save_adapter(model, tmp_path, settings, golden("qwen3"))
    stock, _ = stock_load(golden("qwen3"))
    load_adapters(stock, str(tmp_path))
    prompt, _ = logits("qwen3")
    assert mx.allclose(cast_model(stock, "float32")(prompt), model(prompt), atol=1e-4)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_gradients_reach_the_adapter_through_quantized_experts(kind: str, golden: Any, logits: Any) -> None:
    import mlx.nn as nn

    model, _ = load_model(golden("gpt_oss_mxfp4"), dtype="float32")
    trained(model, LoraSettings(2, 4.0, 0.0, ("q_proj", "gate_proj"), kind))
    prompt, _ = logits("gpt_oss_mxfp4")
    _, gradients = nn.value_and_grad(model, lambda m: mx.mean(mx.square(m(prompt))))(model)
    values = [g for _, g in tree_flatten(gradients)]
    assert len(values) == (8 if kind == "lora" else 12)
    assert all(mx.all(mx.isfinite(g)).item() and mx.abs(g).max().item() > 0 for g in values)
