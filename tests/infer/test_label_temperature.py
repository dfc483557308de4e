from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.small_chain import RecordedProgress

import mlx_distill as md
from mlx_distill.config import ASSETS
from mlx_distill.errors import DataError
from mlx_distill.infer.label_temperature import (
    LABEL_TEMPERATURE,
    LabelTemperature,
    fit_label_temperature,
    read_label_temperature,
    usable_temperature,
    write_label_temperature,
)
from mlx_distill.metrics.calibration import MIN_ROWS
from mlx_distill.models.folder import source_key
from mlx_distill.tasks.task import Task, load_task

ITEMS = [{"id": i, "text": f"Gardeners are kind {i}.", "group": "gardeners"} for i in range(3)]


@pytest.fixture(scope="module")
def task() -> Task:
    return load_task("moderation")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(ASSETS / "models" / "tiny-qwen3", tmp_path / "model"))


def distributions(task: Task, n: int, temperature: float) -> tuple[list[dict[str, float]], list[str]]:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(n, len(task.labels))) * 1.5
    truth = (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)
    p = np.exp(logits * temperature)
    p /= p.sum(axis=1, keepdims=True)
    return [dict(zip(task.labels, map(float, line), strict=True)) for line in p], [
        task.labels[i] for i in truth
    ]


def fitted(task: Task, folder: Path, n: int = 400, **changes: Any) -> LabelTemperature:
    return replace(fit_label_temperature(*distributions(task, n, 3.0), task, folder), **changes)


def test_what_is_fitted_is_read_back_and_used(task: Task, folder: Path) -> None:
    write_label_temperature(folder, fitted(task, folder))
    known = read_label_temperature(folder)
    assert known == fitted(task, folder) and known.rows == 400
    assert known.temperature == pytest.approx(3.0, rel=0.25)
    assert known.before and known.after and known.after.nll < known.before.nll
    found = md.classify(folder, task, ITEMS, progress=(progress := RecordedProgress()))
    plain = md.classify(folder, task, ITEMS, temperature=1.0, progress=RecordedProgress())
    assert all(c.calibrated for c in found) and not any(c.calibrated for c in plain)
    assert any("calibrated at temperature" in note for note in progress.notes)
    for own, other in zip(found, plain, strict=True):
        assert own.probabilities and other.probabilities
        p = np.array(list(other.probabilities.values())) ** (1 / known.temperature)
        np.testing.assert_allclose(list(own.probabilities.values()), p / p.sum(), atol=1e-6)
        assert own.label == other.label


def test_a_temperature_for_something_else_is_not_used(task: Task, folder: Path) -> None:
    known = fitted(task, folder)
    assert usable_temperature(known, folder, task, "none") == (known.temperature, None)
    other = replace(task, user="Is this hostile? {text}")
    cases = [
        (known, task, "tokens", "normalize"),
        (known, other, "none", "another task or prompt"),
        (replace(known, weights="0"), task, "none", "weights have changed"),
        (replace(known, temperature=None, reason="3 rows"), task, "none", "3 rows"),
        (None, task, "none", LABEL_TEMPERATURE),
    ]
    for entry, asked, normalize, reason in cases:
        temperature, why = usable_temperature(entry, folder, asked, normalize)
        assert temperature is None and reason in str(why)
    weights = next(folder.glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert "weights have changed" in str(usable_temperature(known, folder, task, "none")[1])


def test_a_classification_says_where_it_is_not_calibrated(task: Task, folder: Path) -> None:
    (found,) = md.classify(folder, task, ITEMS[:1], progress=(progress := RecordedProgress()))
    assert not found.calibrated and any("probabilities: not calibrated" in n for n in progress.notes)


def test_too_few_rows_are_recorded_with_the_reason(task: Task, folder: Path) -> None:
    known = fitted(task, folder, n=MIN_ROWS - 1)
    assert known.temperature is None and known.after is None and known.before is not None
    assert f"{MIN_ROWS - 1} rows" in str(known.reason)
    probabilities, truth = distributions(task, 60, 2.0)
    known = fit_label_temperature([None, *probabilities[1:]], [truth[0], *[None] * 59], task, folder)
    assert known.rows == 0 and known.before is None


def test_the_file_is_no_part_of_the_model(task: Task, folder: Path) -> None:
    key = source_key(folder)
    write_label_temperature(folder, fitted(task, folder))
    assert source_key(folder) == key


def test_a_file_of_another_format_is_refused(folder: Path) -> None:
    (folder / LABEL_TEMPERATURE).write_text(json.dumps({"format": 0}))
    with pytest.raises(DataError, match="format 1"):
        read_label_temperature(folder)
