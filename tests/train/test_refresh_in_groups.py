"""Bases refreshed in groups of matrices: the same steps as with all gradients at once, in less memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx
import pytest
from helpers.tiny_model import make_batches, make_model, make_rows, settings
from mlx.utils import tree_flatten

from mlx_distill.optim import GaLoreAdamW, make_optimizer
from mlx_distill.optim.subspace import find_basis
from mlx_distill.records import Batch
from mlx_distill.train import make_trainable, sft
from mlx_distill.train.trunk_head import make_trunk
from mlx_distill.train.updates import WHOLE_BYTES, StepResult, UpdateContext, frozen, make_updater

BATCHES = make_batches(make_rows(24), 2)
DOWN, UP, NORM = "model.down_proj.weight", "model.up_proj.weight", "model.norm.weight"


def take_steps(
    whole_bytes: int, *, stagger: bool, compiled: bool = False, basis: Any = None
) -> tuple[dict[str, mx.array], list[StepResult], list[list[str]]]:
    """Seven steps of three micro-batches with dropout and clipping: the weights, the results, and what was
    trainable each time that a window was differentiated.
    """
    config = settings(
        method="galore",
        galore_update_gap=3,
        accumulate=3,
        steps=7,
        modules_to_save=["norm"],
        galore_stagger=stagger,
    )
    model = make_model(dropout=0.2)
    make_trainable(model, config)
    optimizer, plain, windows = make_optimizer(config, 7), sft(), []
    assert isinstance(optimizer, GaLoreAdamW)
    optimizer.basis = basis or optimizer.basis
    optimizer.init(model.trainable_parameters())

    def weights(batch: Batch) -> Any:
        if batch is window[0]:
            windows.append(sorted(path for path, _ in tree_flatten(model.trainable_parameters())))
        return plain.weights(batch)

    model.train()
    context = UpdateContext(
        model,
        replace(plain, weights=weights),
        optimizer,
        config.clip_norm,
        trunk=make_trunk(model, compiled=True) if compiled else None,
        whole_bytes=whole_bytes,
    )
    update, results = make_updater(context, config), []
    mx.random.seed(0)
    for step in range(7):
        window = [BATCHES[(3 * step + i) % len(BATCHES)] for i in range(3)]
        results.append(update(window))
    return dict(tree_flatten(model.parameters())), results, windows


@pytest.mark.slow
@pytest.mark.parametrize("stagger", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_groups_of_one_matrix_take_the_steps_of_all_at_once(stagger: bool, compiled: bool) -> None:
    """There are two matrices, so a step at which both bases are refreshed differentiates its window twice."""
    at_once, results, windows = take_steps(WHOLE_BYTES, stagger=stagger, compiled=compiled)
    assert windows == [[DOWN, NORM, UP]] * 7
    in_groups, other_results, windows = take_steps(1, stagger=stagger, compiled=compiled)
    assert windows[:2] == [[UP], [DOWN, NORM]]
    assert len(windows) == (8 if stagger else 10)  # both at step 1, and without stagger at 4 and 7 too
    for a, b in zip(results, other_results, strict=True):
        assert a.loss == pytest.approx(b.loss, rel=1e-5)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-4)
    for name, value in at_once.items():
        assert mx.allclose(value, in_groups[name], rtol=1e-4, atol=1e-5).item(), name


def test_each_basis_is_computed_once_a_refresh() -> None:
    shapes: list[tuple[int, ...]] = []

    def basis(gradient: mx.array, rank: int, projection: str, old: Any) -> dict[str, mx.array]:
        shapes.append(gradient.shape)
        return find_basis(gradient, rank, projection, "auto", old)

    take_steps(1, stagger=False, basis=basis)
    assert shapes == [(32, 16), (16, 32)] * 3  # steps 1, 4 and 7


def test_frozen_parameters_are_trainable_again_also_after_an_error() -> None:
    model = make_model()
    before = [path for path, _ in tree_flatten(model.trainable_parameters())]

    def fail() -> None:
        with frozen(model, before[1:]):
            assert [path for path, _ in tree_flatten(model.trainable_parameters())] == before[:1]
            raise ValueError

    with pytest.raises(ValueError):
        fail()
    assert [path for path, _ in tree_flatten(model.trainable_parameters())] == before
