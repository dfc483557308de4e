"""Streamed updates, whose gradients are never in memory together, equal accumulated ones exactly."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from helpers.list_batches import ListBatches
from helpers.tiny_model import Deep, TinyModel, make_batches, make_model, make_rows, settings
from mlx.utils import tree_flatten

from mlx_distill.errors import ConfigError, DataError
from mlx_distill.optim import AdamW, make_optimizer
from mlx_distill.records import Batch
from mlx_distill.train import Objective, make_trainable, sft, train
from mlx_distill.train.updates import UpdateContext, accumulated_update, make_updater, streamed_update

ROWS = make_rows(16)


def run(folder: Path, **changes: Any) -> tuple[dict[str, list], list[float]]:
    config = settings(accumulate=1, steps=4, **changes)
    model, norms = make_model(dropout=0.2), []
    make_trainable(model, config)
    source = ListBatches(make_batches(ROWS, 4))
    hooks = [lambda row: norms.append((row["grad_norm"], row["loss"]))]
    train(model, source, sft(), make_optimizer(config, 4), config, folder=folder, hooks=hooks)
    return {name: a.tolist() for name, a in tree_flatten(model.parameters())}, norms


@pytest.mark.slow
@pytest.mark.parametrize("clip_norm", [0.0, 0.05])
@pytest.mark.parametrize("method", ["full", "apollo", "apollo-mini", "galore", "dora"])
def test_streaming_changes_no_bit(tmp_path: Path, method: str, clip_norm: float) -> None:
    """With dropout, clipped or not: weights, losses and norms."""
    held = run(tmp_path / "held", method=method, clip_norm=clip_norm)
    assert run(tmp_path / "streamed", method=method, clip_norm=clip_norm, stream_gradients=True) == held


def deep_peak(update: Any, clip_norm: float) -> float:
    """Peak memory of a step above weights and state, in units of the weights' size."""
    mx.random.seed(0)
    model, optimizer = Deep(16, 256), AdamW(1e-3)
    batch = Batch(mx.zeros((1, 1), mx.int32), mx.zeros((1, 1), mx.int32), mx.ones((1, 1)))
    x = mx.random.normal((4, 256))
    objective = Objective(
        lambda _: {"text": 1.0}, lambda model, _: {"text": mx.square(model(x)).sum()}, {"text": 1.0}
    )
    optimizer.init(model.trainable_parameters())
    mx.eval(model.parameters(), optimizer.state, x)
    base = mx.get_active_memory()
    mx.reset_peak_memory()
    update(UpdateContext(model, objective, optimizer, clip_norm, group_bytes=1), [batch])
    return (mx.get_peak_memory() - base) / (16 * 256 * 256 * 4)


@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
def test_streamed_gradients_are_never_in_memory_together(clip_norm: float) -> None:
    accumulated, streamed = (deep_peak(update, clip_norm) for update in (accumulated_update, streamed_update))
    assert accumulated > 1.0 and streamed < 0.6, (accumulated, streamed)


@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
def test_a_gradient_that_is_not_a_number_stops_a_streamed_run_too(tmp_path: Path, clip_norm: float) -> None:
    """The square root of zero: a finite loss with an infinite slope."""
    objective = sft()

    def steep(model: TinyModel, batch: Batch) -> dict[str, mx.array]:
        return {
            "text": objective.sums(model, batch)["text"]
            + mx.sqrt(mx.abs(model.model.norm.weight).sum() * 0.0)
        }

    config = settings(accumulate=1, steps=1, clip_norm=clip_norm, stream_gradients=True)
    model = make_model()
    with pytest.raises(DataError, match="the gradient is not a number") as caught:
        source = ListBatches(make_batches(ROWS, 4))
        train(
            model, source, replace(objective, sums=steep), make_optimizer(config, 1), config, folder=tmp_path
        )
    untouched = all(
        mx.array_equal(a, b) for (_, a), (_, b) in zip(*map(tree_flatten, (model, make_model())), strict=True)
    )
    assert untouched == (clip_norm > 0)
    assert ("step before" in (caught.value.fix or "")) == untouched
    assert (tmp_path / "nan.safetensors").is_file()


def test_a_batch_without_a_trained_token_updates_nothing() -> None:
    batch = make_batches(ROWS[:2], 2)[0]
    model = make_model()
    update = make_updater(
        UpdateContext(model, sft(), AdamW(1.0), 1.0), settings(stream_gradients=True, accumulate=1)
    )
    result = update([replace(batch, mask=batch.mask * 0)])
    assert result.grad_norm == result.loss == 0.0
    assert all(
        mx.array_equal(a, b) for (_, a), (_, b) in zip(*map(tree_flatten, (model, make_model())), strict=True)
    )


def test_streaming_with_accumulation_is_refused(tmp_path: Path) -> None:
    config = settings(stream_gradients=True, accumulate=2)
    with pytest.raises(ConfigError, match="accumulate: 2") as caught:
        train(
            make_model(),
            ListBatches(make_batches(ROWS, 4)),
            sft(),
            make_optimizer(config, 6),
            config,
            folder=tmp_path,
        )
    assert caught.value.fix
