"""Rows by the kind of their error, as a task defines them, and files for relabelling."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mlx_distill.evaluate.conditions import INVALID, Condition
from mlx_distill.metrics.classification import Row, clusters_of
from mlx_distill.metrics.clusters import share_estimate
from mlx_distill.metrics.intervals import Estimate
from mlx_distill.storage import write_jsonl, write_text
from mlx_distill.tasks.task import Task

MAX_IDS = 40
"""The number of ids of each category in the report; the files have all rows."""
FOLDER = "errors"
_COLUMNS = ("id", "set", "categories", "title", "input", "truth", "answer", "error", "text")


def parse_categories(task: Task) -> dict[str, Condition]:
    """The conditions of a task's error categories by name, ``invalid`` last: answers that are not valid.

    Raises:
        ConfigError: a condition that is wrong, with its place.
    """
    if not task.error_categories:
        return {}
    properties = task.schema["properties"]
    out = {
        name: Condition(raw, properties, f"task {task.name!r}: error_categories.{name}")
        for name, raw in task.error_categories.items()
    }
    invalid = Condition({"answer": INVALID}, properties, INVALID)
    return out if INVALID in out else {**out, INVALID: invalid}


def error_categories(rows: Sequence[Row], task: Task, confidence: float = 0.95) -> dict[str, Any]:
    """How many rows have each kind of error.

    Args:
        rows: Predictions. Of rows without a true answer only invalid answers are errors.
        task: Defines the categories.
        confidence: Level of the intervals.

    Returns:
        For each category ``count``; ``rate``, of all rows with a true answer; ``rate_where_possible``, of the
        rows whose true answer fits the conditions on it (None for a category without such conditions): the
        share of songs with a true score below 80 that are given 95 and more; and ``ids``, the first ones.
    """
    out = {}
    for name, condition in parse_categories(task).items():
        counted = [row for row in rows if row.get("truth") is not None or name == INVALID]
        possible = [row for row in counted if condition.applies(row)]
        errors = [row for row in counted if condition.holds(row)]
        share = partial(_share, condition, task=task, confidence=confidence)
        out[name] = {
            "count": len(errors),
            "rate": share(counted),
            "rate_where_possible": share(possible) if condition.has_truth else None,
            "ids": [row["id"] for row in errors[:MAX_IDS]],
        }
    return out


def _share(condition: Condition, rows: Sequence[Row], task: Task, confidence: float) -> Estimate:
    holds = [condition.holds(row) for row in rows]
    return share_estimate(holds, clusters_of(rows, task.cluster), confidence)


def error_rows(rows: Sequence[Row], task: Task) -> list[dict[str, Any]]:
    """The rows with an error of some category, for relabelling: ``id``, ``set``, ``categories``, ``title``,
    ``input``, ``fields``, ``truth``, ``answer``, ``error`` and ``text``.
    """
    conditions = parse_categories(task)
    out = []
    for row in rows:
        has_truth = row.get("truth") is not None
        kinds = [
            name for name, one in conditions.items() if (has_truth or name == INVALID) and one.holds(row)
        ]
        if kinds:
            copied = {key: row.get(key) for key in (*_COLUMNS, "fields")}
            out.append({**copied, "categories": kinds})
    return out


def write_error_rows(folder: Path, models: Mapping[str, Sequence[Row]], task: Task) -> list[Path]:
    """Write the rows with errors of each model as ``errors/MODEL.jsonl`` and, for a spreadsheet, ``.csv``.

    A task without error categories gets no files, and those of models that are no more measured are removed.

    Args:
        folder: The run's folder.
        models: Model name to its predictions.
        task: Defines the categories.

    Returns:
        The files.
    """
    target = folder / FOLDER
    written = []
    for name, rows in models.items() if task.error_categories else ():
        errors = error_rows(rows, task)
        target.mkdir(parents=True, exist_ok=True)
        path = target / f"{name}.jsonl"
        write_jsonl(path, errors)
        write_text(path.with_suffix(".csv"), csv_text(errors, _COLUMNS))
        written += [path, path.with_suffix(".csv")]
    for path in [*target.glob("*.jsonl"), *target.glob("*.csv")]:
        if path not in written:
            path.unlink()
    return written


def csv_text(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Rows as CSV; lists and mappings are JSON. A cell that a spreadsheet would take for a formula, which
    begins with ``=``, ``+``, ``-`` or ``@``, gets a quote before it.

    >>> print(csv_text([{"id": 1, "text": "=1+1"}], ["id", "text"]).replace("\\r", ""), end="")
    id,text
    1,'=1+1
    """
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(columns)
    for row in rows:
        writer.writerow([_cell(row.get(name)) for name in columns])
    return out.getvalue()


def _cell(value: Any) -> Any:
    if isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
        value = ", ".join(value)
    elif isinstance(value, (list, tuple, Mapping)):
        value = json.dumps(value, ensure_ascii=False)
    if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")):
        return "'" + value
    return value
