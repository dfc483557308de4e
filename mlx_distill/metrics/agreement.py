"""Agreement of a model with its teacher on the same items.

Rows are paired by their id. A row that only one model has is left out; ``n`` is the number of pairs. An
invalid answer agrees with nothing, not even with another invalid answer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mlx_distill.errors import DataError
from mlx_distill.metrics.classification import (
    Row,
    accuracy,
    clusters_of,
    confusion,
    correct,
    distance_bounds,
    group_by,
    predicted_label,
    predicted_score,
    true_value,
)
from mlx_distill.metrics.clusters import number_estimate, share_estimate
from mlx_distill.metrics.intervals import Estimate
from mlx_distill.metrics.paired import Comparison, compare_paired

MIN_PROBABILITY = 1e-12
"""Label probabilities are clipped to this, so that a zero does not make a KL divergence infinite."""


def pair_by_id(model: Sequence[Row], teacher: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Pairs of rows with the same id, in the model's order.

    Raises:
        DataError: an id occurs twice in the rows of one model.

    >>> pair_by_id([{"id": "x"}, {"id": "y"}], [{"id": "y"}])
    [({'id': 'y'}, {'id': 'y'})]
    """
    teacher_rows = _by_id(teacher)
    _by_id(model)  # raises where an id occurs twice
    return [(row, teacher_rows[row["id"]]) for row in model if row["id"] in teacher_rows]


def _by_id(rows: Sequence[Row]) -> dict[str, Row]:
    by_id: dict[str, Row] = {}
    for row in rows:
        if row["id"] in by_id:
            raise DataError(
                f"id {row['id']!r} occurs twice in one set of predictions",
                fix="give every row of the data its own id",
            )
        by_id[row["id"]] = row
    return by_id


def same_label(model: Row, teacher: Row) -> bool:
    """Whether both answers are valid and have the same label."""
    return predicted_label(model) is not None and predicted_label(model) == predicted_label(teacher)


def verdict_agreement(
    model: Sequence[Row], teacher: Sequence[Row], *, cluster: str | None = None, confidence: float = 0.95
) -> Estimate:
    """Share of the items on which the model gives the teacher's label; with a ``cluster``, the field of a row
    that related rows share, the interval is that of clusters.

    >>> row = {"id": "x", "answer": {}, "label": "a"}
    >>> verdict_agreement([row], [{**row, "label": "b"}])["value"]
    0.0
    """
    pairs = pair_by_id(model, teacher)
    clusters = clusters_of([a for a, _ in pairs], cluster)
    return share_estimate([same_label(a, b) for a, b in pairs], clusters, confidence)


def agreement(
    model: Sequence[Row],
    teacher: Sequence[Row],
    *,
    tolerance: float | None,
    cluster: str | None = None,
    confidence: float = 0.95,
) -> Estimate:
    """Share of the items with the teacher's label and a score within ``tolerance`` points of the teacher's.

    Args:
        model: The model's rows.
        teacher: The teacher's rows.
        tolerance: In points of the task's scale; None compares the label only (a task without a score).
        cluster: As in :func:`verdict_agreement`.
        confidence: Level of the interval.

    >>> row = {"id": "x", "answer": {}, "label": "a", "score": 60}
    >>> agreement([row], [{**row, "score": 65}], tolerance=5.0)["value"]
    1.0
    """
    pairs = pair_by_id(model, teacher)
    clusters = clusters_of([a for a, _ in pairs], cluster)
    hits = [same_label(a, b) and _within(a, b, tolerance) for a, b in pairs]
    return share_estimate(hits, clusters, confidence)


def _within(model: Row, teacher: Row, tolerance: float | None) -> bool:
    if tolerance is None:
        return True
    a, b = predicted_score(model), predicted_score(teacher)
    return a is not None and b is not None and abs(a - b) <= tolerance + 1e-9


def score_gap(
    model: Sequence[Row],
    teacher: Sequence[Row],
    *,
    scale: tuple[float, float] | None = None,
    cluster: str | None = None,
    confidence: float = 0.95,
) -> Estimate:
    """Mean absolute difference between the model's and the teacher's score, in points.

    Only items for which both models gave a score count. With the lowest and highest score (``scale``) the
    interval stays within them; ``cluster`` as in :func:`verdict_agreement`.

    >>> row = {"id": "x", "answer": {}, "label": "a", "score": 60}
    >>> score_gap([row], [{**row, "score": 65}])["value"]
    5.0
    """
    pairs = [(row, predicted_score(row), predicted_score(b)) for row, b in pair_by_id(model, teacher)]
    gaps = [(row, abs(a - b)) for row, a, b in pairs if a is not None and b is not None]
    clusters = clusters_of([row for row, _ in gaps], cluster)
    return number_estimate([gap for _, gap in gaps], clusters, confidence, bounds=distance_bounds(scale))


def label_divergence(
    teacher: Mapping[str, float], model: Mapping[str, float], labels: Sequence[str]
) -> float:
    """KL divergence in nats from the teacher's label distribution to the model's.

    ``sum_c p_c ln(p_c / q_c)``, both distributions normalized over ``labels``.

    >>> round(label_divergence({"a": 0.5, "b": 0.5}, {"a": 0.75, "b": 0.25}, ["a", "b"]), 4)
    0.1438
    """
    p = [max(float(teacher.get(name, 0.0)), MIN_PROBABILITY) for name in labels]
    q = [max(float(model.get(name, 0.0)), MIN_PROBABILITY) for name in labels]
    p_sum, q_sum = math.fsum(p), math.fsum(q)
    terms = (a / p_sum * math.log((a / p_sum) / (b / q_sum)) for a, b in zip(p, q, strict=True))
    return max(0.0, math.fsum(terms))


def label_kl(
    model: Sequence[Row],
    teacher: Sequence[Row],
    labels: Sequence[str],
    *,
    cluster: str | None = None,
    confidence: float = 0.95,
) -> Estimate:
    """Mean KL divergence in nats from the teacher's label distribution to the model's.

    Only items for which both models have label probabilities count; ``cluster`` as in
    :func:`verdict_agreement`.
    """
    pairs = [(a, b) for a, b in pair_by_id(model, teacher) if a.get("label_probs") and b.get("label_probs")]
    values = [label_divergence(b["label_probs"], a["label_probs"], labels) for a, b in pairs]
    clusters = clusters_of([a for a, _ in pairs], cluster)
    return number_estimate(values, clusters, confidence, bounds=(0.0, math.inf))


def teacher_confusion(
    model: Sequence[Row], teacher: Sequence[Row], label: str, labels: Sequence[str]
) -> dict[str, Any]:
    """:func:`mlx_distill.metrics.classification.confusion` with the teacher's labels as the reference."""
    pairs = pair_by_id(model, teacher)
    return confusion([a for a, _ in pairs], label, labels, [predicted_label(b) for _, b in pairs])


def by_slice(
    rows: Sequence[Row],
    teacher: Sequence[Row] | None,
    label: str,
    fields: Sequence[str],
    *,
    cluster: str | None = None,
    confidence: float = 0.95,
) -> dict[str, dict[str, Any]]:
    """Accuracy, and agreement with the teacher if there is one, for each value of each field; ``cluster`` as
    in :func:`verdict_agreement`.

    Returns:
        ``{field: {value: {"n", "accuracy", "verdict_agreement"}}}``.
    """
    out: dict[str, dict[str, Any]] = {}
    for field in fields:
        out[field] = {
            value: {
                "n": len(members),
                "accuracy": accuracy(members, label, cluster=cluster, confidence=confidence),
                "verdict_agreement": None
                if teacher is None
                else verdict_agreement(members, teacher, cluster=cluster, confidence=confidence),
            }
            for value, members in group_by(rows, field).items()
        }
    return out


def accuracy_gain(
    model: Sequence[Row],
    teacher: Sequence[Row],
    label: str,
    *,
    cluster: str | None = None,
    confidence: float = 0.95,
) -> Comparison | None:
    """Accuracy of the model minus the teacher's, as a paired comparison on the items with a true label; of
    rows that share a ``cluster``, a field of theirs, with clustered standard errors.
    """
    pairs = [(a, b) for a, b in pair_by_id(model, teacher) if true_value(a, label) is not None]
    model_correct = correct([a for a, _ in pairs], label)
    teacher_correct = correct([b for _, b in pairs], label)
    clusters = clusters_of([a for a, _ in pairs], cluster)
    if not pairs:
        return None
    return compare_paired(model_correct, teacher_correct, clusters=clusters, confidence=confidence)


def agreement_gain(
    first: Sequence[Row],
    second: Sequence[Row],
    teacher: Sequence[Row],
    *,
    cluster: str | None = None,
    confidence: float = 0.95,
) -> Comparison | None:
    """Agreement of ``first`` with the teacher minus that of ``second``, on the items that all three have;
    ``cluster`` as in :func:`accuracy_gain`.
    """
    reference = _by_id(teacher)
    pairs = [(a, b) for a, b in pair_by_id(first, second) if a["id"] in reference]
    hits = [[same_label(row, reference[row["id"]]) for row in rows] for rows in zip(*pairs, strict=True)]
    clusters = clusters_of([a for a, _ in pairs], cluster)
    return compare_paired(hits[0], hits[1], clusters=clusters, confidence=confidence) if hits else None


def disagreements(
    model: Sequence[Row],
    teacher: Sequence[Row],
    labels: Sequence[str],
    properties: Sequence[str],
    *,
    limit: int | None = None,
) -> list[dict[str, Any]]:
    """The items on which the labels differ or an answer is invalid, in descending order of their distance.

    The distance is the KL divergence of the label probabilities, then the difference of the scores.

    Args:
        model: The model's rows.
        teacher: The teacher's rows.
        labels: The task's classes.
        properties: Fields of the answer, in the schema's order.
        limit: The largest number of items returned; None for all.

    Returns:
        For each item ``id``, ``set``, ``title``, ``input``, ``fields``, ``truth``, ``teacher`` and ``model``
        (each ``answer``, ``label``, ``score``, ``error``, and ``text`` where the answer is invalid), and
        ``differs``: the names of the fields that differ.
    """
    differing = [(a, b) for a, b in pair_by_id(model, teacher) if not same_label(a, b)]
    differing.sort(key=lambda rows: _distance(rows[0], rows[1], labels), reverse=True)
    return [side_by_side(a, b, properties) for a, b in differing[:limit]]


def _distance(model: Row, teacher: Row, labels: Sequence[str]) -> tuple[float, float]:
    p, q = teacher.get("label_probs"), model.get("label_probs")
    a, b = predicted_score(model), predicted_score(teacher)
    kl = label_divergence(p, q, labels) if p and q else 0.0
    return kl, abs(a - b) if a is not None and b is not None else 0.0


def side_by_side(model: Row, teacher: Row, properties: Sequence[str]) -> dict[str, Any]:
    """One item with the answers of both models and the names of the fields that differ; see
    :func:`disagreements`.
    """
    teacher_answer, model_answer = teacher.get("answer") or {}, model.get("answer") or {}
    return {
        **{key: model.get(key) for key in ("id", "set", "title", "input", "fields", "truth")},
        "teacher": _answer_of(teacher),
        "model": _answer_of(model),
        "differs": [name for name in properties if teacher_answer.get(name) != model_answer.get(name)],
    }


def _answer_of(row: Row) -> dict[str, Any]:
    out = {key: row.get(key) for key in ("answer", "error")} | {
        "label": predicted_label(row),
        "score": predicted_score(row),
    }
    return out if row.get("answer") is not None else {**out, "text": row.get("text", "")}
