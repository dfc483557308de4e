"""Metrics with one value a row: those by which two models can be compared in pairs.

An invalid answer is wrong in all of them: 0 where higher is better, the largest error of the task's scale
where lower is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_distill.errors import ConfigError
from mlx_distill.evaluate.registry import METRICS, Metric, metric_named, task_metrics
from mlx_distill.metrics.answers import is_free, is_same, overlap_f1, same_value, similarity
from mlx_distill.metrics.classification import predicted_label, predicted_score, true_value
from mlx_distill.tasks.task import Task
from mlx_distill.text import known_names, words

Row = Mapping[str, Any]


@dataclass(frozen=True)
class RowMetric:
    """A metric with one value a row.

    Attributes:
        name: Its name on the command line and in files.
        title: Its name in tables.
        value: Its value of a row; None for a row without the true answer that it needs.
        binary: Whether a row is right or wrong; else its value is a number.
        unit: ``rate`` for values from 0 to 1, shown in percent and percentage points; ``points`` for values
            on the task's scale; ``nats`` for divergences.
        higher_is_better: False for an error.
    """

    name: str
    title: str
    value: Callable[[Row], float | bool | None]
    binary: bool = False
    unit: str = "rate"
    higher_is_better: bool = True

    @property
    def point(self) -> float:
        """One point in units of the value."""
        return 0.01 if self.unit == "rate" else 1.0


def row_metrics(task: Task) -> dict[str, RowMetric]:
    """The metrics of a task by name; the main one first: whether the label is right, else the answer's F1."""
    properties = task.schema["properties"]
    metrics = [_accuracy(task.label)] if task.label else []
    if not task.label:
        metrics.append(RowMetric("answer_f1", "Answer F1", lambda row: _answer_f1(row, task)))
    if task.score:
        metrics.append(_score_error(task, task.score))
    metrics.append(RowMetric("exact_match", "Exact match", _exact, binary=True))
    if task.label:
        metrics.append(RowMetric("answer_f1", "Answer F1", lambda row: _answer_f1(row, task)))
    for name, schema in properties.items():
        if name != task.label:
            metrics.append(_field(name, schema if isinstance(schema, Mapping) else {}))
    metrics.append(
        RowMetric("json_valid", "Fits the task", lambda row: row.get("answer") is not None, binary=True)
    )
    for own in task_metrics(task):  # those that the task names
        if own.values is not None and own.name not in {metric.name for metric in metrics}:
            metrics.append(_registered(own))
    return {metric.name: metric for metric in metrics}


def _registered(metric: Metric) -> RowMetric:
    """A metric of the registry that has a value a row."""
    values = metric.values
    assert values is not None, metric.name
    return RowMetric(
        metric.name,
        metric.title,
        lambda row: values([row])[0],
        binary=metric.binary,
        unit={"share": "rate", "nats": "nats"}.get(metric.unit, "points"),
        higher_is_better=metric.better == "higher",
    )


def find_metric(task: Task, name: str | None) -> RowMetric:
    """The metric of that name, or the main one: one of :func:`row_metrics`, of the registry, or the user's
    own ``module:function``.

    Raises:
        ConfigError: the task has no such metric.
    """
    metrics = row_metrics(task)
    if name is None:
        return next(iter(metrics.values()))
    if name in metrics:
        return metrics[name]
    if name in METRICS or ":" in name:
        registered = metric_named(task, name)
        if registered.values is not None:
            return _registered(registered)
    raise ConfigError(
        f"--metric {name}: not one with a value a row in the task {task.name!r}",
        fix=known_names(name, metrics, "metrics"),
    )


def _accuracy(label: str) -> RowMetric:
    def right(row: Row) -> bool | None:
        truth = true_value(row, label)
        return None if truth is None else predicted_label(row) == truth

    return RowMetric("accuracy", "Accuracy", right, binary=True)


def _score_error(task: Task, score: str) -> RowMetric:
    low, high = task.score_scale

    def error(row: Row) -> float | None:
        truth = true_value(row, score)
        if truth is None:
            return None
        predicted = predicted_score(row)
        worst = max(abs(float(truth) - low), abs(high - float(truth)))
        return worst if predicted is None else min(worst, abs(predicted - float(truth)))

    title = f"{words(score).capitalize()} error"
    return RowMetric("score_error", title, error, unit="points", higher_is_better=False)


def _exact(row: Row) -> bool | None:
    return None if row.get("truth") is None else is_same(row.get("answer"), row["truth"])


def _answer_f1(row: Row, task: Task) -> float | None:
    tolerances = {task.score: task.score_tolerance} if task.score else {}
    if row.get("truth") is None:
        return None
    return similarity(row.get("answer"), row["truth"], task.schema["properties"], tolerances)


def _field(name: str, schema: Mapping[str, Any]) -> RowMetric:
    free = is_free(schema)

    def value(row: Row) -> float | bool | None:
        truth = row.get("truth")
        if truth is None or name not in truth:
            return None
        answer = row.get("answer")
        if not free:
            return same_value(name, answer, truth)
        return 0.0 if answer is None else overlap_f1(answer.get(name), truth[name])

    title = words(name).capitalize()
    return RowMetric(name, f"{title}, F1" if free else f"{title}, same", value, binary=not free)


def values_of(metric: RowMetric, rows: Sequence[Row]) -> list[float | bool | None]:
    """The metric of each row."""
    return [metric.value(row) for row in rows]


def row_clusters(rows: Sequence[Row], task: Task) -> list[Any] | None:
    """The cluster of each row; None where the task names no field for it, or no row has the field."""
    if not task.cluster:
        return None
    names = [(row.get("fields") or {}).get(task.cluster) for row in rows]
    return names if any(name not in (None, "") for name in names) else None
