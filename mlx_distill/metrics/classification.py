"""Figures from rows of predictions: right or wrong, errors by class and by group, speed.

A row is a dict as ``predictions.jsonl`` holds it: ``id``, ``truth``, ``answer``, ``label``, ``score``,
``label_probs``, ``fields``, ``latency_s``, ``tokens``. An answer that is not valid is never right: it has no
label and no score, whatever its text looks like. Everything against a teacher lives in
:mod:`mlx_distill.metrics.agreement`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from mlx_distill.metrics.intervals import Estimate, mean_estimate, newcombe, rate, wilson

Row = Mapping[str, Any]
FEW = 30
"""Below this many items a rate of a group is flagged: its interval is wider than +-0.18 at a rate of one half."""


def answered(row: Row) -> str | None:
    """The label of a valid answer, else None."""
    return row.get("label") if row.get("answer") is not None else None


def answered_score(row: Row) -> float | None:
    """The score of a valid answer, else None."""
    score = row.get("score") if row.get("answer") is not None else None
    return None if score is None else float(score)


def true_value(row: Row, field: str) -> Any:
    """A field of the row's own answer, None where the row has none."""
    return (row.get("truth") or {}).get(field)


def accuracy(rows: Sequence[Row], label: str, *, confidence: float = 0.95) -> Estimate:
    """Share of the rows whose label is the true one.

    Args:
        rows: Predictions; rows without a truth are left out.
        label: The task's label field.

    >>> row = {"truth": {"kind": "a"}, "answer": {"kind": "a"}, "label": "a"}
    >>> accuracy([row, {**row, "answer": None}], "kind")["value"]
    0.5
    """
    hits = right(rows, label)
    return rate(sum(hits), len(hits), confidence)


def right(rows: Sequence[Row], label: str) -> list[bool]:
    """Whether each row that has a truth has the true label."""
    return [answered(row) == true_value(row, label) for row in rows if true_value(row, label) is not None]


def json_valid(rows: Sequence[Row], *, confidence: float = 0.95) -> Estimate:
    """Share of the rows whose answer fits the task's schema.

    >>> json_valid([{"answer": {}}, {"answer": None}])["value"]
    0.5
    """
    return rate(sum(row.get("answer") is not None for row in rows), len(rows), confidence)


def score_mae(rows: Sequence[Row], score: str | None, *, confidence: float = 0.95) -> Estimate:
    """Mean absolute difference of the score from the true one, in points of the task's scale.

    Rows without a valid answer have no score to compare; ``n`` counts those that do.

    >>> score_mae([{"truth": {"s": 50}, "answer": {"s": 47}, "score": 47}], "s")["value"]
    3.0
    """
    pairs = [(answered_score(row), true_value(row, score)) for row in rows] if score else []
    return mean_estimate([abs(a - float(b)) for a, b in pairs if a is not None and b is not None], confidence)


@dataclass(frozen=True)
class Counts:
    """Items of the two sides of a binary decision: true and false positives and negatives."""

    true_positive: int
    false_positive: int
    true_negative: int
    false_negative: int

    @property
    def positives(self) -> int:
        """Items that are positive in truth."""
        return self.true_positive + self.false_negative

    @property
    def negatives(self) -> int:
        """Items that are negative in truth."""
        return self.true_negative + self.false_positive


def count_sides(rows: Sequence[Row], label: str, positive: Sequence[str]) -> Counts:
    """Tally the rows by side. An answer that is not valid raises no flag, so it misses a positive and passes
    a negative.

    >>> row = {"truth": {"kind": "bad"}, "answer": None, "label": None}
    >>> count_sides([row], "kind", ["bad"])
    Counts(true_positive=0, false_positive=0, true_negative=0, false_negative=1)
    """
    cells = [0, 0, 0, 0]
    for row in rows:
        truth = true_value(row, label)
        if truth is not None:
            cells[2 * (truth in positive) + (answered(row) in positive)] += 1
    return Counts(
        true_negative=cells[0], false_positive=cells[1], false_negative=cells[2], true_positive=cells[3]
    )


def precision(counts: Counts, confidence: float = 0.95) -> Estimate:
    """Of the items called positive, the share that is: ``TP / (TP + FP)``."""
    return rate(counts.true_positive, counts.true_positive + counts.false_positive, confidence)


def recall(counts: Counts, confidence: float = 0.95) -> Estimate:
    """Of the positive items, the share that is called so: ``TP / (TP + FN)``."""
    return rate(counts.true_positive, counts.positives, confidence)


def false_positive_rate(counts: Counts, confidence: float = 0.95) -> Estimate:
    """Of the negative items, the share that is called positive: ``FP / (FP + TN)``."""
    return rate(counts.false_positive, counts.negatives, confidence)


def false_negative_rate(counts: Counts, confidence: float = 0.95) -> Estimate:
    """Of the positive items, the share that is not called so: ``FN / (FN + TP)``."""
    return rate(counts.false_negative, counts.positives, confidence)


def f1(counts: Counts, confidence: float = 0.95) -> Estimate:
    """``2 TP / (2 TP + FP + FN)``.

    It rises with the share ``J = TP / (TP + FP + FN)`` of the items that somebody calls positive, as
    ``2 J / (1 + J)``, so the ends of Wilson's interval of ``J`` give those of F1; ``n`` counts these items.

    >>> round(f1(Counts(8, 2, 9, 1))["value"], 4)
    0.8421
    """
    share = rate(
        counts.true_positive, counts.true_positive + counts.false_positive + counts.false_negative, confidence
    )
    if share["value"] is None or share["low"] is None or share["high"] is None:
        return share
    value, low, high = (2 * x / (1 + x) for x in (share["value"], share["low"], share["high"]))
    return {"value": value, "low": low, "high": high, "n": share["n"]}


def macro_f1(
    rows: Sequence[Row],
    label: str,
    labels: Sequence[str],
    confidence: float = 0.95,
    *,
    resamples: int = 10_000,
    seed: int = 0,
) -> Estimate:
    """Mean over the classes of each one's F1, with a percentile bootstrap interval over the items.

    A class that neither the truth nor an answer names has no F1 and is left out of the mean.

    >>> row = {"truth": {"kind": "a"}, "answer": {"kind": "a"}, "label": "a"}
    >>> macro_f1([row], "kind", ["a", "b"])["value"]
    1.0
    """
    cells = np.array(confusion(rows, label, labels)["counts"], dtype=np.int64).reshape(
        len(labels), len(labels) + 1
    )
    n, value = int(cells.sum()), float(_mean_f1(cells[None])[0])
    if n == 0 or np.isnan(value):
        return {"value": None, "low": None, "high": None, "n": n}
    # Drawing n items with replacement is drawing the cells' counts from a multinomial.
    draws = (
        np.random.default_rng(seed)
        .multinomial(n, cells.ravel() / n, size=resamples)
        .reshape(resamples, *cells.shape)
    )
    low, high = (
        float(x) for x in np.nanquantile(_mean_f1(draws), [0.5 - confidence / 2, 0.5 + confidence / 2])
    )
    if low == high:  # all right or all wrong: resampling finds no doubt where there is some
        low, high = wilson(round(value * n), n, confidence)
    return {"value": value, "low": low, "high": high, "n": n}


def _mean_f1(cells: Int[np.ndarray, "r truth answer"]) -> Float[np.ndarray, " r"]:
    """Mean F1 of each of many confusion matrices ``[r, truth, answer]``; NaN where no class occurs."""
    columns = []
    for index in range(cells.shape[1]):
        named = cells[:, index, :].sum(1) + cells[:, :, index].sum(1)
        with np.errstate(invalid="ignore"):
            columns.append(2 * cells[:, index, index] / np.where(named > 0, named, np.nan))
    table = np.stack(columns, axis=1)
    known = ~np.isnan(table)
    return np.where(known.any(1), np.where(known, table, 0).sum(1) / np.maximum(known.sum(1), 1), np.nan)


def confusion(
    rows: Sequence[Row], label: str, labels: Sequence[str], reference: Sequence[str | None] | None = None
) -> dict[str, Any]:
    """How often each true label got each answer.

    Args:
        rows: Predictions.
        label: The task's label field.
        labels: The classes, in order.
        reference: What to compare with instead of the truth, one label a row (a teacher's, say).

    Returns:
        ``labels`` (the rows of the matrix, and its columns but the last), ``counts [l, l + 1]`` whose last
        column holds the answers
        that were not valid, ``n``, and ``left_out``: rows whose reference is none of the classes.

    >>> confusion([{"truth": {"kind": "a"}, "answer": {"kind": "b"}, "label": "b"}], "kind", ["a", "b"])["counts"]
    [[0, 1, 0], [0, 0, 0]]
    """
    place = {name: i for i, name in enumerate(labels)}
    counts = [[0] * (len(labels) + 1) for _ in labels]
    left_out = 0
    truths = [true_value(row, label) for row in rows] if reference is None else reference
    for row, truth in zip(rows, truths, strict=True):
        if truth in place:
            counts[place[truth]][place.get(answered(row) or "", len(labels))] += 1
        else:
            left_out += 1
    return {"labels": list(labels), "counts": counts, "n": sum(map(sum, counts)), "left_out": left_out}


def split_by(rows: Sequence[Row], field: str) -> dict[str, list[Row]]:
    """The rows by the value of one of their fields, in the order of the values; ``(none)`` where a row lacks
    it.

    >>> list(split_by([{"fields": {"kind": "b"}}, {"fields": {}}, {"fields": {"kind": "a"}}], "kind"))
    ['(none)', 'a', 'b']
    """
    parts: dict[str, list[Row]] = {}
    for row in rows:
        value = (row.get("fields") or {}).get(field)
        parts.setdefault("(none)" if value is None or value == "" else str(value), []).append(row)
    return dict(sorted(parts.items()))


def by_group(
    rows: Sequence[Row],
    label: str,
    positive: Sequence[str],
    group: str,
    *,
    confidence: float = 0.95,
    few: int = FEW,
) -> dict[str, Any]:
    """False-positive and false-negative rates of each group, with counts, and the widest gap of each rate.

    Args:
        rows: Predictions; rows without a truth are left out.
        label: The task's label field.
        positive: Classes that count as positive.
        group: The field of the row that names the group.
        few: A rate over fewer items is flagged, and takes no part in the gaps.

    Returns:
        ``field``; ``groups``: for each its ``n``, both rates, their counts, and ``few``, the names of the
        flagged rates; ``gaps``: for each rate the groups with the highest and lowest value, and the
        difference with Newcombe's interval (None where fewer than two groups have enough items). The interval
        is that of two groups chosen beforehand; the widest of many gaps is wider by luck too.
    """
    groups: dict[str, Any] = {}
    for name, part in split_by([row for row in rows if true_value(row, label) is not None], group).items():
        counts = count_sides(part, label, positive)
        groups[name] = {
            "n": len(part),
            "false_positive_rate": false_positive_rate(counts, confidence),
            "false_positives": counts.false_positive,
            "negatives": counts.negatives,
            "false_negative_rate": false_negative_rate(counts, confidence),
            "false_negatives": counts.false_negative,
            "positives": counts.positives,
            "few": [
                kind
                for kind, n in (
                    ("false_positive_rate", counts.negatives),
                    ("false_negative_rate", counts.positives),
                )
                if n < few
            ],
        }
    sides = {
        "false_positive_rate": ("false_positives", "negatives"),
        "false_negative_rate": ("false_negatives", "positives"),
    }
    gaps = {kind: _gap(groups, kind, *keys, confidence) for kind, keys in sides.items()}
    return {"field": group, "groups": groups, "gaps": gaps, "few_below": few}


def _gap(
    groups: Mapping[str, Any], kind: str, hits: str, items: str, confidence: float
) -> dict[str, Any] | None:
    known = [
        (group[kind]["value"], name)
        for name, group in groups.items()
        if kind not in group["few"] and group[kind]["n"]
    ]
    if len(known) < 2:
        return None
    highest, lowest = max(known)[1], min(known)[1]
    high, low = groups[highest], groups[lowest]
    ends = newcombe(high[hits], high[items], low[hits], low[items], confidence)
    return {
        "highest": highest,
        "lowest": lowest,
        "value": high[kind]["value"] - low[kind]["value"],
        "low": ends[0],
        "high": ends[1],
    }


def latency(rows: Sequence[Row]) -> dict[str, Any]:
    """Seconds an item, and items and tokens a minute or second, from each row's share of its batch's wall
    time.

    ``latency_s`` is the median, ``latency_p95_s`` the 95th percentile, ``items_per_minute`` 60 over the mean:
        what a long run gets through.

    >>> latency([{"latency_s": 0.5, "tokens": 10}, {"latency_s": 1.5, "tokens": 30}])["items_per_minute"]
    60.0
    """
    times = np.array([float(row.get("latency_s") or 0.0) for row in rows])
    times, tokens = times[times > 0], sum(int(row.get("tokens") or 0) for row in rows if row.get("latency_s"))
    if not times.size:
        return {"latency_s": None, "latency_p95_s": None, "items_per_minute": None, "tokens_per_second": None}
    return {
        "latency_s": float(np.median(times)),
        "latency_p95_s": float(np.quantile(times, 0.95)),
        "items_per_minute": float(60 / times.mean()),
        "tokens_per_second": float(tokens / times.sum()) if tokens else None,
    }
