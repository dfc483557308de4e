"""Golden checkpoints and logits for tests/models: random tiny models, saved and computed by transformers.

    python tests/golden/make_models.py        (needs the parity extra)

Writes ``models_<name>/`` (Hugging Face layout: sharded safetensors with an index, bfloat16) and
``models_logits.safetensors`` (prompt and float32 logits). Prompts are longer than the sliding window and
longer than the original length of YaRN.
"""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import load_file, save_file
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

HERE = Path(__file__).parent
YARN = {
    "rope_type": "yarn",
    "factor": 8.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 32,
}
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 256,
}
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def cases() -> dict[str, tuple[type, object]]:
    """Name -> (model class, config)."""
    theta = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    gpt = dict(
        SMALL, head_dim=16, intermediate_size=32, num_local_experts=4, num_experts_per_tok=2, sliding_window=8
    )
    return {
        "qwen2": (
            Qwen2ForCausalLM,
            Qwen2Config(**SMALL, intermediate_size=64, tie_word_embeddings=True, **theta),
        ),
        "qwen3": (
            Qwen3ForCausalLM,
            Qwen3Config(**SMALL, intermediate_size=64, head_dim=16, tie_word_embeddings=True, **theta),
        ),
        "qwen3_yarn": (
            Qwen3ForCausalLM,
            Qwen3Config(
                **SMALL,
                intermediate_size=64,
                head_dim=16,
                tie_word_embeddings=False,
                rope_parameters={**YARN, "rope_theta": 1e4},
            ),
        ),
        "qwen3_moe": (
            Qwen3MoeForCausalLM,
            Qwen3MoeConfig(
                **SMALL,
                intermediate_size=64,
                moe_intermediate_size=32,
                head_dim=16,
                num_experts=4,
                num_experts_per_tok=2,
                norm_topk_prob=True,
                tie_word_embeddings=False,
                rope_parameters={**YARN, "rope_theta": 1e4},
            ),
        ),
        "gpt_oss": (
            GptOssForCausalLM,
            GptOssConfig(**gpt, rope_parameters={**YARN, "truncate": False, "rope_theta": 150000.0}),
        ),
        "gpt_oss_mxfp4": (
            GptOssForCausalLM,
            GptOssConfig(**gpt, rope_parameters={**YARN, "truncate": False, "rope_theta": 150000.0}),
        ),
    }


def random_weights(model: torch.nn.Module, seed: int) -> None:
    """Random weights, large enough that every part of the model affects the logits; exact in bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if "norm" in name:
                value = 1 + 0.2 * noise
            elif p.dim() == 1 or "bias" in name or "sinks" in name:
                value = 0.3 * noise
            else:
                value = 1.5 * p.shape[-1] ** -0.5 * noise
            p.copy_(value.to(torch.bfloat16).float())


def mxfp4(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Quantize ``[..., n]`` float32 to MXFP4.

    Returns:
        Blocks ``[..., n / 32, 16]`` uint8, scales ``[..., n / 32]`` uint8, and the dequantized values.
    """
    groups = values.reshape(*values.shape[:-1], -1, 32)
    exponent = np.floor(np.log2(np.abs(groups).max(-1))) - 2
    codes = np.abs(groups[..., None] / 2.0 ** exponent[..., None, None] - E2M1).argmin(-1).astype(np.uint8)
    decoded = E2M1[codes] * 2.0 ** exponent[..., None]
    blocks = codes[..., 0::2] | codes[..., 1::2] << 4
    return blocks, (exponent + 127).astype(np.uint8), decoded.reshape(values.shape).astype(np.float32)


def to_mxfp4(state: dict[str, torch.Tensor], model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Quantize the experts to MXFP4 in the state, and put their dequantized values into the model."""
    out = {}
    parameters = dict(model.named_parameters())
    for name, value in state.items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            out[name] = value
            continue
        blocks, scales, decoded = mxfp4(value.float().transpose(1, 2).contiguous().numpy())
        out[name + "_blocks"], out[name + "_scales"] = torch.tensor(blocks), torch.tensor(scales)
        with torch.no_grad():
            parameters[name].copy_(torch.tensor(decoded).transpose(1, 2))
    return out


def save_folder(name: str, model: torch.nn.Module, config: object, shards: int = 2) -> None:
    """Write config.json, numbered shards and the index."""
    folder = HERE / f"models_{name}"
    shutil.rmtree(folder, ignore_errors=True)
    # A copy, because this also rounds the frequencies of RoPE.
    copy.deepcopy(model).bfloat16().save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    raw = json.loads((folder / "config.json").read_text())
    raw["torch_dtype"] = "bfloat16"
    if name == "gpt_oss_mxfp4":
        state = to_mxfp4(state, model)
        # The keys of the published checkpoints.
        rope = raw.pop("rope_parameters")
        raw["rope_theta"] = rope.pop("rope_theta")
        raw["rope_scaling"] = rope
        raw["quantization_config"] = {
            "quant_method": "mxfp4",
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
        }
    (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
    (folder / "model.safetensors").unlink()
    names = sorted(state)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        shard = {n: state[n].contiguous() for n in names[i::shards]}
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    total = sum(t.numel() * t.element_size() for t in state.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def main() -> None:
    """Write all checkpoints and logits."""
    logits = {}
    for seed, (name, (cls, config)) in enumerate(cases().items()):
        config._attn_implementation = "eager"
        torch.manual_seed(seed)
        model = cls(config).eval()
        random_weights(model, 100 + seed)
        save_folder(name, model, config)
        prompt = torch.randint(0, config.vocab_size, (2, 48), generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            logits[f"{name}.logits"] = model(prompt).logits.float().numpy()
        logits[f"{name}.prompt"] = prompt.to(torch.int32).numpy()
        print(name, logits[f"{name}.logits"].std())
    save_numpy(logits, HERE / "models_logits.safetensors")


if __name__ == "__main__":
    main()
