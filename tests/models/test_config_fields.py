"""Fields of config.json and generation_config.json: computed, named in a note, or refused with file, key and
value; never a traceback.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_distill.errors import ModelError
from mlx_distill.models.architectures.registry import ARCHITECTURES, architecture_of, expected_shapes
from mlx_distill.models.architectures.rope import rope_settings, yarn_frequencies
from mlx_distill.models.config_files import config_notes, load_config
from mlx_distill.models.convert import convert
from mlx_distill.models.export import to_hf
from mlx_distill.models.load import load_model

# The complete fields of the published checkpoints.
_QWEN3_8B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 12288,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "model_type": "qwen3",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
_QWEN3_30B: dict[str, Any] = {
    **_QWEN3_8B,
    "architectures": ["Qwen3MoeForCausalLM"],
    "decoder_sparse_step": 1,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
    "rope_theta": 1000000.0,
}
_QWEN25_7B: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
_GPT_OSS_20B: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": 200002,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072,
    "model_type": "gpt_oss",
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "output_router_logits": False,
    "pad_token_id": 199999,
    "quantization_config": {
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router"],
        "quant_method": "mxfp4",
    },
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "router_aux_loss_coef": 0.9,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "transformers_version": "4.55.0.dev0",
    "use_cache": True,
    "vocab_size": 201088,
}
_QWEN3_GENERATION: dict[str, Any] = {
    "bos_token_id": 151643,
    "do_sample": True,
    "eos_token_id": [151645, 151643],
    "pad_token_id": 151643,
    "temperature": 0.6,
    "top_k": 20,
    "top_p": 0.95,
    "transformers_version": "4.51.0",
}
_GPT_OSS_GENERATION: dict[str, Any] = {
    "bos_token_id": 199998,
    "do_sample": True,
    "eos_token_id": [200002, 199999, 200012],
    "pad_token_id": 199999,
    "transformers_version": "4.55.0.dev0",
}
# What transformers 4 wrote of every model.
_EVERY_DEFAULT: dict[str, Any] = {
    "return_dict": True, "output_hidden_states": False, "output_attentions": False, "torchscript": False,
    "use_bfloat16": False, "tf_legacy_loss": False, "pruned_heads": {}, "chunk_size_feed_forward": 0,
    "is_encoder_decoder": False, "is_decoder": False, "cross_attention_hidden_size": None,
    "add_cross_attention": False, "tie_encoder_decoder": False, "max_length": 20, "min_length": 0,
    "do_sample": False, "early_stopping": False, "num_beams": 1, "num_beam_groups": 1, "temperature": 1.0,
    "top_k": 50, "top_p": 1.0, "typical_p": 1.0, "repetition_penalty": 1.0, "length_penalty": 1.0,
    "no_repeat_ngram_size": 0, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "prefix": None,
    "problem_type": None, "_name_or_path": "x", "_attn_implementation_autoset": True,
}  # fmt: skip


def write(folder: Path, config: dict[str, Any], generation: dict[str, Any] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def notes_of(folder: Path) -> list[str]:
    return config_notes(folder, ARCHITECTURES[load_config(folder)["model_type"]].fields)


@pytest.mark.parametrize(
    ("config", "generation"),
    [
        (_QWEN3_8B, _QWEN3_GENERATION),
        (_QWEN3_30B, _QWEN3_GENERATION),
        (_QWEN25_7B, None),
        (_GPT_OSS_20B, _GPT_OSS_GENERATION),
        ({**_QWEN3_8B, **_EVERY_DEFAULT}, {"_from_model_config": True, "use_cache": True}),
    ],
)
def test_published_checkpoints_give_no_note(config: Any, generation: Any, tmp_path: Path) -> None:
    folder = write(tmp_path / "model", config, generation)
    assert notes_of(folder) == []
    assert expected_shapes(load_config(folder))
    if generation and "eos_token_id" in generation:
        assert load_config(folder)["eos_token_id"] == generation["eos_token_id"]


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        (_QWEN3_8B, {"attention_bias": True}),
        (_QWEN3_8B, {"mlp_bias": True}),
        (_QWEN3_8B, {"hidden_act": "gelu"}),
        (_QWEN3_8B, {"qk_layernorm": False}),
        (_QWEN25_7B, {"use_qk_norm": True}),
        (_GPT_OSS_20B, {"attention_bias": False}),
        (_QWEN3_8B, {"partial_rotary_factor": 0.5}),
        (_QWEN3_8B, {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "partial_rotary_factor": 0.5}}),
        (_QWEN3_8B, {"final_logit_softcapping": 30.0}),
        (_QWEN3_8B, {"logits_scaling": 8.0}),
        (_QWEN3_8B, {"attention_multiplier": 0.01}),
        (_QWEN3_8B, {"per_layer_config": {"0": {"head_dim": 64}}}),
        (_QWEN3_8B, {"pruned_heads": {"0": [1]}}),
        (_QWEN3_8B, {"layer_types": ["linear_attention"] * 36}),
        (_QWEN3_8B, {"layer_types": ["sliding_attention"] * 36}),
        (_QWEN3_8B, {"layer_types": ["full_attention"] * 35}),
        (_QWEN3_8B, {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 1}),
        (_QWEN3_8B, {"num_key_value_heads": 5}),
        (_QWEN3_8B, {"head_dim": 127}),
        (_QWEN3_30B, {"num_experts_per_tok": 129}),
        (_QWEN3_30B, {"decoder_sparse_step": 0}),
        (_QWEN3_8B, {"rope_theta": None}),
        (_QWEN3_8B, {"rope_parameters": {"rope_type": "default", "rope_theta": None}}),
        (_QWEN3_8B, {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}),
        (_QWEN3_8B, {"rope_parameters": {"full_attention": {"rope_type": "default"}}}),
        (_QWEN3_8B, {"rope_scaling": {"rope_type": "linear", "factor": None}}),
        (_QWEN3_8B, {"rope_scaling": {"rope_type": "yarn", "original_max_position_embeddings": 32768}}),
        (
            _QWEN3_8B,
            {
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
                "rope_scaling": {"rope_type": "yarn", "factor": 4.0},
            },
        ),
        (
            _QWEN3_8B,
            {
                "original_max_position_embeddings": 4096,
                "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
            },
        ),
    ],
    ids=lambda value: "" if "model_type" in value else str(value)[:50],
)
def test_a_value_that_is_not_computed_is_an_error(config: Any, changes: Any, tmp_path: Path) -> None:
    folder = write(tmp_path / "model", {**config, **changes})
    with pytest.raises(ModelError, match=r"config\.json") as caught:
        expected_shapes(load_config(folder), str(folder / "config.json"))
    names = {*changes, *(key for value in changes.values() if isinstance(value, dict) for key in value)}
    assert any(name.removesuffix("_scaling") in caught.value.message for name in names), caught.value.message
    assert caught.value.fix


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("num_hidden_layers", None, "num_hidden_layers None is not a whole number"),
        ("num_hidden_layers", -1, "num_hidden_layers -1 is less than 1"),
        ("hidden_size", "4096", "hidden_size '4096' is not a whole number"),
        ("vocab_size", 1.5, "vocab_size 1.5 is not a whole number"),
        ("rms_norm_eps", -1e-6, "rms_norm_eps -1e-06 is less than 0"),
        ("tie_word_embeddings", "true", "tie_word_embeddings 'true' is not true or false"),
        ("rope_theta", 0, "rope_theta 0 is not greater than 1"),
        ("rope_theta", float("nan"), "not valid JSON: NaN is no JSON number"),
        ("rope_scaling", "yarn", "rope_scaling 'yarn' is not an object"),
        ("rope_scaling", {"rope_type": "yarn", "factor": "4"}, "rope_scaling.factor '4' is not a number"),
        ("rope_scaling", {"rope_type": "yarn", "factor": 0}, "rope_scaling.factor 0 is not greater than 0"),
        ("rope_parameters", {"rope_type": 3}, "rope_parameters.rope_type 3 is not text"),
        (
            "rope_parameters",
            {"rope_type": "yarn", "factor": 4.0, "beta_fast": [32]},
            r"rope_parameters.beta_fast [32] is not a number",
        ),
        ("eos_token_id", "</s>", "eos_token_id '</s>' is not a token id"),
        ("eos_token_id", 151936, "eos_token_id 151936 is no token"),
    ],
)
def test_a_wrong_value_is_named_with_its_file(key: str, value: Any, said: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "model", {**_QWEN3_8B, key: value})
    with pytest.raises(ModelError) as caught:
        load_config(folder)
    assert caught.value.message.startswith(f"{folder / 'config.json'}: {said}")
    assert caught.value.fix


WRONG: list[Any] = [
    None,
    "x",
    "",
    -1,
    0,
    1,
    7,
    0.5,
    1e308,
    float("nan"),
    True,
    False,
    [],
    [None],
    {},
    {"a": None},
]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2", "qwen3_moe", "gpt_oss"])
def test_no_value_of_any_field_gives_a_traceback(name: str, golden: Any, tmp_path: Path) -> None:
    whole = json.loads((golden(name) / "config.json").read_text())
    rope = whole.get("rope_parameters") or {}
    changed = [{**whole, key: value} for key in whole for value in WRONG]
    changed += [{**whole, "rope_parameters": {**rope, key: value}} for key in rope for value in WRONG]
    read = [is_read(config, write(tmp_path / "model", config)) for config in changed]
    assert len(changed) // 4 < sum(read) < len(changed)


def is_read(config: dict[str, Any], folder: Path) -> bool:
    """Whether a config is read; else its error names the file and a fix."""
    where = str(folder / "config.json")
    try:
        expected_shapes(load_config(folder), where)
        architecture_of(config).stock_difference(load_config(folder))
    except ModelError as error:
        if error.fix and "config.json" in error.message:
            return False
        raise
    return True


@pytest.mark.slow
def test_a_yarn_factor_that_is_null_is_the_ratio_of_the_lengths(
    copy: Any, golden: Any, logits: Any, tools: Any, tmp_path: Path
) -> None:
    """As in transformers, where the key has to be there. The golden factor is the ratio."""
    folder = copy("qwen3_yarn")
    config = json.loads((folder / "config.json").read_text())
    rope = config["rope_parameters"]
    assert rope["factor"] == config["max_position_embeddings"] / rope["original_max_position_embeddings"]
    tools.config(folder, rope_parameters={**rope, "factor": None})
    convert(folder, tmp_path / "ours")
    to_hf(tmp_path / "ours", tmp_path / "back")
    prompt, wanted = logits("qwen3_yarn")
    for found in (folder, tmp_path / "ours", tmp_path / "back"):
        model, _ = load_model(found, dtype="float32")
        assert mx.abs(model(prompt) - wanted).max().item() < 2e-5 * mx.abs(wanted).max().item()
    from mlx_lm.utils import load_model as stock_load

    assert stock_load(tmp_path / "ours")[0](prompt).shape == wanted.shape


def test_a_default_beyond_the_experts_is_an_error(golden: Any, tmp_path: Path) -> None:
    config = json.loads((golden("gpt_oss") / "config.json").read_text())
    del config["num_experts_per_tok"]
    with pytest.raises(ModelError, match="'num_experts_per_tok' is missing"):
        expected_shapes({**config, "num_local_experts": 3})
    assert expected_shapes({**config, "num_local_experts": 4})


def test_a_base_inside_the_rope_comes_before_the_one_outside() -> None:
    inner = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 2e5, "original_max_position_embeddings": 64}
    for key in ("rope_parameters", "rope_scaling"):
        assert rope_settings({"rope_theta": 5e5, key: inner}).theta == 2e5
    # transformers 5.24: theta 2e5, head size 16.
    frequencies, _ = yarn_frequencies(16, rope_settings({"rope_theta": 5e5, "rope_scaling": inner}))
    assert frequencies[:3].tolist() == pytest.approx([1.0, 0.13590996, 0.01182177], rel=1e-6)


def test_fields_that_are_not_known_are_named_once(copy: Any, tools: Any, tmp_path: Path) -> None:
    folder = copy("qwen3")
    tools.config(
        folder,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
        dual_chunk_attention_config={"chunk_size": 262144},
        off_field=False,
        empty_field={},
    )
    note = f"{folder / 'config.json'}: not known and not used: dual_chunk_attention_config {{'chunk_size'"
    with pytest.warns(UserWarning, match="not known and not used") as warned:
        load_model(folder)
    assert len(warned) == 1
    report = convert(folder, tmp_path / "ours")
    assert len(report.notes) == 1 and report.notes[0].startswith(note)
    assert "rope_parameters.mrope_section [2, 3, 3]" in report.notes[0]
    assert not any(name in report.notes[0] for name in ("off_field", "empty_field"))
    load_model(tmp_path / "ours")  # no warning: the conversion has said it


@pytest.mark.parametrize(
    ("field", "value", "is_noted"),
    [
        ("repetition_penalty", 1.05, True),
        ("repetition_penalty", 1.0, False),
        ("no_repeat_ngram_size", 3, True),
        ("suppress_tokens", [5], True),
        ("forced_eos_token_id", 5, True),
        ("stop_strings", ["\n"], True),
        ("num_beams", 4, True),
        ("num_beams", 1, False),
        ("temperature", 0.6, False),
        ("max_new_tokens", 2048, False),
    ],
)
def test_what_would_change_greedy_answers_is_noted(
    field: str, value: Any, is_noted: bool, tmp_path: Path
) -> None:
    folder = write(tmp_path / "model", _QWEN3_8B, {**_QWEN3_GENERATION, field: value})
    where = folder / "generation_config.json"
    wanted = [f"{where}: not used, since answers are decoded greedily: {field} {value!r}"]
    assert notes_of(folder) == (wanted if is_noted else [])


@pytest.mark.parametrize("eos", ["<|im_end|>", [151645, None], -1, [151645, 151936]])
def test_stop_tokens_of_generation_config_are_tokens_of_the_model(eos: Any, tmp_path: Path) -> None:
    folder = write(tmp_path / "model", _QWEN3_8B, {"eos_token_id": eos})
    with pytest.raises(ModelError, match=r"generation_config\.json: eos_token_id") as caught:
        load_config(folder)
    assert caught.value.fix


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "qwen3_moe", "gpt_oss"])
def test_a_norm_without_epsilon_has_the_one_of_transformers(name: str, copy: Any, tmp_path: Path) -> None:
    folder = copy(name)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    del config["rms_norm_eps"]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    convert(folder, tmp_path / "out")
    model, _ = load_model(tmp_path / "out")
    assert model.args.rms_norm_eps == (1e-5 if name == "gpt_oss" else 1e-6)
