"""Which fields of config.json and generation_config.json are read, and which values are computed.

The rule for all model families: a field that changes the result and is not computed is an error or a named
note, never silence. A table maps the name of a field to its :class:`Field`; a family's table is part of its
:class:`~mlx_distill.models.checkpoint.layout.Architecture`. Those of tokenizer_config.json are in
:mod:`~mlx_distill.models.tokenizer_fields`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_distill.errors import ModelError
from mlx_distill.text import listed, shortened

_LARGEST = 1e15  # no field is near it, and float32 overflows far beyond it
_ORIGINAL = "take config.json from the original checkpoint"


@dataclass(frozen=True)
class Field:
    """What the value of a field may be.

    Args:
        kind: ``whole`` number, ``number``, ``flag``, ``text``, ``list``, ``object``, ``token`` (a token id or
            a list of them), ``off`` (false, 0 or empty) or ``any``.
        least: The smallest number.
        above: A number that the value must be greater than.
        null: Whether null is allowed and means the default.
        only: The values that are computed, beside null; empty for all values.
    """

    kind: str = "any"
    least: float = -math.inf
    above: float = -math.inf
    null: bool = False
    only: tuple[Any, ...] = ()

    def problem(self, value: Any) -> str | None:
        """Why a value is not allowed, after its name and itself; None if it is."""
        if value is None:
            return None if self.null or self.only or self.kind == "any" else f"is not {_KINDS[self.kind]}"
        if self.only:
            allowed = any(
                value == one and isinstance(value, bool) == isinstance(one, bool) for one in self.only
            )
            return None if allowed else f"is not supported; only {listed([repr(one) for one in self.only])}"
        if not _is_kind(self.kind, value):
            return f"is not {_KINDS[self.kind]}"
        if self.kind in ("whole", "number"):
            if value < self.least:
                return f"is less than {self.least:g}"
            if value <= self.above:
                return f"is not greater than {self.above:g}"
            if value > _LARGEST:
                return "is too large"
        return None


_KINDS = {
    "whole": "a whole number",
    "number": "a number",
    "flag": "true or false",
    "text": "text",
    "list": "a list",
    "object": "an object",
    "token": "a token id or a list of token ids",
    "off": "supported",
}


def _is_kind(kind: str, value: Any) -> bool:
    match kind:
        case "whole":
            return isinstance(value, int) and not isinstance(value, bool)
        case "number":
            return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        case "flag":
            return isinstance(value, bool)
        case "text":
            return isinstance(value, str)
        case "list":
            return isinstance(value, list)
        case "object":
            return isinstance(value, dict)
        case "token":
            ids = value if isinstance(value, list) else [value]
            return all(_is_kind("whole", number) for number in ids)
        case "off":
            return not value
        case _:
            return True


Fields = Mapping[str, Field]
ANY, SIZE = Field(), Field("whole", least=1)
OPTIONAL_SIZE, FLAG, OFF = (
    Field("whole", least=1, null=True),
    Field("flag", null=True),
    Field("off", null=True),
)
_POSITIVE = Field("number", above=0, null=True)
_NOT_NEGATIVE = Field("number", least=0, null=True)
_OBJECT = Field("object", null=True)
_ROPE_BASE = Field("number", above=1, null=True)

ROPE_FIELDS: Fields = {
    "rope_type": Field("text", null=True),
    "type": Field("text", null=True),
    "rope_theta": Field("number", above=1),
    "factor": _POSITIVE,
    "original_max_position_embeddings": _POSITIVE,
    "beta_fast": _NOT_NEGATIVE,
    "beta_slow": _NOT_NEGATIVE,
    "attention_factor": _NOT_NEGATIVE,
    "mscale": _NOT_NEGATIVE,
    "mscale_all_dim": _NOT_NEGATIVE,
    "truncate": FLAG,
    "partial_rotary_factor": Field(only=(1.0,)),
}
_ROPES = ("rope_parameters", "rope_scaling")

# What tells of the checkpoint, of training, or of how a library computes the same numbers.
_INFORMATION = """
    architectures dtype torch_dtype transformers_version unsloth_version unsloth_fixed unsloth_training_name
    id2label label2id num_labels problem_type task_specific_params finetuning_task name_or_path language
    bos_token_id pad_token_id sep_token_id decoder_start_token_id tokenizer_class prefix model_name
    attention_dropout hidden_dropout embd_pdrop attn_pdrop resid_pdrop initializer_range use_cache
    gradient_checkpointing output_router_logits router_aux_loss_coef pretraining_tp use_flash_attention
    attn_implementation use_bfloat16 torchscript return_dict return_dict_in_generate output_attentions
    output_hidden_states output_scores chunk_size_feed_forward tie_encoder_decoder
    cross_attention_hidden_size is_decoder
    max_length max_new_tokens min_length do_sample early_stopping num_beams num_beam_groups temperature top_k
    top_p typical_p repetition_penalty length_penalty diversity_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences forced_bos_token_id forced_eos_token_id
    remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
""".split()

# What other families compute with and these do not: an error unless it is off.
_NOT_COMPUTED: Fields = {
    **dict.fromkeys(
        """
        final_logit_softcapping attn_logit_softcapping attention_multiplier query_pre_attn_scalar scale_emb
        scale_depth dim_model_base attn_temperature_tuning attn_scale floor_scale no_rope_layers
        no_rope_layer_interval sliding_window_pattern attention_chunk_size alibi parallel_attn kv_lora_rank
        q_lora_rank n_shared_experts shared_expert_intermediate_size per_layer_config pruned_heads
        is_encoder_decoder add_cross_attention mlp_bias use_mla
        """.split(),
        OFF,
    ),
    **dict.fromkeys(
        "logits_scaling logit_scale embedding_multiplier residual_multiplier routed_scaling_factor".split(),
        Field(only=(1.0, 0.0)),
    ),
    "position_embedding_type": Field(only=("rope", "rotary")),
    "rotary_pct": Field(only=(1.0,)),
    "partial_rotary_factor": Field(only=(1.0,)),
}

DECODER_FIELDS: Fields = {
    **dict.fromkeys(_INFORMATION, ANY),
    **_NOT_COMPUTED,
    "model_type": Field("text"),
    "hidden_size": SIZE,
    "intermediate_size": SIZE,
    "num_hidden_layers": SIZE,
    "num_attention_heads": SIZE,
    "num_key_value_heads": OPTIONAL_SIZE,
    "head_dim": OPTIONAL_SIZE,
    "vocab_size": SIZE,
    "rms_norm_eps": Field("number", least=0),
    "max_position_embeddings": OPTIONAL_SIZE,
    "original_max_position_embeddings": _POSITIVE,
    "rope_theta": _ROPE_BASE,
    "rope_parameters": _OBJECT,
    "rope_scaling": _OBJECT,
    **dict.fromkeys(("quantization", "quantization_config", "compression_config"), _OBJECT),
    "tie_word_embeddings": FLAG,
    "hidden_act": Field(only=("silu", "swish")),
    "layer_types": Field("list", null=True),
    "eos_token_id": Field("token", null=True),
}

# Sampling is not used (answers are decoded greedily), and the length of answers is the task's.
GENERATION_FIELDS: Fields = {
    **dict.fromkeys(
        """
        do_sample temperature top_k top_p min_p top_h typical_p epsilon_cutoff eta_cutoff renormalize_logits
        max_length max_new_tokens max_time early_stopping length_penalty use_cache cache_implementation
        cache_config max_cache_len bos_token_id pad_token_id decoder_start_token_id transformers_version
        return_dict_in_generate output_attentions output_hidden_states output_scores output_logits
        num_return_sequences remove_invalid_values trust_remote_code use_mtp is_assistant num_assistant_tokens
        num_assistant_tokens_schedule assistant_confidence_threshold assistant_early_exit
        assistant_lookbehind target_lookbehind assistant_ensemble_weight prompt_lookup_num_tokens
        max_matching_ngram_size speculation_type compile_config disable_compile continuous_batching_config
        low_memory prefill_chunk_size chat_format max_window_size stop_words_type
        """.split(),
        ANY,
    ),
    "eos_token_id": Field("token", null=True),
}
# Where these fields of generation_config.json have no effect.
_NO_EFFECT = {
    "repetition_penalty": 1,
    "encoder_repetition_penalty": 1,
    "num_beams": 1,
    "num_beam_groups": 1,
    "guidance_scale": 1,
}


def check_fields(config: Mapping[str, Any], fields: Fields, where: str) -> None:
    """Raise for a value of the wrong kind, or one that is not computed.

    Args:
        config: The object of a file, or a part of it.
        fields: Its table.
        where: The file, and the name of the part.

    Raises:
        ModelError: with file, key and value.

    >>> check_fields({"head_dim": None, "rope_theta": "1e6"}, DECODER_FIELDS, "config.json")
    Traceback (most recent call last):
    mlx_distill.errors.ModelError: config.json: rope_theta '1e6' is not a number (take config.json from ...)
    """
    separator = ": " if where.endswith(".json") else "."
    for name, field in fields.items():
        if name in config and (problem := field.problem(config[name])):
            value = shortened(repr(config[name]))
            raise ModelError(f"{where}{separator}{name} {value} {problem}", fix=_ORIGINAL)
    for name in _ROPES:
        if fields is not ROPE_FIELDS and isinstance(config.get(name), dict):
            check_fields(config[name], ROPE_FIELDS, f"{where}: {name}")


def check_model_config(config: Mapping[str, Any], fields: Fields, where: str) -> None:
    """Raise for fields of config.json that are wrong alone or together.

    Raises:
        ModelError: with file, key and value.
    """
    check_fields(config, fields, where)
    heads, groups = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if heads and groups and heads % groups:
        raise ModelError(
            f"{where}: num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}",
            fix=_ORIGINAL,
        )
    head_dim = config.get("head_dim")
    if head_dim and head_dim % 2:
        raise ModelError(f"{where}: head_dim {head_dim} is odd, and rope rotates pairs", fix=_ORIGINAL)
    experts = config.get("num_experts") or config.get("num_local_experts")
    chosen = config.get("num_experts_per_tok")
    if experts and chosen and chosen > experts:
        raise ModelError(
            f"{where}: num_experts_per_tok {chosen} is more than the {experts} experts", fix=_ORIGINAL
        )
    types, layers = config.get("layer_types"), config.get("num_hidden_layers")
    if types and layers and len(types) != layers:
        raise ModelError(f"{where}: layer_types names {len(types)} layers of {layers}", fix=_ORIGINAL)


def check_stop_tokens(tokens: int | Sequence[int] | None, vocabulary: Any, where: str) -> None:
    """Raise for an ``eos_token_id`` that the model cannot produce.

    Raises:
        ModelError: with file and id.
    """
    for token in [tokens] if isinstance(tokens, int) else tokens or ():
        if isinstance(vocabulary, int) and not 0 <= token < vocabulary:
            raise ModelError(
                f"{where}: eos_token_id {token} is no token of a vocabulary of {vocabulary}",
                fix="correct it, or take the file from the original checkpoint",
            )


def unused_fields(config: Mapping[str, Any], fields: Fields) -> list[str]:
    """Fields that no table knows and whose value is set, as ``name value``.

    >>> unused_fields({"new": 2, "other": None, "off": False, "_private": 1}, {})
    ['new 2']
    """
    unused = [
        f"{name} {shortened(repr(value), 40)}"
        for name, value in config.items()
        if name not in fields and not name.startswith("_") and value and value != _NO_EFFECT.get(name)
    ]
    for name in _ROPES:
        if name in fields and isinstance(config.get(name), dict):
            unused += [f"{name}.{text}" for text in unused_fields(config[name], ROPE_FIELDS)]
    return unused
