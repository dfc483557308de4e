"""Qwen2, Qwen2.5, Qwen3 and Qwen3-MoE: mlx-lm's classes with transformers' rope."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mlx_distill.errors import ModelError
from mlx_distill.models.architectures.rope import build_rope, other_logits, rope_settings, stock_difference
from mlx_distill.models.checkpoint.layout import Architecture, ModuleNames, Rule
from mlx_distill.models.checkpoint.transforms import Same, SplitBlocks, Stack
from mlx_distill.models.config_fields import (
    ANY,
    DECODER_FIELDS,
    FLAG,
    OFF,
    OPTIONAL_SIZE,
    SIZE,
    Field,
    Fields,
)

# Qwen2 has biases on queries, keys and values and no norms on them, Qwen3 the reverse.
QWEN2_FIELDS: Fields = {
    **DECODER_FIELDS,
    **dict.fromkeys(("use_qk_norm", "qk_norm", "qk_layernorm"), OFF),
    "attention_bias": ANY,  # of no effect in transformers
    "qkv_bias": Field(only=(True,)),
    "use_sliding_window": FLAG,
    "sliding_window": Field("whole", least=0, null=True),
    "max_window_layers": Field("whole", least=0, null=True),
    "use_mrope": OFF,
}
QWEN3_FIELDS: Fields = {
    **QWEN2_FIELDS,
    **dict.fromkeys(("use_qk_norm", "qk_norm", "qk_layernorm"), Field(only=(True,))),
    "attention_bias": OFF,
    "qkv_bias": OFF,
}
QWEN3_MOE_FIELDS: Fields = {
    **QWEN3_FIELDS,
    "num_experts": OPTIONAL_SIZE,
    "num_local_experts": OPTIONAL_SIZE,
    "num_experts_per_tok": SIZE,
    "moe_intermediate_size": SIZE,
    "decoder_sparse_step": OPTIONAL_SIZE,
    "mlp_only_layers": Field("list", null=True),
    "norm_topk_prob": FLAG,
}

_MLP = "model.layers.{l}.mlp."

MOE_RULES = (
    *(
        Rule(_MLP + f"experts.{{e}}.{name}.weight", (_MLP + f"switch_mlp.{name}.weight",), Stack())
        for name in ("gate_proj", "up_proj", "down_proj")
    ),
    # transformers 5 holds experts in memory like this, and can write them like this.
    Rule(
        _MLP + "experts.gate_up_proj",
        (_MLP + "switch_mlp.gate_proj.weight", _MLP + "switch_mlp.up_proj.weight"),
        SplitBlocks(),
    ),
    Rule(_MLP + "experts.down_proj", (_MLP + "switch_mlp.down_proj.weight",), Same()),
)


def _classes(name: str) -> Callable[[], tuple[Any, Any]]:
    def load() -> tuple[Any, Any]:
        from importlib import import_module

        module = import_module(f"mlx_lm.models.{name}")
        return module.Model, module.ModelArgs

    return load


def _head_dim(config: Mapping[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _positions(config: Mapping[str, Any]) -> int:
    return int(config.get("max_position_embeddings") or 32_768)


def _arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    if config.get("use_sliding_window") and config.get("sliding_window") and _has_sliding_layers(config):
        raise ModelError(
            "config.json: use_sliding_window is true, and the MLX class has no sliding window",
            fix="set use_sliding_window to false if the texts are shorter than the window",
        )
    if others := [kind for kind in config.get("layer_types") or () if kind != "full_attention"]:
        raise ModelError(
            f"config.json: layer_types {others[0]!r} is not supported", fix="only full_attention is"
        )
    if (
        config["model_type"] == "qwen2"
        and _head_dim(config) * config["num_attention_heads"] != config["hidden_size"]
    ):
        raise ModelError(
            "config.json: head_dim times num_attention_heads is not hidden_size",
            fix="use a Qwen2 with the default head size",
        )
    rope = rope_settings(config)
    # Those of transformers' configs, where mlx-lm has none.
    defaults = {
        "num_key_value_heads": config["num_attention_heads"],
        "tie_word_embeddings": False,
        "max_position_embeddings": 32_768,
        "rms_norm_eps": 1e-6,
    }
    # transformers 5 writes num_experts as num_local_experts.
    moe: dict[str, Any] = {
        "num_experts": config.get("num_local_experts"),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": False,
    }
    values = {key: value for key, value in config.items() if value is not None and key != "rope_parameters"}
    return {
        **defaults,
        **moe,
        **values,
        "head_dim": _head_dim(config),
        "rope_theta": rope.theta,
        "rope_scaling": None,
    }


def _has_sliding_layers(config: Mapping[str, Any]) -> bool:
    if config.get("layer_types"):
        return "sliding_attention" in config["layer_types"]
    return (
        config["model_type"] == "qwen3_moe"
        or int(config.get("max_window_layers", 28)) < config["num_hidden_layers"]
    )


def _patch(model: Any, config: Mapping[str, Any]) -> None:
    rope = build_rope(_head_dim(config), rope_settings(config), _positions(config))
    for layer in model.layers:
        layer.self_attn.rope = rope


def _stock_difference(config: Mapping[str, Any]) -> str | None:
    rope = rope_settings(config)
    if rope.kind != "default" and config["model_type"] == "qwen3_moe":
        return other_logits(f"it applies no {rope.kind} rope to Qwen3-MoE")
    return stock_difference(_head_dim(config), rope, _positions(config))


def _shapes(a: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    h, d, is_qwen2 = a["hidden_size"], a["head_dim"], a["model_type"] == "qwen2"
    q, kv = a["num_attention_heads"] * d, a["num_key_value_heads"] * d
    out: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (a["vocab_size"], h),
        "model.norm.weight": (h,),
    }
    if not a["tie_word_embeddings"]:
        out["lm_head.weight"] = (a["vocab_size"], h)
    for n in range(a["num_hidden_layers"]):
        p = f"model.layers.{n}."
        out |= {f"{p}input_layernorm.weight": (h,), f"{p}post_attention_layernorm.weight": (h,)}
        for name, rows, columns in (("q_proj", q, h), ("k_proj", kv, h), ("v_proj", kv, h), ("o_proj", h, q)):
            out[f"{p}self_attn.{name}.weight"] = (rows, columns)
            if is_qwen2 and name != "o_proj":
                out[f"{p}self_attn.{name}.bias"] = (rows,)
        if not is_qwen2:
            out |= {f"{p}self_attn.q_norm.weight": (d,), f"{p}self_attn.k_norm.weight": (d,)}
        out |= _mlp_shapes(a, n, f"{p}mlp.")
    return out


def _mlp_shapes(a: Mapping[str, Any], layer: int, prefix: str) -> dict[str, tuple[int, ...]]:
    h, i = a["hidden_size"], a["intermediate_size"]
    sparse = (
        a["model_type"] == "qwen3_moe"
        and layer not in a["mlp_only_layers"]
        and (layer + 1) % a["decoder_sparse_step"] == 0
    )
    if not sparse:
        return {
            f"{prefix}{name}.weight": shape
            for name, shape in (("gate_proj", (i, h)), ("up_proj", (i, h)), ("down_proj", (h, i)))
        }
    e, m = a["num_experts"], a["moe_intermediate_size"]
    out: dict[str, tuple[int, ...]] = {f"{prefix}gate.weight": (e, h)}
    for name, shape in (("gate_proj", (e, m, h)), ("up_proj", (e, m, h)), ("down_proj", (e, h, m))):
        out[f"{prefix}switch_mlp.{name}.weight"] = shape
    return out


QWEN2 = Architecture(
    "qwen2",
    _classes("qwen2"),
    _arguments,
    _patch,
    _shapes,
    stock_difference=_stock_difference,
    fields=QWEN2_FIELDS,
)
QWEN3 = Architecture(
    "qwen3",
    _classes("qwen3"),
    _arguments,
    _patch,
    _shapes,
    stock_difference=_stock_difference,
    fields=QWEN3_FIELDS,
)
QWEN3_MOE = Architecture(
    "qwen3_moe",
    _classes("qwen3_moe"),
    _arguments,
    _patch,
    _shapes,
    MOE_RULES,
    modules=ModuleNames(routers=("mlp.gate",), experts=("mlp.switch_mlp",)),
    config_aliases={"num_experts": "num_local_experts"},
    stock_difference=_stock_difference,
    fields=QWEN3_MOE_FIELDS,
)
