"""Whether the label probabilities of the evaluated models mean what they say: temperature, reliability, the
rows that a model may decide itself, and whether the teacher's temperature serves the student.

Temperatures and thresholds come from validation rows alone; every figure is that of the held-out rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from mlx_distill.data.evaluation_files import VALID_LABELS, read_lines
from mlx_distill.errors import DataError
from mlx_distill.infer.label_temperature import (
    log_table,
    read_label_temperature,
    usable_temperature,
    what_is_asked,
)
from mlx_distill.metrics.calibration import (
    auto_decidable,
    calibration_error,
    class_numbers,
    fit_temperature,
    reliability,
    risk_coverage,
    scale,
)
from mlx_distill.metrics.classification import Row
from mlx_distill.metrics.paired import compare_means
from mlx_distill.tasks.task import Task

TEACHER = "teacher"
MAX_ERROR = 0.05
"""The error that a model may have on the rows that it decides itself."""
CURVE_POINTS = 200


@dataclass(frozen=True)
class LabelTable:
    """Log-probabilities of the labels of some rows with a true label.

    Attributes:
        log_probs: One row each.
        truth: The number of each row's true label.
        ids: Of the rows.
        clusters: The value of the task's cluster field, or None.
    """

    log_probs: Float[np.ndarray, "n c"]
    truth: Int[np.ndarray, " n"]
    ids: Sequence[str]
    clusters: Sequence[Any]


def label_table(rows: Sequence[Row], task: Task) -> LabelTable | None:
    """The rows with label probabilities and a true label; None where there are none.

    Args:
        rows: With ``id``, ``label_probs``, ``truth`` (the true answer, or its label) and ``fields``.
        task: Names the labels.
    """
    truths = [row.get("truth") for row in rows]
    names = [truth.get(task.label) if isinstance(truth, Mapping) else truth for truth in truths]
    numbers = class_numbers(names, task.labels)
    used = [i for i, row in enumerate(rows) if row.get("label_probs") and numbers[i] >= 0]
    if not used:
        return None
    return LabelTable(
        log_table([rows[i]["label_probs"] for i in used], task.labels),
        numbers[used],
        [str(rows[i]["id"]) for i in used],
        [(rows[i].get("fields") or {}).get(task.cluster) if task.cluster else None for i in used],
    )


def calibration_figures(
    models: Mapping[str, Sequence[Row]],
    evaluations: Mapping[str, Path],
    folders: Mapping[str, Path],
    task: Task,
    *,
    confidence: float = 0.95,
) -> dict[str, dict[str, Any] | None]:
    """The calibration of each model, None where no row has label probabilities and a true label.

    Args:
        models: Model name to its predictions on the held-out rows.
        evaluations: The folder of each model's evaluation.
        folders: The folder of each model.
        task: Of the predictions.
        confidence: Level of the intervals.

    Returns:
        Of each model ``n``; ``temperature`` and the ``fitted_rows`` behind it, or the ``reason`` why there is
        none; ``before`` and ``after`` (likelihood, calibration error, Brier score); ``reliability`` with the
        band of a calibrated model, and ``risk_coverage``, both at the temperature; ``auto_decidable`` at
        :data:`MAX_ERROR`; and ``transfer``, see :func:`transferred`.
    """
    tables = {name: label_table(rows, task) for name, rows in models.items()}
    out: dict[str, dict[str, Any] | None] = {}
    for name, table in tables.items():
        valid = _valid_table(evaluations[name], task)
        out[name] = None if table is None else _figures(table, valid, folders[name], task, confidence)
    teacher = (out.get(TEACHER) or {}).get("temperature")
    for name, table in tables.items():
        figures = out[name]
        if table is not None and figures is not None and teacher and name != TEACHER:
            figures["transfer"] = transferred(table, figures["temperature"] or 1.0, teacher, confidence)
    return out


def _valid_table(evaluation: Path, task: Task) -> LabelTable | None:
    """The labels of the validation rows that an evaluation scored for this task and prompt."""
    read = read_lines(evaluation / VALID_LABELS)
    if read is None or read[0]["asked"] != what_is_asked(task):
        return None
    return label_table(read[1], task)


def _figures(
    table: LabelTable, valid: LabelTable | None, folder: Path, task: Task, confidence: float
) -> dict[str, Any]:
    temperature, fitted_rows, reason = _temperature(valid, folder, task)
    used = temperature or 1.0
    probabilities = np.exp(scale(table.log_probs, used))
    curve = risk_coverage(probabilities, table.truth)
    after = calibration_error(table.log_probs, table.truth, temperature) if temperature else None
    decided = None
    if valid is not None:
        of_valid = np.exp(scale(valid.log_probs, used))
        decided = asdict(
            auto_decidable(
                of_valid,
                valid.truth,
                probabilities,
                table.truth,
                max_error=MAX_ERROR,
                confidence=confidence,
            )
        )
    return {
        "n": len(table.truth),
        "temperature": temperature,
        "reason": reason,
        "fitted_rows": fitted_rows,
        "before": asdict(calibration_error(table.log_probs, table.truth)),
        "after": asdict(after) if after else None,
        "reliability": asdict(reliability(probabilities, table.truth, confidence=confidence)),
        "risk_coverage": _thinned(curve.coverage, curve.risk),
        "auto_decidable": decided,
        "transfer": None,
    }


def _temperature(
    valid: LabelTable | None, folder: Path, task: Task
) -> tuple[float | None, int | None, str | None]:
    """The temperature in the model's folder, else one fitted to the validation rows of its evaluation; the
    rows behind it; and why there is none.
    """
    fitted = read_label_temperature(folder)
    if fitted is not None or valid is None:
        temperature, reason = usable_temperature(fitted, folder, task, "none")
        return temperature, fitted.rows if fitted else None, reason
    try:
        return fit_temperature(valid.log_probs, valid.truth), len(valid.truth), None
    except DataError as error:
        return None, len(valid.truth), error.message


def transferred(table: LabelTable, own: float, teacher: float, confidence: float) -> dict[str, Any]:
    """Whether another model's temperature serves this one.

    Args:
        table: The held-out rows.
        own: The model's own temperature, 1 where none was fitted.
        teacher: The temperature of the teacher.
        confidence: Level of the interval.

    Returns:
        ``temperature``: the teacher's; ``nll``: the negative log-likelihood at it; ``difference``: that minus
        the one at the model's own temperature, paired, above 0 where the teacher's is worse.
    """
    rows = np.arange(len(table.truth))
    at_teacher, at_own = (-scale(table.log_probs, t)[rows, table.truth] for t in (teacher, own))
    clusters = table.clusters if any(value is not None for value in table.clusters) else None
    compared = compare_means(at_teacher.tolist(), at_own.tolist(), clusters=clusters, confidence=confidence)
    return {
        "temperature": teacher,
        "nll": float(at_teacher.mean()),
        "difference": compared["difference"],
    }


def _thinned(coverage: Sequence[float], risk: Sequence[float]) -> list[list[float]]:
    """At most :data:`CURVE_POINTS` points of the curve, evenly by coverage, the last one among them."""
    points = [[x, y] for x, y in zip(coverage, risk, strict=True)]
    if len(points) <= CURVE_POINTS:
        return points
    wanted = np.searchsorted(coverage, np.linspace(0, 1, CURVE_POINTS), side="left")
    chosen = sorted({min(int(i), len(points) - 1) for i in wanted} | {len(points) - 1})
    return [points[i] for i in chosen]
