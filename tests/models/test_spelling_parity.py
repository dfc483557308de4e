"""Spellings of checkpoints and configs beside transformers: what it loads, we load, with the same logits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_distill.errors import ModelError
from mlx_distill.models.architectures.registry import ARCHITECTURES
from mlx_distill.models.config_fields import GENERATION_FIELDS, unused_fields
from mlx_distill.models.convert import convert
from mlx_distill.models.export import to_hf
from mlx_distill.models.load import load_model

# The references warn of their own futures, and our notes are warnings.
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
PROMPT = np.random.default_rng(0).integers(0, 90, (1, 70))
KINDS = ["qwen2", "qwen3", "qwen3_moe", "gpt_oss"]
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def save(kind: str, folder: Path, seed: int = 0, **options: Any) -> None:
    """A random model in the layout of transformers, with options of its config and of ``save_pretrained``."""
    import torch
    import transformers as tf

    saving = {key: options.pop(key) for key in ("max_shard_size",) if key in options}
    shape = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 48,
        "vocab_size": 90,
        "max_position_embeddings": 128,
        "eos_token_id": 5,
    }
    moe = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    config = {
        "qwen2": lambda: tf.Qwen2Config(**{**shape, **options}),
        "qwen3": lambda: tf.Qwen3Config(**{**shape, "head_dim": 16, **options}),
        "qwen3_moe": lambda: tf.Qwen3MoeConfig(**{**shape, "head_dim": 16, **moe, **options}),
        "gpt_oss": lambda: tf.GptOssConfig(
            **{**shape, "head_dim": 16, "num_local_experts": 3, "num_experts_per_tok": 2, **options}
        ),
    }[kind]()
    torch.manual_seed(seed)
    model = tf.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, p in model.named_parameters():
            scale = 0.2 if p.dim() == 1 else 1.5 * p.shape[-1] ** -0.5
            p.copy_(float("norm" in name) + scale * torch.randn_like(p))
    model.save_pretrained(folder, **saving)


def theirs(folder: Path, **options: Any) -> np.ndarray:
    import torch
    import transformers as tf

    model = tf.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", **options).float()
    with torch.no_grad():
        return np.asarray(model.eval()(torch.tensor(PROMPT)).logits)


def ours(folder: Path) -> np.ndarray:
    return np.array(load_model(folder, dtype="float32")[0](mx.array(PROMPT)))


def assert_same(folder: Path, tmp_path: Path, wanted: np.ndarray | None = None) -> np.ndarray:
    """Loaded, converted and exported again, a folder gives transformers' logits."""
    wanted = theirs(folder) if wanted is None else wanted
    convert(folder, tmp_path / "ours")
    to_hf(tmp_path / "ours", tmp_path / "back")
    for found in (ours(folder), ours(tmp_path / "ours"), theirs(tmp_path / "back")):
        assert float(np.abs(found - wanted).max()) < 1e-4, float(np.abs(found - wanted).max())
    return wanted


def set_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("kind", KINDS)
def test_a_tied_config_with_a_head_of_its_own(kind: str, tmp_path: Path) -> None:
    save(kind, tmp_path / "model")
    untied = theirs(tmp_path / "model")
    set_config(tmp_path / "model", tie_word_embeddings=True)
    assert np.array_equal(assert_same(tmp_path / "model", tmp_path), untied)


@pytest.mark.parametrize("kind", KINDS[:3])
@pytest.mark.parametrize(
    "names", [(HEAD, EMBEDDING), (HEAD,), (EMBEDDING,)], ids=["both", "head", "embedding"]
)
def test_a_tied_model_by_either_name(kind: str, names: tuple[str, ...], tmp_path: Path, tools: Any) -> None:
    save(kind, tmp_path / "model", tie_word_embeddings=True)
    wanted = theirs(tmp_path / "model")
    tensors = tools.read(tmp_path / "model" / SINGLE)
    value = tensors.pop(EMBEDDING)
    tools.write(tmp_path / "model" / SINGLE, {**tensors, **dict.fromkeys(names, value)})
    with_metadata(tmp_path / "model" / SINGLE)
    assert np.array_equal(assert_same(tmp_path / "model", tmp_path), wanted)


def with_metadata(path: Path) -> None:
    """Write a file again as transformers needs it."""
    weights = mx.load(str(path))
    mx.eval(weights)
    mx.save_safetensors(str(path), weights, metadata={"format": "pt"})


@pytest.mark.parametrize("kind", ["qwen3", "gpt_oss"])
@pytest.mark.parametrize("shards", ["kept", "removed"])
def test_a_single_file_beside_an_older_index(kind: str, shards: str, tmp_path: Path) -> None:
    save(kind, tmp_path / "model", seed=0, max_shard_size="30KB")
    assert (tmp_path / "model" / INDEX).is_file()
    old = theirs(tmp_path / "model")
    save(kind, tmp_path / "tuned", seed=1)
    shutil.copy(tmp_path / "tuned" / SINGLE, tmp_path / "model" / SINGLE)
    if shards == "removed":
        for path in (tmp_path / "model").glob("model-*.safetensors"):
            path.unlink()
    wanted = assert_same(tmp_path / "model", tmp_path)
    assert np.array_equal(wanted, theirs(tmp_path / "tuned"))
    assert np.abs(wanted - old).max() > 0.1


def test_a_shard_that_the_index_does_not_name(tmp_path: Path) -> None:
    save("qwen3", tmp_path / "model", max_shard_size="30KB")
    save("qwen3", tmp_path / "other", seed=1)
    shutil.copy(tmp_path / "other" / SINGLE, tmp_path / "model" / "model-00001-of-00009.safetensors")
    assert_same(tmp_path / "model", tmp_path)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3_moe"])
@pytest.mark.parametrize(
    ("spell", "loads"),
    [
        (lambda name: name.removeprefix("model."), True),
        (lambda name: f"module._orig_mod.{name}", False),
        (lambda name: name.replace("layers.1.", "layers.1._orig_mod."), False),
    ],
    ids=["trunk alone", "compiled and parallel", "compiled layer"],
)
def test_names_of_tensors(kind: str, spell: Callable[[str], str], loads: bool, tmp_path: Path) -> None:
    save(kind, tmp_path / "model")
    wanted = theirs(tmp_path / "model")
    file = tmp_path / "model" / SINGLE
    weights = {spell(name): value for name, value in mx.load(str(file)).items()}
    mx.eval(weights)
    mx.save_safetensors(str(file), weights, metadata={"format": "pt"})
    if loads:
        assert np.array_equal(theirs(tmp_path / "model"), wanted)
    assert_same(tmp_path / "model", tmp_path, wanted)


YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 5e4, "original_max_position_embeddings": 32}


def without(*names: str, **changes: Any) -> dict[str, Any]:
    return {key: value for key, value in {**YARN, **changes}.items() if key not in names}


ROPES: list[dict[str, Any]] = [
    {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 2e5}, "rope_theta": 5e4},
    {"rope_theta": 5e4, "rope_scaling": None},
    {"rope_theta": 5e4, "rope_scaling": without("rope_theta", "rope_type", type="yarn")},
    {"rope_theta": 1e6, "rope_scaling": YARN},
    {"rope_parameters": YARN},
    {"rope_parameters": without(factor=None)},
    {"rope_parameters": without("original_max_position_embeddings")},
    {"rope_parameters": without("original_max_position_embeddings", factor=None)},
    {"rope_parameters": without(truncate=False)},
    {"rope_parameters": without(truncate=None)},
    {"rope_parameters": without(attention_factor=1.3)},
    {"rope_parameters": without(attention_factor=0.0)},
    {"rope_parameters": without(mscale=0.7, mscale_all_dim=1.0)},
    {"rope_parameters": without(mscale=0.7)},
    {"rope_parameters": without(beta_fast=0, beta_slow=0)},
    {"rope_parameters": without(beta_fast=8, beta_slow=2.0)},
    {"rope_parameters": without(factor=0.5)},
    {"rope_parameters": without("original_max_position_embeddings", rope_type="linear")},
]


@pytest.mark.parametrize(
    ("kind", "rope"),
    [
        *(("qwen3", rope) for rope in ROPES),
        *((kind, ROPES[i]) for kind in ("qwen3_moe", "gpt_oss") for i in (2, 4, 6)),
    ],
    ids=lambda value: value if isinstance(value, str) else json.dumps(value)[:90],
)
def test_spellings_of_a_rope(kind: str, rope: dict[str, Any], tmp_path: Path) -> None:
    save(kind, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    config.pop("rope_parameters")
    path.write_text(json.dumps({**config, **rope}))
    assert_same(tmp_path / "model", tmp_path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe"])
def test_fp8_with_block_scales(kind: str, dtype: str, tmp_path: Path) -> None:
    """Blocks of 16 x 16, which divide the weights, as transformers needs it."""
    import torch

    save(kind, tmp_path / "model")
    file = tmp_path / "model" / SINGLE
    from safetensors.torch import load_file, save_file

    tensors = {}
    for name, value in load_file(file).items():
        if not name.endswith("proj.weight"):
            tensors[name] = value.to(getattr(torch, dtype))
            continue
        rows, columns = (n // 16 for n in value.shape)
        blocks = value.reshape(rows, 16, columns, 16)
        scales = blocks.abs().amax((1, 3)) / 448
        scaled = (blocks / scales[:, None, :, None]).reshape(value.shape)
        tensors[name] = scaled.to(torch.float8_e4m3fn)
        tensors[name + "_scale_inv"] = scales
    save_file(tensors, file, metadata={"format": "pt"})
    quantization = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 16]}
    set_config(tmp_path / "model", quantization_config=quantization, dtype=dtype)
    assert_same(tmp_path / "model", tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_of_transformers_is_known(kind: str, tmp_path: Path) -> None:
    """A field that it adds has to be computed, or be put into the table with what it means."""
    import transformers as tf

    save(kind, tmp_path / "model")
    fields = ARCHITECTURES[kind].fields
    for config in (
        json.loads((tmp_path / "model" / "config.json").read_text()),
        {
            key: value or "set"
            for key, value in tf.AutoConfig.for_model(kind).to_dict().items()
            if key not in ("rope_parameters", "is_encoder_decoder")
        },
    ):
        assert unused_fields(config, fields) == []
    generation = {key: value or "set" for key, value in tf.GenerationConfig().to_dict().items()}
    changing = {text.split()[0] for text in unused_fields(generation, GENERATION_FIELDS)}
    assert changing == CHANGE_GREEDY_ANSWERS


CHANGE_GREEDY_ANSWERS = set(
    """
    bad_words_ids begin_suppress_tokens constraints diversity_penalty dola_layers encoder_no_repeat_ngram_size
    encoder_repetition_penalty exponential_decay_length_penalty force_words_ids forced_bos_token_id
    forced_eos_token_id guidance_scale min_length min_new_tokens no_repeat_ngram_size num_beam_groups
    num_beams penalty_alpha repetition_penalty sequence_bias stop_strings suppress_tokens token_healing
    watermarking_config
    """.split()
)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": None},
        {"num_hidden_layers": "2"},
        {"layer_types": ["sliding_attention", "full_attention"]},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e4}},
        {"rope_parameters": {**YARN, "factor": "4"}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e4, "factor": None}},
    ],
    ids=lambda changes: json.dumps(changes)[:60],
)
def test_what_transformers_does_not_load_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    save("qwen3", tmp_path / "model")
    set_config(tmp_path / "model", **changes)
    with pytest.raises(Exception):  # noqa: B017 - of many types
        theirs(tmp_path / "model")
    with pytest.raises(ModelError) as caught:
        load_model(tmp_path / "model")
    assert "config.json" in caught.value.message and caught.value.fix
