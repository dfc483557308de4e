"""Logits equal transformers', for every architecture and layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_distill.models.load import cast, head, hidden_states, load_model, project

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


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("steps", [(1,) * 48, (20, 9, 1, 1, 17)])
def test_logits_with_a_cache_equal_transformers(name: str, steps: tuple[int, ...], golden: Any, logits: Any) -> None:
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


def test_stored_types_are_kept_unless_told(golden: Any) -> None:
    model, _ = load_model(golden("gpt_oss_mxfp4"))
    assert model.model.norm.weight.dtype == mx.bfloat16
    cast(model, "float32")
    experts = model.model.layers[0].mlp.experts.gate_proj
    assert model.model.norm.weight.dtype == mx.float32
    assert (experts.weight.dtype, experts.scales.dtype, experts.mode) == (mx.uint32, mx.uint8, "mxfp4")


def test_stock_mlx_lm_still_rounds_the_correction_range(golden: Any, logits: Any, tmp_path: Path) -> None:
    """Fails once upstream has mended its YaRN: then rope.py may go."""
    from mlx_lm.utils import load_model as stock_load

    from mlx_distill.models.convert import convert

    report = convert(golden("gpt_oss_mxfp4"), tmp_path / "out")
    model, _ = stock_load(tmp_path / "out")
    prompt, wanted = logits("gpt_oss_mxfp4")
    assert error(cast(model, "float32")(prompt), wanted) > 0.1
    assert report.note is not None
    assert "truncate" in report.note


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "qwen3_yarn"])
def test_stock_mlx_lm_loads_what_we_convert(name: str, golden: Any, logits: Any, tmp_path: Path) -> None:
    from mlx_lm.utils import load_model as stock_load

    from mlx_distill.models.convert import convert

    assert convert(golden(name), tmp_path / "out").note is None
    model, _ = stock_load(tmp_path / "out")
    prompt, wanted = logits(name)
    assert error(cast(model, "float32")(prompt), wanted) < TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_the_expected_shapes_are_those_of_the_models(name: str, golden: Any) -> None:
    """The twin: mlx-lm's own classes, which conversion does not need to import."""
    from mlx.utils import tree_flatten

    from mlx_distill.models.load import load_config
    from mlx_distill.models.registry import build_model, expected_shapes

    config = load_config(golden(name))
    for change in ({}, {"num_hidden_layers": 4, "layer_types": None}, {"mlp_only_layers": [1], "decoder_sparse_step": 1}):
        changed = {**config, **change}
        wanted = {path: value.shape for path, value in tree_flatten(build_model(changed).parameters())}
        assert expected_shapes(changed) == wanted


def test_conversion_does_not_import_mlx_lm(golden: Any, tmp_path: Path) -> None:
    import subprocess
    import sys

    code = "import sys; from mlx_distill import convert; convert(sys.argv[1], sys.argv[2]); assert 'mlx_lm' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, str(golden("gpt_oss_mxfp4")), str(tmp_path / "out")], check=True)
