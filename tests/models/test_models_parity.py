"""Logits equal transformers', for every architecture and layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_distill.losses.output_head import project
from mlx_distill.models.forward import head, hidden_states
from mlx_distill.models.load import load_model
from mlx_distill.models.modules import cast_model

NAMES = ("qwen2", "qwen3", "qwen3_yarn", "qwen3_moe", "gpt_oss", "gpt_oss_mxfp4")
TOLERANCE = 2e-5  # of the logits' scale


def error(found: mx.array, wanted: mx.array) -> float:
    """Greatest difference over the greatest logit."""
    return (mx.abs(found - wanted).max() / mx.abs(wanted).max()).item()


@pytest.mark.parametrize("name", NAMES)
def test_logits_of_a_whole_prompt_equal_transformers(name: str, golden: Any, logits: Any) -> None:
    model, _ = load_model(golden(name), dtype="float32")
    prompt, wanted = logits(name)
    assert error(model(prompt), wanted) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("steps", [(1,) * 48, (20, 9, 1, 1, 17)])
def test_logits_with_a_cache_equal_transformers(
    name: str, steps: tuple[int, ...], golden: Any, logits: Any
) -> None:
    from mlx_lm.models.cache import make_prompt_cache

    model, _ = load_model(golden(name), dtype="float32")
    prompt, wanted = logits(name)
    cache, parts, position = make_prompt_cache(model), [], 0
    for step in steps:
        parts.append(model(prompt[:, position : position + step], cache=cache))
        position += step
    assert error(mx.concatenate(parts, axis=1), wanted) < TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_the_head_on_the_hidden_states_gives_the_logits(name: str, golden: Any, logits: Any) -> None:
    model, config = load_model(golden(name), dtype="float32")
    prompt, _ = logits(name)
    hidden = hidden_states(model, prompt)
    assert hidden.shape == (*prompt.shape, config["hidden_size"])
    assert mx.array_equal(project(head(model), hidden), model(prompt))


def test_stored_types_are_kept_by_default(golden: Any) -> None:
    model, _ = load_model(golden("gpt_oss_mxfp4"))
    assert model.model.norm.weight.dtype == mx.bfloat16
    cast_model(model, "float32")
    experts = model.model.layers[0].mlp.experts.gate_proj
    assert model.model.norm.weight.dtype == mx.float32
    assert (experts.weight.dtype, experts.scales.dtype, experts.mode) == (mx.uint32, mx.uint8, "mxfp4")


@pytest.mark.slow
def test_stock_mlx_lm_still_rounds_the_correction_range(golden: Any, logits: Any, tmp_path: Path) -> None:
    """Fails once mlx-lm computes YaRN as transformers does: then rope.py can be removed."""
    from mlx_lm.utils import load_model as stock_load

    from mlx_distill.models.convert import convert

    for name, said in (
        ("gpt_oss_mxfp4", "correction range"),
        ("gpt_oss", "correction range"),
        ("qwen3_moe", "yarn"),
    ):
        report = convert(golden(name), tmp_path / name)
        model, _ = stock_load(tmp_path / name)
        prompt, wanted = logits(name)
        assert error(cast_model(model, "float32")(prompt), wanted) > 0.1
        assert said in report.notes[-1]
        assert report.lines()[-1] == report.notes[-1]


PACKED = [
    ("qwen2", "affine3"),
    ("qwen3", "mixed4"),
    ("qwen3_moe", "mixed-nvfp4"),
    ("gpt_oss", "mxfp8"),
    ("gpt_oss_mxfp4", "mixed4"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "quantize"), [*((name, None) for name in NAMES), *PACKED])
def test_stock_mlx_lm_computes_the_same_where_nothing_is_said(
    name: str, quantize: str | None, copy: Any, logits: Any, tools: Any, tmp_path: Path
) -> None:
    """With a rope that it computes: unquantized, quantized, and mixed with MXFP4 experts."""
    from mlx_lm.utils import load_model as stock_load

    from mlx_distill.models.convert import convert

    folder = copy(name)
    if name == "qwen3_moe":
        tools.config(folder, rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    elif name.startswith("gpt_oss"):
        tools.config(
            folder,
            rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
            rope_scaling=None,
            rope_theta=None,
        )
    assert convert(folder, tmp_path / "out", quantize).notes == ()
    stock, _ = stock_load(tmp_path / "out")
    ours, _ = load_model(tmp_path / "out", dtype="float32")
    prompt, wanted = logits(name)
    found = cast_model(stock, "float32")(prompt)
    assert error(found, ours(prompt)) < 1e-6
    if quantize is None and name in ("qwen2", "qwen3", "qwen3_yarn"):
        assert error(found, wanted) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_both_spellings_of_the_rope_give_the_same_logits(
    name: str, copy: Any, logits: Any, tools: Any, tmp_path: Path
) -> None:
    """As transformers 5 writes it and as before, loaded and converted; the spelling comes back on export."""
    import json

    from mlx_distill.models.convert import convert
    from mlx_distill.models.export import to_hf

    folder = copy(name)
    config = json.loads((folder / "config.json").read_text())
    if new := config.get("rope_parameters"):
        other = {
            "rope_theta": new["rope_theta"],
            "rope_scaling": {k: v for k, v in new.items() if k != "rope_theta"},
        }
        tools.config(
            folder,
            rope_parameters=None,
            **(other if new["rope_type"] != "default" else {**other, "rope_scaling": None}),
        )
    else:
        other = {"rope_parameters": {**config["rope_scaling"], "rope_theta": config["rope_theta"]}}
        tools.config(folder, rope_scaling=None, rope_theta=None, **other)
    prompt, wanted = logits(name)
    convert(folder, tmp_path / "ours")
    for path in (folder, tmp_path / "ours"):
        assert error(load_model(path, dtype="float32")[0](prompt), wanted) < TOLERANCE
    to_hf(tmp_path / "ours", tmp_path / "back")
    spelled = [json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "back")]
    assert spelled[0] == spelled[1]


def test_experts_as_transformers_holds_them_in_memory_are_the_same_ones(
    copy: Any, logits: Any, tools: Any
) -> None:
    """Qwen3-MoE with gate and up of all experts in one tensor, as transformers 5 may write it."""
    import json

    folder = copy("qwen3_moe")
    tensors = tools.all(folder)
    for layer in (0, 1):
        prefix = f"model.layers.{layer}.mlp.experts."
        taken = {
            key: [tensors.pop(f"{prefix}{e}.{key}.weight") for e in range(4)]
            for key in ("gate_proj", "up_proj", "down_proj")
        }
        _, (rows, columns), _ = taken["gate_proj"][0]
        both = b"".join(
            gate[2] + up[2] for gate, up in zip(taken["gate_proj"], taken["up_proj"], strict=True)
        )
        tensors[f"{prefix}gate_up_proj"] = ("BF16", [4, 2 * rows, columns], both)
        tensors[f"{prefix}down_proj"] = (
            "BF16",
            [4, columns, rows],
            b"".join(down[2] for down in taken["down_proj"]),
        )
    for path in folder.glob("model*"):
        path.unlink()
    tools.write(folder / "model.safetensors", tensors)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "qwen3_moe"
    prompt, wanted = logits("qwen3_moe")
    assert error(load_model(folder, dtype="float32")[0](prompt), wanted) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2", "qwen3_moe"])
def test_a_head_of_its_own_and_a_tied_one(name: str, copy: Any, logits: Any, tools: Any) -> None:
    """The same checkpoint in the other form: a tied one with its head written out, an untied one with the
    embedding as its head.
    """
    folder = copy(name)
    tensors = tools.all(folder)
    tied = "lm_head.weight" not in tensors
    if tied:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    else:
        tensors["model.embed_tokens.weight"] = tensors["lm_head.weight"]
    for path in folder.glob("model*"):
        path.unlink()
    tools.write(folder / "model.safetensors", tensors)
    prompt, wanted = logits(name)
    found = []
    for change in (True, False):
        tools.config(folder, tie_word_embeddings=change)
        found.append(load_model(folder, dtype="float32")[0](prompt))
        assert ("lm_head" in load_model(folder)[0]) is not change
    assert error(found[0], found[1]) < 1e-6
    if tied:
        assert error(found[0], wanted) < TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_the_expected_shapes_are_those_of_the_models(name: str, golden: Any) -> None:
    """The twin: mlx-lm's own classes, which conversion does not need to import."""
    from mlx.utils import tree_flatten

    from mlx_distill.models.architectures.registry import build_model, expected_shapes
    from mlx_distill.models.load import load_config

    config = load_config(golden(name))
    for change in (
        {},
        {"num_hidden_layers": 4, "layer_types": None},
        {"mlp_only_layers": [1], "decoder_sparse_step": 1},
    ):
        changed = {**config, **change}
        wanted = {path: value.shape for path, value in tree_flatten(build_model(changed).parameters())}
        assert expected_shapes(changed) == wanted


_GPT_OSS = {
    "model_type": "gpt_oss",
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}
_QWEN = {"vocab_size": 151_936, "num_attention_heads": 32, "head_dim": 128, "tie_word_embeddings": False}
# the numbers of config.json, and the parameters: 20.9, 116.8, 8.2, 30.5 and 7.6 billion, as their makers say
PUBLISHED = {
    "gpt-oss-20b": (
        {**_GPT_OSS, "vocab_size": 201_088, "num_hidden_layers": 24, "num_local_experts": 32},
        20_914_757_184,
    ),
    "gpt-oss-120b": (
        {**_GPT_OSS, "vocab_size": 201_088, "num_hidden_layers": 36, "num_local_experts": 128},
        116_829_156_672,
    ),
    "Qwen3-8B": (
        {
            **_QWEN,
            "model_type": "qwen3",
            "hidden_size": 4096,
            "intermediate_size": 12_288,
            "num_hidden_layers": 36,
            "num_key_value_heads": 8,
        },
        8_190_735_360,
    ),
    "Qwen3-30B-A3B": (
        {
            **_QWEN,
            "model_type": "qwen3_moe",
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_hidden_layers": 48,
            "num_key_value_heads": 4,
            "num_experts": 128,
        },
        30_532_122_624,
    ),
    "Qwen2.5-7B": (
        {
            "model_type": "qwen2",
            "hidden_size": 3584,
            "intermediate_size": 18_944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152_064,
        },
        7_615_616_512,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_models_have_as_many_parameters_as_we_expect(name: str) -> None:
    from math import prod

    from mlx_distill.models.architectures.registry import expected_shapes

    config, parameters = PUBLISHED[name]
    assert sum(map(prod, expected_shapes(config).values())) == parameters


def test_conversion_does_not_import_mlx_lm(golden: Any, tmp_path: Path) -> None:
    import subprocess
    import sys

    code = (
        "import sys; from mlx_distill import convert; convert(sys.argv[1], sys.argv[2]); "
        "assert 'mlx_lm' not in sys.modules"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(golden("gpt_oss_mxfp4")), str(tmp_path / "out")], check=True
    )
