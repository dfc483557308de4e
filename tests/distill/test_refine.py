"""Refinement of quantized students: against plain twins, killed and repeated, written and loaded."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from mlx_distill.distill.quantization_error import quantization_error
from mlx_distill.distill.refine import RefineJob, refine
from mlx_distill.distill.refine_blocks import FACTS, PaddedRows
from mlx_distill.distill.refine_estimate import estimate_refine, predict_refine
from mlx_distill.distill.refine_targets import student_targets
from mlx_distill.distill.refine_training import RefineSettings, grid_weight, train_settings
from mlx_distill.distill.teacher import TokenizedAnswer
from mlx_distill.errors import DataError
from mlx_distill.models.architectures.registry import build_model
from mlx_distill.models.blocks import Blocks
from mlx_distill.models.forward import hidden_states
from mlx_distill.models.forward import logits as logits_of
from mlx_distill.models.grid_layers import GridWeight, grid_layers
from mlx_distill.models.grids import find_scales, pack, round_to_grid, stored_scales, straight_through
from mlx_distill.models.load import load_model, save_model
from mlx_distill.models.modules import unquantized_like
from mlx_distill.models.quantization import Quantization, parse_mode
from mlx_distill.models.refined import Refined
from mlx_distill.progress import NullProgress
from mlx_distill.records import Batch
from mlx_distill.train.batches import RowBatches

Golden = Callable[[str], Path]
SHORT = {"steps": 8, "learning_rate": 3e-3, "checkpoint_every": 3}
MODES = ["mxfp4", "nvfp4", "mxfp8", "affine3"]
BY_BLOCKS = {"memory_bytes": 1}


def mode_of(name: str) -> Quantization:
    return parse_mode(name, 32 if name.startswith("affine") else 0)


def rows(count: int = 12, seed: int = 0) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(1, 64, int(random.integers(5, 20))).tolist() for _ in range(count)]


def quantizations(model: Any, mode: str, other: str | None = None) -> dict[str, Quantization]:
    """Of every unquantized linear layer, embedding and stack of experts but the routers; ``other`` of the
    embedding.
    """
    modes = {
        path: mode_of(mode)
        for path, module in model.named_modules()
        if "weight" in module and module.weight.ndim > 1 and "scales" not in module
        if not path.endswith((".router", ".gate"))
    }
    if other is not None:
        modes["model.embed_tokens"] = mode_of(other)
    return modes


def start_of(model: Any, modes: Mapping[str, Quantization]) -> dict[str, Refined]:
    """As calibration gives it: scales and weights that are a little moved."""
    random, modules, out = np.random.default_rng(3), dict(model.named_modules()), {}
    for path, q in modes.items():
        weight = modules[path].weight.astype(mx.float32)
        latent = weight * mx.array(random.uniform(0.97, 1.03, weight.shape).astype(np.float32))
        scales = find_scales(weight, q)
        out[path] = Refined(pack(latent, scales, q), latent)
    return out


def quantized_layers(model: Any, refined: Mapping[str, Refined], modes: Mapping[str, Quantization]) -> Any:
    """The model with quantized modules that hold these tensors."""
    modules, layers = dict(model.named_modules()), []
    for path, part in refined.items():
        layer = modules[path].to_quantized(modes[path].group_size, modes[path].bits, mode=modes[path].mode)
        for name, array in part.parts.items():
            layer[name] = array
        layers.append((path, layer))
    model.update_modules(tree_unflatten(layers))
    return model


def loaded(golden: Golden, name: str) -> Any:
    return load_model(golden(name), dtype="float32")[0]


def same(a: Mapping[str, Refined], b: Mapping[str, Refined]) -> bool:
    return a.keys() == b.keys() and all(
        mx.array_equal(a[path].parts[name], b[path].parts[name]).item()
        for path in a
        for name in a[path].parts
    )


def output(model: Any, row: Sequence[int]) -> mx.array:
    return logits_of(model, hidden_states(model, mx.array([row])))


class Killed(BaseException):
    """Nothing catches it."""


class Dies(NullProgress):
    """Fails when a training step beyond ``last`` is shown: like a kill."""

    def __init__(self, last: int) -> None:
        self.last = last

    @contextmanager
    def task(self, name: str, total: float | None = None, unit: str = "", start: float = 0) -> Iterator[Any]:
        def update(done: float, **info: Any) -> None:
            if name == "refine" and "loss" in info and done > self.last:
                raise Killed

        yield type("Bar", (), {"update": staticmethod(update)})


# ---------------------------------------------------------------- layers


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("model_name", ["qwen3", "qwen3_moe"])
def test_a_grid_layer_computes_with_the_rounded_weight_and_learns_by_the_gradient_of_it(
    golden: Golden, model_name: str, mode: str
) -> None:
    model, twin = loaded(golden, model_name), loaded(golden, model_name)
    modes = quantizations(model, mode)
    modules = dict(twin.named_modules())
    weights, plain = {}, []
    for path, start in start_of(model, modes).items():
        weights[path] = grid_weight(modules[path], start, modes[path], latent=True)
        rounded = round_to_grid(start.latent, weights[path].scales, modes[path])
        plain.append((path, unquantized_like(modules[path], rounded)))
    twin.update_modules(tree_unflatten(plain))
    twin.freeze()
    for _, layer in plain:
        layer.unfreeze(keys=["weight"], recurse=False)
    row = rows(1)[0]

    def loss(current: Any) -> mx.array:
        return mx.square(output(current, row)).mean()

    with grid_layers(model, weights, mx.float32):
        assert mx.array_equal(output(model, row), output(twin, row)).item()
        value, gradient = nn.value_and_grad(model, loss)(model)
    expected, expected_gradient = nn.value_and_grad(twin, loss)(twin)
    assert value.item() == expected.item()
    found, wanted = dict(tree_flatten(gradient)), dict(tree_flatten(expected_gradient))
    assert found.keys() == wanted.keys() and len(found) == len(modes)
    for path, part in found.items():
        grid = weights[path.removesuffix(".weight")]
        # 0 where the weight is outside of the grid's range, else that of the plain twin.
        inside = mx.grad(lambda w, g=grid: straight_through(w, g.scales, g.quantization).sum())(grid.weight)
        assert mx.allclose(part, wanted[path] * inside, atol=1e-7).item(), path


def test_an_offset_has_the_gradient_of_the_rounded_weight_times_the_step(golden: Golden) -> None:
    model = loaded(golden, "qwen3")
    path, q = "model.layers.0.mlp.down_proj", mode_of("affine3")
    weight = dict(model.named_modules())[path].weight
    scales = find_scales(weight, q)
    row = rows(1)[0]

    def gradients(learns_offset: bool) -> mx.array:
        with grid_layers(model, {path: GridWeight(weight, scales, q, learns_offset)}, mx.float32):
            _, tree = nn.value_and_grad(model, lambda m: mx.square(output(m, row)).mean())(model)
        ((name, value),) = tree_flatten(tree)
        assert name == f"{path}.{'offset' if learns_offset else 'weight'}"
        return value

    step = mx.repeat(scales.scale, q.group_size, axis=-1)
    assert mx.allclose(gradients(True), gradients(False) * step, rtol=1e-5, atol=1e-9).item()


# ---------------------------------------------------------------- end to end


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["nvfp4", "affine3"])
def test_the_loss_falls_and_so_does_the_divergence_of_the_packed_model(
    golden: Golden, tmp_path: Path, mode: str
) -> None:
    model, reference = loaded(golden, "qwen3"), loaded(golden, "qwen3")
    modes = quantizations(model, mode)
    start, answers = start_of(model, modes), [TokenizedAnswer(row, 1) for row in rows()]
    refined = refine(
        RefineJob(
            model,
            modes,
            start,
            rows(),
            folder=tmp_path,
            settings=RefineSettings(steps=30, learning_rate=1e-3),
        )
    )
    facts = json.loads((tmp_path / FACTS).read_text())
    assert facts["last_loss"] < 0.8 * facts["first_loss"] and facts["steps"] == 30
    before, after = (
        quantization_error(reference, quantized_layers(loaded(golden, "qwen3"), parts, modes), answers).kl
        for parts in (start, refined)
    )
    assert after < 0.8 * before
    # The student is as it was.
    assert mx.array_equal(output(model, rows()[0]), output(reference, rows()[0])).item()


@pytest.mark.parametrize(
    ("model_name", "mode", "changes"),
    [("qwen3", "affine3", {}), ("qwen3_moe", "nvfp4", {}), ("qwen3_moe", "affine4", BY_BLOCKS)],
)
def test_a_loaded_folder_has_the_logits_of_the_trained_model(
    golden: Golden, tmp_path: Path, model_name: str, mode: str, changes: Mapping[str, Any]
) -> None:
    model = loaded(golden, model_name)
    modes = quantizations(model, mode)
    start = start_of(model, modes)
    refined = refine(
        RefineJob(
            model, modes, start, rows(), folder=tmp_path / "work", settings=RefineSettings(**SHORT, **changes)
        )
    )
    packed = quantized_layers(model, refined, modes)
    save_model(packed, golden(model_name), tmp_path / "model")
    again = load_model(tmp_path / "model", dtype="float32")[0]
    trained, modules = loaded(golden, model_name), dict(model.named_modules())
    values = [
        (path, round_to_grid(part.latent, stored_scales(part.parts, modes[path]), modes[path]))
        for path, part in refined.items()
    ]
    trained.update_modules(tree_unflatten([(p, unquantized_like(modules[p], v)) for p, v in values]))
    expected = output(trained, rows()[0])
    assert mx.allclose(output(again, rows()[0]), expected, atol=2e-4).item()
    for path, part in refined.items():
        assert not mx.array_equal(part.parts["weight"], start[path].parts["weight"]).item() or (
            changes and not path.startswith("model.layers")
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "other", "changes"),
    [("affine4", None, {}), ("mxfp4", "affine8", {}), ("nvfp4", None, BY_BLOCKS)],
    ids=["offsets", "both", "by blocks"],
)
def test_a_killed_refinement_that_is_repeated_gives_the_same_bits(
    golden: Golden, tmp_path: Path, mode: str, other: str | None, changes: Mapping[str, Any]
) -> None:
    settings = RefineSettings(**SHORT, **changes)

    def run(folder: Path, **options: Any) -> dict[str, Refined]:
        model = loaded(golden, "qwen3")
        modes = quantizations(model, mode, other)
        return refine(
            RefineJob(
                model,
                modes,
                start_of(model, modes),
                rows(),
                folder=folder,
                settings=settings,
                **options,
            )
        )

    whole = run(tmp_path / "whole")
    for last in (2, 5) if not changes else (2, 11):
        with pytest.raises(Killed):
            run(tmp_path / "killed", progress=Dies(last))
    assert same(run(tmp_path / "killed"), whole)
    # Finished: nothing is trained again.
    assert same(run(tmp_path / "killed", **({"progress": Dies(0)} if changes else {})), whole)


def test_targets_are_computed_once_and_again_for_another_student(golden: Golden, tmp_path: Path) -> None:
    model = loaded(golden, "qwen3")
    first = student_targets(model, rows(), tmp_path, identity="a").store.content
    model.model.norm.weight = model.model.norm.weight * 2
    assert student_targets(model, rows(), tmp_path, identity="a").store.content == first
    assert student_targets(model, rows(), tmp_path, identity="b").store.content != first
    with pytest.raises(DataError, match="row 1 has 1 tokens"):
        student_targets(model, [[1, 2], [3]], tmp_path)


@pytest.mark.parametrize("model_name", ["qwen3", "gpt_oss_mxfp4"])
@pytest.mark.parametrize("trains", [False, True])
def test_the_objective_is_the_divergence_of_all_real_tokens_dense_or_tiled(
    golden: Golden, tmp_path: Path, model_name: str, trains: bool
) -> None:
    model, student = loaded(golden, model_name), loaded(golden, model_name)
    targets = student_targets(model, rows(), tmp_path)
    embedding = student.model.embed_tokens
    embedding.weight = embedding.weight + 0.1 * mx.random.normal(embedding.weight.shape)
    student.freeze()
    student.model.norm.unfreeze()
    if trains:
        getattr(student, "lm_head", embedding).unfreeze()
    batch = next(targets.dataset(train_settings(RefineSettings())).train_batches(12, 0))
    weight = targets.objective().weights(batch)["token"]
    assert weight == sum(len(row) - 1 for row in rows())
    measured = quantization_error(model, student, [TokenizedAnswer(row, 1) for row in rows()]).kl
    results = []
    for dense_limit in (1 << 24, 0):
        objective = targets.objective(dense_limit)
        value, gradient = nn.value_and_grad(student, lambda m, o=objective: o.sums(m, batch)["token"])(
            student
        )
        assert value.item() / weight == pytest.approx(measured, rel=1e-4)
        results.append(dict(tree_flatten(gradient)))
    dense, tiled = results
    assert dense.keys() == tiled.keys() and len(dense) == 1 + trains
    for path in dense:
        assert mx.allclose(dense[path], tiled[path], rtol=1e-3, atol=1e-4).item(), path


@pytest.mark.parametrize("changes", [{}, BY_BLOCKS], ids=["end to end", "by blocks"])
def test_a_loss_that_is_not_a_number_is_an_error_and_nothing_is_kept(
    golden: Golden, tmp_path: Path, changes: Mapping[str, Any]
) -> None:
    model = loaded(golden, "qwen3")
    modes = quantizations(model, "mxfp4")
    settings = RefineSettings(steps=4, learning_rate=3e38, **changes)
    with pytest.raises(DataError, match=r"not a number|not finite"):
        refine(RefineJob(model, modes, start_of(model, modes), rows(), folder=tmp_path, settings=settings))
    assert not (tmp_path / FACTS).exists() and not list(tmp_path.glob("blocks/*.safetensors"))
    assert mx.isfinite(output(model, rows()[0])).all().item()


def test_a_rate_that_is_too_high_is_said(golden: Golden, tmp_path: Path) -> None:
    model, notes = loaded(golden, "qwen3"), []
    modes = quantizations(model, "mxfp4")
    progress = NullProgress()
    progress.note = notes.append  # type: ignore[method-assign]
    settings = RefineSettings(steps=6, learning_rate=1.0)
    refine(
        RefineJob(
            model,
            modes,
            start_of(model, modes),
            rows(),
            folder=tmp_path,
            settings=settings,
            progress=progress,
        )
    )
    assert any("lower the learning rate" in note for note in notes), notes


@pytest.mark.parametrize("changes", [{}, BY_BLOCKS], ids=["end to end", "by blocks"])
def test_a_student_in_bfloat16_is_trained_in_float32(
    golden: Golden, tmp_path: Path, changes: Mapping[str, Any]
) -> None:
    model = load_model(golden("qwen3"), dtype="bfloat16")[0]
    modes = quantizations(model, "nvfp4")
    settings = RefineSettings(steps=12, learning_rate=2e-3, **changes)
    job = RefineJob(model, modes, start_of(model, modes), rows(), folder=tmp_path, settings=settings)
    refined = refine(job)
    assert all(part.latent.dtype == mx.float32 for part in refined.values())
    facts = json.loads((tmp_path / FACTS).read_text())
    for part in facts.get("blocks", [facts]):
        assert part["last_loss"] < part.get("first_loss", 1.0)
    assert model.model.embed_tokens.weight.dtype == mx.bfloat16


def test_published_experts_keep_their_bits(golden: Golden, tmp_path: Path) -> None:
    model = loaded(golden, "gpt_oss_mxfp4")
    experts = {name: value for name, value in tree_flatten(model.parameters()) if ".experts." in name}
    assert any(value.dtype == mx.uint32 for value in experts.values())
    modes = quantizations(model, "mxfp4")
    assert modes and not any(".experts." in path for path in modes)
    start = start_of(model, modes)
    del start["model.embed_tokens"]  # not the head, so calibration measures nothing of it
    for changes in ({}, BY_BLOCKS):
        settings = RefineSettings(**SHORT, **changes)
        assert (
            refine(RefineJob(model, modes, start, rows(), folder=tmp_path, settings=settings)).keys()
            == modes.keys()
        )
    now = dict(tree_flatten(model.parameters()))
    assert all(mx.array_equal(value, now[name]).item() for name, value in experts.items())


# ---------------------------------------------------------------- block by block


@pytest.mark.parametrize("model_name", ["qwen3", "gpt_oss", "gpt_oss_mxfp4"])
def test_blocks_run_one_by_one_are_the_trunk(golden: Golden, model_name: str) -> None:
    model = loaded(golden, model_name)
    texts = [*rows(5), list(range(1, 50))]  # longer than the sliding window
    blocks = Blocks(model)
    rows_of = PaddedRows(blocks, texts, 2)
    hidden = rows_of.embedded()
    for block in range(len(blocks)):
        hidden = rows_of.outputs(block, hidden)
    for row, found in zip(texts, hidden, strict=True):
        expected = hidden_states(model, mx.array([row]))[0]
        assert mx.allclose(blocks.finished(found[None])[0], expected, atol=2e-5).item()


def test_a_block_is_trained_as_by_its_plain_twin(golden: Golden, tmp_path: Path) -> None:
    model = loaded(golden, "qwen3")
    modes = {p: q for p, q in quantizations(model, "mxfp4").items() if p.startswith("model.layers.0.")}
    start = start_of(model, modes)
    settings = RefineSettings(steps=5, learning_rate=2e-3, **BY_BLOCKS)
    found = refine(RefineJob(model, modes, start, rows(), folder=tmp_path, settings=settings))
    # The twin: the same block, one row at a time, Adam in NumPy.
    layer, texts = model.model.layers[0], rows()
    names = [path.removeprefix("model.layers.0.") for path in modes]
    scales = {p: stored_scales(start[p].parts, q) for p, q in modes.items()}
    latent = {p: np.array(start[p].latent) for p in modes}
    moments = {p: np.zeros((2, *latent[p].shape)) for p in modes}
    inputs = [model.model.embed_tokens(mx.array([row])) for row in texts]
    targets = [layer(x, "causal") for x in inputs]
    modules = dict(layer.named_modules())
    layer.freeze()
    for name in names:
        modules[name].unfreeze(keys=["weight"], recurse=False)
    own = {name: modules[name].weight for name in names}

    def error(weights: Any, chosen: Sequence[int]) -> mx.array:
        for name, path in zip(names, modes, strict=True):
            modules[name].weight = straight_through(weights[path], scales[path], modes[path])
        return sum(mx.square(layer(inputs[i], "causal") - targets[i]).mean(-1).sum() for i in chosen)

    everything = {p: mx.array(value) for p, value in latent.items()}
    unit = (error(everything, range(len(texts))) / sum(map(len, texts))).item()
    none = mx.zeros((1, 1))
    order = RowBatches(
        [len(row) for row in texts],
        lambda chosen: Batch(none, none, none, tuple(chosen)),
        settings.batch_size,
        0,
    )
    for step in range(settings.steps):
        chosen = next(order).rows
        tokens = sum(len(texts[i]) for i in chosen)
        gradient = mx.grad(lambda w, c=chosen: error(w, c))({p: mx.array(v) for p, v in latent.items()})
        for p in modes:
            g = np.array(gradient[p], np.float64) / tokens / unit
            m, v = moments[p]
            m[:], v[:] = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            rate = 2e-3 * (1 - step / settings.steps)
            move = rate * (m / (1 - 0.9 ** (step + 1))) / (np.sqrt(v / (1 - 0.999 ** (step + 1))) + 1e-8)
            latent[p] = (latent[p] - move).astype(np.float32)
    for name in names:
        modules[name].weight = own[name]
    for path, q in modes.items():
        twin = round_to_grid(mx.array(latent[path]), scales[path], q)
        assert (found[path].latent == twin).mean().item() > 0.995, path


# ---------------------------------------------------------------- estimate


def test_an_estimate_needs_no_weights_and_counts_what_trains(golden: Golden) -> None:
    model = loaded(golden, "qwen3_moe")
    modes = quantizations(model, "nvfp4")
    lengths = [len(row) for row in rows()]
    found = estimate_refine(model, modes, lengths, 4)
    assert found.trained == sum(dict(model.named_modules())[path].weight.size for path in modes)
    config = json.loads((golden("qwen3_moe") / "config.json").read_text())
    shapes = estimate_refine(build_model(config), modes, lengths, 4)
    assert (shapes.trained, shapes.step_flops) == (found.trained, found.step_flops)
    assert found.block_bytes < found.end_to_end_bytes
    assert found.state_bytes == 12 * found.trained
    # Twice as many rows a step are twice the work.
    assert estimate_refine(model, modes, lengths, 8).step_flops == pytest.approx(
        2 * found.step_flops, rel=0.01
    )


def test_the_prediction_of_gpt_oss_20b_trains_what_is_not_published_in_mxfp4() -> None:
    config = {
        "model_type": "gpt_oss",
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 24,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "vocab_size": 201_088,
        "sliding_window": 128,
        "layer_types": ["sliding_attention", "full_attention"] * 12,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150_000,
        "tie_word_embeddings": False,
        "quantization_config": {"quant_method": "mxfp4"},
    }
    found = predict_refine(config, [300] * 200)
    attention, ends = 24 * 2880 * (4096 + 2 * 512 + 4096), 2 * 201_088 * 2880
    assert found.trained == attention + ends and found.largest_block == attention // 24
    # Experts of 4.25 bits, and the rest in bfloat16.
    assert found.resident_bytes == pytest.approx(2 * found.trained + 19.11e9 * 4.25 / 8, rel=0.01)
    assert predict_refine(config, [300] * 200, mode="affine4").state_bytes == 4 * found.trained
