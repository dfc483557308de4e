"""PEFT's variants of LoRA: what PEFT computes with a saved adapter, we compute or refuse."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_distill.errors import ModelError
from mlx_distill.models.export import from_peft, to_hf, to_peft
from mlx_distill.models.load import load_model
from mlx_distill.models.peft_config import HARMLESS, HONOURED, NOT_COMPUTED

# The references warn of their own futures.
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
PROMPT = np.random.default_rng(0).integers(0, 90, (1, 24))
ATTENTION = ["q_proj", "v_proj"]


def base_model(kind: str, folder: Path, *, tied: bool = False) -> Path:
    """A random checkpoint of two layers."""
    import torch
    import transformers as tf

    shape = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 90,
        "intermediate_size": 48,
        "max_position_embeddings": 128,
        "tie_word_embeddings": tied,
    }
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    config = {
        "qwen2": lambda: tf.Qwen2Config(**shape),
        "qwen3": lambda: tf.Qwen3Config(**shape, head_dim=16),
        "qwen3_moe": lambda: tf.Qwen3MoeConfig(**shape, **experts, head_dim=16),
        "gpt_oss": lambda: tf.GptOssConfig(
            **{**shape, "tie_word_embeddings": False},
            head_dim=16,
            num_local_experts=4,
            num_experts_per_tok=2,
            sliding_window=8,
        ),
    }[kind]()
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    randomize(model, lambda name: True, 0.2)
    model.save_pretrained(folder)
    return folder


def randomize(model: Any, is_changed: Callable[[str], bool], scale: float) -> None:
    """Add noise to parameters, as a training would."""
    import torch

    with torch.no_grad():
        for name, value in model.named_parameters():
            if is_changed(name):
                value.add_(scale * torch.randn_like(value))


def logits(model: Any) -> np.ndarray:
    import torch

    with torch.no_grad():
        return np.asarray(model(torch.tensor(PROMPT)).logits)


def peft_logits(base: Path, adapter: Path, rows: int = 0) -> np.ndarray:
    """What PEFT computes with a saved adapter."""
    import peft
    import transformers as tf

    model = tf.AutoModelForCausalLM.from_pretrained(base)
    if rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
    return logits(peft.PeftModel.from_pretrained(model, adapter).eval())


def trained_adapter(base: Path, folder: Path, rows: int = 0, **options: Any) -> Path:
    """Save an adapter of PEFT's that has learned something."""
    import peft
    import torch
    import transformers as tf

    torch.manual_seed(1)
    model = tf.AutoModelForCausalLM.from_pretrained(base)
    if rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
    defaults = {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION, "task_type": "CAUSAL_LM"}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**{**defaults, **options}))
    randomize(wrapped, lambda name: dict(wrapped.named_parameters())[name].requires_grad, 0.1)
    if rows:
        randomize(wrapped, lambda name: "embed_tokens" in name or "lm_head" in name, 0.1)
    wrapped.save_pretrained(folder)
    return folder


def difference(folder: Path, wanted: np.ndarray) -> float:
    model, _ = load_model(folder, dtype="float32")
    return float(np.abs(np.array(model(mx.array(PROMPT))) - wanted).max() / np.abs(wanted).max())


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "rslora": ("qwen3", {"use_rslora": True}),
    "patterns": (
        "qwen3",
        {
            "target_modules": ["q_proj", "v_proj", "up_proj"],
            "rank_pattern": {"v_proj": 2, "layers.1.mlp.up_proj": 6},
            "alpha_pattern": {"q_proj": 3, r".*\.0\.mlp.*": 32},
        },
    ),
    "patterns with rslora": (
        "qwen3",
        {"use_rslora": True, "rank_pattern": {"v_proj": 9}, "alpha_pattern": {"q_proj": 5}},
    ),
    "rank above a dimension": ("qwen3", {"r": 40}),
    "bias all": ("qwen2", {"bias": "all"}),
    "bias lora_only": ("qwen2", {"bias": "lora_only", "target_modules": ["q_proj", "o_proj"]}),
    "modules_to_save": ("qwen3", {"modules_to_save": ["embed_tokens", "lm_head", "norm"]}),
    "regular expression": ("qwen3", {"target_modules": r".*layers\.1\..*(q_proj|down_proj)"}),
    "all-linear": ("qwen3", {"target_modules": "all-linear", "exclude_modules": ["k_proj"]}),
    "layers_to_transform": ("qwen3", {"layers_to_transform": [1], "layers_pattern": "layers"}),
    "dora": ("qwen3", {"use_dora": True}),
    "dora with patterns": ("qwen3", {"use_dora": True, "rank_pattern": {"v_proj": 2}}),
    "dropout": ("qwen3", {"lora_dropout": 0.5}),
    "fan_in_fan_out": ("qwen3", {"fan_in_fan_out": True}),
    "gaussian": ("qwen3", {"init_lora_weights": "gaussian"}),
    "orthogonal": ("qwen3", {"init_lora_weights": "orthogonal"}),
    "mica": ("qwen3", {"init_lora_weights": "mica"}),
    "random start": ("qwen3", {"init_lora_weights": False}),
    "head": ("qwen3", {"target_modules": ["q_proj", "lm_head"]}),
    "experts by name": ("qwen3_moe", {"target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"]}),
    "router": ("qwen3_moe", {"target_modules": ["q_proj", "gate"]}),
    "one parameter of experts": ("qwen3_moe", {"target_parameters": ["mlp.experts.down_proj"]}),
    "experts of gpt-oss": ("gpt_oss", {"target_parameters": ["gate_up_proj", "experts.down_proj"]}),
    "experts of one layer": (
        "gpt_oss",
        {
            "target_parameters": ["1.mlp.experts.down_proj", "1.mlp.experts.gate_up_proj"],
            "rank_pattern": {".*gate_up_proj": 3},
            "use_rslora": True,
        },
    ),
}
ON_EXPERTS = [name for name, (kind, _) in VARIANTS.items() if kind in ("qwen3_moe", "gpt_oss")]


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_is_computed_as_peft_computes_it(name: str, tmp_path: Path) -> None:
    kind, options = VARIANTS[name]
    base = base_model(kind, tmp_path / "base")
    wanted = peft_logits(base, trained_adapter(base, tmp_path / "peft", **options))
    from_peft(tmp_path / "peft", tmp_path / "ours")
    assert difference(base, wanted) > 1e-3
    assert difference(tmp_path / "ours", wanted) < 1e-4
    to_hf(tmp_path / "ours", tmp_path / "merged")
    assert difference(tmp_path / "merged", wanted) < 1e-4
    if name in ON_EXPERTS:
        with pytest.raises(ModelError, match=r"experts|routers"):
            to_peft(tmp_path / "ours", tmp_path / "back")
        return
    to_peft(tmp_path / "ours", tmp_path / "back")
    back = peft_logits(base, tmp_path / "back")
    assert np.abs(back - wanted).max() < 1e-4 * np.abs(wanted).max()


@pytest.mark.parametrize("tied", [False, True])
def test_an_adapter_over_added_tokens_brings_its_rows(tied: bool, tmp_path: Path) -> None:
    base = base_model("qwen3", tmp_path / "base", tied=tied)
    wanted = peft_logits(base, trained_adapter(base, tmp_path / "peft", rows=93), rows=93)
    from_peft(tmp_path / "peft", tmp_path / "ours")
    to_hf(tmp_path / "ours", tmp_path / "merged")
    for folder in ("ours", "merged"):
        assert difference(tmp_path / folder, wanted) < 1e-4
    to_peft(tmp_path / "ours", tmp_path / "back")
    assert np.abs(peft_logits(base, tmp_path / "back", 93) - wanted).max() < 1e-4 * np.abs(wanted).max()


@pytest.mark.parametrize(
    "options",
    [
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "pissa_niter_4"},
        {"init_lora_weights": "olora"},
        {"lora_bias": True},
        {"layer_replication": [[0, 2], [1, 2]]},
        {"trainable_token_indices": [3, 4]},
        {"alora_invocation_tokens": [3]},
        {"target_modules": ["q_proj", "embed_tokens"]},
    ],
)
def test_a_variant_that_is_not_computed_is_refused(options: dict[str, Any], tmp_path: Path) -> None:
    base = base_model("qwen3", tmp_path / "base")
    trained_adapter(base, tmp_path / "peft", **options)
    with pytest.raises(ModelError) as caught:
        from_peft(tmp_path / "peft", tmp_path / "ours")
    assert caught.value.fix
    assert not (tmp_path / "ours").exists()


def test_adapters_of_single_experts_are_stacked(tmp_path: Path) -> None:
    """In the names that transformers 4 gave them, which PEFT still reads."""
    base = base_model("qwen3_moe", tmp_path / "base")
    random, tensors = np.random.default_rng(3), {}
    for layer in range(2):
        for expert in range(4):
            for name in ("gate_proj", "up_proj", "down_proj"):
                path = f"base_model.model.model.layers.{layer}.mlp.experts.{expert}.{name}"
                for leaf, shape in (("lora_A", (4, 32)), ("lora_B", (32, 4))):
                    tensors[f"{path}.{leaf}.weight"] = mx.array(
                        0.3 * random.standard_normal(shape, np.float32)
                    )
    (tmp_path / "peft").mkdir()
    mx.save_safetensors(str(tmp_path / "peft" / "adapter_model.safetensors"), tensors)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["gate_proj", "up_proj", "down_proj"],
    }
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(config))
    wanted = peft_logits(base, tmp_path / "peft")
    from_peft(tmp_path / "peft", tmp_path / "ours")
    assert difference(base, wanted) > 1e-3
    assert difference(tmp_path / "ours", wanted) < 1e-4


def test_every_key_of_peft_is_in_one_list() -> None:
    import peft

    keys = {field.name for field in fields(peft.LoraConfig)}
    ours = [*HONOURED, *HARMLESS, *NOT_COMPUTED]
    assert len(set(ours)) == len(ours)
    assert keys <= set(ours)
