"""All figures of any number of models that answered the same rows: by set, with paired comparisons."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from mlx_distill.errors import ConfigError, DataError
from mlx_distill.evaluate.categories import error_categories
from mlx_distill.evaluate.figures import compare_models, constrained_metrics, main_metrics, model_metrics
from mlx_distill.evaluate.groups import group_changes
from mlx_distill.evaluate.references import reference_metrics
from mlx_distill.evaluate.registry import compare_metrics, measure, task_metrics
from mlx_distill.metrics.classification import Row
from mlx_distill.run_models import run_model
from mlx_distill.tasks.task import Task

MAIN_SET = "test"
TEACHER = "teacher"
_EXAMPLES = 3


def evaluate_models(
    models: Mapping[str, Sequence[Row]],
    task: Task,
    *,
    reference: str | None = TEACHER,
    constrained: Collection[str] = (),
    confidence: float = 0.95,
) -> dict[str, Any]:
    """Measure any number of models on the same rows.

    An answer that is not valid counts as wrong in every metric.

    Args:
        models: Model name to its predictions, as :func:`mlx_distill.data.predictions.read_predictions` gives
            them.
        task: Names the label, its classes, the score, slices, metrics and error categories.
        reference: The model that the others are compared with; one that is not among ``models`` is none.
        constrained: The models whose rows have answers under the grammar of the task as well.
        confidence: Level of the intervals.

    Returns:
        ``main_set``; ``sets``: the number of rows of each, the main set first; ``by_set``: set, then model,
        to its figures (:func:`mlx_distill.evaluate.figures.model_metrics`, ``task_metrics`` and
        ``error_categories``, and those of :func:`mlx_distill.evaluate.references.reference_metrics`);
        ``comparisons``: paired, on the main set; ``group_changes``: the error rates within each group before
        and after, see :func:`mlx_distill.evaluate.groups.group_changes`.

    Raises:
        DataError: the models did not answer the same rows.
        ConfigError: no models, or a metric or category of the task that does not fit it.

    >>> from mlx_distill.tasks.task import parse_task
    >>> schema = {"type": "object", "properties": {"mood": {"type": "string", "enum": ["joy", "fear"]}}}
    >>> raw = {"name": "t", "system": "", "user": "{text}", "schema": schema, "label": "mood"}
    >>> row = {"id": "1", "set": "test", "truth": {"mood": "joy"}, "answer": {"mood": "joy"}, "label": "joy"}
    >>> wrong = {**row, "answer": {"mood": "fear"}, "label": "fear"}
    >>> result = evaluate_models({"teacher": [row], "student": [wrong]}, parse_task(raw, "t"))
    >>> {name: figures["accuracy"]["value"] for name, figures in result["by_set"]["test"].items()}
    {'teacher': 1.0, 'student': 0.0}
    """
    if not models:
        raise ConfigError("predictions of at least one model are needed", fix="name a file of predictions")
    check_same_rows(models)
    sets = _count_sets(models.values())
    main = next(iter(sets))
    rows = {name: _of_set(models, name) for name in sets}
    by_set = {name: _set_figures(rows[name], task, reference, constrained, confidence) for name in sets}
    return {
        "main_set": main,
        "sets": sets,
        "by_set": by_set,
        "comparisons": _comparisons(rows[main], task, reference, confidence),
        "group_changes": _group_changes(rows[main], task, confidence),
    }


def _group_changes(
    models: Mapping[str, Sequence[Row]], task: Task, confidence: float
) -> list[dict[str, Any]]:
    if not (task.label and task.positive and task.group):
        return []
    return group_changes(
        models, task.label, task.positive, task.group, cluster=task.cluster, confidence=confidence
    )


def check_same_rows(models: Mapping[str, Sequence[Row]]) -> None:
    """Refuse models that did not answer the same rows of a set: a comparison over what happens to be in both
    would silently be one of other rows. A model without any row of a set is no part of that set's tables.

    Raises:
        DataError: an id occurs twice in one set of one model, ids differ, or one row has different true
            answers; with counts and examples.

    >>> check_same_rows({"a": [{"id": "1"}, {"id": "2"}], "b": [{"id": "1"}, {"id": "3"}]})
    Traceback (most recent call last):
    mlx_distill.errors.DataError: a and b answered different rows: 1 of 2 rows of a is not in b ('2'), 1 of 2
    rows of b is not in a ('3'): let both answer the same rows: run the evaluate stage again for both
    """
    by_set: dict[str, dict[str, dict[str, Row]]] = {}
    for model, predictions in models.items():
        for row in predictions:
            rows = by_set.setdefault(str(row.get("set", MAIN_SET)), {}).setdefault(model, {})
            if row["id"] in rows:
                raise DataError(
                    f"id {row['id']!r} occurs twice in one set of the predictions of {model}",
                    fix="give every row of the data its own id",
                )
            rows[row["id"]] = row
    for members in by_set.values():
        first, *others = members
        for other in others:
            _check_pair(first, members[first], other, members[other])


def _check_pair(first: str, rows: Mapping[str, Row], second: str, others: Mapping[str, Row]) -> None:
    missing = [_missing(first, rows, second, others), _missing(second, others, first, rows)]
    if any(missing):
        raise DataError(
            f"{first} and {second} answered different rows: {', '.join(filter(None, missing))}",
            fix="let both answer the same rows: run the evaluate stage again for both",
        )
    for row_id, row in others.items():
        if row.get("truth") != rows[row_id].get("truth"):
            raise DataError(
                f"row {row_id!r} has other true answers in the predictions of {first} and of {second}",
                fix="the rows were changed between the two: run the evaluate stage again for both",
            )


def _missing(model: str, rows: Mapping[str, Row], other: str, others: Mapping[str, Row]) -> str | None:
    """How many rows of a model another one does not have, with the first of them."""
    absent = [row_id for row_id in rows if row_id not in others]
    if not absent:
        return None
    examples = ", ".join(map(repr, absent[:_EXAMPLES]))
    more = ", ..." if len(absent) > _EXAMPLES else ""
    are = "is" if len(absent) == 1 else "are"
    return f"{len(absent)} of {len(rows)} rows of {model} {are} not in {other} ({examples}{more})"


def in_set(rows: Sequence[Row], name: str) -> list[Row]:
    """The rows of one set."""
    return [row for row in rows if row.get("set", MAIN_SET) == name]


def _of_set(models: Mapping[str, Sequence[Row]], name: str) -> dict[str, list[Row]]:
    """The rows of one set of each model that answered it."""
    members = {model: in_set(rows, name) for model, rows in models.items()}
    return {model: rows for model, rows in members.items() if rows}


def _count_sets(models: Iterable[Sequence[Row]]) -> dict[str, int]:
    """Rows of each set: the main set first, then in the order of their first row."""
    counts: dict[str, int] = {}
    for rows in models:
        for name, count in Counter(str(row.get("set", MAIN_SET)) for row in rows).items():
            counts.setdefault(name, count)
    return dict(sorted(counts.items(), key=lambda item: item[0] != MAIN_SET))


def _set_figures(
    models: Mapping[str, Sequence[Row]],
    task: Task,
    reference: str | None,
    constrained: Collection[str],
    confidence: float,
) -> dict[str, Any]:
    """The figures of each model on one set; of some also those of the answers under the grammar."""
    own_metrics = task_metrics(task)
    out = {}
    for model, rows in models.items():
        against = None if model == reference else models.get(reference or "")
        figures = model_metrics(rows, against, task, confidence=confidence)
        if model in constrained:
            figures |= constrained_metrics(rows, against, task, figures, confidence)
        figures["task_metrics"] = measure(own_metrics, rows, confidence)
        figures["task_comparisons"] = (
            compare_metrics(own_metrics, rows, against, confidence, cluster=task.cluster)
            if against is not None
            else {}
        )
        figures["error_categories"] = error_categories(rows, task, confidence)
        figures |= reference_metrics(rows, task, confidence=confidence)
        out[model] = figures
    return out


def _comparisons(
    models: Mapping[str, Sequence[Row]], task: Task, reference: str | None, confidence: float
) -> list[dict[str, Any]]:
    """Paired comparisons of the models of a run; of a task without a label by the F1 of the answers.

    Agreement with the teacher: after and before distillation, quantized and not, and against each control.
    Accuracy: the teacher after and before fine-tuning, and each other model against the teacher.
    """
    if reference is None or reference not in models:
        return []
    pairs = [("student", "student_before"), ("quantized", "student")]
    pairs += [("student", model) for model in models if run_model(model).role == "control"]
    accuracy, agreement = main_metrics(task.label)
    kinds: list[tuple[str, str, str, Sequence[Row] | None]] = [
        (agreement, first, second, models[reference]) for first, second in pairs
    ]
    before = f"{reference}_before"
    kinds += [(accuracy, reference, before, None)]
    kinds += [(accuracy, name, reference, None) for name in models if name not in (reference, before)]
    out = []
    for metric, first, second, against in kinds:
        if first in models and second in models:
            result = compare_models(models[first], models[second], against, task, confidence)
            if result:
                out.append({"metric": metric, "first": first, "second": second, **result})
    return out


def majority(figures: Mapping[str, Any]) -> dict[str, Any] | None:
    """The most frequent true label and its share; None without labels.

    Args:
        figures: Model name to its figures on one set.
    """
    confusion = next((model["confusion"] for model in figures.values() if "confusion" in model), None)
    if not confusion or not confusion["n"]:
        return None
    counts = [sum(row) for row in confusion["counts"]]
    return {"label": confusion["labels"][counts.index(max(counts))], "value": max(counts) / confusion["n"]}
