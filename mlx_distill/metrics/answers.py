"""Whole answers and their fields against a reference: the true answer or the teacher's.

These metrics need no label: they measure a summary, an extraction or any other answer. An invalid answer
matches nothing, not even another invalid one.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from mlx_distill.metrics.agreement import pair_by_id, side_by_side
from mlx_distill.metrics.classification import Row, clusters_of, group_by
from mlx_distill.metrics.clusters import share_estimate
from mlx_distill.metrics.intervals import Estimate
from mlx_distill.metrics.paired import Comparison, compare_means

Answer = Mapping[str, Any]
Pair = tuple[Answer | None, Answer | None]
"""A model's answer, None where it is invalid, and its reference."""

# Scripts without spaces between words: each character is a word.
_UNSPACED = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")


def truth_pairs(rows: Sequence[Row]) -> list[Pair]:
    """The model's and the true answer of each row that has a true one."""
    return [(row.get("answer"), row["truth"]) for row in rows if row.get("truth") is not None]


def teacher_pairs(model: Sequence[Row], teacher: Sequence[Row]) -> list[Pair]:
    """The model's and the teacher's answer of each item that both have."""
    return [(a.get("answer"), b.get("answer")) for a, b in pair_by_id(model, teacher)]


def truth_clusters(rows: Sequence[Row], cluster: str | None) -> list[Any] | None:
    """The cluster of each of :func:`truth_pairs`; None without a field of clusters."""
    return clusters_of([row for row in rows if row.get("truth") is not None], cluster)


def teacher_clusters(model: Sequence[Row], teacher: Sequence[Row], cluster: str | None) -> list[Any] | None:
    """The cluster of each of :func:`teacher_pairs`; None without a field of clusters."""
    return clusters_of([a for a, _ in pair_by_id(model, teacher)], cluster)


def _present(
    values: Sequence[float | None], clusters: Sequence[Hashable] | None, confidence: float
) -> Estimate:
    """The mean of the values between 0 and 1 that are there."""
    kept = [i for i, value in enumerate(values) if value is not None]
    own = None if clusters is None else [clusters[i] for i in kept]
    return share_estimate([value for value in values if value is not None], own, confidence)


def same_value(
    field: str, answer: Answer | None, reference: Answer | None, tolerances: Mapping[str, float] | None = None
) -> bool:
    """Whether both answers are valid and have the same value in a field, numbers within its tolerance.

    >>> same_value("score", {"score": 60}, {"score": 64}, {"score": 5.0})
    True
    """
    if answer is None or reference is None:
        return False
    a, b = answer.get(field), reference.get(field)
    tolerance = (tolerances or {}).get(field)
    is_bool = [isinstance(value, bool) for value in (a, b)]
    if tolerance is not None and isinstance(a, (int, float)) and isinstance(b, (int, float)):
        return not any(is_bool) and abs(a - b) <= tolerance + 1e-9
    return bool(a == b) and is_bool[0] == is_bool[1]


def overlap_f1(value: Any, reference: Any) -> float | None:
    """F1 of the items of two lists, or of the words of two texts, as bags and without regard to case.

    ``2 |A ∩ B| / (|A| + |B|)``; 1 where both are empty, None for any other reference. Of texts it is SQuAD's
    (https://arxiv.org/abs/1606.05250), but articles count.

    >>> overlap_f1(["grace", "hope"], ["Hope"]), overlap_f1("a red door", "The red door.")
    (0.6666666666666666, 0.6666666666666666)
    """
    if value == reference and isinstance(reference, (str, list, tuple)):
        return 1.0
    if isinstance(reference, str):
        parts = [Counter(text_words(text)) for text in (value, reference)]
    elif isinstance(reference, (list, tuple)):
        parts = [Counter(list_items(items)) for items in (value, reference)]
    else:
        return None
    total = sum(counter.total() for counter in parts)
    return 2 * (parts[0] & parts[1]).total() / total if total else 1.0


def text_words(value: Any) -> list[str]:
    """The words of a text in lower case; none of what is no text."""
    return _WORD.findall(value.lower()) if isinstance(value, str) else []


def list_items(value: Any) -> list[str]:
    """The items of a list as texts that are compared: without regard to case; none of what is no list."""
    if not isinstance(value, (list, tuple)):
        return []
    return [
        item.strip().lower() if isinstance(item, str) else json.dumps(item, sort_keys=True) for item in value
    ]


def exact_match(
    pairs: Sequence[Pair],
    fields: Sequence[str] | None = None,
    *,
    clusters: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
) -> Estimate:
    """Share of the answers that equal their reference.

    Args:
        pairs: From :func:`truth_pairs` or :func:`teacher_pairs`.
        fields: Compare these fields alone; a reference without one of them is left out. None: all fields.
        clusters: Of each pair; None for independent ones.
        confidence: Level of the interval.

    >>> exact_match([({"a": 1, "b": 2}, {"a": 1, "b": 3})], ["a"])["value"]
    1.0
    """
    hits = [
        is_same(answer, reference, fields)
        if fields is None or reference is None or all(name in reference for name in fields)
        else None
        for answer, reference in pairs
    ]
    return _present(hits, clusters, confidence)


def is_same(answer: Answer | None, reference: Answer | None, fields: Sequence[str] | None = None) -> bool:
    """Whether both answers are valid and equal in all fields, or in the given ones."""
    if answer is None or reference is None:
        return False
    names = {*answer, *reference} if fields is None else fields
    return all(same_value(name, answer, reference) for name in names)


def is_free(schema: Mapping[str, Any]) -> bool:
    """Whether a field's schema is that of a list or of a free text, which are compared by their overlap.

    >>> is_free({"type": "string"}), is_free({"type": "string", "enum": ["a", "b"]})
    (True, False)
    """
    kinds = schema.get("type")
    kinds = [kinds] if isinstance(kinds, str) else kinds or []
    closed = "enum" in schema or "const" in schema
    return "array" in kinds or ("string" in kinds and not closed)


def similarity(
    answer: Answer | None,
    reference: Answer | None,
    properties: Mapping[str, Any],
    tolerances: Mapping[str, float] | None = None,
) -> float | None:
    """Mean over the fields of the reference: :func:`overlap_f1` of lists and free texts, 1 or 0 of others.

    Args:
        answer: The model's, None where it is invalid: 0.
        reference: The reference; None where the teacher's is invalid: 0.
        properties: The schema of each field.
        tolerances: How far the numbers of a field may lie apart and still count as equal.

    Returns:
        Between 0 and 1; None for a reference without a field.
    """
    if answer is None or reference is None:
        return 0.0
    values = []
    for name, value in reference.items():
        schema = properties.get(name)
        overlap = overlap_f1(answer.get(name), value) if is_free(schema or {}) else None
        same = float(same_value(name, answer, reference, tolerances))
        values.append(same if overlap is None else overlap)
    return sum(values) / len(values) if values else None


def answer_f1(
    pairs: Sequence[Pair],
    properties: Mapping[str, Any],
    tolerances: Mapping[str, float] | None = None,
    *,
    clusters: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
) -> Estimate:
    """Mean :func:`similarity` of the answers to their references; ``clusters`` of the pairs as in
    :func:`exact_match`.

    >>> pairs = [({"topic": "a", "notes": "a b"}, {"topic": "a", "notes": "b c"})]
    >>> answer_f1(pairs, {"topic": {"enum": ["a", "b"]}, "notes": {"type": "string"}})["value"]
    0.75
    """
    return _present([similarity(a, b, properties, tolerances) for a, b in pairs], clusters, confidence)


def field_f1(
    pairs: Sequence[Pair],
    field: str,
    *,
    clusters: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
) -> Estimate:
    """Mean :func:`overlap_f1` of one field; references without a list or text in it are left out, and an
    invalid answer counts 0. ``clusters`` of the pairs as in :func:`exact_match`.
    """
    values: list[float | None] = []
    for answer, reference in pairs:
        overlap = overlap_f1((answer or {}).get(field), (reference or {}).get(field))
        if reference is None or (overlap is not None and answer is None):
            overlap = 0.0
        values.append(overlap)
    return _present(values, clusters, confidence)


def differing_answers(
    model: Sequence[Row],
    teacher: Sequence[Row],
    properties: Mapping[str, Any],
    tolerances: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """The items on which the answers differ or one is invalid, the least similar first, as
    :func:`mlx_distill.metrics.agreement.disagreements` has them.
    """
    pairs = pair_by_id(model, teacher)
    differing = [(a, b) for a, b in pairs if not is_same(a.get("answer"), b.get("answer"))]

    def closeness(rows: tuple[Row, Row]) -> float:
        answer, reference = (row.get("answer") for row in rows)
        return similarity(answer, reference, properties, tolerances) or 0.0

    differing.sort(key=closeness)
    return [side_by_side(a, b, list(properties)) for a, b in differing]


def compare_answers(
    first: Sequence[Row],
    second: Sequence[Row],
    reference: Sequence[Row] | None,
    properties: Mapping[str, Any],
    tolerances: Mapping[str, float] | None = None,
    *,
    cluster: str | None = None,
    confidence: float = 0.95,
) -> Comparison | None:
    """:func:`similarity` of two models' answers, as a paired comparison on the items that both have.

    Args:
        first: Rows of the first model.
        second: Rows of the second model.
        reference: Rows of the teacher; None compares with the true answers.
        properties: The schema of each field.
        tolerances: As in :func:`similarity`.
        cluster: The field of a row that related rows share.
        confidence: Level of the interval.
    """
    answers = None if reference is None else {row["id"]: row.get("answer") for row in reference}
    values: list[tuple[float, float]] = []
    compared: list[Row] = []
    for a, b in pair_by_id(first, second):
        if answers is None and a.get("truth") is None or answers is not None and a["id"] not in answers:
            continue
        wanted = a["truth"] if answers is None else answers[a["id"]]
        x, y = (similarity(row.get("answer"), wanted, properties, tolerances) for row in (a, b))
        if x is not None and y is not None:
            values.append((x, y))
            compared.append(a)
    if not values:
        return None
    clusters = clusters_of(compared, cluster)
    first_values, second_values = ([pair[i] for pair in values] for i in (0, 1))
    return compare_means(first_values, second_values, clusters=clusters, confidence=confidence)


def answers_by_slice(
    rows: Sequence[Row],
    teacher: Sequence[Row] | None,
    fields: Sequence[str],
    properties: Mapping[str, Any],
    tolerances: Mapping[str, float] | None = None,
    *,
    cluster: str | None = None,
    confidence: float = 0.95,
) -> dict[str, dict[str, Any]]:
    """:func:`answer_f1` against the truth and the teacher for each value of each field of the rows.

    Returns:
        ``{field: {value: {"n", "answer_f1", "teacher_answer_f1"}}}``.
    """

    def f1(pairs: Sequence[Pair], clusters: Sequence[Hashable] | None) -> Estimate:
        return answer_f1(pairs, properties, tolerances, clusters=clusters, confidence=confidence)

    return {
        field: {
            value: {
                "n": len(members),
                "answer_f1": f1(truth_pairs(members), truth_clusters(members, cluster)),
                "teacher_answer_f1": None
                if teacher is None
                else f1(teacher_pairs(members, teacher), teacher_clusters(members, teacher, cluster)),
            }
            for value, members in group_by(rows, field).items()
        }
        for field in fields
    }
