"""gpt-oss (20b and 120b): mlx-lm's class with transformers' rope, and both layouts of its checkpoints.

The MXFP4 layout has ``gate_up_proj_blocks [e, 2 i, h / 32, 16]`` with gate and up in alternating rows. The
unquantized layout has ``gate_up_proj [e, h, 2 i]``, transposed, with gate and up in alternating columns, and
``down_proj [e, i, h]``, transposed too. ``down_proj`` is square at full size, so a missing transpose would
pass every check of shapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_distill.errors import ModelError
from mlx_distill.models.architectures.rope import (
    RopeSettings,
    build_rope,
    other_logits,
    rope_settings,
    stock_difference,
)
from mlx_distill.models.checkpoint.layout import (
    Architecture,
    ModuleNames,
    NativeQuantization,
    Rule,
)
from mlx_distill.models.checkpoint.transforms import Mxfp4Words, Same, SplitColumns, SplitRows, Transpose
from mlx_distill.models.config_fields import ANY, DECODER_FIELDS, OFF, OPTIONAL_SIZE, SIZE, Field, Fields

FIELDS: Fields = {
    **DECODER_FIELDS,
    **dict.fromkeys(("use_qk_norm", "qk_norm", "qk_layernorm"), OFF),
    "attention_bias": Field(only=(True,)),
    "num_local_experts": SIZE,
    "num_experts": OPTIONAL_SIZE,
    "head_dim": SIZE,
    "num_experts_per_tok": SIZE,
    "experts_per_token": ANY,  # OpenAI's name of num_experts_per_tok
    "initial_context_length": ANY,  # original_max_position_embeddings of the rope
    "sliding_window": SIZE,
    "swiglu_alpha": Field("number", null=True),
    "swiglu_limit": Field("number", above=0, null=True),
}

_EXPERTS = "model.layers.{l}.mlp.experts."
_DEFAULT_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}

RULES = (
    Rule(
        _EXPERTS + "gate_up_proj_blocks",
        (_EXPERTS + "gate_proj.weight", _EXPERTS + "up_proj.weight"),
        SplitRows(mxfp4=True),
        quantized=True,
    ),
    Rule(
        _EXPERTS + "gate_up_proj_scales",
        (_EXPERTS + "gate_proj.scales", _EXPERTS + "up_proj.scales"),
        SplitRows(),
        quantized=True,
    ),
    Rule(_EXPERTS + "down_proj_blocks", (_EXPERTS + "down_proj.weight",), Mxfp4Words(), quantized=True),
    Rule(_EXPERTS + "down_proj_scales", (_EXPERTS + "down_proj.scales",), Same(), quantized=True),
    Rule(
        _EXPERTS + "gate_up_proj",
        (_EXPERTS + "gate_proj.weight", _EXPERTS + "up_proj.weight"),
        Transpose(split=True),
    ),
    Rule(_EXPERTS + "down_proj", (_EXPERTS + "down_proj.weight",), Transpose()),
    Rule(
        _EXPERTS + "gate_up_proj_bias",
        (_EXPERTS + "gate_proj.bias", _EXPERTS + "up_proj.bias"),
        SplitColumns(),
    ),
    Rule(_EXPERTS + "down_proj_bias", (_EXPERTS + "down_proj.bias",), Same()),
)


def _classes() -> tuple[Any, Any]:
    from mlx_lm.models import gpt_oss

    return gpt_oss.Model, gpt_oss.ModelArgs


def layer_types(config: Mapping[str, Any]) -> list[str]:
    """The attention type of each layer."""
    alternating = [
        "full_attention" if i % 2 else "sliding_attention" for i in range(config["num_hidden_layers"])
    ]
    return list(config.get("layer_types") or alternating)


def _arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    types = layer_types(config)
    if len(types) != config["num_hidden_layers"] or set(types) != {"sliding_attention", "full_attention"}:
        raise ModelError(
            f"config.json: layer_types {sorted(set(types))} for {config['num_hidden_layers']} layers",
            fix="gpt-oss needs one type for each layer, and both sliding_attention and full_attention",
        )
    # A default of the family that is more than the experts of a small model.
    if "num_experts_per_tok" not in config and config["num_local_experts"] < 4:
        raise KeyError("num_experts_per_tok")
    if config.get("tie_word_embeddings"):
        raise ModelError(
            "config.json: tie_word_embeddings with gpt-oss",
            fix="save the checkpoint with its head written out (untied)",
        )
    rope = _rope(config)
    # The default rope is built here and replaced by _patch: mlx-lm cannot build every rope that we can.
    return {**config, "layer_types": types, "rope_theta": rope.theta, "rope_scaling": None}


def _rope(config: Mapping[str, Any]) -> RopeSettings:
    return rope_settings(config, 150_000.0, _DEFAULT_ROPE)


def _patch(model: Any, config: Mapping[str, Any]) -> None:
    rope = build_rope(
        int(config.get("head_dim") or 64),
        _rope(config),
        int(config.get("max_position_embeddings") or 131_072),
    )
    for layer in model.layers:
        layer.self_attn.rope = rope
        activation = layer.mlp.experts.activation
        activation._alpha, activation._limit = _activation(config)


def _activation(config: Mapping[str, Any]) -> tuple[float, float]:
    return float(config.get("swiglu_alpha") or 1.702), float(config.get("swiglu_limit") or 7.0)


def _stock_difference(config: Mapping[str, Any]) -> str | None:
    if not (config.get("rope_parameters") or config.get("rope_scaling")):
        return other_logits("it applies no YaRN if a gpt-oss config names no rope")
    if _activation(config) != (1.702, 7.0):
        return other_logits("it does not read swiglu_alpha and swiglu_limit")
    return stock_difference(
        int(config.get("head_dim") or 64),
        _rope(config),
        int(config.get("max_position_embeddings") or 131_072),
    )


def _shapes(a: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    h, i, e = a["hidden_size"], a["intermediate_size"], a["num_local_experts"]
    d = a.get("head_dim", 64)
    q, kv = a["num_attention_heads"] * d, a["num_key_value_heads"] * d
    out: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (a["vocab_size"], h),
        "model.norm.weight": (h,),
    }
    out["lm_head.weight"] = (a["vocab_size"], h)
    for n in range(a["num_hidden_layers"]):
        p = f"model.layers.{n}."
        out |= {
            f"{p}input_layernorm.weight": (h,),
            f"{p}post_attention_layernorm.weight": (h,),
            f"{p}self_attn.sinks": (a["num_attention_heads"],),
        }
        for name, rows, columns in (("q_proj", q, h), ("k_proj", kv, h), ("v_proj", kv, h), ("o_proj", h, q)):
            out |= {f"{p}self_attn.{name}.weight": (rows, columns), f"{p}self_attn.{name}.bias": (rows,)}
        out |= {f"{p}mlp.router.weight": (e, h), f"{p}mlp.router.bias": (e,)}
        for name, rows, columns in (("gate_proj", i, h), ("up_proj", i, h), ("down_proj", h, i)):
            out |= {
                f"{p}mlp.experts.{name}.weight": (e, rows, columns),
                f"{p}mlp.experts.{name}.bias": (e, rows),
            }
    return out


GPT_OSS = Architecture(
    "gpt_oss",
    _classes,
    _arguments,
    _patch,
    _shapes,
    RULES,
    modules=ModuleNames(routers=("mlp.router",), experts=("mlp.experts",)),
    rope=_rope,
    native_quantization=NativeQuantization(
        "mxfp4",
        ("model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"),
    ),
    stock_difference=_stock_difference,
    fields=FIELDS,
)
