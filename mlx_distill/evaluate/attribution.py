"""Where accuracy is lost on the way from the teacher to the student to the quantized student.

All models answered the same rows, so the differences of the steps add up to the whole exactly:
``(S - T) + (Q - S) = Q - T``. A small difference can hide many rows that changed both ways; so each step has
its churn and, of models with label probabilities, the KL divergence of the labels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise, product
from typing import Any

from mlx_distill.errors import DataError
from mlx_distill.evaluate.row_metrics import RowMetric, find_metric, row_clusters, values_of
from mlx_distill.metrics.agreement import label_kl
from mlx_distill.metrics.paired import compare_means, compare_paired
from mlx_distill.tasks.task import Task

Row = Mapping[str, Any]
CHAIN = ("teacher", "student", "quantized")


def attribute(
    models: Mapping[str, Sequence[Row]],
    task: Task,
    *,
    chain: Sequence[str] = CHAIN,
    confidence: float = 0.95,
) -> dict[str, Any] | None:
    """Attribute the difference between the first and the last model of a chain to its steps.

    Args:
        models: Model name to its predictions on the same rows.
        task: Its main metric is attributed: whether the label is right, else the F1 of the answer.
        chain: The models in order; without one of them there is nothing to attribute.
        confidence: Level of the intervals.

    Returns:
        ``metric``; ``models``; ``n``; ``steps`` and ``total``, each ``first``, ``second``, ``difference``
        (second minus first, paired interval), ``p``, ``fixed``, ``broken``, ``churn``, ``label_kl`` and
        ``share`` (of the total, None where the total's interval holds 0: a share of what may be nothing);
        ``patterns``: of right and wrong, how many rows have each. None where a model or the truth is missing.

    Raises:
        DataError: the models did not answer the same rows.

    >>> schema = {"type": "object", "properties": {"mood": {"enum": ["joy", "fear"]}}}
    >>> task = Task("t", system="", user="{text}", schema=schema, label="mood")
    >>> def row(i, label): return {"id": i, "truth": {"mood": "joy"}, "answer": {}, "label": label}
    >>> rows = {"teacher": [row(1, "joy")], "student": [row(1, "fear")], "quantized": [row(1, "joy")]}
    >>> [step["difference"]["value"] for step in attribute(rows, task)["steps"]]
    [-1.0, 1.0]
    """
    if any(name not in models for name in chain):
        return None
    rows = _aligned([models[name] for name in chain])
    metric = find_metric(task, None)
    values = [values_of(metric, members) for members in rows]
    kept = [i for i, row in enumerate(zip(*values, strict=True)) if None not in row]
    if not kept:
        return None
    measured = [[column[i] for i in kept] for column in values]
    rows = [[members[i] for i in kept] for members in rows]
    clusters = row_clusters(rows[0], task)

    def step(first: int, second: int) -> dict[str, Any]:
        result = _step(metric, measured[first], measured[second], clusters, confidence)
        kl = label_kl(rows[second], rows[first], task.labels, confidence=confidence) if task.label else None
        return {"first": chain[first], "second": chain[second], **result, "label_kl": kl}

    steps = [step(i, j) for i, j in pairwise(range(len(chain)))]
    total = step(0, len(chain) - 1)
    whole = total["difference"]
    is_clear = whole["low"] is not None and not whole["low"] <= 0 <= whole["high"]
    for one in steps:
        one["share"] = one["difference"]["value"] / whole["value"] if is_clear else None
    return {
        "metric": metric.name,
        "title": metric.title,
        "models": list(chain),
        "n": len(kept),
        "steps": steps,
        "total": {**total, "share": None},
        "patterns": _patterns(measured) if metric.binary else None,
    }


def _aligned(models: Sequence[Sequence[Row]]) -> list[list[Row]]:
    """The rows of each model in the order of the first one's."""
    by_id = [{row["id"]: row for row in rows} for rows in models]
    if any(rows.keys() != by_id[0].keys() for rows in by_id):
        raise DataError(
            "the models of an attribution answered different rows", fix="run the evaluate stage again"
        )
    return [[rows[id] for id in by_id[0]] for rows in by_id]


def _step(
    metric: RowMetric,
    first: Sequence[Any],
    second: Sequence[Any],
    clusters: Sequence[Any] | None,
    confidence: float,
) -> dict[str, Any]:
    test = compare_paired if metric.binary else compare_means
    result = test(second, first, clusters=clusters, confidence=confidence)
    fixed, broken = result["first_only"], result["second_only"]
    return {
        "difference": dict(result["difference"]),
        "p": result["p_value"],
        "fixed": fixed,
        "broken": broken,
        "churn": (fixed + broken) / len(first),
    }


def _patterns(measured: Sequence[Sequence[Any]]) -> list[dict[str, Any]]:
    """How many rows have each pattern of right and wrong, the all-right one first."""
    counts = Counter(tuple(map(bool, row)) for row in zip(*measured, strict=True))
    n = len(measured[0])
    return [
        {"right": list(pattern), "count": counts[pattern], "share": counts[pattern] / n}
        for pattern in product((True, False), repeat=len(measured))
    ]
