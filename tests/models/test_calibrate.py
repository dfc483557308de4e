"""Calibration block by block: what it measures, what it writes, and that it is better than rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_distill.errors import DataError, ModelError
from mlx_distill.models.calibrate import calibrate, dequantized
from mlx_distill.models.convert import convert
from mlx_distill.models.gptq import column_factor, gptq
from mlx_distill.models.grids import find_scales, pack, round_to_grid
from mlx_distill.models.load import load_model
from mlx_distill.models.quantization import Quantization, parse_mode
from mlx_distill.models.refined import Refined
from mlx_distill.models.rounding import InputMoments, round_weight

VOCABULARY = 64  # of the smallest golden model


def loaded(golden: Any, folder: Path, name: str) -> Any:
    convert(golden(name), folder / "base")
    return load_model(folder / "base", dtype="float32")[0]


def settings(model: Any, mode: str) -> dict[str, Quantization]:
    """Every unquantized linear layer and stack of experts but the routers; a tied embedding."""
    from mlx_lm.models.switch_layers import SwitchLinear

    types = (nn.Linear, SwitchLinear)
    tied = "lm_head" not in model
    return {
        path: parse_mode(mode, 32 if mode.startswith("affine") else 0)
        for path, module in model.named_modules()
        if (isinstance(module, types) and not path.endswith(("router", "mlp.gate")))
        or (tied and isinstance(module, nn.Embedding))
    }


def rows(count: int = 12, vocabulary: int = VOCABULARY, seed: int = 0) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(0, vocabulary, random.integers(5, 40)).tolist() for _ in range(count)]


def recorded(model: Any, path: str, sequences: list[list[int]], expert: int | None = None) -> np.ndarray:
    """The inputs of a module, by one row at a time through the whole model."""
    module, found = dict(model.named_modules())[path], []
    kind = type(module)

    class Keep(kind):  # type: ignore[misc, valid-type]
        def __call__(self, x: mx.array, *args: Any, **more: Any) -> mx.array:
            if expert is None:
                found.append(np.array(x).reshape(-1, x.shape[-1]))
            else:
                each = mx.broadcast_to(x.squeeze(-2), (*args[0].shape, x.shape[-1]))
                found.append(np.array(each)[np.array(args[0]) == expert])
            return kind.__call__(self, x, *args, **more)

    module.__class__ = Keep
    for row in sequences:
        mx.eval(model(mx.array([row])))
    module.__class__ = kind
    return np.concatenate(found).astype(np.float64)


def plain_hessian(model: Any, path: str, sequences: list[list[int]], expert: int | None = None) -> np.ndarray:
    """The mean of x x^T."""
    x = recorded(model, path, sequences, expert)
    return x.T @ x / len(x)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2", "qwen3", "qwen3_moe", "gpt_oss", "gpt_oss_mxfp4"])
def test_every_architecture_is_calibrated_and_left_as_it_was(name: str, golden: Any, tmp_path: Path) -> None:
    model = loaded(golden, tmp_path, name)
    wanted, before = settings(model, "affine4"), dict(tree_flatten(model.parameters()))
    found = dict(calibrate(model, rows(), wanted))
    assert found.keys() == wanted.keys()
    assert all(mx.array_equal(value, before[key]) for key, value in tree_flatten(model.parameters()))
    modules = dict(model.named_modules())
    for path, refined in found.items():
        assert type(modules[path]).__name__ in ("Linear", "SwitchLinear", "Embedding")
        assert refined.latent.shape == modules[path].weight.shape
        assert dequantized(refined, wanted[path]).shape == refined.latent.shape


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["mxfp4", "affine3"])
def test_the_first_block_is_rounded_by_the_hessian_of_a_plain_forward(
    mode: str, golden: Any, tmp_path: Path
) -> None:
    model, sequences = loaded(golden, tmp_path, "qwen3"), rows()
    for path in ("model.layers.0.self_attn.k_proj", "model.layers.0.mlp.down_proj"):
        q = settings(model, mode)[path]
        (refined,) = dict(calibrate(model, sequences, {path: q})).values()
        weight, hessian = dict(model.named_modules())[path].weight, plain_hessian(model, path, sequences)
        scales = find_scales(weight, q, mx.array(np.diag(hessian).astype(np.float32)))
        wanted = round_to_grid(mx.array(gptq(np.array(weight), column_factor(hessian), scales, q)), scales, q)
        assert mx.mean((dequantized(refined, q) == wanted).astype(mx.float32)).item() > 0.98
        difference = np.array(weight) - np.array(dequantized(refined, q))
        nearest = np.array(weight) - np.array(round_to_grid(weight, find_scales(weight, q), q))
        errors = [np.einsum("oi,ij,oj->", d, hessian, d) for d in (difference, nearest)]
        assert errors[0] < 0.8 * errors[1]


@pytest.mark.slow
def test_each_expert_is_rounded_by_its_own_tokens(golden: Any, tmp_path: Path) -> None:
    model, sequences = loaded(golden, tmp_path, "qwen3_moe"), rows(24)
    path = next(p for p in settings(model, "affine4") if p.endswith("0.mlp.switch_mlp.down_proj"))
    q = settings(model, "affine4")[path]
    (refined,) = dict(calibrate(model, sequences, {path: q})).values()
    weight = dict(model.named_modules())[path].weight
    for expert in range(len(weight)):
        hessian = plain_hessian(model, path, sequences, expert)
        scales = find_scales(weight[expert], q, mx.array(np.diag(hessian).astype(np.float32)))
        latent = mx.array(gptq(np.array(weight[expert]), column_factor(hessian), scales, q))
        same = pack(latent, scales, q)["weight"] == refined.parts["weight"][expert]
        assert mx.mean(same.astype(mx.float32)).item() > 0.9


@pytest.mark.slow
def test_a_tied_embedding_is_rounded_as_head_and_as_embedding(golden: Any, tmp_path: Path) -> None:
    model = loaded(golden, tmp_path, "qwen3")
    assert "lm_head" not in model, "this golden model is tied"
    path, q = "model.embed_tokens", parse_mode("affine4", 32)
    (refined,) = dict(calibrate(model, rows(), {path: q})).values()
    hidden = np.concatenate([np.array(model.model(mx.array([row])))[0] for row in rows()]).astype(np.float64)
    hessian = hidden.T @ hidden / len(hidden)
    hessian += np.mean(np.diag(hessian)) * np.eye(len(hessian))
    weight = model.model.embed_tokens.weight
    scales = find_scales(weight, q, mx.array(np.diag(hessian).astype(np.float32)))
    wanted = pack(mx.array(gptq(np.array(weight), column_factor(hessian), scales, q)), scales, q)["weight"]
    assert mx.mean((refined.parts["weight"] == wanted).astype(mx.float32)).item() > 0.9


@pytest.mark.slow
def test_the_blocks_behind_get_what_the_quantized_ones_compute(golden: Any, tmp_path: Path) -> None:
    model, sequences = loaded(golden, tmp_path, "qwen3"), rows()
    wanted = settings(model, "affine2")
    path = "model.layers.1.self_attn.k_proj"
    alone = dict(calibrate(model, sequences, {path: wanted[path]}))[path]
    behind = dict(calibrate(model, sequences, wanted))[path]
    assert not mx.array_equal(alone.parts["weight"], behind.parts["weight"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3", "gpt_oss_mxfp4"])
def test_a_layer_gets_what_the_rounded_layers_before_it_compute(
    name: str, golden: Any, tmp_path: Path
) -> None:
    """Against whole forwards, one row at a time, of the unquantized and of a partly rounded model."""
    model, sequences = loaded(golden, tmp_path, name), rows()
    path = {"qwen3": "model.layers.1.mlp.down_proj", "gpt_oss_mxfp4": "model.layers.1.self_attn.o_proj"}[name]
    wanted, modules = settings(model, "affine3"), dict(model.named_modules())
    found = dict(calibrate(model, sequences, wanted))
    plain, weight = recorded(model, path, sequences), modules[path].weight
    for before in list(found)[: list(found).index(path)]:
        modules[before].weight = dequantized(found[before], wanted[before])
    x = recorded(model, path, sequences)
    moments = InputMoments(x.T @ x / len(x), (plain - x).T @ x / len(x))
    expected = round_weight(weight, [moments], wanted[path])
    same = found[path].parts["weight"] == expected.parts["weight"]
    assert mx.mean(same.astype(mx.float32)).item() > 0.9
    without = round_weight(weight, [InputMoments(moments.hessian)], wanted[path])
    assert mx.mean((without.parts["weight"] == expected.parts["weight"]).astype(mx.float32)).item() < 0.8


@pytest.mark.slow
def test_a_killed_calibration_continues_to_the_same_result(golden: Any, tmp_path: Path) -> None:
    model, sequences = loaded(golden, tmp_path, "qwen3"), rows()
    wanted = settings(model, "mxfp4")
    whole = dict(calibrate(model, sequences, wanted))
    kept: dict[str, Refined] = {}
    for number, (path, refined) in enumerate(calibrate(model, sequences, wanted)):
        kept[path] = refined
        if number == 9:  # in the middle of the second block
            break
    rest = dict(calibrate(model, sequences, wanted, finished=kept.get))
    assert rest.keys() == whole.keys() - kept.keys()
    for path, refined in {**kept, **rest}.items():
        assert mx.array_equal(refined.parts["weight"], whole[path].parts["weight"])


def test_what_cannot_be_calibrated_is_refused(golden: Any, tmp_path: Path) -> None:
    model = loaded(golden, tmp_path, "gpt_oss_mxfp4")
    q = parse_mode("mxfp4")
    with pytest.raises(DataError, match="no rows"):
        next(calibrate(model, [], {"lm_head": q}))
    for path in ("model.layers.0.mlp.experts.up_proj", "model.nothing", "model.norm"):
        with pytest.raises(ModelError, match="cannot be calibrated"):
            next(calibrate(model, rows(), {path: q}))
