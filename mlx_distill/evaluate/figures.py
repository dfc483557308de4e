"""The figures of one model on one set of rows, and the paired comparison of two models."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from mlx_distill import metrics as m
from mlx_distill.data.predictions import constrained_rows
from mlx_distill.evaluate.groups import group_errors
from mlx_distill.evaluate.known_probabilities import known_figures
from mlx_distill.evaluate.latency import latency_intervals
from mlx_distill.metrics.classification import OUTCOMES, ConfusionCounts, Row
from mlx_distill.metrics.paired import Comparison
from mlx_distill.tasks.task import Task

# Of these the answers under the grammar of the task have figures of their own.
CONSTRAINED = (
    "json_valid",
    "accuracy",
    "verdict_agreement",
    "agreement",
    "answer_f1",
    "teacher_answer_f1",
    "exact_match",
)


def main_metrics(label: str | None) -> tuple[str, str]:
    """The metrics by which models are compared: against the truth and against the teacher.

    Args:
        label: The task's label field; None for a task without one.

    >>> main_metrics(None)
    ('answer_f1', 'teacher_answer_f1')
    """
    return ("accuracy", "verdict_agreement") if label else ("answer_f1", "teacher_answer_f1")


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
    level = _level(task, confidence)
    mae = m.score_mae(rows, task.score, scale=task.score_scale, **level)
    of_task = (
        _label_metrics(rows, teacher, task, task.label, confidence)
        if task.label
        else _answer_metrics(rows, teacher, task, confidence)
    )
    return {
        "n": len(rows),
        "score_mae": mae["value"],
        "score_mae_interval": mae,
        "score_gap": m.score_gap(rows, teacher, scale=task.score_scale, **level)
        if teacher and task.score
        else None,
        "json_valid": m.json_valid(rows, **level),
        "invalid": _invalid_example(rows),
        **m.latency(rows),
        **latency_intervals(rows, confidence),
        **dict.fromkeys(f"{key}_constrained" for key in CONSTRAINED if key == "json_valid" or key in of_task),
        "constraint": None,
        "at_threshold": _threshold_figures(rows, task, confidence),
        **_field_metrics(rows, teacher, task, confidence),
        **of_task,
    }


def _level(task: Task, confidence: float) -> dict[str, Any]:
    """The level of intervals, and the field by which rows are clustered."""
    return {"cluster": task.cluster, "confidence": confidence}


def constrained_metrics(
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
    metrics = [key for key in CONSTRAINED if key in free]
    compared = dict(zip(main_metrics(task.label), (None, teacher), strict=True))
    return {
        **{f"{key}_constrained": figures[key] for key in metrics},
        "constraint": {
            "changed": sum(row["constrained"] is not None for row in rows),
            "invalid": figures["invalid"],
            **{
                key: compare_models(others, rows, reference, task, confidence)
                for key, reference in compared.items()
                if reference is not None or free[key] is not None
            },
        },
    }


def compare_models(
    first: Sequence[Row], second: Sequence[Row], teacher: Sequence[Row] | None, task: Task, confidence: float
) -> Comparison | None:
    """The agreement of two models with the teacher, or without one their accuracy, on the same items; with
    clustered standard errors where the task names a cluster.
    """
    level = _level(task, confidence)
    if task.label is None:
        return m.compare_answers(first, second, teacher, *compared_fields(task), **level)
    if teacher is None:
        return m.accuracy_gain(first, second, task.label, **level)
    return m.agreement_gain(first, second, teacher, **level)


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
    level: dict[str, Any] = {
        "clusters": m.truth_clusters(rows, task.cluster),
        "confidence": confidence,
    }
    own_level = level | {"clusters": m.teacher_clusters(rows, teacher, task.cluster) if teacher else None}
    fields: dict[str, Any] = {}
    for name, schema in task.schema["properties"].items():
        free = isinstance(schema, Mapping) and m.is_free(schema)
        fields[name] = {
            "exact": m.exact_match(truth, [name], **level),
            "f1": m.field_f1(truth, name, **level) if free else None,
            "teacher_exact": m.exact_match(own, [name], **own_level) if own is not None else None,
            "teacher_f1": m.field_f1(own, name, **own_level) if free and own is not None else None,
        }
    return {
        "exact_match": m.exact_match(truth, **level),
        "teacher_exact_match": m.exact_match(own, **own_level) if own is not None else None,
        "fields": fields,
    }


def _answer_metrics(
    rows: Sequence[Row], teacher: Sequence[Row] | None, task: Task, confidence: float
) -> dict[str, Any]:
    """The metrics of a task without a label."""
    fields, level = compared_fields(task), _level(task, confidence)
    slices = m.present_fields(rows, task.slices)
    out: dict[str, Any] = {
        "answer_f1": m.answer_f1(
            m.truth_pairs(rows),
            *fields,
            clusters=m.truth_clusters(rows, task.cluster),
            confidence=confidence,
        ),
        "teacher_answer_f1": None,
        "versus_teacher": None,
        "disagreements": None,
        "by_slice": m.answers_by_slice(rows, teacher, slices, *fields, **level),
    }
    if teacher:
        own, clusters = m.teacher_pairs(rows, teacher), m.teacher_clusters(rows, teacher, task.cluster)
        out["teacher_answer_f1"] = m.answer_f1(own, *fields, clusters=clusters, confidence=confidence)
        out["versus_teacher"] = compare_models(rows, teacher, None, task, confidence)
        out["disagreements"] = len(m.differing_answers(rows, teacher, *fields))
    return out


def compared_fields(task: Task) -> tuple[Mapping[str, Any], dict[str, float]]:
    """The schemas of the answer's fields, and the tolerance of the score."""
    return task.schema["properties"], {task.score: task.score_tolerance} if task.score else {}


def _label_metrics(
    rows: Sequence[Row], teacher: Sequence[Row] | None, task: Task, label: str, confidence: float
) -> dict[str, Any]:
    """The metrics of a task with a label field."""
    level = _level(task, confidence)
    out: dict[str, Any] = {
        "accuracy": m.accuracy(rows, label, **level),
        "accuracy_by_distribution": m.accuracy_by_distribution(rows, label, **level),
        "verdict_agreement": None,
        "agreement": None,
        "macro_f1": m.macro_f1(
            rows, label, task.labels, confidence, clusters=m.clusters_of(rows, task.cluster)
        ),
        **_binary_metrics(rows, task, label, confidence),
        "confusion": m.confusion(rows, label, task.labels),
        "teacher_confusion": None,
        "label_kl": None,
        "label_kl_interval": None,
        "versus_teacher": None,
        "disagreements": None,
        "by_slice": m.by_slice(rows, teacher, label, m.present_fields(rows, task.slices), **level),
    }
    if known := known_figures(rows, task, confidence):
        out["known_probabilities"] = known
    return out | _teacher_metrics(rows, teacher, task, label, confidence) if teacher else out


def _binary_metrics(rows: Sequence[Row], task: Task, label: str, confidence: float) -> dict[str, Any]:
    """Precision, recall, F1 and error rates, where the task has positive classes."""
    if not task.positive:
        return {}
    counts = m.confusion_counts(rows, label, task.positive, cluster=task.cluster)
    out = _binary_figures(counts, confidence)
    if task.group:
        level = _level(task, confidence)
        out["by_group"] = group_errors(rows, label, task.positive, task.group, **level)
    return out


def _binary_figures(counts: ConfusionCounts, confidence: float) -> dict[str, Any]:
    return {
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


def _threshold_figures(rows: Sequence[Row], task: Task, confidence: float) -> dict[str, Any] | None:
    """Accuracy, precision, recall, F1 and error rates of scores from ``score_threshold`` on; None without."""
    if task.score is None or task.score_threshold is None:
        return None
    counts = m.threshold_counts(rows, task.score, task.score_threshold, cluster=task.cluster)
    right = ["true_positive", "true_negative"]
    return {
        "threshold": task.score_threshold,
        "accuracy": counts.share(right, list(OUTCOMES.values()), confidence),
        **_binary_figures(counts, confidence),
    }


def _teacher_metrics(
    rows: Sequence[Row], teacher: Sequence[Row], task: Task, label: str, confidence: float
) -> dict[str, Any]:
    """The metrics of a model's labels against its teacher's."""
    labels, level = task.labels, _level(task, confidence)
    kl = m.label_kl(rows, teacher, labels, **level)
    tolerance = task.score_tolerance if task.score else None
    return {
        "verdict_agreement": m.verdict_agreement(rows, teacher, **level),
        "agreement": m.agreement(rows, teacher, tolerance=tolerance, **level),
        "teacher_confusion": m.teacher_confusion(rows, teacher, label, labels),
        "label_kl": kl["value"],
        "label_kl_interval": kl,
        "versus_teacher": compare_models(rows, teacher, None, task, confidence),
        "disagreements": len(m.disagreements(rows, teacher, labels, ())),
    }
