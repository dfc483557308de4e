"""The metrics that a task can name under ``metrics:``, and a user's own functions.

A metric with one value a row (``values``) is the mean of these values, and two models are compared in pairs
of them; the others, such as F1, are computed over all rows at once. An answer that is not valid counts as
wrong in every metric. A metric joins by one entry of :data:`METRICS`.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from mlx_distill import metrics as m
from mlx_distill.errors import ConfigError
from mlx_distill.evaluate import text_metrics
from mlx_distill.evaluate.known_probabilities import expected_values, kl_values
from mlx_distill.evaluate.latency import latency_quantile
from mlx_distill.evaluate.multilabel import AVERAGES, Average, multilabel_f1
from mlx_distill.evaluate.user_metrics import user_values
from mlx_distill.metrics.agreement import pair_by_id
from mlx_distill.metrics.answers import list_items, overlap_f1, same_value
from mlx_distill.metrics.classification import (
    Row,
    confusion_counts,
    distance_bounds,
    predicted_label,
    true_value,
)
from mlx_distill.metrics.clusters import number_estimate, share_estimate
from mlx_distill.metrics.intervals import Estimate
from mlx_distill.metrics.paired import Comparison, compare_means, compare_paired
from mlx_distill.tasks.task import Task
from mlx_distill.text import known_names, words

Values = Callable[[Sequence[Row]], Sequence[float | None]]
Figure = Callable[[Sequence[Row], float], Any]
_LESS_NATS = {"unit": "nats", "better": "lower"}


@dataclass(frozen=True)
class Metric:
    """A metric of a task.

    Attributes:
        name: Its key in ``report.json``.
        title: Its name in tables.
        unit: ``share`` (0 to 1), ``points`` of the score's scale, ``seconds``, or ``nats``.
        better: Whether higher or lower values are better.
        figure: Its value over rows, at a confidence level: an estimate, or a mapping of estimates.
        values: Its value for each row, None for a row that does not count; None where there is no such value.
        binary: Whether a row is right or wrong, so that its values are booleans.
    """

    name: str
    title: str
    unit: Literal["share", "points", "seconds", "nats"]
    better: Literal["higher", "lower"]
    figure: Figure
    values: Values | None = None
    binary: bool = False


def task_metrics(task: Task) -> list[Metric]:
    """The metrics that a task names, in order.

    Raises:
        ConfigError: an unknown metric or option, one that the task has no field for, a name twice, a function
            that cannot be imported, or a library that is not installed.
    """
    out: list[Metric] = []
    for spec in task.metrics:
        metric = _metric(spec, task)
        if any(other.name == metric.name for other in out):
            raise ConfigError(
                f"task {task.name!r}: metrics: {metric.name!r} twice",
                fix="give one of them another name: {metric: ..., name: ...}",
            )
        out.append(metric)
    return out


def metric_named(task: Task, name: str) -> Metric:
    """A metric of a task by its name there, or by its name in :data:`METRICS`.

    Raises:
        ConfigError: there is none, or it does not fit the task.
    """
    own = {metric.name: metric for metric in task_metrics(task)}
    return own[name] if name in own else _metric(name, task)


def measure(metrics: Sequence[Metric], rows: Sequence[Row], confidence: float = 0.95) -> dict[str, Any]:
    """The figures of one model: an estimate, or a mapping of estimates, by the metric's name."""
    return {metric.name: metric.figure(rows, confidence) for metric in metrics}


def compare_metrics(
    metrics: Sequence[Metric],
    first: Sequence[Row],
    second: Sequence[Row],
    confidence: float = 0.95,
    *,
    cluster: str | None = None,
) -> dict[str, Comparison]:
    """Paired comparisons of two models by each metric that has a value a row: the first minus the second."""
    out = {}
    for metric in metrics:
        if metric.values is not None:
            result = compare_by(metric, first, second, confidence, cluster=cluster)
            if result is not None:
                out[metric.name] = result
    return out


def compare_by(
    metric: Metric,
    first: Sequence[Row],
    second: Sequence[Row],
    confidence: float = 0.95,
    *,
    cluster: str | None = None,
) -> Comparison | None:
    """A paired comparison of two models by a metric with a value a row, over the rows that count for both.

    Args:
        metric: With ``values``.
        first: Rows of the first model.
        second: Rows of the second model.
        confidence: Level of the interval.
        cluster: The field of a row that related rows share.

    Returns:
        The comparison, the first minus the second; None where no row counts.
    """
    assert metric.values is not None, metric.name
    pairs = pair_by_id(first, second)
    own, other = (metric.values([pair[i] for pair in pairs]) for i in (0, 1))
    kept = [i for i, (a, b) in enumerate(zip(own, other, strict=True)) if a is not None and b is not None]
    x, y = ([values[i] for i in kept] for values in (own, other))
    if not kept:
        return None
    clusters = m.clusters_of([pairs[i][0] for i in kept], cluster)
    if metric.binary:
        return compare_paired(
            [bool(v) for v in x], [bool(v) for v in y], clusters=clusters, confidence=confidence
        )
    return compare_means(
        [float(v or 0) for v in x], [float(v or 0) for v in y], clusters=clusters, confidence=confidence
    )


def _metric(spec: str | Mapping[str, Any], task: Task) -> Metric:
    options = {} if isinstance(spec, str) else dict(spec)
    kind = spec if isinstance(spec, str) else str(options.pop("metric"))
    name = options.pop("name", None)
    where = f"task {task.name!r}: metrics: {kind}"
    if ":" in kind:
        values = user_values(kind, options, task.folders, where)
        metric = _mean(task, kind, words(kind.partition(":")[2]), values)
    else:
        build = METRICS.get(kind)
        if build is None:
            raise ConfigError(
                f"{where}: no such metric",
                fix=f"{known_names(kind, list(METRICS), 'metrics')}; or module:function",
            )
        known = [key for key in inspect.signature(build).parameters if key != "task"]
        for key in options:
            if key not in known:
                fix = known_names(str(key), known, "its options") if known else "it has no options"
                raise ConfigError(f"{where}: unknown option {key!r}", fix=fix)
        try:
            metric = build(task, **options)
        except _MisfitError as error:
            raise ConfigError(f"{where}: {error}", fix=error.fix) from None
    return replace(metric, name=str(name), title=_title(str(name))) if name else metric


def _title(name: str) -> str:
    """A name that a user gave as a title: ``theme_f1`` is Theme F1."""
    text = words(name)
    return re.sub(r"\b(f1|bleu|rouge)\b", lambda match: match[0].upper(), text[:1].upper() + text[1:])


class _MisfitError(Exception):
    """A metric that does not fit a task, and how to make it fit."""

    def __init__(self, message: str, fix: str) -> None:
        super().__init__(message)
        self.fix = fix


def _need(task: Task, key: Literal["label", "score", "positive"]) -> Any:
    value = getattr(task, key)
    if not value:
        raise _MisfitError(f"the task has no {key}", f"set {key} in the task, or take the metric out")
    return value


def _field(task: Task, field: str | None) -> str:
    properties = list(task.schema["properties"])
    if field is None:
        raise _MisfitError(
            "field is missing", f"write {{metric: ..., field: NAME}}; fields: {', '.join(properties)}"
        )
    if field not in properties:
        raise _MisfitError(
            f"the answer has no field {field!r}", known_names(field, properties, "fields of the answer")
        )
    return field


def _choice(value: str, choices: Sequence[str], option: str) -> str:
    if value not in choices:
        raise _MisfitError(f"{option}: {value!r}", f"one of {', '.join(choices)}")
    return value


def _mean(task: Task, name: str, title: str, values: Values, **kinds: Any) -> Metric:
    """A metric that is the mean of its values; of booleans a rate."""
    unit, better = kinds.get("unit", "share"), kinds.get("better", "higher")

    def figure(rows: Sequence[Row], confidence: float) -> Estimate:
        found = values(rows)
        kept = [float(value) for value in found if value is not None]
        counted = [row for row, value in zip(rows, found, strict=True) if value is not None]
        clusters = m.clusters_of(counted, task.cluster)
        if unit == "share":
            return share_estimate(kept, clusters, confidence)
        bounds = (0.0, math.inf) if unit == "nats" else distance_bounds(task.score_scale)
        return number_estimate(kept, clusters, confidence, bounds=bounds)

    return Metric(name, title, unit, better, figure, values, kinds.get("binary", False))


def _pooled(name: str, title: str, figure: Figure, better: Literal["higher", "lower"] = "higher") -> Metric:
    return Metric(name, title, "share", better, figure)


def _where_true(rows: Sequence[Row], field: str, value: Callable[[Row, Any], float]) -> list[float | None]:
    """A value for each row that has a true value of the field, 0 (or False) where the answer is invalid."""
    out: list[float | None] = []
    for row in rows:
        truth = true_value(row, field)
        out.append(None if truth is None else value(row, truth))
    return out


def _accuracy(task: Task) -> Metric:
    label = _need(task, "label")
    return _mean(
        task,
        "accuracy",
        "Accuracy",
        lambda rows: _where_true(rows, label, lambda row, truth: predicted_label(row) == truth),
        binary=True,
    )


def _binary(kind: str, title: str, task: Task, positive: Sequence[str] | str | None = None) -> Metric:
    """Precision, recall or F1 of the positive classes, or of others that the metric names."""
    label = _need(task, "label")
    names = [positive] if isinstance(positive, str) else positive or _need(task, "positive")
    for name in names:
        if name not in task.labels:
            raise _MisfitError(f"positive: {name!r} is no class", known_names(name, task.labels, "classes"))
    of_counts = getattr(m, kind)
    return _pooled(
        kind,
        title,
        lambda rows, confidence: of_counts(
            confusion_counts(rows, label, names, cluster=task.cluster), confidence
        ),
        "lower" if kind.endswith("_rate") else "higher",
    )


def _macro_f1(task: Task) -> Metric:
    label = _need(task, "label")

    def figure(rows: Sequence[Row], confidence: float) -> Any:
        clusters = m.clusters_of(rows, task.cluster)
        return m.macro_f1(rows, label, task.labels, confidence, clusters=clusters)

    return _pooled("macro_f1", "Macro F1", figure)


def _by_class(task: Task) -> Metric:
    """Precision, recall and F1 of each class against the others."""
    label = _need(task, "label")

    def figure(rows: Sequence[Row], confidence: float) -> dict[str, Any]:
        out = {}
        for name in task.labels:
            counts = confusion_counts(rows, label, [name], cluster=task.cluster)
            kinds = {kind: getattr(m, kind)(counts, confidence) for kind in ("precision", "recall", "f1")}
            out[name] = {**kinds, "n": counts.positives}
        return out

    return _pooled("by_class", "By class", figure)


def _confusion(task: Task) -> Metric:
    label = _need(task, "label")
    return _pooled("confusion", "Confusion", lambda rows, _: m.confusion(rows, label, task.labels))


def _score_mae(task: Task) -> Metric:
    score = _need(task, "score")
    return _mean(
        task,
        "score_mae",
        f"{words(score).capitalize()} error",
        lambda rows: m.score_errors(rows, score, task.score_scale),
        unit="points",
        better="lower",
    )


def _list_f1(task: Task, field: str | None = None, average: str = "micro") -> Metric:
    name, average = _field(task, field), _choice(average, AVERAGES, "average")
    title = f"{words(name).capitalize()} F1" + ("" if average == "samples" else f" ({average})")
    if average == "samples":
        return _mean(task, f"{name}_f1_samples", title, lambda rows: _overlaps(rows, name))
    kind: Average = "micro" if average == "micro" else "macro"
    return _pooled(
        f"{name}_f1_{average}",
        title,
        lambda rows, level: multilabel_f1(rows, name, kind, level, cluster=task.cluster),
    )


def _overlaps(rows: Sequence[Row], field: str) -> list[float | None]:
    out: list[float | None] = []
    for row in rows:
        overlap = overlap_f1((row.get("answer") or {}).get(field), true_value(row, field))
        is_valid = row.get("answer") is not None
        out.append(overlap if overlap is None or is_valid else 0.0)
    return out


def _field_accuracy(task: Task, field: str | None = None) -> Metric:
    name = _field(task, field)
    return _mean(
        task,
        f"{name}_accuracy",
        f"{words(name).capitalize()} accuracy",
        lambda rows: _where_true(rows, name, lambda row, _: _same(row, name)),
        binary=True,
    )


def _same(row: Row, field: str) -> bool:
    """Whether a field is right; lists are equal in any order."""
    answer, truth = row.get("answer"), row["truth"]
    if answer is not None and isinstance(truth.get(field), (list, tuple)):
        return isinstance(answer.get(field), (list, tuple)) and sorted(list_items(answer[field])) == sorted(
            list_items(truth[field])
        )
    return same_value(field, answer, truth)


def _completeness(task: Task, field: str | None = None, expected: bool = False) -> Metric:
    """Share of the rows whose answer has the field, and not empty; with ``expected`` of the rows whose true
    answer has it so.
    """
    name = _field(task, field)

    def values(rows: Sequence[Row]) -> list[float | None]:
        return [
            None if expected and _is_empty((row.get("truth") or {}).get(name))
            else not _is_empty((row.get("answer") or {}).get(name))
            for row in rows
        ]  # fmt: skip

    return _mean(task, f"{name}_completeness", f"{words(name).capitalize()} given", values, binary=True)


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip()) or value in ([], {}, ())


def _exact_match(task: Task) -> Metric:
    return _mean(
        task,
        "exact_match",
        "Exact match",
        lambda rows: [
            None if row.get("truth") is None else m.is_same(row.get("answer"), row["truth"]) for row in rows
        ],
        binary=True,
    )


def _contains(task: Task, field: str | None = None) -> Metric:
    """Whether the field holds the true text, or all true items of a list, without regard to case."""
    name = _field(task, field)

    def contains(row: Row, truth: Any) -> bool:
        value = (row.get("answer") or {}).get(name)
        if isinstance(truth, (list, tuple)):
            return isinstance(value, (list, tuple)) and set(list_items(truth)) <= set(list_items(value))
        return value is not None and str(truth).strip().lower() in str(value).lower()

    return _mean(
        task,
        f"{name}_contains",
        f"{words(name).capitalize()} contains the true one",
        lambda rows: _where_true(rows, name, contains),
        binary=True,
    )


def _rouge(task: Task, field: str | None = None, type: str = "rougeL", stem: bool = False) -> Metric:
    name, type = _field(task, field), _choice(type, text_metrics.ROUGE_TYPES, "type")
    score = text_metrics.rouge(type, stem)

    def of_row(row: Row, truth: Any) -> float:
        return score(text_metrics.text_of((row.get("answer") or {}).get(name)), text_metrics.text_of(truth))

    title = f"{words(name).capitalize()} {type.replace('rouge', 'ROUGE-')}"
    return _mean(task, f"{name}_{type}", title, lambda rows: _where_true(rows, name, of_row))


def _bleu(task: Task, field: str | None = None, tokenize: str = "13a") -> Metric:
    name = _field(task, field)
    corpus = text_metrics.bleu(tokenize)

    def figure(rows: Sequence[Row], confidence: float) -> Estimate:
        kept = [row for row in rows if true_value(row, name) is not None]
        pairs = [
            (
                text_metrics.text_of((row.get("answer") or {}).get(name)),
                text_metrics.text_of(true_value(row, name)),
            )
            for row in kept
        ]
        return corpus(pairs, confidence, m.clusters_of(kept, task.cluster))

    return _pooled(f"{name}_bleu", f"{words(name).capitalize()} BLEU", figure)


def _valid(task: Task) -> Metric:
    return _mean(
        task,
        "json_valid",
        "Fits the task",
        lambda rows: [row.get("answer") is not None for row in rows],
        binary=True,
    )


def _exact(
    name: str, title: str, of_rows: Callable[..., Any], kinds: Mapping[str, Any], task: Task
) -> Metric:
    _need(task, "label")
    return _mean(task, name, title, partial(of_rows, task=task), **kinds)


def _latency(task: Task, quantile: float = 0.5) -> Metric:
    if isinstance(quantile, bool) or not isinstance(quantile, (int, float)) or not 0 < quantile < 1:
        raise _MisfitError(f"quantile: {quantile!r}", "between 0 and 1, such as 0.95")
    return Metric(
        "latency" if quantile == 0.5 else f"latency_p{100 * quantile:g}",
        "Median per row" if quantile == 0.5 else f"{100 * quantile:g}th percentile per row",
        "seconds",
        "lower",
        lambda rows, confidence: latency_quantile(rows, quantile, confidence),
    )


METRICS: Mapping[str, Callable[..., Metric]] = {
    "accuracy": _accuracy,
    "precision": partial(_binary, "precision", "Precision"),
    "recall": partial(_binary, "recall", "Recall"),
    "f1": partial(_binary, "f1", "F1"),
    "false_positive_rate": partial(_binary, "false_positive_rate", "False positives"),
    "false_negative_rate": partial(_binary, "false_negative_rate", "False negatives"),
    "macro_f1": _macro_f1,
    "by_class": _by_class,
    "confusion": _confusion,
    "score_mae": _score_mae,
    "list_f1": _list_f1,
    "field_accuracy": _field_accuracy,
    "completeness": _completeness,
    "exact_match": _exact_match,
    "contains": _contains,
    "rouge": _rouge,
    "bleu": _bleu,
    "json_valid": _valid,
    "kl_to_truth": partial(_exact, "kl_to_truth", "KL to the truth", kl_values, _LESS_NATS),
    "expected_accuracy": partial(_exact, "expected_accuracy", "Expected accuracy", expected_values, {}),
    "latency": _latency,
}
"""Name under ``metrics:`` to what makes the metric of a task, with its options as keyword arguments."""
