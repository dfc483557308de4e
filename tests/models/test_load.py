"""Modules that are trained fully beside an adapter: saved, merged, quantized, and in PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers.merge_adapters import merge
from mlx.utils import tree_flatten

from mlx_distill.errors import ConfigError, ModelError
from mlx_distill.inspection import inspect
from mlx_distill.models.adapters import LoraSettings, adapter_settings, add_lora, save_adapter
from mlx_distill.models.convert import convert
from mlx_distill.models.export import from_peft, to_hf, to_peft
from mlx_distill.models.load import load_model
from mlx_distill.models.quantize import quantize_folder

NORMS = ("norm", "q_norm", "input_layernorm")
CASES = [
    ("qwen3", (*NORMS, "embed_tokens"), "lora"),
    ("qwen3_yarn", ("model.norm", "lm_head"), "dora"),
    ("gpt_oss", ("embed_tokens", "lm_head", "norm", "o_proj", "router"), "lora"),
]


def student(folder: Path, base: Path, whole: tuple[str, ...], kind: str = "lora") -> Any:
    """A model whose adapter and whole modules have learned something, saved in ``folder``."""
    model, _ = load_model(base, dtype="float32")
    settings = LoraSettings(4, 8.0, 0.0, ("q_proj", "v_proj"), kind, modules_to_save=whole)
    add_lora(model, settings)
    moved = [
        (path, a + 0.1 * mx.random.normal(a.shape, key=mx.random.key(i)))
        for i, (path, a) in enumerate(tree_flatten(model.trainable_parameters()))
        if not path.endswith(".m")
    ]
    model.load_weights(moved, strict=False)
    model.eval()
    save_adapter(model, folder, settings, base)
    assert adapter_settings(folder) == settings
    return model


@pytest.mark.slow
@pytest.mark.parametrize(("name", "whole", "kind"), CASES)
def test_modules_to_save_survive_saving_merging_and_exporting(
    name: str, whole: tuple[str, ...], kind: str, golden: Any, logits: Any, tmp_path: Path
) -> None:
    convert(golden(name), tmp_path / "base", dtype="float32")
    model = student(tmp_path / "student", tmp_path / "base", whole, kind)
    prompt, plain = logits(name)
    wanted = model(prompt)
    again, _ = load_model(tmp_path / "student")
    assert mx.array_equal(again(prompt), wanted)
    merge(again)
    to_hf(tmp_path / "student", tmp_path / "out", memory_bytes=4096)
    for found in (again, load_model(tmp_path / "out")[0]):
        assert mx.abs(found(prompt) - wanted).max().item() < 2e-5 * mx.abs(plain).max().item()
        for path, module in model.named_modules():
            if path.endswith(tuple(f".{end}" for end in whole)):
                assert mx.array_equal(dict(found.named_modules())[path].weight, module.weight), path
    assert "norm" in inspect(tmp_path / "student").facts["whole"]


def test_only_modules_to_save_are_trainable(golden: Any) -> None:
    model, _ = load_model(golden("gpt_oss"))
    paths = add_lora(model, LoraSettings(4, 8.0, 0.0, ("q_proj",), modules_to_save=("norm", "o_proj")))
    ends = ("weight", "bias")
    assert paths[-3:] == ["model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj", "model.norm"]
    assert {path for path, _ in tree_flatten(model.trainable_parameters()) if "lora" not in path} == {
        "model.norm.weight",
        *(f"model.layers.{i}.self_attn.o_proj.{end}" for i in (0, 1) for end in ends),
    }


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["merge", "keep"])
def test_modules_to_save_are_quantized_when_merged_and_not_when_kept(
    adapter: str, golden: Any, logits: Any, tmp_path: Path
) -> None:
    convert(golden("qwen3_yarn"), tmp_path / "base", dtype="float32")
    model = student(tmp_path / "student", tmp_path / "base", ("lm_head", "norm"))
    quantize_folder(tmp_path / "student", tmp_path / "small", "affine8", adapter=adapter)
    small, _ = load_model(tmp_path / "small")
    assert isinstance(small.lm_head, nn.QuantizedLinear) == (adapter == "merge")
    prompt, plain = logits("qwen3_yarn")
    assert (
        mx.abs(small(prompt) - model(prompt)).mean().item()
        < 0.1 * mx.abs(plain - model(prompt)).mean().item()
    )


def test_stock_mlx_lm_refuses_what_it_would_not_compute(golden: Any, tmp_path: Path) -> None:
    """Once it reads such files, the adapters' docstring has to say so."""
    from mlx_lm.utils import load_adapters
    from mlx_lm.utils import load_model as stock_load

    student(tmp_path / "student", golden("qwen3"), ("norm",))
    stock, _ = stock_load(golden("qwen3"))
    with pytest.raises(ValueError, match=r"model\.norm\.weight"):
        load_adapters(stock, str(tmp_path / "student"))


def test_modules_to_save_replace_quantized_modules(golden: Any, logits: Any, tmp_path: Path) -> None:
    """An adapter of the unquantized model on the quantized one."""
    convert(golden("qwen3"), tmp_path / "plain")
    convert(golden("qwen3"), tmp_path / "base", quantize="affine8")
    student(tmp_path / "student", tmp_path / "plain", ("embed_tokens", "up_proj"))
    path = tmp_path / "student" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base": "../base"}))
    found, _ = load_model(tmp_path / "student", dtype="float32")
    assert isinstance(found.model.embed_tokens, nn.Embedding) and isinstance(
        found.model.layers[0].mlp.up_proj, nn.Linear
    )
    assert isinstance(found.model.layers[0].mlp.down_proj, nn.QuantizedLinear)
    twin, _ = load_model(tmp_path / "base", dtype="float32")
    with pytest.raises(ModelError, match="quantized"):
        add_lora(twin, LoraSettings(4, 8.0, 0.0, ("q_proj",), modules_to_save=("embed_tokens",)))


def test_on_a_quantized_base_the_model_computes_in_its_own_type(
    golden: Any, logits: Any, tmp_path: Path
) -> None:
    convert(golden("qwen3"), tmp_path / "base", dtype="bfloat16")
    student(tmp_path / "student", tmp_path / "base", ("embed_tokens", "norm"))
    quantize_folder(tmp_path / "student", tmp_path / "small", "affine8", adapter="keep")
    plain, quantized = (load_model(tmp_path / name)[0] for name in ("student", "small"))
    prompt, _ = logits("qwen3")
    assert isinstance(quantized.layers[0].mlp.up_proj, nn.QuantizedLinear)
    assert (
        plain(prompt).dtype
        == quantized(prompt).dtype
        == plain.model(prompt).dtype
        == quantized.model(prompt).dtype
        == mx.bfloat16
    )
    assert quantized.model.embed_tokens.weight.dtype == mx.bfloat16
    assert mx.array_equal(quantized.model.embed_tokens.weight, plain.model.embed_tokens.weight)


@pytest.mark.parametrize(
    ("whole", "error", "message"),
    [
        (("gate",), ModelError, "module to save 'gate' matches nothing"),
        (("lm_head",), ModelError, "'lm_head' matches nothing"),  # the golden Qwen3's head is its embedding
        (
            ("layers.1.self_attn.q_proj",),
            ConfigError,
            "model.layers.1.self_attn.q_proj in target_modules and in modules_to_save",
        ),
    ],
)
def test_names_that_cannot_be_meant_are_refused(
    whole: tuple[str, ...], error: type, message: str, golden: Any
) -> None:
    model, _ = load_model(golden("qwen3"))
    with pytest.raises(error, match=message) as caught:
        add_lora(model, LoraSettings(4, 8.0, 0.0, ("q_proj",), modules_to_save=whole))
    assert caught.value.fix


def test_what_the_base_does_not_have_is_refused(golden: Any, tmp_path: Path) -> None:
    convert(golden("qwen3_yarn"), tmp_path / "base")
    student(tmp_path / "student", tmp_path / "base", ("lm_head",))
    path = tmp_path / "student" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base": str(golden("qwen3"))}))
    for use in (load_model, lambda folder: quantize_folder(folder, tmp_path / "small", "affine8")):
        with pytest.raises(ModelError, match=r"base in|base model") as caught:
            use(tmp_path / "student")
        assert caught.value.fix
    student(tmp_path / "experts", golden("qwen3_moe"), ("up_proj",))
    with pytest.raises(ModelError, match="experts"):
        to_peft(tmp_path / "experts", tmp_path / "peft")


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "whole"),
    [
        ("qwen3", ("embed_tokens", *NORMS)),
        ("qwen3_yarn", ("embed_tokens", "lm_head")),
        ("gpt_oss", ("norm", "o_proj")),
    ],
)
def test_peft_computes_the_same_and_saves_what_we_read(
    name: str, whole: tuple[str, ...], golden: Any, logits: Any, tmp_path: Path
) -> None:
    import peft
    import torch
    import transformers as tf

    model = student(tmp_path / "student", golden(name), whole)
    to_peft(tmp_path / "student", tmp_path / "peft")
    prompt, _ = logits(name)
    base = tf.AutoModelForCausalLM.from_pretrained(golden(name), attn_implementation="eager").float()
    wrapped = peft.PeftModel.from_pretrained(base, tmp_path / "peft").eval()
    with torch.no_grad():
        theirs = wrapped(torch.tensor(np.array(prompt))).logits.numpy()
    wanted = np.array(model(prompt))
    assert np.abs(theirs - wanted).max() < 1e-4 * np.abs(wanted).max()
    wrapped.save_pretrained(tmp_path / "saved")
    from_peft(tmp_path / "saved", tmp_path / "again", golden(name))
    again, _ = load_model(tmp_path / "again", dtype="float32")
    assert mx.array_equal(again(prompt), model(prompt))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tied", "head"), [(False, None), (False, 1.0), (True, 1.0), (True, 0.0), (False, 0.0)]
)
def test_an_embedding_and_a_head_that_part_do_not_fit_a_base_where_they_are_one(
    tied: bool, head: float | None, golden: Any, tmp_path: Path
) -> None:
    """PEFT trains a tied embedding apart from its head, unless it is asked not to."""
    student(tmp_path / "student", golden("qwen3"), ("embed_tokens",))
    to_peft(tmp_path / "student", tmp_path / "peft")
    path, file = tmp_path / "peft" / "adapter_config.json", tmp_path / "peft" / "adapter_model.safetensors"
    config, weights = json.loads(path.read_text()), mx.load(str(file))
    assert config["ensure_weight_tying"] and config["modules_to_save"] == ["lm_head", "model.embed_tokens"]
    mx.eval(weights)  # before the file is written over
    copy = weights.pop("base_model.model.lm_head.weight")
    if head is None:
        config["modules_to_save"] = ["embed_tokens"]
    else:
        weights["base_model.model.lm_head.weight"] = copy + head
    path.write_text(json.dumps({**config, "ensure_weight_tying": tied}))
    mx.save_safetensors(str(file), weights)
    if head == 0.0:
        assert from_peft(tmp_path / "peft", tmp_path / "again", golden("qwen3")).modules
        assert adapter_settings(tmp_path / "again").modules_to_save == ("model.embed_tokens",)
        return
    with pytest.raises(ModelError, match="embedding and head differ") as caught:
        from_peft(tmp_path / "peft", tmp_path / "again", golden("qwen3"))
    assert caught.value.fix
