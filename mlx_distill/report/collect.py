"""The report of a run as a dict: metrics of each model, comparisons, disagreements, provenance.

All metrics are computed from ``predictions.jsonl`` by functions of :mod:`mlx_distill.metrics`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mlx_distill import metrics as m
from mlx_distill.data.predictions import constrained_rows, read_predictions
from mlx_distill.errors import ConfigError
from mlx_distill.infer.label_temperature import measured_calibration
from mlx_distill.metrics.classification import Row
from mlx_distill.metrics.paired import Comparison
from mlx_distill.report import provenance
from mlx_distill.report.diagnosis import diagnose
from mlx_distill.report.tables import main_metrics
from mlx_distill.run_models import RESULTS, run_model
from mlx_distill.tasks.task import Task

FORMAT = 1
MAIN_SET = "test"
TEACHER = "teacher"
# Of these the answers under the grammar of the task have figures of their own.
_CONSTRAINED = (
    "json_valid",
    "accuracy",
    "verdict_agreement",
    "agreement",
    "answer_f1",
    "teacher_answer_f1",
    "exact_match",
)
MAX_DISAGREEMENTS = 40
"""The number of disagreements that are listed for each model."""


def build_report(
    run: str | Path,
    recipe: Mapping[str, Any],
    task: Task,
    evaluations: Mapping[str, str | Path],
    *,
    confidence: float = 0.95,
    goals: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Measure every model of a run and collect the facts about it.

    Args:
        run: The run's folder: sizes, training curves and manifests are read from its stages.
        recipe: The recipe as a plain mapping (``config.to_mapping(recipe)``).
        task: The task of the run.
        evaluations: Model name to its ``predictions.jsonl`` (or the folder that holds it), in the order of
            the tables. ``teacher`` is the reference of every agreement; :mod:`mlx_distill.run_models` says
            which of the others are controls.
        confidence: Level of the intervals.
        goals: ``{"model", "metric", "at_least" or "at_most"}``: limits to show as met or missed.

    Returns:
        The report as plain JSON values: ``metrics`` (of the set ``test``), ``by_set``, ``comparisons``,
        ``disagreements``, ``sizes``, ``curves``, ``provenance``, ``diagnosis`` (what is wrong with the
        result). A rate is ``{"value", "low", "high", "n"}``; what was not measured is None, and what the task
        does not have is absent.

    Raises:
        DataError: predictions that are empty, of another format, or lack a field, with file and line.
        ConfigError: no evaluations.
    """
    if not evaluations:
        raise ConfigError(
            "a report needs the predictions of at least one model", fix="run: mlx-distill evaluate RECIPE"
        )
    run = Path(run)
    headers, rows, folders = {}, {}, {}
    for name, path in evaluations.items():
        path = Path(path)
        headers[name], rows[name] = read_predictions(path)
        folders[name] = path if path.is_dir() else path.parent
    sets = _count_sets(rows.values())
    main = next(iter(sets))
    constrained = {name for name, header in headers.items() if header["constrained"]}
    by_set = {name: _set_metrics(rows, constrained, name, task, confidence) for name in sets}
    for model, figures in by_set[main].items():
        figures["peak_memory_gb"] = provenance.peak_memory_gb(headers[model], folders[model])
        figures |= provenance.speed(folders[model])
        if task.label:
            figures["calibration"] = measured_calibration(
                _in_set(rows[model], main), run / run_model(model).folder, task
            )
    report = {
        "format": FORMAT,
        "name": str(recipe.get("name") or run.resolve().name),
        "description": str(recipe.get("description") or ""),
        "task": task.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "confidence": confidence,
        "main_set": main,
        "sets": sets,
        "task_details": _task_details(task),
        "models": list(evaluations),
        "controls": [name for name in evaluations if run_model(name).role == "control"],
        "metrics": by_set[main],
        "by_set": by_set,
        "comparisons": _comparisons(rows, main, task, confidence),
        "goals": [_check_goal(goal, by_set[main]) for goal in goals],
        "disagreements": {
            name: _disagreements(rows[name], rows[TEACHER], task)
            for name in rows
            if TEACHER in rows and name in RESULTS
        },
        "sizes": provenance.sizes(run, list(evaluations)),
        "curves": provenance.curves(run),
        "training": provenance.training(run),
        "quantization": provenance.quantization(run),
        "provenance": provenance.provenance(run, recipe, headers, folders),
        "majority": _majority(by_set[main]),
        "teacher_answers": provenance.teacher_answers(run),
    }
    return report | {"diagnosis": diagnose(report)}


def _majority(metrics: Mapping[str, Any]) -> dict[str, Any] | None:
    """The most frequent true label of the held-out rows and its share; None without labels."""
    confusion = next((figures["confusion"] for figures in metrics.values() if "confusion" in figures), None)
    if not confusion or not confusion["n"]:
        return None
    counts = [sum(row) for row in confusion["counts"]]
    return {"label": confusion["labels"][counts.index(max(counts))], "value": max(counts) / confusion["n"]}


def _count_sets(models: Iterable[Sequence[Row]]) -> dict[str, int]:
    """Items of each set: the main set first, then in the order of their first row."""
    counts: dict[str, int] = {}
    for rows in models:
        for name in dict.fromkeys(row["set"] for row in rows):
            counts[name] = max(counts.get(name, 0), len(_in_set(rows, name)))
    return dict(sorted(counts.items(), key=lambda item: item[0] != MAIN_SET))


def _in_set(rows: Sequence[Row], name: str) -> list[Row]:
    return [row for row in rows if row["set"] == name]


def _set_metrics(
    models: Mapping[str, Sequence[Row]], constrained: Set[str], name: str, task: Task, confidence: float
) -> dict[str, Any]:
    """The metrics of each model that has rows in one set; of some also those of the answers under the
    grammar.
    """
    teacher = _in_set(models[TEACHER], name) if TEACHER in models else None
    out = {}
    for model, rows in models.items():
        if set_rows := _in_set(rows, name):
            reference = None if model == TEACHER else teacher
            out[model] = model_metrics(set_rows, reference, task, confidence=confidence)
            if model in constrained:
                out[model] |= _constrained_metrics(set_rows, reference, task, out[model], confidence)
    return out


def model_metrics(
    rows: Sequence[Row], teacher: Sequence[Row] | None, task: Task, *, confidence: float = 0.95
) -> dict[str, Any]:
    """All metrics of one model on one set.

    Args:
        rows: Its predictions.
        teacher: The teacher's predictions on the same items; None (the model is the teacher, or there is
            none) leaves the metrics against it None.
        task: Names the label, its classes, the positive ones, the score, slices and group.
        confidence: Level of the intervals.
    """
    mae = m.score_mae(rows, task.score, confidence=confidence)
    of_task = (
        _label_metrics(rows, teacher, task, task.label, confidence)
        if task.label
        else _answer_metrics(rows, teacher, task, confidence)
    )
    return {
        "n": len(rows),
        "score_mae": mae["value"],
        "score_mae_interval": mae,
        "score_gap": m.score_gap(rows, teacher, confidence=confidence) if teacher and task.score else None,
        "json_valid": m.json_valid(rows, confidence=confidence),
        "invalid": _invalid_example(rows),
        **m.latency(rows),
        "peak_memory_gb": None,
        **dict.fromkeys(provenance.SPEED),
        **dict.fromkeys(
            f"{key}_constrained" for key in _CONSTRAINED if key == "json_valid" or key in of_task
        ),
        "constraint": None,
        **_field_metrics(rows, teacher, task, confidence),
        **of_task,
    }


def _constrained_metrics(
    rows: Sequence[Row],
    teacher: Sequence[Row] | None,
    task: Task,
    free: Mapping[str, Any],
    confidence: float,
) -> dict[str, Any]:
    """The metrics of the answers under the grammar of the task, and as paired comparisons what it changes.

    ``constraint`` has ``changed``, the number of rows whose answer it changes; ``invalid`` as in
    :func:`model_metrics`; and of each compared metric the rate under it minus the free one.
    """
    others = constrained_rows(rows)
    figures = model_metrics(others, teacher, task, confidence=confidence)
    metrics = [key for key in _CONSTRAINED if key in free]
    compared = dict(zip(main_metrics(_task_details(task)), (None, teacher), strict=True))
    return {
        **{f"{key}_constrained": figures[key] for key in metrics},
        "constraint": {
            "changed": sum(row["constrained"] is not None for row in rows),
            "invalid": figures["invalid"],
            **{
                key: _compare(others, rows, reference, task, confidence)
                for key, reference in compared.items()
                if reference is not None or free[key] is not None
            },
        },
    }


def _invalid_example(rows: Sequence[Row]) -> dict[str, Any] | None:
    """The most frequent reason of invalid answers, and the first row with it; None where all are valid."""
    found = [(row, str(row.get("error") or "no reason given")) for row in rows if row.get("answer") is None]
    if not found:
        return None
    # Without what differs from row to row: the value, the field's place, the number of characters.
    kinds = [re.sub(r"'[^']*'|\d+", "…", error) for _, error in found]
    kind, count = Counter(kinds).most_common(1)[0]
    row, error = found[kinds.index(kind)]
    return {"reason": kind, "count": count, "id": row["id"], "error": error}


def _field_metrics(
    rows: Sequence[Row], teacher: Sequence[Row] | None, task: Task, confidence: float
) -> dict[str, Any]:
    """Whole answers and their fields against the truth and the teacher."""
    truth, own = m.truth_pairs(rows), m.teacher_pairs(rows, teacher) if teacher else None
    fields: dict[str, Any] = {}
    for name, schema in task.schema["properties"].items():
        free = isinstance(schema, Mapping) and m.is_free(schema)
        fields[name] = {
            "exact": m.exact_match(truth, [name], confidence=confidence),
            "f1": m.field_f1(truth, name, confidence=confidence) if free else None,
            "teacher_exact": m.exact_match(own, [name], confidence=confidence) if own is not None else None,
            "teacher_f1": m.field_f1(own, name, confidence=confidence) if free and own is not None else None,
        }
    return {
        "exact_match": m.exact_match(truth, confidence=confidence),
        "teacher_exact_match": m.exact_match(own, confidence=confidence) if own is not None else None,
        "fields": fields,
    }


def _answer_metrics(
    rows: Sequence[Row], teacher: Sequence[Row] | None, task: Task, confidence: float
) -> dict[str, Any]:
    """The metrics of a task without a label."""
    properties, tolerances, level = *_compared(task), {"confidence": confidence}
    out: dict[str, Any] = {
        "answer_f1": m.answer_f1(m.truth_pairs(rows), properties, tolerances, **level),
        "teacher_answer_f1": None,
        "versus_teacher": None,
        "disagreements": None,
        "by_slice": m.answers_by_slice(rows, teacher, task.slices, properties, tolerances, **level),
    }
    if teacher:
        own = m.teacher_pairs(rows, teacher)
        out["teacher_answer_f1"] = m.answer_f1(own, properties, tolerances, **level)
        out["versus_teacher"] = m.compare_answers(rows, teacher, None, properties, tolerances, **level)
        out["disagreements"] = len(m.differing_answers(rows, teacher, properties, tolerances))
    return out


def _compared(task: Task) -> tuple[Mapping[str, Any], dict[str, float]]:
    """The schemas of the answer's fields, and the tolerance of the score."""
    return task.schema["properties"], {task.score: task.score_tolerance} if task.score else {}


def _label_metrics(
    rows: Sequence[Row], teacher: Sequence[Row] | None, task: Task, label: str, confidence: float
) -> dict[str, Any]:
    """The metrics of a task with a label field."""
    level = {"confidence": confidence}
    out: dict[str, Any] = {
        "accuracy": m.accuracy(rows, label, **level),
        "accuracy_by_distribution": m.accuracy_by_distribution(rows, label, **level),
        "verdict_agreement": None,
        "agreement": None,
        "macro_f1": m.macro_f1(rows, label, task.labels, confidence),
        **_binary_metrics(rows, task, label, confidence),
        "confusion": m.confusion(rows, label, task.labels),
        "teacher_confusion": None,
        "label_kl": None,
        "label_kl_interval": None,
        "versus_teacher": None,
        "disagreements": None,
        "by_slice": m.by_slice(rows, teacher, label, task.slices, **level),
    }
    return out | _teacher_metrics(rows, teacher, task, label, confidence) if teacher else out


def _binary_metrics(rows: Sequence[Row], task: Task, label: str, confidence: float) -> dict[str, Any]:
    """Precision, recall, F1 and error rates, where the task has positive classes."""
    if not task.positive:
        return {}
    counts = m.confusion_counts(rows, label, task.positive)
    out: dict[str, Any] = {
        "precision": m.precision(counts, confidence),
        "recall": m.recall(counts, confidence),
        "f1": m.f1(counts, confidence),
        "false_positive_rate": m.false_positive_rate(counts, confidence),
        "false_negative_rate": m.false_negative_rate(counts, confidence),
        "counts": {
            "true_positives": counts.true_positive,
            "false_positives": counts.false_positive,
            "true_negatives": counts.true_negative,
            "false_negatives": counts.false_negative,
        },
    }
    if task.group:
        out["by_group"] = m.by_group(rows, label, task.positive, task.group, confidence=confidence)
    return out


def _teacher_metrics(
    rows: Sequence[Row], teacher: Sequence[Row], task: Task, label: str, confidence: float
) -> dict[str, Any]:
    """The metrics of a model's labels against its teacher's."""
    labels, level = task.labels, {"confidence": confidence}
    kl = m.label_kl(rows, teacher, labels, **level)
    tolerance = task.score_tolerance if task.score else None
    return {
        "verdict_agreement": m.verdict_agreement(rows, teacher, **level),
        "agreement": m.agreement(rows, teacher, tolerance=tolerance, **level),
        "teacher_confusion": m.teacher_confusion(rows, teacher, label, labels),
        "label_kl": kl["value"],
        "label_kl_interval": kl,
        "versus_teacher": m.accuracy_gain(rows, teacher, label, **level),
        "disagreements": len(m.disagreements(rows, teacher, labels, ())),
    }


def _comparisons(
    models: Mapping[str, Sequence[Row]], name: str, task: Task, confidence: float
) -> list[dict[str, Any]]:
    """Paired comparisons on one set; of a task without a label by the F1 of the answers.

    Agreement with the teacher: after and before distillation, quantized and not, and against each control.
    Accuracy: each model against the teacher.
    """
    if TEACHER not in models:
        return []
    rows = {model: _in_set(predictions, name) for model, predictions in models.items()}
    pairs = [("student", "student_before"), ("quantized", "student")]
    pairs += [("student", model) for model in rows if run_model(model).role == "control"]
    accuracy, agreement = main_metrics(_task_details(task))
    out = []
    for first, second in pairs:
        if first in rows and second in rows:
            result = _compare(rows[first], rows[second], rows[TEACHER], task, confidence)
            if result:
                out.append({"metric": agreement, "first": first, "second": second, **result})
    for first in rows:
        if first != TEACHER:
            result = _compare(rows[first], rows[TEACHER], None, task, confidence)
            if result:
                out.append({"metric": accuracy, "first": first, "second": TEACHER, **result})
    return out


def _compare(
    first: Sequence[Row], second: Sequence[Row], teacher: Sequence[Row] | None, task: Task, confidence: float
) -> Comparison | None:
    """The agreement of two models with the teacher, or without one their accuracy, on the same items."""
    if task.label is None:
        return m.compare_answers(first, second, teacher, *_compared(task), confidence=confidence)
    if teacher is None:
        return m.accuracy_gain(first, second, task.label, confidence=confidence)
    return m.agreement_gain(first, second, teacher, confidence=confidence)


def _check_goal(goal: Mapping[str, Any], metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The goal with the measured value and whether it is met; not met where nothing was measured."""
    bound = "at_least" if "at_least" in goal else "at_most"
    if "model" not in goal or "metric" not in goal or bound not in goal:
        raise ConfigError(
            f"a goal needs model, metric and at_least or at_most, not {sorted(goal)}",
            fix="correct it in the recipe",
        )
    measured = (metrics.get(goal["model"]) or {}).get(goal["metric"])
    value = measured.get("value") if isinstance(measured, Mapping) else measured
    met = value is not None and (value >= goal[bound] if bound == "at_least" else value <= goal[bound])
    return {
        "model": goal["model"],
        "metric": goal["metric"],
        bound: goal[bound],
        "measured": measured,
        "met": met,
    }


def _disagreements(rows: Sequence[Row], teacher: Sequence[Row], task: Task) -> dict[str, Any]:
    if task.label is None:
        items = m.differing_answers(rows, teacher, *_compared(task))
    else:
        items = m.disagreements(rows, teacher, task.labels, list(task.schema["properties"]))
    return {"count": len(items), "of": len(rows), "rows": items[:MAX_DISAGREEMENTS]}


def _task_details(task: Task) -> dict[str, Any]:
    """The part of a task that the report shows."""
    return {
        "description": task.description,
        "label": task.label,
        "labels": list(task.labels),
        "positive": list(task.positive),
        "score": task.score,
        "score_tolerance": task.score_tolerance,
        "score_scale": list(task.score_scale),
        "slices": list(task.slices),
        "group": task.group,
        "title": task.title,
        "properties": list(task.schema["properties"]),
    }
