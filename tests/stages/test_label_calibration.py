"""The stages that write a student fit the temperature of its label probabilities."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.small_chain import RecordedProgress, finished, make_context

import mlx_distill as md
from mlx_distill.infer.label_temperature import LABEL_TEMPERATURE, log_table, read_label_temperature
from mlx_distill.metrics.calibration import MIN_ROWS, class_numbers, fit_temperature
from mlx_distill.models.load import load
from mlx_distill.report.page import render_html
from mlx_distill.stages.label_calibration import calibrate_labels
from mlx_distill.storage import read_json, read_jsonl, write_jsonl
from mlx_distill.text import percent

pytestmark = pytest.mark.slow


def test_too_few_validation_rows_are_recorded_and_reported() -> None:
    out = finished() / "out"
    valid = len(list(read_jsonl(out / "data" / "valid.jsonl")))
    assert 0 < valid < MIN_ROWS
    for name in ("student", "quantized"):
        fitted = read_label_temperature(out / name)
        assert fitted is not None and fitted.temperature is None and fitted.rows == valid
        assert f"{valid} rows" in str(fitted.reason)
    report = read_json(out / "report.json")
    entry = report["metrics"]["student"]["calibration"]
    assert entry["temperature"] is None and entry["after"] is None and entry["before"]["nll"] > 0
    assert "Calibration error" in render_html(report)
    entry |= {"temperature": 2.0, "fitted_rows": 90, "after": {**entry["before"], "ece": 0.0123}}
    page = render_html(report)
    assert percent(0.0123) in page and "90 validation rows" in page


def test_the_temperature_is_that_of_the_validation_rows_labels(run_copy: Path) -> None:
    """The rows' labels are drawn from the student's own distribution at temperature 2."""
    context = make_context(run=run_copy)
    task, random = context.task, np.random.default_rng(0)
    valid = [row for _, row in read_jsonl(run_copy / "data" / "train.jsonl")][:80]
    student = run_copy / "student"
    plain = md.classify(student, task, valid, temperature=1.0, progress=RecordedProgress())
    table = log_table([c.probabilities or {} for c in plain], task.labels)
    drawn = (table / 2 + random.gumbel(size=table.shape)).argmax(axis=1)
    rows = [{**row, "answer": {task.label: task.labels[i]}} for row, i in zip(valid, drawn, strict=True)]
    write_jsonl(run_copy / "data" / "valid.jsonl", [*rows, {**valid[0], "answer": None}])
    facts = calibrate_labels(context, student, "distill", *load(student))
    fitted = read_label_temperature(student)
    numbers = class_numbers([str(row["answer"][task.label]) for row in rows], task.labels)
    assert fitted is not None and fitted.rows == len(rows)
    assert fitted.temperature == pytest.approx(fit_temperature(table, numbers), rel=1e-3)
    assert facts == {"label_temperature": fitted.temperature}
    (note,) = context.progress.notes  # type: ignore[attr-defined]
    assert f"temperature {fitted.temperature:.3g}" in note and "negative log-likelihood" in note
    assert all(c.calibrated for c in md.classify(student, None, valid[:3], progress=RecordedProgress()))


def test_nothing_is_written_where_labels_cannot_be_scored(run_copy: Path, folder: Path) -> None:
    context = make_context(run=run_copy)
    schema = json.loads(json.dumps(context.task.schema))
    schema["properties"] = {"why": {"type": "string"}, **schema["properties"]}
    model, tokenizer = load(run_copy / "student")
    for task in (replace(context.task, label=None), replace(context.task, schema=schema)):
        assert calibrate_labels(replace(context, task=task), folder, "distill", model, tokenizer) == {}
        assert not (folder / LABEL_TEMPERATURE).exists()
