"""Calibration of the evaluated models, by what their evaluations kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.small_run import LABELS, TASK

from mlx_distill.data.evaluation_files import VALID_LABELS, read_lines, write_lines
from mlx_distill.errors import DataError
from mlx_distill.evaluate.calibration import CURVE_POINTS, calibration_figures
from mlx_distill.infer.label_temperature import (
    fit_label_temperature,
    what_is_asked,
    write_label_temperature,
)
from mlx_distill.metrics.calibration import auto_decidable, calibration_error, fit_temperature
from mlx_distill.tasks.task import Task, parse_task


@pytest.fixture
def task() -> Task:
    return parse_task(TASK, "task")


def rows(n: int, temperature: float, seed: int, spread: float = 3.0) -> list[dict[str, Any]]:
    """Predictions of a model whose confidence is that of a calibrated one, sharpened by a temperature."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, 2)) * spread
    truth = (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)
    p = np.exp(logits * temperature)
    p /= p.sum(axis=1, keepdims=True)
    return [
        {
            "id": f"r{i}",
            "truth": {"colour": LABELS[truth[i]]},
            "label_probs": dict(zip(LABELS, map(float, p[i]), strict=True)),
            "fields": {},
        }
        for i in range(n)
    ]


def arrays(some: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    table = np.array([[row["label_probs"][label] for label in LABELS] for row in some])
    return table, np.array([LABELS.index(row["truth"]["colour"]) for row in some])


def evaluation(folder: Path, valid: list[dict[str, Any]], task: Task) -> Path:
    folder.mkdir(parents=True)
    lines = [{**row, "truth": row["truth"]["colour"]} for row in valid]
    write_lines(folder / VALID_LABELS, {"model": "x", "asked": what_is_asked(task)}, lines)
    return folder


def test_a_model_without_a_temperature_of_its_own_gets_one_from_its_validation_rows(
    tmp_path: Path, task: Task
) -> None:
    valid, test = rows(300, 2.0, 1), rows(400, 2.0, 2)
    folder = evaluation(tmp_path / "teacher", valid, task)
    more = [{**test[0], "label_probs": None}, {**test[0], "truth": None}]
    found = calibration_figures({"teacher": test + more}, {"teacher": folder}, {"teacher": tmp_path}, task)
    entry = found["teacher"]
    assert entry is not None and entry["n"] == 400 and entry["fitted_rows"] == 300
    table, truth = arrays(valid)
    fitted = fit_temperature(np.log(table), truth)
    assert entry["temperature"] == pytest.approx(fitted) == pytest.approx(2.0, rel=0.3)
    table, truth = arrays(test)
    for key, temperature in (("before", 1.0), ("after", fitted)):
        assert entry[key]["nll"] == pytest.approx(calibration_error(np.log(table), truth, temperature).nll)
    # Calibrated, so within its null band; uncalibrated it was not.
    assert entry["reliability"]["ece"] < entry["reliability"]["null_high"]
    assert entry["before"]["ece"] > entry["reliability"]["null_high"]
    assert entry["transfer"] is None
    assert len(entry["risk_coverage"]) <= CURVE_POINTS + 1 and entry["risk_coverage"][-1][0] == 1.0


def test_rows_that_a_model_may_decide_are_chosen_on_validation_rows(tmp_path: Path, task: Task) -> None:
    valid, test = rows(600, 1.0, 3, spread=4.0), rows(600, 1.0, 4, spread=4.0)
    folder = evaluation(tmp_path / "teacher", valid, task)
    entry = calibration_figures({"teacher": test}, {"teacher": folder}, {"teacher": tmp_path}, task)[
        "teacher"
    ]
    assert entry is not None and entry["temperature"]
    tables = [arrays(some) for some in (valid, test)]
    scaled = [(p ** (1 / entry["temperature"])) for p, _ in tables]
    scaled = [p / p.sum(axis=1, keepdims=True) for p in scaled]
    expected = auto_decidable(scaled[0], tables[0][1], scaled[1], tables[1][1])
    assert entry["auto_decidable"]["threshold"] == pytest.approx(expected.threshold)
    assert entry["auto_decidable"]["coverage"] == expected.coverage
    assert 0.2 < entry["auto_decidable"]["coverage"]["value"] < 1.0


def test_the_teachers_temperature_serves_a_student_only_if_it_is_its_own(tmp_path: Path, task: Task) -> None:
    sharpness = {"teacher": 3.0, "student": 3.0, "quantized": 1.0}
    models = {name: rows(400, t, 5) for name, t in sharpness.items()}
    folders = {name: evaluation(tmp_path / name, rows(400, t, 6), task) for name, t in sharpness.items()}
    found = calibration_figures(models, folders, dict.fromkeys(models, tmp_path), task)
    student, quantized = found["student"], found["quantized"]
    assert found["teacher"] and student and quantized
    assert student["transfer"]["temperature"] == found["teacher"]["temperature"]
    assert student["transfer"]["difference"]["value"] == pytest.approx(0.0, abs=1e-6)
    # At the teacher's temperature the calibrated model is far too unsure.
    assert quantized["transfer"]["difference"]["low"] > 0.02


def test_the_temperature_in_the_models_folder_comes_first(tmp_path: Path, task: Task) -> None:
    model = tmp_path / "model"
    model.mkdir()
    known = rows(200, 2.0, 7)
    fitted = fit_label_temperature(
        [row["label_probs"] for row in known], [row["truth"]["colour"] for row in known], task, model
    )
    write_label_temperature(model, fitted)
    folder = evaluation(tmp_path / "student", rows(300, 3.0, 8), task)
    entry = calibration_figures({"student": rows(50, 2.0, 9)}, {"student": folder}, {"student": model}, task)
    assert entry["student"] and entry["student"]["temperature"] == fitted.temperature
    assert entry["student"]["fitted_rows"] == 200


def test_labels_of_another_prompt_are_not_used(tmp_path: Path, task: Task) -> None:
    folder = evaluation(
        tmp_path / "teacher", rows(100, 2.0, 1), parse_task({**TASK, "system": "Other."}, "t")
    )
    entry = calibration_figures(
        {"teacher": rows(50, 2.0, 2)}, {"teacher": folder}, {"teacher": tmp_path}, task
    )
    assert entry["teacher"] and entry["teacher"]["temperature"] is None
    assert entry["teacher"]["auto_decidable"] is None
    without = {**rows(1, 1.0, 0)[0], "label_probs": None}
    assert calibration_figures({"x": [without]}, {"x": folder}, {"x": tmp_path}, task) == {"x": None}


def test_a_file_that_is_cut_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file.jsonl"
    assert read_lines(path) is None
    write_lines(path, {"model": "x"}, [{"id": "a"}, {"id": "b"}])
    assert read_lines(path) == ({"format": 1, "model": "x", "lines": 2}, [{"id": "a"}, {"id": "b"}])
    path.write_text("\n".join(path.read_text().splitlines()[:2]) + "\n")
    with pytest.raises(DataError, match="not a whole file of format 1"):
        read_lines(path)
