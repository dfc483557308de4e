"""Weights that are no numbers are never kept, and whoever finds them says so."""

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
BLOWN = {"learning_rate": 1e38, "weight_decay": 100.0}  # their product is out of float32's range


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


def test_a_validation_loss_that_is_no_number_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="after step 1 the validation loss is not a number") as caught:
        walk(tmp_path, 4, learning_rate=1e38, evaluate_every=1)
    assert "lower the learning rate" in (caught.value.fix or "") and "no checkpoint yet" in (
        caught.value.fix or ""
    )
    assert not list(tmp_path.glob("checkpoints/*"))


def test_spoilt_weights_are_not_a_result(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"after step 1 model\.\S+ holds numbers that are not finite"):
        walk(tmp_path, 1, **BLOWN)
    assert not list(tmp_path.glob("checkpoints/step-*"))


def test_the_checkpoint_before_stands(tmp_path: Path) -> None:
    walk(tmp_path, 2)
    path = tmp_path / "checkpoints" / "step-00000002" / "state.json"
    state = json.loads(path.read_text())
    state["settings"] |= {**BLOWN, "steps": 3}
    path.write_text(json.dumps(state))
    with pytest.raises(DataError, match="after step 3") as caught:
        walk(tmp_path, 3, **BLOWN)
    assert "step-00000002 is intact" in (caught.value.fix or "")


def test_a_metrics_file_that_was_lost_begins_anew_without_zeros(tmp_path: Path) -> None:
    walk(tmp_path, 2)
    (tmp_path / "metrics.jsonl").unlink()
    walk(tmp_path, 2)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""
