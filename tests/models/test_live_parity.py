"""transformers and PEFT side by side with us, on random models: seeds and shapes that the golden values do
not have.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_distill.models.adapters import LoraSettings, add_lora, save_adapter
from mlx_distill.models.convert import convert
from mlx_distill.models.export import from_peft, to_hf, to_peft
from mlx_distill.models.grids import quantize
from mlx_distill.models.load import load_model
from mlx_distill.models.quantization import parse_mode

# The references warn of their own futures.
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
PROMPT = np.random.default_rng(0).integers(0, 90, (1, 70))
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 32,
}


def build(kind: str, seed: int) -> Any:
    """A random transformers model; widths, heads and layers change with the seed."""
    import torch
    import transformers as tf

    heads, layers, hidden = (2, 4, 6)[seed], (4, 2, 3)[seed], (32, 64, 96)[seed]
    shape = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "vocab_size": 90,
    }
    dense = {
        **shape,
        "intermediate_size": (48, 96, 64)[seed],
        "max_position_embeddings": 128,
        "tie_word_embeddings": seed == 1,
    }
    yarn = (
        {"rope_parameters": {**YARN, "rope_theta": (1e4, 1e6, 5e4)[seed]}}
        if seed
        else {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    )
    moe = {
        "num_experts": 3 + seed,
        "num_experts_per_tok": 1 + seed,
        "moe_intermediate_size": 32,
        "norm_topk_prob": seed != 1,
    }
    gpt = {
        **shape,
        "head_dim": 16,
        "intermediate_size": 32,
        "num_local_experts": 3 + seed,
        "num_experts_per_tok": 1 + seed,
        "sliding_window": 5 + seed,
    }
    config = {
        "qwen2": lambda: tf.Qwen2Config(**dense, **yarn),
        "qwen3": lambda: tf.Qwen3Config(**dense, head_dim=(16, 24, 32)[seed], **yarn),
        "qwen3_moe": lambda: tf.Qwen3MoeConfig(**dense, **moe, head_dim=16, **yarn),
        "gpt_oss": lambda: tf.GptOssConfig(
            **gpt, rope_parameters={**YARN, "truncate": seed == 2, "rope_theta": 150000.0}
        ),
    }[kind]()
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    model = tf.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn_like(p)
            p.copy_(
                1 + 0.2 * noise
                if "norm" in name
                else noise * (0.3 if p.dim() == 1 or "bias" in name else 1.5 * p.shape[-1] ** -0.5)
            )
    return model


def logits_of(model: Any) -> np.ndarray:
    import torch

    with torch.no_grad():
        return np.asarray(model(torch.tensor(PROMPT)).logits.float())


def apart(found: mx.array, wanted: np.ndarray) -> float:
    return float(np.abs(np.array(found) - wanted).max() / np.abs(wanted).max())


def step_by_step(model: Any) -> mx.array:
    """The logits of the prompt one token at a time, with a cache."""
    from mlx_lm.models.cache import make_prompt_cache

    cache = make_prompt_cache(model)
    return mx.concatenate(
        [model(mx.array(PROMPT[:, i : i + 1]), cache=cache) for i in range(PROMPT.shape[1])], axis=1
    )


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "qwen3_moe", "gpt_oss"])
def test_in_and_out_again(kind: str, seed: int, tmp_path: Path) -> None:
    import transformers as tf

    model = build(kind, seed)
    wanted = logits_of(model)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="60KB")
    convert(tmp_path / "theirs", tmp_path / "ours")
    for folder in ("theirs", "ours"):
        loaded, _ = load_model(tmp_path / folder)
        assert apart(loaded(mx.array(PROMPT)), wanted) < 2e-5
        assert apart(step_by_step(loaded), wanted) < 2e-5
    to_hf(tmp_path / "ours", tmp_path / "back")
    back, notes = tf.AutoModelForCausalLM.from_pretrained(
        tmp_path / "back", output_loading_info=True, attn_implementation="eager"
    )
    assert not notes["missing_keys"]
    assert not notes["unexpected_keys"]
    assert np.array_equal(logits_of(back.eval()), wanted)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_mxfp4_experts_in_and_out_again(seed: int, tmp_path: Path, tools: Any) -> None:
    """As in the published checkpoints: bfloat16, and experts in blocks and scales that keep their bits."""
    import transformers as tf

    save_mxfp4(build("gpt_oss", seed), tmp_path / "theirs", tools)
    wanted = logits_of(
        tf.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", attn_implementation="eager")
        .float()
        .eval()
    )
    convert(tmp_path / "theirs", tmp_path / "ours")
    for folder in ("theirs", "ours"):
        loaded, _ = load_model(tmp_path / folder, dtype="float32")
        assert apart(loaded(mx.array(PROMPT)), wanted) < 2e-5
        assert apart(step_by_step(loaded), wanted) < 2e-5
    to_hf(tmp_path / "ours", tmp_path / "back")
    assert tools.all(tmp_path / "back") == tools.all(tmp_path / "theirs")
    back = (
        tf.AutoModelForCausalLM.from_pretrained(tmp_path / "back", attn_implementation="eager").float().eval()
    )
    assert np.array_equal(logits_of(back), wanted)


def save_mxfp4(model: Any, folder: Path, tools: Any) -> None:
    """The model's checkpoint with its experts in MXFP4."""
    model.bfloat16().save_pretrained(folder)
    tensors = tools.read(folder / "model.safetensors")
    for name in [n for n in tensors if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        _, (experts, inputs, outputs), data = tensors.pop(name)
        weight = (
            mx.array(np.frombuffer(data, np.uint16))
            .view(mx.bfloat16)
            .reshape(experts, inputs, outputs)
            .swapaxes(1, 2)
        )
        parts = quantize(weight, parse_mode("mxfp4"))
        words, scales = np.array(parts["weight"]), np.array(parts["scales"])
        tensors[f"{name}_blocks"] = ("U8", [experts, outputs, inputs // 32, 16], words.tobytes())
        tensors[f"{name}_scales"] = ("U8", [experts, outputs, inputs // 32], scales.tobytes())
    tools.write(folder / "model.safetensors", tensors)
    path = folder / "config.json"
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "quantization_config": {"quant_method": "mxfp4"}})
    )


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize(
    ("name", "targets"),
    [("qwen3", ("q_proj", "down_proj")), ("qwen3_moe", ("o_proj", "up_proj")), ("gpt_oss", ("v_proj",))],
)
def test_a_student_trained_here_gives_the_same_logits_in_transformers(
    name: str, targets: tuple[str, ...], kind: str, tmp_path: Path
) -> None:
    """Its adapter merged on the way out."""
    import transformers as tf

    build(name, 1).save_pretrained(tmp_path / "base")
    model, settings = adapted(tmp_path / "base", targets, kind)
    save_adapter(model, tmp_path / "student", settings, tmp_path / "base")
    to_hf(tmp_path / "student", tmp_path / "out")
    theirs = logits_of(
        tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    )
    assert apart(model(mx.array(PROMPT)), theirs) < 2e-5


def adapted(
    base: Path, targets: tuple[str, ...], kind: str, *, rslora: bool = False
) -> tuple[Any, LoraSettings]:
    """A model with an adapter that has learned something."""
    model, _ = load_model(base)
    settings = LoraSettings(4, 8.0, 0.0, targets, kind, rslora)
    add_lora(model, settings)
    for path, module in sorted(model.named_modules()):
        if "lora_b" in module:
            module.lora_b = 0.1 * mx.random.normal(module.lora_b.shape, key=mx.random.key(len(path)))
    model.eval()
    return model, settings


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("name", ["qwen3", "gpt_oss"])
def test_peft_computes_what_we_compute(name: str, kind: str, tmp_path: Path) -> None:
    import peft
    import transformers as tf

    build(name, 1).save_pretrained(tmp_path / "base")
    model, settings = adapted(
        tmp_path / "base", ("q_proj", "v_proj", "o_proj"), kind, rslora=name == "gpt_oss"
    )
    save_adapter(model, tmp_path / "adapter", settings, tmp_path / "base")
    to_peft(tmp_path / "adapter", tmp_path / "peft")
    base = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager")
    wrapped = peft.PeftModel.from_pretrained(base, tmp_path / "peft").eval()
    theirs = logits_of(wrapped)
    assert float(np.abs(np.array(model(mx.array(PROMPT))) - theirs).max()) < 1e-4 * np.abs(theirs).max()
    wrapped.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    from_peft(tmp_path / "saved", tmp_path / "again", tmp_path / "base")
    again, _ = load_model(tmp_path / "again")
    assert mx.array_equal(again(mx.array(PROMPT)), model(mx.array(PROMPT)))
