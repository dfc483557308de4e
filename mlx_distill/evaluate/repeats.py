"""How much a model's answers to the same rows vary between runs: the figures of ``repeats.jsonl``."""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from mlx_distill.errors import DataError
from mlx_distill.metrics.answers import is_same
from mlx_distill.metrics.classification import Row, true_value
from mlx_distill.metrics.consistency import flip_rate, repeated_rate, right_in_all_runs, score_deviation
from mlx_distill.tasks.task import Task


def repeat_figures(
    header: Mapping[str, Any],
    lines: Sequence[Mapping[str, Any]],
    rows: Sequence[Row],
    task: Task,
    *,
    confidence: float = 0.95,
) -> dict[str, Any] | None:
    """The figures of repeated runs; rows are averaged over the runs before any interval.

    Args:
        header: Of the file.
        lines: Its lines: ``kind``, ``run``, ``id``, ``answer``, ``label``, ``score``.
        rows: The model's predictions on the set that is reported, with the true answers.
        task: Its label flips, or without a label the whole answer; its score varies.
        confidence: Level of the intervals.

    Returns:
        ``runs``, and of each kind (``shuffled``: greedily in other batches; ``sampled``) its ``temperature``,
        ``flip_rate``, ``accuracy``, ``right_in_all_runs`` and ``score_deviation`` (a share of the scale; None
        without a score). None where no row of the set was repeated.

    Raises:
        DataError: a row that lacks a run.
    """
    truth = {row["id"]: row.get("truth") for row in rows}
    out: dict[str, Any] = {"runs": header["runs"]}
    for kind, temperature in header["temperatures"].items():
        items: dict[str, list[Mapping[str, Any]]] = {}
        for line in lines:
            if line["kind"] == kind and line["id"] in truth:
                items.setdefault(line["id"], []).append(line)
        if not items:
            return None
        incomplete = [id for id, runs in items.items() if len(runs) != header["runs"]]
        if incomplete:
            raise DataError(
                f"the row {incomplete[0]!r} has {len(items[incomplete[0]])} of {header['runs']} runs",
                fix="run the evaluate stage again",
            )
        right = [
            [_is_right(line, known, task) for line in runs]
            for id, runs in items.items()
            if (known := truth[id]) is not None and (task.label is None or known.get(task.label) is not None)
        ]
        scores = [[_score(line) for line in runs] for runs in items.values()]
        out[kind] = {
            "temperature": temperature,
            "flip_rate": flip_rate(
                [[_outcome(line, task) for line in runs] for runs in items.values()], confidence=confidence
            ),
            "accuracy": repeated_rate(right, confidence=confidence) if right else None,
            "right_in_all_runs": right_in_all_runs(right, confidence=confidence) if right else None,
            "score_deviation": score_deviation(scores, task.score_scale, confidence=confidence)
            if task.score
            else None,
        }
    return out


def order_figures(
    header: Mapping[str, Any],
    lines: Sequence[Mapping[str, Any]],
    rows: Sequence[Row],
    *,
    confidence: float = 0.95,
) -> dict[str, Any] | None:
    """How often the order of the labels in the prompt decides: the figures of ``label_orders.jsonl``.

    Args:
        header: Of the file.
        lines: Its lines: ``id`` and ``labels``, the most probable label under each order.
        rows: The model's predictions on the set that is reported.
        confidence: Level of the interval.

    Returns:
        ``orders``: how many; ``flip_rate``: the share of rows whose label is not the same under all of them;
        ``left_out``: rows whose prompt does not list the labels. None without any row.
    """
    ids = {row["id"] for row in rows}
    labels = [line["labels"] for line in lines if line["id"] in ids]
    if not labels:
        return None
    return {
        "orders": len(header["orders"]),
        "flip_rate": flip_rate(labels, confidence=confidence),
        "left_out": header["left_out"],
    }


def _outcome(line: Mapping[str, Any], task: Task) -> Hashable:
    """What has to be the same in all runs: the label of a valid answer, or the answer itself."""
    if line["answer"] is None:
        return None
    return line["label"] if task.label else json.dumps(line["answer"], sort_keys=True)


def _score(line: Mapping[str, Any]) -> float | None:
    return line["score"] if line["answer"] is not None else None


def _is_right(line: Mapping[str, Any], truth: Mapping[str, Any], task: Task) -> bool:
    if task.label is None:
        return is_same(line["answer"], truth)
    return line["answer"] is not None and line["label"] == true_value({"truth": truth}, task.label)
