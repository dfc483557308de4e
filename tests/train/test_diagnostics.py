"""Weights that are not finite are never saved, and end the run with an error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.list_batches import ListBatches
from helpers.tiny_model import make_batches, make_model, make_rows, settings

from mlx_distill.errors import DataError
from mlx_distill.optim import make_optimizer
from mlx_distill.train import make_trainable, sft, train

ROWS = make_rows(12)
OVERFLOWING = {"learning_rate": 1e38, "weight_decay": 100.0}  # their product is out of float32's range


def walk(folder: Path, steps: int, **changes: Any) -> None:
    config = settings(steps=steps, accumulate=1, schedule="constant", warmup=0.0, **changes)
    model, batches = make_model(), make_batches(ROWS, 4)
    make_trainable(model, config)
    train(
        model,
        ListBatches(batches),
        sft(),
        make_optimizer(config, steps),
        config,
        folder=folder,
        valid=batches[:1],
    )


def test_a_validation_loss_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="after step 1 the validation loss is not a number") as caught:
        walk(tmp_path, 4, learning_rate=1e38, evaluate_every=1)
    assert "lower the learning rate" in (caught.value.fix or "") and "no checkpoint yet" in (
        caught.value.fix or ""
    )
    assert not list(tmp_path.glob("checkpoints/*"))


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"after step 1 model\.\S+ holds numbers that are not finite"):
        walk(tmp_path, 1, **OVERFLOWING)
    assert not list(tmp_path.glob("checkpoints/step-*"))


def test_the_previous_checkpoint_is_kept(tmp_path: Path) -> None:
    walk(tmp_path, 2)
    path = tmp_path / "checkpoints" / "step-00000002" / "state.json"
    state = json.loads(path.read_text())
    state["settings"] |= {**OVERFLOWING, "steps": 3}
    path.write_text(json.dumps(state))
    with pytest.raises(DataError, match="after step 3") as caught:
        walk(tmp_path, 3, **OVERFLOWING)
    assert "step-00000002 is intact" in (caught.value.fix or "")


def test_a_lost_metrics_file_is_started_again_without_zeros(tmp_path: Path) -> None:
    walk(tmp_path, 2)
    (tmp_path / "metrics.jsonl").unlink()
    walk(tmp_path, 2)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""
