"""Checkpoints that other tools quantized, and models without a language-model head."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_distill.errors import ModelError
from mlx_distill.inspection import inspect
from mlx_distill.models.checkpoint.plan import plan_checkpoint
from mlx_distill.models.convert import convert
from mlx_distill.models.export import to_hf
from mlx_distill.models.load import load_model

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # the notes

BLOCK = (24, 20)  # does not divide the weights
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(BLOCK)}
UP = "model.layers.0.mlp.up_proj.weight"
METHODS = [
    (
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        "bitsandbytes",
        "-bnb-4bit",
    ),
    ({"quantization_config": {"load_in_8bit": True}}, "bitsandbytes", "-bnb-4bit"),
    ({"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}}, "gptq", "-GPTQ-Int4"),
    ({"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128}}, "awq", "-AWQ"),
    ({"quantization_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors", "w4a16"),
    ({"compression_config": {"format": "pack-quantized"}}, "compressed-tensors", "w4a16"),
    *(
        ({"quantization_config": {"quant_method": method}}, method, "unquantized")
        for method in ("aqlm", "hqq", "eetq", "torchao", "quanto", "mxfp4", "mxfp8", "vptq", "of-next-year")
    ),
    ({"quantization_config": {"weights": "int8"}}, "does not name", "unquantized"),
    ({"quantization_config": {**FP8, "activation_scheme": "static"}}, "activation_scheme", "-FP8"),
    ({"quantization_config": {**FP8, "weight_block_size": None}}, "weight_block_size", "-FP8"),
    ({"quantization_config": {**FP8, "fmt": "e5m2"}}, "fmt 'e5m2'", "-FP8"),
    ({"quantization_config": "fp8"}, "not an object", "config.json"),
]


@pytest.mark.parametrize(("keys", "said", "fix"), METHODS, ids=lambda value: str(value)[:40])
def test_a_method_of_another_tool_is_named_before_any_tensor_is_read(
    keys: dict[str, Any], said: str, fix: str, copy: Any, tools: Any, tmp_path: Path
) -> None:
    folder = copy("qwen3")
    tools.config(folder, **keys)
    if "fp8" not in str(keys):
        for path in folder.glob("*.safetensors*"):
            path.unlink()
    for action in (load_model, inspect, lambda path: convert(path, tmp_path / "out")):
        with pytest.raises(ModelError) as caught:
            action(folder)
        assert f"{folder / 'config.json'}: {next(iter(keys))}" in caught.value.message
        assert said in caught.value.message and "\n" not in caught.value.message
        assert fix in (caught.value.fix or "")
    assert not (tmp_path / "out").exists()


def test_the_file_of_modelopt_is_recognised(copy: Any) -> None:
    folder = copy("qwen3")
    (folder / "hf_quant_config.json").write_text('{"producer": {"name": "modelopt"}}')
    with pytest.raises(ModelError, match=r"hf_quant_config\.json.*ModelOpt"):
        load_model(folder)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Qwen3ForSequenceClassification", "classifier"),
        ("Qwen3ForTokenClassification", "classifier of tokens"),
        ("Qwen3ForQuestionAnswering", "spans"),
        ("Qwen2ForRewardModel", "reward"),
        ("Qwen3Model", "embedding"),
        ("Qwen2_5_VLForConditionalGeneration", "modalities"),
        ("SomethingElse", "no causal language model"),
    ],
)
def test_a_model_without_a_language_model_head_is_named(name: str, said: str, copy: Any, tools: Any) -> None:
    folder = copy("qwen3")
    tools.config(folder, architectures=[name])
    with pytest.raises(ModelError, match=rf"config\.json: architectures: {name} is .*{said}") as caught:
        load_model(folder)
    assert "ForCausalLM" in (caught.value.fix or "")
    tools.config(folder, architectures=[name, "Qwen3ForCausalLM"])
    load_model(folder)


def test_a_model_of_several_modalities_is_named(copy: Any, tools: Any) -> None:
    folder = copy("qwen3")
    tools.config(folder, model_type="qwen3_vl", vision_config={"depth": 27})
    with pytest.raises(ModelError, match="'qwen3_vl' with vision_config"):
        load_model(folder)


def quantize_fp8(folder: Path, tools: Any, dtype: str) -> dict[str, mx.array]:
    """Make the linear layers of a checkpoint FP8, with scales in float32; return their values.

    The values come from MLX's own decoder of E4M3.
    """
    random, wanted, tensors = np.random.default_rng(0), {}, {}
    for name, value in tools.all(folder).items():
        if not name.endswith("proj.weight"):
            tensors[name] = value
            continue
        rows, columns = value[1]
        values = random.integers(0, 256, (rows, columns), np.uint8)
        values[values & 127 == 127] = 0  # NaN
        scales = random.uniform(1e-4, 1e-3, (-(-rows // BLOCK[0]), -(-columns // BLOCK[1]))).astype(
            np.float32
        )
        tensors[name] = ("F8_E4M3", [rows, columns], values.tobytes())
        tensors[name + "_scale_inv"] = ("F32", list(scales.shape), scales.tobytes())
        factors = np.array(
            [[scales[i // BLOCK[0], j // BLOCK[1]] for j in range(columns)] for i in range(rows)]
        )
        wanted[name] = (mx.from_fp8(mx.array(values), mx.float32) * mx.array(factors)).astype(
            getattr(mx, dtype)
        )
    for path in folder.glob("model*"):
        path.unlink()
    tools.write(folder / "model.safetensors", tensors)
    tools.config(folder, quantization_config=FP8, dtype=dtype, torch_dtype=None)
    return wanted


@pytest.mark.parametrize(
    ("name", "dtype"), [("qwen3", "bfloat16"), ("qwen3", "float32"), ("qwen3_moe", "float32")]
)
def test_fp8_with_block_scales_is_dequantized(
    name: str, dtype: str, copy: Any, tools: Any, tmp_path: Path
) -> None:
    folder = copy(name)
    wanted = quantize_fp8(folder, tools, dtype)
    report = convert(folder, tmp_path / "ours", memory_bytes=4096)
    assert "dequantized" in report.notes[0]
    to_hf(tmp_path / "ours", tmp_path / "back")
    for found in (tmp_path / "ours", tmp_path / "back"):
        assert "quantization_config" not in json.loads((found / "config.json").read_text())
    written = {
        key: value
        for file in (tmp_path / "back").glob("*.safetensors")
        for key, value in mx.load(str(file)).items()
    }
    for key, value in wanted.items():
        assert mx.array_equal(written[key], value), key
    prompt = mx.array([[1, 5, 9]])
    models = [load_model(path)[0](prompt) for path in (folder, tmp_path / "ours")]
    assert mx.array_equal(*models)


def test_fp8_without_its_scales_is_refused_by_conversions(copy: Any, tools: Any, tmp_path: Path) -> None:
    folder = copy("qwen3")
    quantize_fp8(folder, tools, "float32")
    whole = tools.all(folder)
    for broken, said in (
        ({n: v for n, v in whole.items() if n != UP + "_scale_inv"}, "without its scales"),
        ({**whole, UP + "_scale_inv": ("F32", [1, 1], bytes(4))}, r"has scales F32 \[1, 1\]"),
    ):
        tools.write(folder / "model.safetensors", broken)
        tools.config(folder, quantization_config=FP8)
        with pytest.raises(ModelError, match=said) as caught:
            convert(folder, tmp_path / "out")
        assert UP in caught.value.message and caught.value.fix
        tools.config(folder, quantization_config=None)
        with pytest.raises(ModelError, match=r"fp8 without quantization_config"):
            convert(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model.layers.0.mlp.up_proj.qweight", "gptq or awq"),
        ("model.layers.0.mlp.up_proj.weight.absmax", "bitsandbytes"),
        ("model.layers.0.mlp.up_proj.SCB", "bitsandbytes"),
        ("model.layers.0.mlp.up_proj.weight_packed", "compressed-tensors"),
        ("model.layers.0.mlp.up_proj.weight_scale_inv", "fp8 without"),
        ("model.layers.0.mlp.up_proj.base_layer.weight", "PEFT"),
        ("score.weight", "classifier"),
        ("v_head.summary.weight", "value head"),
    ],
)
def test_tensors_tell_what_config_json_does_not(name: str, said: str, copy: Any, tools: Any) -> None:
    folder = copy("qwen3")
    file = tools.file_of(folder, UP)
    tensors = tools.read(file)
    tensors[name] = tensors.pop(UP)
    tools.write(file, tensors)
    index = folder / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    raw["weight_map"][name] = raw["weight_map"].pop(UP)
    index.write_text(json.dumps(raw))
    with pytest.raises(ModelError, match=f"tensor '{name}'.*{said}") as caught:
        load_model(folder)
    assert "remove" not in (caught.value.fix or "") and caught.value.fix


@pytest.mark.parametrize("name", ["model-q4.gguf", "consolidated.safetensors", "weights.npz"])
def test_weights_of_other_layouts_are_named(name: str, copy: Any) -> None:
    folder = copy("qwen3")
    for path in folder.glob("model*"):
        path.unlink()
    (folder / name).write_bytes(b"")
    with pytest.raises(ModelError, match=f"only {name}") as caught:
        load_model(folder)
    assert "transformers" in (caught.value.fix or "")


@pytest.mark.parametrize("dtype", ["F64", "I8", "U8", "F8_E5M2", "BOOL"])
def test_a_weight_that_is_no_float_is_refused_by_conversions(
    dtype: str, copy: Any, tools: Any, tmp_path: Path
) -> None:
    folder = copy("qwen3")
    width = 8 if dtype == "F64" else 1
    tools.edit(folder, UP, lambda t: (dtype, t[1], bytes(width * t[1][0] * t[1][1])))
    with pytest.raises(ModelError, match=f"has the type {dtype}"):
        convert(folder, tmp_path / "out")


def test_the_golden_checkpoints_have_nothing_of_this(golden: Any) -> None:
    for name in ("qwen2", "qwen3", "qwen3_moe", "gpt_oss", "gpt_oss_mxfp4"):
        assert plan_checkpoint(golden(name)).notes == ()


@pytest.mark.parametrize(
    ("leaf", "change"),
    [
        ("biases", lambda t: (t[0], [t[1][0] // 2, t[1][1] * 2], t[2])),
        ("biases", lambda t: ("U8", [t[1][0], t[1][1] * 2], t[2])),
        ("scales", lambda t: ("U16", t[1], t[2])),
        ("scales", lambda t: (t[0], [t[1][0], t[1][1], 1], t[2])),
        ("scales", lambda t: (t[0], [1, t[1][0] * t[1][1]], t[2])),
        ("weight", lambda t: (t[0], [t[1][0] * t[1][1], 1], t[2])),
    ],
)
def test_scales_of_another_form_are_refused(
    leaf: str, change: Any, golden: Any, tools: Any, tmp_path: Path
) -> None:
    convert(golden("qwen3"), tmp_path / "small", "affine4")
    name = UP.replace("weight", leaf)
    tools.edit(tmp_path / "small", name, change)
    with pytest.raises(ModelError, match="up_proj") as caught:
        load_model(tmp_path / "small")
    assert caught.value.fix
