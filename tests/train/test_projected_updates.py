"""GaLore in the loop: gradients are added up in the subspace; and the dropout of each rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from helpers.list_batches import ListBatches
from helpers.tiny_model import Deep, TinyModel, make_batches, make_model, make_rows, settings
from mlx.utils import tree_flatten

from mlx_distill.optim import AdamW, GaLoreAdamW, make_optimizer
from mlx_distill.optim.base import array_of
from mlx_distill.recipe import TrainConfig
from mlx_distill.train import Objective, make_trainable, sft, train
from mlx_distill.train.distributed import Ranks
from mlx_distill.train.gradients import window_gradients
from mlx_distill.train.updates import UpdateContext, apply_update, make_updater

GALORE: dict[str, Any] = {
    "method": "galore",
    "galore_rank": 4,
    "galore_update_gap": 3,
    "galore_stagger": False,
}
WHOLE, LOW = {(32, 16), (16, 32)}, {(32, 4), (4, 32)}


def prepared(config: TrainConfig, steps: int = 6) -> tuple[TinyModel, Any]:
    model = make_model()
    make_trainable(model, config)
    return model, make_optimizer(config, steps)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_loop_adds_up_projected_gradients(
    tmp_path: Path, accumulate: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every step but those that refresh bases; with one micro-batch a step, at those too."""
    steps: list[set[tuple[int, ...]]] = [set()]

    def sum_arrays(_: Ranks, arrays: dict[str, mx.array]) -> None:
        steps[-1] |= {array.shape for array in arrays.values()}

    monkeypatch.setattr(Ranks, "sum_arrays", sum_arrays)
    config = settings(**GALORE, accumulate=accumulate)
    model, optimizer = prepared(config)
    batches, hooks = ListBatches(make_batches(make_rows(12), 2)), [lambda row: steps.append(set())]
    train(model, batches, sft(), optimizer, config, folder=tmp_path, hooks=hooks)
    assert [steps[i] for i in (1, 2, 4, 5)] == [LOW] * 4
    assert steps[3] == LOW or accumulate > 1


def peak_of_the_second_step(optimizer: Any, accumulate: int) -> float:
    """Peak memory above weights and state, in units of the weights' size."""
    mx.random.seed(0)
    model, x = Deep(16, 256), mx.random.normal((4, 256))
    objective = Objective(
        lambda _: {"text": 1.0}, lambda model, _: {"text": mx.square(model(x)).sum()}, {"text": 1.0}
    )
    optimizer.init(model.trainable_parameters())
    context = UpdateContext(model, objective, optimizer, clip_norm=1.0, group_bytes=1)
    update = make_updater(context, settings(accumulate=accumulate))
    window = make_batches(make_rows(4), 1)[:accumulate]
    mx.eval(x, [vars(batch) for batch in window])
    update(window)
    base = mx.get_active_memory()
    mx.reset_peak_memory()
    update(window)
    return (mx.get_peak_memory() - base) / (16 * 256 * 256 * 4)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_whole_gradients_of_galore_are_never_in_memory_together(accumulate: int) -> None:
    whole = peak_of_the_second_step(AdamW(1e-3), accumulate)
    low = peak_of_the_second_step(GaLoreAdamW(1e-3, 8), accumulate)
    assert whole > 1.0 and low < 0.6, (whole, low)


def test_a_rank_without_rows_adds_projected_zeros() -> None:
    """Joined into one message with the others', they have to be as many numbers."""
    config, batches = settings(**GALORE), make_batches(make_rows(4), 2)
    model, optimizer = prepared(config)
    optimizer.init(model.trainable_parameters())

    class Second(Ranks):
        """Of two, the first of which trained on a token."""

        def sum(self, values: Any) -> list[float]:
            return [value + 1.0 for value in values]

        def sum_arrays(self, arrays: dict[str, mx.array]) -> None: ...

    for shapes in (WHOLE, LOW):
        first = window_gradients(model, batches, sft(), None, optimizer.project).gradients
        second = window_gradients(model, [], sft(), Second(1, 2), optimizer.project).gradients
        zeros = {path: array_of(gradient) for path, gradient in second.items()}
        assert {path: zero.shape for path, zero in zeros.items()} == {
            path: array_of(gradient).shape for path, gradient in first.items()
        }
        assert {zero.shape for zero in zeros.values()} == shapes
        assert not any(zero.any().item() for zero in zeros.values())
        first = {path: optimizer.project_and_refresh(path, gradient) for path, gradient in first.items()}
        apply_update(model, optimizer, first)


def test_each_rank_has_its_own_dropout(tmp_path: Path) -> None:
    """On the same rows; the first rank has that of a run with one rank."""
    weights = {}
    for name, ranks in (
        ("alone", None),
        ("first", Ranks(0, 1)),
        ("second", Ranks(1, 1)),
        ("second again", Ranks(1, 1)),
    ):
        model, config = make_model(dropout=0.5), settings(steps=2)
        train(
            model,
            ListBatches(make_batches(make_rows(8), 2)),
            sft(),
            make_optimizer(config, 2),
            config,
            folder=tmp_path / name,
            ranks=ranks,
        )
        weights[name] = dict(tree_flatten(model.parameters()))
    path = "model.up_proj.weight"
    assert mx.array_equal(weights["alone"][path], weights["first"][path])
    assert mx.array_equal(weights["second"][path], weights["second again"][path])
    assert not mx.allclose(weights["first"][path], weights["second"][path], atol=1e-3)
