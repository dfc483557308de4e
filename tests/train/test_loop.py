"""The loop: what must not change the result, and what must stop it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from helpers.list_batches import ListBatches
from helpers.tiny_model import TinyModel, collate, make_batches, make_model, make_rows, settings
from mlx.utils import tree_flatten, tree_map, tree_map_with_path

from mlx_distill.errors import ConfigError, DataError, FileError, ModelError
from mlx_distill.optim import make_optimizer
from mlx_distill.recipe import TrainConfig
from mlx_distill.records import Batch
from mlx_distill.runtime import random_key, set_random_key
from mlx_distill.train import (
    Objective,
    TrainResult,
    load_weights,
    make_trainable,
    sft,
    total_steps,
    train,
)
from mlx_distill.train.grad_checkpoint import checkpointed_layers
from mlx_distill.train.gradients import clip_scale, global_norm, window_gradients
from mlx_distill.train.profiling import PARTS
from mlx_distill.train.validation import evaluate

ROWS = make_rows(24)


def run(
    folder: Path,
    config: TrainConfig,
    *,
    batches: list[Batch] | None = None,
    dropout: float = 0.2,
    **kwargs: Any,
) -> tuple[TinyModel, TrainResult]:
    model = make_model(dropout=dropout)
    make_trainable(model, config)
    source = ListBatches(batches or make_batches(ROWS, 4))
    optimizer = make_optimizer(config, total_steps(config, len(source)))
    return model, train(model, source, sft(), optimizer, config, folder=folder, **kwargs)


def weights(model: TinyModel) -> dict[str, list]:
    return {name: a.tolist() for name, a in tree_flatten(model.parameters())}


def rows_of(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second", "peak_memory_bytes")}
        for row in rows
    ]


WINDOWS = {
    "1x8": lambda: make_batches(ROWS[:8], 8),
    "8x1": lambda: make_batches(ROWS[:8], 1),
    "4x2 padded": lambda: make_batches(ROWS[:8], 2, extra_padding=7),
    "3+3+2": lambda: make_batches(ROWS[:8], 3),
    "with an all-masked row": lambda: [*make_batches(ROWS[:8], 4), masked()],
}


def masked() -> Batch:
    batch = collate(ROWS, [9])
    return replace(batch, mask=batch.mask * 0)


@pytest.mark.parametrize("name", WINDOWS)
def test_micro_batching_does_not_change_loss_or_gradient(name: str) -> None:
    model = make_model()
    plain = mx.value_and_grad(lambda p: mean_loss(model, p, collate(ROWS, list(range(8)))))(
        model.trainable_parameters()
    )
    result = window_gradients(model, WINDOWS[name](), sft())
    assert result.loss == pytest.approx(plain[0].item(), rel=1e-5)
    for path, theirs in tree_flatten(plain[1]):
        assert mx.allclose(result.gradients[path], theirs, rtol=1e-4, atol=1e-6), path
    assert global_norm(result.gradients) == pytest.approx(global_norm(plain[1]), rel=1e-5)


def mean_loss(model: TinyModel, parameters: Any, batch: Batch) -> mx.array:
    model.update(parameters)
    logits = model(batch.inputs)
    losses = (
        mx.logsumexp(logits, axis=-1) - mx.take_along_axis(logits, batch.labels[..., None], axis=-1)[..., 0]
    )
    return (losses * batch.mask).sum() / batch.mask.sum()


def test_a_window_without_a_trained_token_updates_nothing(tmp_path: Path) -> None:
    model, result = run(tmp_path, settings(steps=2), batches=[masked()])
    assert weights(model) == weights(make_model(dropout=0.2))
    assert result.metrics["loss"] == 0.0 and result.metrics["tokens"] == 0


def test_each_term_is_divided_by_its_own_weight_over_the_window() -> None:
    model = make_model()
    batches = make_batches(ROWS[:6], 2)
    objective = Objective(
        weights=lambda b: {"text": float(b.mask.sum().item()), "rows": float(len(b.rows))},
        sums=lambda m, b: {"text": sft().sums(m, b)["text"], "rows": mx.square(m(b.inputs)[:, 0]).sum()},
        coefficients={"text": 0.3, "rows": 0.7},
    )
    result = window_gradients(model, batches, objective)
    assert result.weights == {"text": sum(b.mask.sum().item() for b in batches), "rows": 6.0}
    expected = sum(mx.square(model(b.inputs)[:, 0]).sum().item() for b in batches) / 6
    assert result.terms["rows"] == pytest.approx(expected, rel=1e-5)
    assert result.loss == pytest.approx(0.3 * result.terms["text"] + 0.7 * result.terms["rows"], rel=1e-6)


def test_a_term_without_weight_never_produces_a_nan() -> None:
    objective = Objective(
        weights=lambda b: {"text": float(b.mask.sum().item()), "label": 0.0},
        sums=lambda m, b: {"text": sft().sums(m, b)["text"], "label": mx.array(math.nan) * m(b.inputs).sum()},
        coefficients={"text": 1.0, "label": 1.0},
    )
    result = window_gradients(make_model(), make_batches(ROWS[:4], 2), objective)
    assert (
        math.isfinite(result.loss)
        and math.isfinite(global_norm(result.gradients))
        and result.terms["label"] == 0.0
    )


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    first, _ = run(tmp_path, settings())
    again, result = run(tmp_path, settings(), hooks=[lambda row: pytest.fail("a step")])
    assert weights(again) == weights(first) and result.steps == 6 and result.metrics["step"] == 6


@pytest.mark.slow
@pytest.mark.parametrize("keep", [1, 2, 4])
def test_the_last_checkpoints_and_the_best_are_kept(tmp_path: Path, keep: int) -> None:
    run(tmp_path, settings(steps=9, evaluate_every=3, keep_checkpoints=keep), valid=make_batches(ROWS, 8))
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["best", *[f"step-0000000{step}" for step in (4, 6, 8, 9)][-keep:]]


@pytest.mark.slow
def test_validation_disturbs_neither_order_nor_dropout(tmp_path: Path) -> None:
    with_it, _ = run(tmp_path / "a", settings(evaluate_every=1), valid=make_batches(ROWS, 3))
    without, _ = run(tmp_path / "b", settings())
    assert weights(with_it) == weights(without)


def test_evaluate_is_the_mean_over_all_trained_tokens() -> None:
    model = make_model(dropout=0.5)
    model.train()
    found = evaluate(model, make_batches(ROWS, 5), sft())
    model.eval()
    assert found["loss"] == pytest.approx(
        mean_loss(model, model.trainable_parameters(), collate(ROWS, list(range(24)))).item(), rel=1e-5
    )


def test_use_best_leaves_the_best_weights_in_the_model(tmp_path: Path) -> None:
    config = settings(
        learning_rate=3.0, schedule="constant", steps=8, evaluate_every=1, clip_norm=0.0, use_best=True
    )
    valid = make_batches(ROWS, 8)
    model, result = run(tmp_path, config, valid=valid)
    assert result.best_step is not None and result.best_step < 8 and result.best is not None
    assert evaluate(model, valid, sft())["loss"] == pytest.approx(result.best_loss, rel=1e-6)
    other = make_model(seed=5)
    load_weights(result.best, other)
    assert weights(other) == weights(model)


def test_early_stopping_ends_a_run_that_no_longer_improves(tmp_path: Path) -> None:
    config = settings(learning_rate=0.0, steps=20, evaluate_every=1, patience=3)
    _, result = run(tmp_path, config, dropout=0.0, valid=make_batches(ROWS, 8))
    assert result.stopped_early and result.steps == 4 and result.best_step == 1
    _, again = run(tmp_path, config, dropout=0.0, valid=make_batches(ROWS, 8))
    assert again.stopped_early and again.steps == 4
    path = tmp_path / "checkpoints" / "step-00000004" / "state.json"
    state = json.loads(path.read_text())
    state["run"]["waiting"] = state["run"].pop("bad_evals")  # as older versions wrote it
    path.write_text(json.dumps(state))
    _, again = run(tmp_path, config, dropout=0.0, valid=make_batches(ROWS, 8))
    assert again.stopped_early and again.steps == 4


@pytest.mark.parametrize(
    ("epochs", "accumulate", "expected"), [(1.0, 4, 2), (2.0, 4, 3), (0.5, 1, 3), (1.0, 100, 1)]
)
def test_an_epoch_has_every_row_once_including_the_incomplete_last_step(
    tmp_path: Path, epochs: float, accumulate: int, expected: int
) -> None:
    seen: list[int] = []
    model, batches = make_model(), make_batches(ROWS, 4)
    objective = sft()
    watching = replace(objective, sums=lambda m, b: (seen.extend(b.rows), objective.sums(m, b))[1])
    config = settings(steps=0, epochs=epochs, accumulate=accumulate)
    assert total_steps(config, len(batches)) == expected
    result = train(model, ListBatches(batches), watching, optim.SGD(0.1), config, folder=tmp_path)
    assert result.steps == expected
    assert sorted(seen) == sorted(list(range(24)) * int(epochs)) if epochs >= 1 else len(seen) == 12


def test_gradients_are_clipped_by_the_global_norm(tmp_path: Path) -> None:
    assert global_norm({"a": mx.array([3.0, 0.0]), "b": [mx.array([[4.0]])]}) == 5.0
    assert clip_scale(5.0, 1.0) == pytest.approx(0.2) and clip_scale(5.0, 0.0) == clip_scale(5.0, 6.0) == 1.0
    before = make_model()
    model = make_model()
    config = settings(steps=1, clip_norm=1e-3)
    train(model, ListBatches(make_batches(ROWS, 4)), sft(), optim.SGD(1.0), config, folder=tmp_path)
    moved = {
        name: a - b
        for (name, a), (_, b) in zip(
            tree_flatten(model.parameters()), tree_flatten(before.parameters()), strict=True
        )
    }
    assert global_norm(moved) == pytest.approx(1e-3, rel=1e-2)
    assert rows_of(tmp_path)[0]["grad_norm"] > 0.1


def test_nan_stops_before_the_weights_are_updated_and_names_the_rows(tmp_path: Path) -> None:
    objective = sft()

    def poisoned(model: TinyModel, batch: Batch) -> dict[str, mx.array]:
        return {"text": objective.sums(model, batch)["text"] * (math.nan if 6 in batch.rows else 1.0)}

    model = make_model()
    source = ListBatches(make_batches(ROWS[:8], 2), seed=None)
    config = settings(accumulate=4, steps=1)
    with pytest.raises(DataError, match=r"step 1: the loss is not a number \(rows 6, 7\)") as caught:
        train(
            model,
            source,
            replace(objective, sums=poisoned),
            make_optimizer(config, 1),
            config,
            folder=tmp_path,
        )
    assert caught.value.fix
    assert weights(model) == weights(make_model())
    saved = mx.load(str(tmp_path / "nan.safetensors"))
    assert mx.array_equal(saved["3.inputs"], collate(ROWS, [6, 7]).inputs)
    assert json.loads((tmp_path / "nan.json").read_text())["suspects"] == [3]


@pytest.mark.parametrize("change", ["settings", "model", "data", "identity", "optimizer"])
def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path, change: str) -> None:
    config = settings(steps=2)
    train(
        make_model(),
        ListBatches(make_batches(ROWS, 4)),
        sft(),
        make_optimizer(config, 2),
        config,
        folder=tmp_path,
        identity="a",
    )
    batches = make_batches(ROWS[:8] if change == "data" else ROWS, 4)
    model = make_model(width=8 if change == "model" else 16)
    later = settings(steps=2, learning_rate=3e-3) if change == "settings" else config
    optimizer = optim.SGD(0.1) if change == "optimizer" else make_optimizer(config, 2)
    expected = {"settings": ConfigError, "identity": ConfigError, "data": DataError}.get(change, ModelError)
    with pytest.raises(expected) as caught:
        identity = "b" if change == "identity" else "a"
        train(model, ListBatches(batches), sft(), optimizer, later, folder=tmp_path, identity=identity)
    assert caught.value.fix


def test_a_damaged_checkpoint_is_an_error_with_a_fix(tmp_path: Path) -> None:
    run(tmp_path, settings(steps=2))
    path = tmp_path / "checkpoints" / "step-00000002" / "trainable.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(Exception, match="cannot be read") as caught:
        run(tmp_path, settings(steps=2))
    assert "delete" in str(caught.value)


def test_a_full_disk_leaves_the_older_checkpoint_to_resume_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = run(tmp_path / "whole", settings())
    real, saves = mx.save_safetensors, []

    def full(path: str, arrays: dict, **more: Any) -> None:
        saves.append(path)
        if len(saves) == 4:  # the optimizer's file of the second checkpoint
            Path(path).write_bytes(b"half")
            raise RuntimeError("[write] Unable to write 400 bytes to file.")
        real(path, arrays, **more)

    monkeypatch.setattr(mx, "save_safetensors", full)
    with pytest.raises(FileError, match="cannot be written") as caught:
        run(tmp_path / "cut", settings())
    assert "free some space" in str(caught.value)
    assert [p.name for p in (tmp_path / "cut" / "checkpoints").iterdir()] == ["step-00000002"]
    assert weights(run(tmp_path / "cut", settings())[0]) == weights(whole)


def test_a_model_without_trainable_weights_is_refused(tmp_path: Path) -> None:
    model = make_model()
    model.freeze()
    with pytest.raises(ConfigError, match="no weight"):
        train(model, ListBatches(make_batches(ROWS, 4)), sft(), optim.SGD(0.1), settings(), folder=tmp_path)


def test_hooks_get_metrics_and_timing(tmp_path: Path) -> None:
    told: list[dict] = []
    run(tmp_path, settings(steps=3), hooks=[told.append])
    assert [row["step"] for row in told] == [1, 2, 3]
    wanted = {
        "step",
        "steps",
        "loss",
        "terms",
        "learning_rate",
        "grad_norm",
        "tokens",
        "tokens_per_second",
        "seconds",
        "eta_s",
    }
    assert wanted | {"peak_memory_bytes"} <= set(told[0])
    assert set(told[0]["timing"]) == set(PARTS) and told[0]["timing"]["forward"] > 0
    assert told[-1]["eta_s"] == 0.0 and told[0]["peak_memory_bytes"] > 0
    json.dumps(told, allow_nan=False)


def test_an_exception_in_a_hook_ends_the_run_and_leaves_its_checkpoint(tmp_path: Path) -> None:
    def full(row: dict) -> None:
        if row["step"] == 5:
            raise OSError("the sink is full")

    with pytest.raises(OSError, match="sink is full"):
        run(tmp_path / "cut", settings(), hooks=[full])
    resumed, result = run(tmp_path / "cut", settings())
    whole, _ = run(tmp_path / "whole", settings())
    assert result.resumed == 4 and weights(resumed) == weights(whole)


@pytest.mark.parametrize(("minutes", "step"), [(1e-9, 4), (0.0, 0), (5.0, 0)])
def test_a_slow_training_has_a_checkpoint_before_its_first_number_of_steps(
    tmp_path: Path, minutes: float, step: int
) -> None:
    def killed(row: dict) -> None:
        if row["step"] == 5:
            raise KeyboardInterrupt

    config = settings(checkpoint_every=1000, checkpoint_minutes=minutes)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", config, hooks=[killed])
    resumed, result = run(tmp_path / "cut", settings())  # neither interval changes the result
    whole, _ = run(tmp_path / "whole", settings())
    assert result.resumed == step and weights(resumed) == weights(whole)


def test_the_random_state_is_restored() -> None:
    key = random_key()
    first = mx.random.normal((4,)).tolist()
    set_random_key(key)
    assert mx.random.normal((4,)).tolist() == first


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 8])
def test_accumulated_galore_equals_one_large_batch(tmp_path: Path, size: int) -> None:
    """Across a refresh, with clipping: the norm is that of the projected gradient, accumulated or not."""
    config = settings(method="galore", steps=5, accumulate=8 // size, galore_update_gap=3, clip_norm=0.05)
    model = make_model()
    make_trainable(model, config)
    source = ListBatches(make_batches(ROWS, size), seed=None)
    train(model, source, sft(), make_optimizer(config, 5), config, folder=tmp_path)

    plain = make_model()
    make_trainable(plain, config)
    optimizer = make_optimizer(config, 5)
    rows = rows_of(tmp_path)
    for step in range(5):
        batch = collate(ROWS, [(8 * step + i) % 24 for i in range(8)])
        loss, gradients = mx.value_and_grad(lambda p, batch=batch: mean_loss(plain, p, batch))(
            plain.trainable_parameters()
        )
        optimizer.init(plain.trainable_parameters())
        low = tree_map_with_path(optimizer.project_and_refresh, gradients)
        norm = global_norm(low)
        scale = clip_scale(norm, 0.05)
        assert rows[step]["loss"] == pytest.approx(loss.item(), rel=1e-4)
        assert rows[step]["grad_norm"] == pytest.approx(norm, rel=1e-3)
        optimizer.update(plain, tree_map(lambda g, scale=scale: g * scale, low))
    for (path, a), (_, b) in zip(
        tree_flatten(model.parameters()), tree_flatten(plain.parameters()), strict=True
    ):
        assert mx.allclose(a, b, atol=2e-4), path


class Layer(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.proj, self.dropout = nn.Linear(16, 16), nn.Dropout(dropout)

    def __call__(self, x: mx.array, mask: object = None, cache: object = None) -> mx.array:
        return x + self.dropout(mx.tanh(self.proj(x)))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_checkpointing_changes_neither_value_nor_gradient(dropout: float) -> None:
    layers = [Layer(dropout) for _ in range(3)]
    model = nn.Sequential(*layers)
    x = mx.random.normal((4, 16))
    step = nn.value_and_grad(model, lambda m: mx.square(m(x)).sum())
    key = random_key()
    plain = step(model)
    mx.eval(plain)
    after = random_key()
    set_random_key(key)
    with checkpointed_layers(model):
        assert type(layers[0]) is not Layer and isinstance(layers[0], Layer)
        loss, gradients = step(model)
        mx.eval(loss, gradients)
    assert random_key() == after
    assert loss.item() == plain[0].item()
    for (path, a), (_, b) in zip(tree_flatten(gradients), tree_flatten(plain[1]), strict=True):
        assert mx.allclose(a, b, atol=1e-6), path
    assert type(layers[0]) is Layer
