"""Tiny random models of every architecture and of each kind of cache that mlx-lm has for a batch: plain keys
and values, sliding windows, states of short convolutions, gated delta rules and Mamba 2.
"""

from __future__ import annotations

import importlib
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map

VOCABULARY = 400
WINDOW = 6
_COMMON: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
}
_QWEN: dict[str, Any] = {
    **_COMMON,
    "intermediate_size": 48,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
_EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2": _QWEN,
    "qwen3": {**_QWEN, "head_dim": 8},
    "qwen3_wide": {**_QWEN, "head_dim": 64},
    "qwen3_moe": {**_QWEN, **_EXPERTS, "head_dim": 8},
    "gpt_oss": {
        **{key: value for key, value in _COMMON.items() if key != "max_position_embeddings"},
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "intermediate_size": 32,
        "head_dim": 8,
        "sliding_window": WINDOW,
    },
    "lfm2": {
        **_COMMON,
        "norm_eps": 1e-6,
        "conv_bias": False,
        "conv_L_cache": 3,
        "block_dim": 32,
        "block_ff_dim": 48,
        "block_multiple_of": 8,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": False,
        "full_attn_idxs": [1],
    },
    "qwen3_next": {
        **_QWEN,
        **_EXPERTS,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 8,
        "linear_conv_kernel_dim": 4,
        "shared_expert_intermediate_size": 32,
        "partial_rotary_factor": 0.5,
        "head_dim": 8,
        "full_attention_interval": 2,
    },
    "granitemoehybrid": {
        **_QWEN,
        "attention_bias": False,
        "embedding_multiplier": 1.0,
        "attention_multiplier": 0.35,
        "logits_scaling": 1.0,
        "residual_multiplier": 1.0,
        "layer_types": ["mamba", "attention"],
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 16,
        "mamba_d_conv": 4,
        "mamba_n_groups": 1,
        "mamba_conv_bias": True,
        "mamba_proj_bias": False,
    },
}


def make_cached_model(kind: str) -> Any:
    """Weights large enough that greedy answers wander instead of repeating one token."""
    name = kind.removesuffix("_wide")
    module = importlib.import_module(f"mlx_lm.models.{name}")
    mx.random.seed(11)
    model = module.Model(module.ModelArgs.from_dict({"model_type": name, **CONFIGS[kind]}))
    if kind == "gpt_oss":
        for layer in model.layers:
            layer.self_attn.sinks = mx.random.normal(layer.self_attn.sinks.shape)
    model.update(tree_map(lambda p: p * 3 if p.ndim == 2 or p.ndim > 3 else p, model.parameters()))
    mx.eval(model.parameters())
    return model.eval()
