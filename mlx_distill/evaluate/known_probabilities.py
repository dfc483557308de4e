"""Figures of rows whose true answer was drawn from a known probability: such rows have a field
``probabilities``, which holds for the label the exact probability of each class.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from mlx_distill import metrics as m
from mlx_distill.errors import DataError
from mlx_distill.metrics.classification import Row, predicted_label
from mlx_distill.metrics.clusters import number_estimate, share_estimate
from mlx_distill.metrics.known_probabilities import (
    attainable_accuracy,
    divergences,
    exact_calibration_error,
)
from mlx_distill.tasks.task import Task

FIELD = "probabilities"
_TOLERANCE = 1e-3


def exact_probabilities(row: Row, task: Task) -> list[float] | None:
    """The exact probability of each class of a row, in the order of ``task.labels``; None where it has none.

    Raises:
        DataError: they are not those of the task's classes, or do not sum to 1.

    >>> schema = {"type": "object", "properties": {"mood": {"enum": ["joy", "fear"]}}}
    >>> task = Task("t", system="", user="{text}", schema=schema, label="mood")
    >>> exact_probabilities({"fields": {"probabilities": {"mood": {"joy": 0.75, "fear": 0.25}}}}, task)
    [0.75, 0.25]
    """
    known = (row.get("fields") or {}).get(FIELD)
    found = known.get(task.label) if isinstance(known, dict) else None
    if not isinstance(found, dict):
        return None
    values = [found.get(name) for name in task.labels]
    numbers = [float(v) for v in values if isinstance(v, (int, float)) and 0 <= v <= 1]
    if found.keys() != set(task.labels) or len(numbers) < len(values) or abs(sum(numbers) - 1) > _TOLERANCE:
        raise DataError(
            f"row {row.get('id')!r}: {FIELD}: {task.label} is not the exact distribution over the classes "
            f"{', '.join(task.labels)}",
            fix=f"give each class its probability, or rename the field {FIELD!r} if it holds something else",
        )
    return numbers


def kl_values(rows: Sequence[Row], task: Task) -> list[float | None]:
    """For each row the KL divergence in nats from the exact probabilities to the model's label probabilities;
    None where either is missing.
    """
    out: list[float | None] = []
    for row in rows:
        exact, model = exact_probabilities(row, task), row.get("label_probs")
        if exact is None or not model:
            out.append(None)
            continue
        own = np.array([[float(model.get(name, 0.0)) for name in task.labels]])
        out.append(float(divergences(np.array([exact]), own / own.sum())[0]))
    return out


def expected_values(rows: Sequence[Row], task: Task) -> list[float | None]:
    """For each row the exact probability that its answer's label is right: 0 of an invalid answer, None where
    the row has no exact probabilities.
    """
    out: list[float | None] = []
    for row in rows:
        exact, label = exact_probabilities(row, task), predicted_label(row)
        right = 0.0 if exact is None or label not in task.labels else exact[task.labels.index(label)]
        out.append(None if exact is None else right)
    return out


def known_figures(rows: Sequence[Row], task: Task, confidence: float = 0.95) -> dict[str, Any] | None:
    """The figures of a model against exact probabilities; None where no row has them.

    Args:
        rows: Its predictions.
        task: Names the label and its classes.
        confidence: Level of the intervals.

    Returns:
        ``n``; ``attainable_accuracy``: that of the most probable class of each row, which no model exceeds on
        average; ``expected_accuracy``: of the model's labels, without the luck of the draws;
        ``best_label``: how often the model's label is the most probable one; ``kl_to_truth`` in nats and
        ``calibration_error`` of its label probabilities, None where it has none.
    """
    exact = [exact_probabilities(row, task) for row in rows]
    kept = [(row, p) for row, p in zip(rows, exact, strict=True) if p is not None]
    if not kept:
        return None
    known, table = [row for row, _ in kept], np.array([p for _, p in kept])
    clusters = m.clusters_of(known, task.cluster)
    labels = [predicted_label(row) for row in known]
    best = [float(label == task.labels[p.argmax()]) for label, p in zip(labels, table, strict=True)]
    out: dict[str, Any] = {
        "n": len(known),
        "attainable_accuracy": share_estimate(attainable_accuracy(table).tolist(), clusters, confidence),
        "expected_accuracy": share_estimate(
            [value or 0.0 for value in expected_values(known, task)], clusters, confidence
        ),
        "best_label": share_estimate(best, clusters, confidence),
        "kl_to_truth": None,
        "calibration_error": None,
    }
    scored = [i for i, row in enumerate(known) if row.get("label_probs")]
    if scored:
        values = [value for value in kl_values(known, task) if value is not None]
        own = m.clusters_of([known[i] for i in scored], task.cluster)
        out["kl_to_truth"] = number_estimate(values, own, confidence, bounds=(0.0, math.inf))
        model = np.array([[float(known[i]["label_probs"].get(c, 0.0)) for c in task.labels] for i in scored])
        model /= model.sum(axis=1, keepdims=True)
        out["calibration_error"] = exact_calibration_error(table[scored], model)
    return out
