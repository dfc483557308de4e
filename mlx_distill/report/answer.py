"""The answer of a report: whether the model that a run is for is as good as the one that it replaces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mlx_distill.evaluate.compare import compare_sides, parse_margin
from mlx_distill.evaluate.comparison_inputs import Side
from mlx_distill.evaluate.row_metrics import find_metric
from mlx_distill.metrics.classification import Row
from mlx_distill.run_models import RESULTS
from mlx_distill.tasks.task import Task

_ANSWER = (
    "verdict",
    "sentence",
    "advice",
    "margin",
    "margin_text",
    "difference",
    "metric",
    "n",
    "provable_margin",
    "rows_needed",
)


def final_pair(models: Sequence[str]) -> tuple[str, str] | None:
    """The model that is replaced, and the one that replaces it: the teacher, and the student, quantized if
    it is; in a run that ends with the teacher, the teacher before fine-tuning and after. None without both.

    >>> final_pair(["teacher", "student_before", "student"])
    ('teacher', 'student')
    >>> final_pair(["teacher_before", "teacher"])
    ('teacher_before', 'teacher')
    """
    final = next((name for name in reversed(RESULTS) if name in models), "teacher")
    replaced = "teacher_before" if final == "teacher" else "teacher"
    return (replaced, final) if {replaced, final} <= {*models} else None


def compare_final(
    models: Mapping[str, Sequence[Row]], task: Task, set_name: str, margin: str | None, confidence: float
) -> dict[str, Any] | None:
    """Compare the final model with the one that it replaces on the rows of one set.

    Args:
        models: Model name to its predictions.
        task: Names the label, or of a task without one the fields of the answer.
        set_name: The set.
        margin: How much worse is still as good, such as ``3pt``; None for none.
        confidence: Level of the intervals.

    Returns:
        The comparison, see :func:`mlx_distill.evaluate.compare.compare_sides`; None where one of the two was
        not measured, or no row has a true answer.

    Raises:
        DataError: the two cannot be compared, such as by a margin that is a share of a rate of 0.
    """
    pair = final_pair([name for name, rows in models.items() if any(row["set"] == set_name for row in rows)])
    if pair is None:
        return None
    replaced, final = (
        Side(name, f"evaluations/{name}", "run", models[name], task, name, name) for name in pair
    )
    metric = find_metric(task, None)
    if all(metric.value(row) is None for row in final.rows if row["set"] == set_name):
        return None
    found = compare_sides(
        replaced,
        final,
        margin=parse_margin(margin) if margin else None,
        set_name=set_name,
        confidence=confidence,
    )
    return found.to_dict() | {"models": list(pair)}


def answer(comparison: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The part of a final comparison that a report states first."""
    return {key: comparison[key] for key in _ANSWER} if comparison else None
