"""How far a model gives its teacher's answers: the same items, row by row.

Rows are paired by their id; rows that only one side has are left out, so ``n`` says how many were compared.
An answer that is not valid agrees with nothing, not even with another one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mlx_distill.errors import DataError
from mlx_distill.metrics.classification import (
    Row,
    accuracy,
    answered,
    answered_score,
    confusion,
    right,
    split_by,
    true_value,
)
from mlx_distill.metrics.intervals import Comparison, Estimate, compare_paired, mean_estimate, rate

TINY = 1e-12
"""Least probability of a label in a divergence: a model's exact zero would make it infinite."""


def pair(model: Sequence[Row], teacher: Sequence[Row]) -> list[tuple[Row, Row]]:
    """The rows of both that are answers to the same item, in the model's order.

    Raises:
        DataError: an id twice on one side.

    >>> pair([{"id": "x"}, {"id": "y"}], [{"id": "y"}])
    [({'id': 'y'}, {'id': 'y'})]
    """
    known = _by_id(teacher)
    _by_id(model)
    return [(row, known[row["id"]]) for row in model if row["id"] in known]


def _by_id(rows: Sequence[Row]) -> dict[str, Row]:
    known: dict[str, Row] = {}
    for row in rows:
        if row["id"] in known:
            raise DataError(
                f"id {row['id']!r} stands twice in one set of predictions",
                fix="give every row of the data its own id",
            )
        known[row["id"]] = row
    return known


def same_label(model: Row, teacher: Row) -> bool:
    """Whether both answers are valid and name the same label."""
    return answered(model) is not None and answered(model) == answered(teacher)


def verdict_agreement(model: Sequence[Row], teacher: Sequence[Row], *, confidence: float = 0.95) -> Estimate:
    """Share of the items on which the model gives the teacher's label.

    >>> row = {"id": "x", "answer": {}, "label": "a"}
    >>> verdict_agreement([row], [{**row, "label": "b"}])["value"]
    0.0
    """
    hits = [same_label(a, b) for a, b in pair(model, teacher)]
    return rate(sum(hits), len(hits), confidence)


def agreement(
    model: Sequence[Row], teacher: Sequence[Row], *, tolerance: float | None, confidence: float = 0.95
) -> Estimate:
    """Share of the items with the teacher's label and a score at most ``tolerance`` points from the
    teacher's.

    Args:
        tolerance: In points of the task's scale; None where the task has no score, and then the label alone
            decides.

    >>> row = {"id": "x", "answer": {}, "label": "a", "score": 60}
    >>> agreement([row], [{**row, "score": 65}], tolerance=5.0)["value"]
    1.0
    """
    hits = [same_label(a, b) and _near(a, b, tolerance) for a, b in pair(model, teacher)]
    return rate(sum(hits), len(hits), confidence)


def _near(model: Row, teacher: Row, tolerance: float | None) -> bool:
    if tolerance is None:
        return True
    a, b = answered_score(model), answered_score(teacher)
    return a is not None and b is not None and abs(a - b) <= tolerance + 1e-9


def score_gap(model: Sequence[Row], teacher: Sequence[Row], *, confidence: float = 0.95) -> Estimate:
    """Mean absolute difference of the model's score from the teacher's, in points, over items where both have
    one.

    >>> row = {"id": "x", "answer": {}, "label": "a", "score": 60}
    >>> score_gap([row], [{**row, "score": 65}])["value"]
    5.0
    """
    pairs = [(answered_score(a), answered_score(b)) for a, b in pair(model, teacher)]
    return mean_estimate([abs(a - b) for a, b in pairs if a is not None and b is not None], confidence)


def divergence(teacher: Mapping[str, float], model: Mapping[str, float], labels: Sequence[str]) -> float:
    """KL divergence in nats of one label distribution from another: ``sum_c p_c ln(p_c / q_c)``, each
    normalized over ``labels``.

    >>> round(divergence({"a": 0.5, "b": 0.5}, {"a": 0.75, "b": 0.25}, ["a", "b"]), 4)
    0.1438
    """
    p, q = ([max(float(side.get(name, 0.0)), TINY) for name in labels] for side in (teacher, model))
    p_all, q_all = math.fsum(p), math.fsum(q)
    return max(
        0.0, math.fsum(a / p_all * math.log((a / p_all) / (b / q_all)) for a, b in zip(p, q, strict=True))
    )


def label_kl(
    model: Sequence[Row], teacher: Sequence[Row], labels: Sequence[str], *, confidence: float = 0.95
) -> Estimate:
    """Mean KL divergence in nats of the teacher's label distribution to the model's, over items where both
    were asked for one.
    """
    pairs = [(b.get("label_probs"), a.get("label_probs")) for a, b in pair(model, teacher)]
    return mean_estimate([divergence(p, q, labels) for p, q in pairs if p and q], confidence)


def teacher_confusion(
    model: Sequence[Row], teacher: Sequence[Row], label: str, labels: Sequence[str]
) -> dict[str, Any]:
    """:func:`mlx_distill.metrics.classification.confusion` with the teacher's labels as the reference."""
    pairs = pair(model, teacher)
    return confusion([a for a, _ in pairs], label, labels, [answered(b) for _, b in pairs])


def by_slice(
    rows: Sequence[Row],
    teacher: Sequence[Row] | None,
    label: str,
    fields: Sequence[str],
    *,
    confidence: float = 0.95,
) -> dict[str, dict[str, Any]]:
    """Accuracy, and agreement with the teacher where there is one, by the values of each field.

    Returns:
        ``{field: {value: {"n", "accuracy", "verdict_agreement"}}}``.
    """
    out: dict[str, dict[str, Any]] = {}
    for field in fields:
        out[field] = {
            value: {
                "n": len(part),
                "accuracy": accuracy(part, label, confidence=confidence),
                "verdict_agreement": None
                if teacher is None
                else verdict_agreement(part, teacher, confidence=confidence),
            }
            for value, part in split_by(rows, field).items()
        }
    return out


def versus(
    model: Sequence[Row], teacher: Sequence[Row], label: str, *, confidence: float = 0.95
) -> Comparison | None:
    """Who is right where: accuracy of the model less the teacher's on the items that have a truth, as a
    paired comparison.
    """
    pairs = [(a, b) for a, b in pair(model, teacher) if true_value(a, label) is not None]
    return compare_paired(
        right([a for a, _ in pairs], label), right([b for _, b in pairs], label), confidence
    )


def agreement_gain(
    first: Sequence[Row], second: Sequence[Row], teacher: Sequence[Row], *, confidence: float = 0.95
) -> Comparison | None:
    """Agreement of one model with the teacher less another's, on the items that all three answered."""
    reference = _by_id(teacher)
    pairs = [(a, b) for a, b in pair(first, second) if a["id"] in reference]
    return compare_paired(
        [same_label(a, reference[a["id"]]) for a, _ in pairs],
        [same_label(b, reference[b["id"]]) for _, b in pairs],
        confidence,
    )


def disagreements(
    model: Sequence[Row],
    teacher: Sequence[Row],
    labels: Sequence[str],
    properties: Sequence[str],
    *,
    limit: int | None = None,
) -> list[dict[str, Any]]:
    """The items on which the labels differ (or an answer is not valid), side by side, the farthest apart
    first.

    Args:
        labels: The task's classes.
        properties: Fields of the answer, in the schema's order.
        limit: At most so many; None for all.

    Returns:
        For each item ``id``, ``set``, ``title``, ``input``, ``fields``, ``truth``, ``teacher`` and ``model``
        (each ``answer``, ``label``, ``score``, ``error``, and ``text`` where the answer is not valid), and
        ``differs``: the names of the fields that differ.
    """
    apart = [(a, b) for a, b in pair(model, teacher) if not same_label(a, b)]
    apart.sort(key=lambda both: _distance(both[0], both[1], labels), reverse=True)
    return [_side_by_side(a, b, properties) for a, b in apart[:limit]]


def _distance(model: Row, teacher: Row, labels: Sequence[str]) -> tuple[float, float]:
    p, q = teacher.get("label_probs"), model.get("label_probs")
    a, b = answered_score(model), answered_score(teacher)
    return (divergence(p, q, labels) if p and q else 0.0), (
        abs(a - b) if a is not None and b is not None else 0.0
    )


def _side_by_side(model: Row, teacher: Row, properties: Sequence[str]) -> dict[str, Any]:
    left, right_ = teacher.get("answer") or {}, model.get("answer") or {}
    return {
        **{key: model.get(key) for key in ("id", "set", "title", "input", "fields", "truth")},
        "teacher": _side(teacher),
        "model": _side(model),
        "differs": [name for name in properties if left.get(name) != right_.get(name)],
    }


def _side(row: Row) -> dict[str, Any]:
    side = {key: row.get(key) for key in ("answer", "error")} | {
        "label": answered(row),
        "score": answered_score(row),
    }
    return side if row.get("answer") is not None else {**side, "text": row.get("text", "")}
