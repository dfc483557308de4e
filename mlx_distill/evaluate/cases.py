"""The cases of a comparison: each row with the truth, both answers, and what changed between them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mlx_distill.evaluate.conditions import Condition
from mlx_distill.evaluate.row_metrics import RowMetric
from mlx_distill.metrics.agreement import verdict_agreement
from mlx_distill.metrics.classification import predicted_label, predicted_score, true_value
from mlx_distill.tasks.task import Task
from mlx_distill.text import words

Row = Mapping[str, Any]
CHANGES = ("fixed", "broken", "both_right", "both_wrong")
"""What becomes of a row from A to B where a metric says right or wrong."""
MOVES = ("improved", "worsened", "same")
"""The same where a metric is a number."""
_EPSILON = 1e-12


def change_of(a: float | bool | None, b: float | bool | None, metric: RowMetric) -> str | None:
    """What changes on a row from A to B; None where the row has no true answer for the metric.

    >>> change_of(False, True, RowMetric("accuracy", "Accuracy", bool, binary=True))
    'fixed'
    """
    if a is None or b is None:
        return None
    if metric.binary:
        return {(0, 1): "fixed", (1, 0): "broken", (1, 1): "both_right", (0, 0): "both_wrong"}[int(a), int(b)]
    gain = (b - a) if metric.higher_is_better else (a - b)
    return "improved" if gain > _EPSILON else "worsened" if gain < -_EPSILON else "same"


def label_agreement(a: Sequence[Row], b: Sequence[Row], task: Task, confidence: float) -> Any:
    """The share of rows on which both give the same label, with its interval; None for a task without one."""
    if task.label is None:
        return None
    found = verdict_agreement(b, a, cluster=task.cluster, confidence=confidence)
    return {name: found.get(name) for name in ("value", "low", "high", "n")}


def make_case(
    a: Row, b: Row, change: str | None, task: Task, categories: Mapping[str, Condition]
) -> dict[str, Any]:
    """One row as a case; ``categories`` are the error categories of the task.

    Returns:
        ``id``, ``title``, ``input``, ``slices``, ``cluster``, ``change``, ``truth`` (``label``, ``score``,
        ``answer``), ``a`` and ``b`` (each ``label``, ``score``, ``answer``, ``error``, ``text`` where the
        answer is invalid, ``label_probs``, ``error_class``), and ``differs``, the fields in which the answers
        differ.
    """
    fields = a.get("fields") or {}
    truth = a.get("truth")
    answers = [row.get("answer") or {} for row in (a, b)]
    return {
        "id": a["id"],
        "title": a.get("title"),
        "input": a.get("input") or "",
        "slices": {name: fields.get(name) for name in task.slices},
        "cluster": fields.get(task.cluster) if task.cluster else None,
        "change": change,
        "truth": {
            "label": true_value(a, task.label) if task.label else None,
            "score": true_value(a, task.score) if task.score else None,
            "answer": truth,
        },
        "a": _answer(a, task, categories),
        "b": _answer(b, task, categories),
        "differs": [
            name for name in task.schema["properties"] if answers[0].get(name) != answers[1].get(name)
        ],
    }


def _answer(row: Row, task: Task, categories: Mapping[str, Condition]) -> dict[str, Any]:
    valid = row.get("answer") is not None
    return {
        "label": predicted_label(row),
        "score": predicted_score(row),
        "answer": row.get("answer"),
        "error": None if valid else row.get("error") or "invalid",
        "text": None if valid else row.get("text", ""),
        "label_probs": row.get("label_probs"),
        "error_class": error_class(row, task, categories),
    }


def error_class(row: Row, task: Task, categories: Mapping[str, Condition]) -> str | None:
    """What kind of error an answer is: ``invalid``, those of the task's error categories that hold, else
    ``false positive``, ``false negative`` or ``wrong label``; None for a right one, and where the row has no
    true label.
    """
    if row.get("answer") is None:
        return "invalid"
    holding = [name for name, condition in categories.items() if row.get("truth") and condition.holds(row)]
    if holding:
        return ", ".join(map(words, holding))
    truth = true_value(row, task.label) if task.label else None
    predicted = predicted_label(row)
    if truth is None or predicted == truth:
        return None
    if task.positive and (truth in task.positive) != (predicted in task.positive):
        return "false positive" if predicted in task.positive else "false negative"
    return "wrong label"


def word_diff(first: str, second: str) -> list[tuple[str, str]]:
    """Two texts as runs of words that are in both, only in the first (``-``) or only in the second (``+``).

    >>> word_diff("a red door", "a blue door")
    [('=', 'a '), ('-', 'red'), ('+', 'blue'), ('=', ' door')]
    """
    a, b = (re.findall(r"\s+|\w+|[^\w\s]", text) for text in (first, second))
    out: list[tuple[str, str]] = []
    for kind, i, j, k, m in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        if kind == "equal":
            out.append(("=", "".join(a[i:j])))
            continue
        out += [("-", "".join(a[i:j]))] if j > i else []
        out += [("+", "".join(b[k:m]))] if m > k else []
    return out


def ids_by_change(changes: Mapping[str, str | None]) -> dict[str, list[str]]:
    """The ids of the cases ``fixed`` and ``broken``; of a number those ``improved`` and ``worsened``."""
    wanted = {"fixed": ("fixed", "improved"), "broken": ("broken", "worsened")}
    return {name: [id for id, change in changes.items() if change in kinds] for name, kinds in wanted.items()}


def change_counts(changes: Sequence[str | None], metric: RowMetric) -> dict[str, int]:
    """How many rows changed in each way."""
    return {name: sum(change == name for change in changes) for name in (CHANGES if metric.binary else MOVES)}
