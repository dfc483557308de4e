"""Where a basis is due, gradients are whole: a few at a time, and the steps are those of having them all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from helpers.tiny_model import make_batches, make_model, make_rows, settings
from mlx.utils import tree_flatten

from mlx_distill.optim import make_optimizer
from mlx_distill.train import ListBatches, make_trainable, sft, train
from mlx_distill.train import loop as steps_module
from mlx_distill.train import updates as refresh_module
from mlx_distill.train.updates import frozen

ROWS = make_rows(24)


def walk(folder: Path, **changes: Any) -> tuple[dict[str, mx.array], list[dict[str, Any]]]:
    config = settings(
        method="galore", galore_update_gap=3, accumulate=3, steps=7, modules_to_save=["norm"], **changes
    )
    model, seen = make_model(dropout=0.2), []
    make_trainable(model, config)
    train(
        model,
        ListBatches(make_batches(ROWS, 2)),
        sft(),
        make_optimizer(config, 7),
        config,
        folder=folder,
        hooks=[seen.append],
    )
    return dict(tree_flatten(model.parameters())), seen


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What was differentiated, one window after the other."""
    seen: list[list[str]] = []
    whole = steps_module.window_gradients

    def told(*args: Any) -> Any:
        found = whole(*args)
        seen.append(sorted(found.gradients))
        return found

    monkeypatch.setattr(steps_module, "window_gradients", told)
    return seen


@pytest.mark.parametrize("stagger", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_groups_of_one_matrix_take_the_steps_of_all_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, windows: list[list[str]], stagger: bool, compiled: bool
) -> None:
    """With dropout, clipping, and a norm beside; two matrices, so a step at which both are due goes through
    its window twice.
    """
    at_once, seen = walk(tmp_path / "at once", galore_stagger=stagger, compile=compiled)
    assert len(windows) == 7
    windows.clear()
    monkeypatch.setattr(refresh_module, "_LEAST_BYTES", 1)
    groups, also = walk(tmp_path / "groups", galore_stagger=stagger, compile=compiled)
    down, up, norm = "model.down_proj.weight", "model.up_proj.weight", "model.norm.weight"
    both = [[up], [down, norm]]
    assert windows[:2] == both
    assert len(windows) == (8 if stagger else 10)  # both at step 1, and without stagger at 4 and 7 too
    for a, b in zip(seen, also, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5) and a["grad_norm"] == pytest.approx(
            b["grad_norm"], rel=1e-4
        )
    for name, value in at_once.items():
        assert mx.allclose(value, groups[name], rtol=1e-4, atol=1e-5).item(), name


def test_a_basis_is_found_once_a_refresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlx_distill.optim.galore import GaLoreAdamW

    found: list[tuple[str, int]] = []
    whole = GaLoreAdamW._refresh

    def told(self: Any, path: str, *args: Any) -> None:
        found.append((path, self.count))
        whole(self, path, *args)

    monkeypatch.setattr(GaLoreAdamW, "_refresh", told)
    monkeypatch.setattr(refresh_module, "_LEAST_BYTES", 1)
    walk(tmp_path, galore_stagger=False)
    assert len(found) == len(set(found)) == 6 and {count for _, count in found} == {0, 3, 6}


def test_what_is_frozen_thaws_also_after_an_error() -> None:
    model = make_model()
    before = [path for path, _ in tree_flatten(model.trainable_parameters())]

    def fail() -> None:
        with frozen(model, before[1:]):
            assert [path for path, _ in tree_flatten(model.trainable_parameters())] == before[:1]
            raise ValueError

    with pytest.raises(ValueError):
        fail()
    assert [path for path, _ in tree_flatten(model.trainable_parameters())] == before
