"""F1 of fields that hold lists of labels, such as the themes of a song."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int

from mlx_distill.metrics.answers import list_items
from mlx_distill.metrics.classification import Row, true_value
from mlx_distill.metrics.intervals import Estimate, wilson

Average = Literal["micro", "macro", "samples"]
AVERAGES = ("micro", "macro", "samples")
_CHUNK = 2_000_000  # resampled rows at a time: 16 MB


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
    resamples: int = 2_000,
    seed: int = 0,
) -> Estimate:
    """F1 of a field that holds a list of labels, with a percentile bootstrap interval over the rows.

    ``micro``: ``2 TP / (2 TP + FP + FN)`` over all labels of all rows; ``macro``: the mean of the F1 of each
    label that occurs in any true or given answer. The labels are fixed: one that a resample lacks is left out
    of that resample's mean. For ``samples``, the mean over rows, see
    :func:`mlx_distill.metrics.answers.field_f1`.

    >>> rows = [{"truth": {"t": ["a", "b"]}, "answer": {"t": ["b", "c"]}}, {"truth": {"t": ["a"]}}]
    >>> round(multilabel_f1(rows, "t")["value"], 3), round(multilabel_f1(rows, "t", "macro")["value"], 3)
    (0.4, 0.333)
    """
    _, counts = multilabel_counts(rows, field)
    n = counts.shape[0]
    flat = counts.sum(axis=1, keepdims=True) if average == "micro" else counts
    value = float(_mean_f1(flat.sum(axis=0)[None])[0]) if flat.size else float("nan")
    if np.isnan(value):
        return {"value": None, "low": None, "high": None, "n": n}
    means = _resampled_f1(flat.astype(np.float64), resamples, np.random.default_rng(seed))
    low, high = (float(end) for end in np.nanquantile(means, [0.5 - confidence / 2, 0.5 + confidence / 2]))
    if low == high:  # all right or all wrong: every resample has the same F1
        low, high = wilson(round(value * n), n, confidence)
    return {"value": value, "low": low, "high": high, "n": n}


def _resampled_f1(
    counts: Float[np.ndarray, "rows labels counts"], resamples: int, rng: np.random.Generator
) -> Float[np.ndarray, " resamples"]:
    n, labels, _ = counts.shape
    # Rows with the same counts are interchangeable, so that the number of each kind is drawn.
    kinds, numbers = np.unique(counts.reshape(n, -1), axis=0, return_counts=True)
    chunk, out = max(1, _CHUNK // len(kinds)), []
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        times = rng.multinomial(n, numbers / n, size=size).astype(np.float64)
        out.append(_mean_f1((times @ kinds).reshape(size, labels, 3)))
    return np.concatenate(out)


def _mean_f1(counts: Any) -> Float[np.ndarray, " resamples"]:
    """Mean over the labels of the F1 of counts ``[resamples, labels, 3]``; NaN where no label occurs."""
    weights = 2 * counts[..., 0] + counts[..., 1] + counts[..., 2]
    present = weights > 0
    f1 = np.where(present, 2 * counts[..., 0] / np.where(present, weights, 1), 0.0)
    total = present.sum(axis=1)
    return np.where(total > 0, f1.sum(axis=1) / np.maximum(total, 1), np.nan)
