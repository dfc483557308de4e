"""F1 of fields that hold lists of labels, such as the themes of a song."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float, Int, Real

from mlx_distill.metrics.answers import list_items
from mlx_distill.metrics.classification import Row, clusters_of, true_value
from mlx_distill.metrics.clusters import cluster_sums
from mlx_distill.metrics.intervals import Estimate, bootstrap_totals, wilson

Average = Literal["micro", "macro"]
AVERAGES = ("micro", "macro", "samples")


def multilabel_counts(
    rows: Sequence[Row], field: str
) -> tuple[list[str], Int[np.ndarray, "rows labels counts"]]:
    """True positives, false positives and false negatives of each label of each row.

    An answer that is not valid has none of the true labels. Rows whose true answer has no list in the field
    are left out; order, upper case and repetitions of labels do not count.

    Args:
        rows: Predictions.
        field: The answer's field with the list.

    Returns:
        The labels that occur, sorted, and the counts, last axis TP, FP, FN.

    >>> rows = [{"truth": {"t": ["a", "b"]}, "answer": {"t": ["b", "c"]}}, {"truth": {}, "answer": {}}]
    >>> labels, counts = multilabel_counts(rows, "t")
    >>> labels, counts.tolist()
    (['a', 'b', 'c'], [[[0, 0, 1], [1, 0, 0], [0, 1, 0]]])
    """
    pairs = []
    for row in rows:
        truth = true_value(row, field)
        if isinstance(truth, (list, tuple)):
            pairs.append((set(list_items((row.get("answer") or {}).get(field))), set(list_items(truth))))
    labels = sorted(set().union(*(answer | truth for answer, truth in pairs)))
    index = {name: i for i, name in enumerate(labels)}
    counts = np.zeros((len(pairs), len(labels), 3), dtype=np.int64)
    for i, (answer, truth) in enumerate(pairs):
        for kind, names in enumerate((answer & truth, answer - truth, truth - answer)):
            counts[i, [index[name] for name in names], kind] = 1
    return labels, counts


def multilabel_f1(
    rows: Sequence[Row],
    field: str,
    average: Average = "micro",
    confidence: float = 0.95,
    *,
    cluster: str | None = None,
    resamples: int = 2_000,
    seed: int = 0,
) -> Estimate:
    """F1 of a field that holds a list of labels, with a percentile bootstrap interval over the rows, or
    over the clusters of rows that share a field of theirs (``cluster``).

    ``micro``: ``2 TP / (2 TP + FP + FN)`` over all labels of all rows; ``macro``: the mean of the F1 of each
    label that occurs in any true or given answer. The labels are the same in every resample: one that a
    resample lacks counts there as 0, as in :func:`mlx_distill.metrics.classification.macro_f1`. For the mean
    over rows (``samples``) see :func:`mlx_distill.metrics.answers.field_f1`.

    >>> rows = [{"truth": {"t": ["a", "b"]}, "answer": {"t": ["b", "c"]}}, {"truth": {"t": ["a"]}}]
    >>> round(multilabel_f1(rows, "t")["value"], 3), round(multilabel_f1(rows, "t", "macro")["value"], 3)
    (0.4, 0.333)
    """
    labels, counts = multilabel_counts(rows, field)
    n = counts.shape[0]
    if not labels:
        return {"value": None, "low": None, "high": None, "n": n}
    tables = counts.sum(axis=1) if average == "micro" else counts.reshape(n, -1)
    value = float(_mean_f1(tables.sum(axis=0, keepdims=True))[0])
    counted = [row for row in rows if isinstance(true_value(row, field), (list, tuple))]
    tables = cluster_sums(tables, clusters_of(counted, cluster))
    low, high = bootstrap_totals(tables, _mean_f1, confidence, resamples=resamples, seed=seed)
    if low == high:  # all right or all wrong: every resample has the same F1
        low, high = wilson(round(value * len(tables)), len(tables), confidence)
    return {"value": value, "low": low, "high": high, "n": n}


def _mean_f1(totals: Real[np.ndarray, "resamples counts"]) -> Float[np.ndarray, " resamples"]:
    """Mean over the labels of the F1 of TP, FP and FN of each label in turn."""
    right, false, missed = np.moveaxis(totals.reshape(len(totals), -1, 3), 2, 0)
    return (2 * right / np.maximum(2 * right + false + missed, 1)).mean(axis=1)
