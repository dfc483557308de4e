"""Metrics of one model against the true labels: accuracy, F1, error rates, latency.

A row is a dict of ``predictions.jsonl``: ``id``, ``truth``, ``answer``, ``label``, ``score``,
``label_probs``, ``fields``, ``latency_s``, ``tokens``. An invalid answer (``answer`` is None) is never
correct: it has no label and no score, whatever its text is. Comparisons with a teacher are in
:mod:`mlx_distill.metrics.agreement`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float, Real

from mlx_distill.errors import DataError
from mlx_distill.metrics.clusters import cluster_sums, clustered_rate, number_estimate, share_estimate
from mlx_distill.metrics.intervals import Estimate, bootstrap_totals, rate, wilson

Row = Mapping[str, Any]
MIN_ITEMS = 30
"""A group's rate over fewer items is flagged: at a rate of 0.5 its interval is wider than +-0.18."""


def predicted_label(row: Row) -> str | None:
    """The label of a valid answer, else None."""
    return row.get("label") if row.get("answer") is not None else None


def predicted_score(row: Row) -> float | None:
    """The score of a valid answer, else None."""
    score = row.get("score") if row.get("answer") is not None else None
    return None if score is None else float(score)


def true_value(row: Row, field: str) -> Any:
    """A field of the true answer, None where the row has none."""
    return (row.get("truth") or {}).get(field)


def accuracy(
    rows: Sequence[Row], label: str, *, cluster: str | None = None, confidence: float = 0.95
) -> Estimate:
    """Share of the rows with the true label.

    Args:
        rows: Predictions; rows without a true label are left out.
        label: The task's label field.
        cluster: The field of a row that related rows share: the interval is then that of clusters.
        confidence: Level of the interval.

    >>> row = {"truth": {"kind": "a"}, "answer": {"kind": "a"}, "label": "a"}
    >>> accuracy([row, {**row, "answer": None}], "kind")["value"]
    0.5
    """
    labelled = [row for row in rows if true_value(row, label) is not None]
    return share_estimate(correct(labelled, label), clusters_of(labelled, cluster), confidence)


def accuracy_by_distribution(
    rows: Sequence[Row], label: str, *, cluster: str | None = None, confidence: float = 0.95
) -> Estimate:
    """Share of the rows whose most probable label, by ``label_probs``, is the true one.

    Beside :func:`accuracy` it tells a model that does not know the label from one that knows it and does not
    write it. Rows without a true label or without label probabilities are left out; ``cluster`` as in
    :func:`accuracy`.

    >>> row = {"truth": {"kind": "a"}, "answer": None, "label_probs": {"a": 0.8, "b": 0.2}}
    >>> accuracy_by_distribution([row], "kind")["value"], accuracy([row], "kind")["value"]
    (1.0, 0.0)
    """
    kept = [row for row in rows if row.get("label_probs") and true_value(row, label) is not None]
    likeliest = [max(row["label_probs"], key=row["label_probs"].__getitem__) for row in kept]
    hits = [name == true_value(row, label) for name, row in zip(likeliest, kept, strict=True)]
    return share_estimate(hits, clusters_of(kept, cluster), confidence)


def correct(rows: Sequence[Row], label: str) -> list[bool]:
    """For each row that has a true label, whether the prediction equals it."""
    truths = [(row, true_value(row, label)) for row in rows]
    return [predicted_label(row) == truth for row, truth in truths if truth is not None]


def json_valid(rows: Sequence[Row], *, cluster: str | None = None, confidence: float = 0.95) -> Estimate:
    """Share of the rows whose answer is valid under the task's schema; ``cluster`` as in :func:`accuracy`.

    >>> json_valid([{"answer": {}}, {"answer": None}])["value"]
    0.5
    """
    valid = [row.get("answer") is not None for row in rows]
    return share_estimate(valid, clusters_of(rows, cluster), confidence)


def score_errors(
    rows: Sequence[Row], score: str, scale: tuple[float, float] | None = None
) -> list[float | None]:
    """Absolute error of each row's score, None where the row has no true score.

    Args:
        rows: Predictions.
        score: The task's score field.
        scale: Lowest and highest score: an answer that is not valid then has the largest error that its true
            score allows; None leaves it out.

    >>> score_errors([{"truth": {"s": 70}, "answer": None}], "s", (0, 100))
    [70.0]
    """
    out: list[float | None] = []
    for row in rows:
        given, truth = predicted_score(row), true_value(row, score)
        if truth is None:
            out.append(None)
        elif given is not None:
            out.append(abs(given - float(truth)))
        else:
            out.append(None if scale is None else max(abs(float(truth) - end) for end in scale))
    return out


def score_mae(
    rows: Sequence[Row],
    score: str | None,
    *,
    scale: tuple[float, float] | None = None,
    cluster: str | None = None,
    confidence: float = 0.95,
) -> Estimate:
    """Mean absolute error of the score, in points of the task's scale; ``n`` counts the rows.

    Args:
        rows: Predictions; rows without a true score are left out.
        score: The task's score field.
        scale: Lowest and highest score: an answer that is not valid then has the largest error that its true
            score allows; None leaves it out.
        cluster: As in :func:`accuracy`.
        confidence: Level of the interval.

    >>> score_mae([{"truth": {"s": 50}, "answer": {"s": 47}, "score": 47}], "s")["value"]
    3.0
    """
    errors = score_errors(rows, score, scale) if score else []
    kept = [(row, error) for row, error in zip(rows, errors, strict=bool(score)) if error is not None]
    clusters = clusters_of([row for row, _ in kept], cluster)
    return number_estimate([error for _, error in kept], clusters, confidence, bounds=distance_bounds(scale))


def distance_bounds(scale: tuple[float, float] | None) -> tuple[float, float]:
    """Between which values the distance of two scores lies; without a scale it has no upper end.

    >>> distance_bounds((1, 5))
    (0.0, 4.0)
    """
    return 0.0, float("inf") if scale is None else float(scale[1] - scale[0])


@dataclass(frozen=True)
class ConfusionCounts:
    """Numbers of true and false positives and negatives; of rows in clusters also the outcome of each row,
    such as ``false_positive``, with its cluster.
    """

    true_positive: int
    false_positive: int
    true_negative: int
    false_negative: int
    clustered: Sequence[tuple[str, Hashable]] | None = field(default=None, repr=False, compare=False)

    @property
    def positives(self) -> int:
        """Items whose true label is positive."""
        return self.true_positive + self.false_negative

    @property
    def negatives(self) -> int:
        """Items whose true label is negative."""
        return self.true_negative + self.false_positive

    def share(self, events: Sequence[str], of: Sequence[str], confidence: float = 0.95) -> Estimate:
        """The rate of some outcomes among others.

        >>> ConfusionCounts(8, 2, 9, 1).share(["true_positive"], ["true_positive", "false_positive"])["value"]
        0.8
        """
        if self.clustered is None:
            hits, n = (sum(getattr(self, name) for name in names) for names in (events, of))
            return rate(hits, n, confidence)
        kept = [(outcome in events, cluster) for outcome, cluster in self.clustered if outcome in of]
        return clustered_rate([hit for hit, _ in kept], [cluster for _, cluster in kept], confidence)


OUTCOMES: Mapping[tuple[bool, bool], str] = {
    (True, True): "true_positive",
    (False, True): "false_positive",
    (False, False): "true_negative",
    (True, False): "false_negative",
}
"""What a truth and a prediction are together."""


def binary_counts(
    pairs: Iterable[tuple[bool, bool | None]], clusters: Sequence[Hashable] | None = None
) -> ConfusionCounts:
    """Count true and false positives and negatives of pairs of truth and prediction.

    A prediction of None, that of an answer which is not valid, is wrong: a false positive where the truth is
    negative, else a false negative. So a model that answers nothing has no good error rate. With the
    ``clusters`` of the pairs the intervals of rates are those of clusters.

    >>> binary_counts([(False, None), (True, None), (True, True)])
    ConfusionCounts(true_positive=1, false_positive=1, true_negative=0, false_negative=1)
    """
    outcomes = [OUTCOMES[truth, not truth if given is None else given] for truth, given in pairs]
    counts = Counter(outcomes)
    clustered = None if clusters is None else list(zip(outcomes, clusters, strict=True))
    return ConfusionCounts(**{name: counts[name] for name in OUTCOMES.values()}, clustered=clustered)


def confusion_counts(
    rows: Sequence[Row], label: str, positive: Sequence[str], *, cluster: str | None = None
) -> ConfusionCounts:
    """Count true and false positives and negatives.

    An answer that is not valid is wrong, see :func:`binary_counts`.

    Args:
        rows: Predictions; rows without a true label are left out.
        label: The task's label field.
        positive: Classes that count as positive.
        cluster: As in :func:`accuracy`.

    >>> row = {"truth": {"kind": "bad"}, "answer": None, "label": None}
    >>> confusion_counts([row], "kind", ["bad"])
    ConfusionCounts(true_positive=0, false_positive=0, true_negative=0, false_negative=1)
    """
    labelled = [row for row in rows if true_value(row, label) is not None]
    pairs = [
        (
            true_value(row, label) in positive,
            None if (given := predicted_label(row)) is None else given in positive,
        )
        for row in labelled
    ]
    return binary_counts(pairs, clusters_of(labelled, cluster))


def threshold_counts(
    rows: Sequence[Row], score: str, threshold: float, *, cluster: str | None = None
) -> ConfusionCounts:
    """:func:`binary_counts` of scores of at least ``threshold``, which are positive.

    Args:
        rows: Predictions; rows without a true score are left out.
        score: The task's score field.
        threshold: The lowest positive score.
        cluster: As in :func:`accuracy`.
    """
    scored = [row for row in rows if true_value(row, score) is not None]
    pairs = [
        (
            float(true_value(row, score)) >= threshold,
            None if (given := predicted_score(row)) is None else given >= threshold,
        )
        for row in scored
    ]
    return binary_counts(pairs, clusters_of(scored, cluster))


def precision(counts: ConfusionCounts, confidence: float = 0.95) -> Estimate:
    """``TP / (TP + FP)``: share of the positive predictions that are correct."""
    return counts.share(["true_positive"], ["true_positive", "false_positive"], confidence)


def recall(counts: ConfusionCounts, confidence: float = 0.95) -> Estimate:
    """``TP / (TP + FN)``: share of the positive items that are predicted positive."""
    return counts.share(["true_positive"], ["true_positive", "false_negative"], confidence)


def false_positive_rate(counts: ConfusionCounts, confidence: float = 0.95) -> Estimate:
    """``FP / (FP + TN)``: share of the negative items that are predicted positive."""
    return counts.share(["false_positive"], ["false_positive", "true_negative"], confidence)


def false_negative_rate(counts: ConfusionCounts, confidence: float = 0.95) -> Estimate:
    """``FN / (FN + TP)``: share of the positive items that are predicted negative."""
    return counts.share(["false_negative"], ["true_positive", "false_negative"], confidence)


def f1(counts: ConfusionCounts, confidence: float = 0.95) -> Estimate:
    """``2 TP / (2 TP + FP + FN)``.

    F1 equals ``2 J / (1 + J)`` with the Jaccard index ``J = TP / (TP + FP + FN)`` and increases with it, so
    the interval is that of the rate ``J`` mapped the same way; ``n`` is ``TP + FP + FN``.

    >>> round(f1(ConfusionCounts(8, 2, 9, 1))["value"], 4)
    0.8421
    """
    of = ["true_positive", "false_positive", "false_negative"]
    jaccard = counts.share(["true_positive"], of, confidence)
    if jaccard["value"] is None or jaccard["low"] is None or jaccard["high"] is None:
        return jaccard
    out = jaccard.copy()  # of clusters with their number
    out["value"], out["low"], out["high"] = (
        2 * x / (1 + x) for x in (jaccard["value"], jaccard["low"], jaccard["high"])
    )
    return out


class MacroF1(Estimate):
    """A macro F1 with the classes over which it is the mean."""

    classes: list[str]


def macro_f1(
    rows: Sequence[Row],
    label: str,
    labels: Sequence[str],
    confidence: float = 0.95,
    *,
    clusters: Sequence[Hashable] | None = None,
    resamples: int = 10_000,
    seed: int = 0,
) -> MacroF1:
    """Mean of the F1 of each class, with a percentile bootstrap interval over the rows or their clusters.

    The classes are those that occur in the true labels or in the predictions, and the same in every resample:
    one that a resample has in neither counts there as 0, as scikit-learn's ``zero_division=0`` does. An
    invalid answer is wrong: it is in the denominator of its true class.

    Args:
        rows: Predictions; rows without a true label are left out.
        label: The task's label field.
        labels: The task's classes.
        confidence: Level of the interval.
        clusters: The cluster of each row, which are then resampled as a whole; None for rows on their own.
        resamples: Number of draws.
        seed: The same seed gives the same interval.

    >>> row = {"truth": {"kind": "a"}, "answer": {"kind": "a"}, "label": "a"}
    >>> estimate = macro_f1([row], "kind", ["a", "b"])
    >>> estimate["value"], estimate["classes"]
    (1.0, ['a'])
    """
    if clusters is not None and len(clusters) != len(rows):
        raise DataError(f"{len(clusters)} clusters of {len(rows)} rows", fix="give one cluster per row")
    index = {name: i for i, name in enumerate(labels)}
    used = [i for i, row in enumerate(rows) if true_value(row, label) in index]
    truth = np.array([index[true_value(rows[i], label)] for i in used], dtype=np.int64)
    answer = np.array([index.get(predicted_label(rows[i]) or "", -1) for i in used], dtype=np.int64)
    n, every = len(used), np.arange(len(labels))
    # Of each row and class: whether it is answered rightly, and how often it is the true or predicted one.
    right = (truth[:, None] == every) & (answer[:, None] == every)
    sizes = (truth[:, None] == every).astype(np.int64) + (answer[:, None] == every)
    present = sizes.sum(axis=0) > 0
    classes = [name for name, occurs in zip(labels, present, strict=True) if occurs]
    if n == 0:
        return {"value": None, "low": None, "high": None, "n": 0, "classes": []}

    def statistic(totals: Real[np.ndarray, "r k"]) -> Float[np.ndarray, " r"]:
        hits, occurrences = np.split(totals, 2, axis=1)
        return (2 * hits / np.maximum(occurrences, 1)).mean(axis=1)

    tables = np.concatenate([right[:, present], sizes[:, present]], axis=1)
    if clusters is not None:
        tables = cluster_sums(tables, [clusters[i] for i in used])
    units, value = len(tables), float(statistic(tables.sum(axis=0, keepdims=True))[0])
    low, high = bootstrap_totals(tables, statistic, confidence, resamples=resamples, seed=seed)
    if low == high:  # all correct or all wrong: every resample has the same F1
        low, high = wilson(round(value * units), units, confidence)
    return {"value": value, "low": low, "high": high, "n": n, "classes": classes}


def confusion(
    rows: Sequence[Row], label: str, labels: Sequence[str], reference: Sequence[str | None] | None = None
) -> dict[str, Any]:
    """The confusion matrix.

    Args:
        rows: Predictions.
        label: The task's label field.
        labels: The classes, in order.
        reference: Labels to compare with instead of the true ones, one per row (for example a teacher's).

    Returns:
        ``labels`` (the rows of the matrix, and its columns but the last), ``counts [l, l + 1]`` whose last
        column counts invalid answers, ``n``, and ``left_out``: rows whose reference is none of the classes.

    >>> row = {"truth": {"kind": "a"}, "answer": {"kind": "b"}, "label": "b"}
    >>> confusion([row], "kind", ["a", "b"])["counts"]
    [[0, 1, 0], [0, 0, 0]]
    """
    index = {name: i for i, name in enumerate(labels)}
    counts = [[0] * (len(labels) + 1) for _ in labels]
    left_out = 0
    truths = [true_value(row, label) for row in rows] if reference is None else reference
    for row, truth in zip(rows, truths, strict=True):
        if truth in index:
            counts[index[truth]][index.get(predicted_label(row) or "", len(labels))] += 1
        else:
            left_out += 1
    return {"labels": list(labels), "counts": counts, "n": sum(map(sum, counts)), "left_out": left_out}


def clusters_of(rows: Sequence[Row], field: str | None) -> list[Any] | None:
    """The cluster of each row: the value of one of its fields; None without such a field.

    >>> clusters_of([{"fields": {"artist": "x"}}, {"fields": {}}], "artist")
    ['x', None]
    """
    return None if field is None else [(row.get("fields") or {}).get(field) for row in rows]


def present_fields(rows: Sequence[Row], fields: Sequence[str]) -> list[str]:
    """The fields of which some row has a value.

    >>> present_fields([{"fields": {"kind": "a", "tag": ""}}, {"fields": {}}], ["kind", "tag"])
    ['kind']
    """
    return [
        name for name in fields if any((row.get("fields") or {}).get(name) not in (None, "") for row in rows)
    ]


def group_by(rows: Sequence[Row], field: str) -> dict[str, list[Row]]:
    """Rows grouped by the value of one of their fields, sorted by value; ``(none)`` for rows without one.

    >>> list(group_by([{"fields": {"kind": "b"}}, {"fields": {}}, {"fields": {"kind": "a"}}], "kind"))
    ['(none)', 'a', 'b']
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        value = (row.get("fields") or {}).get(field)
        groups.setdefault("(none)" if value is None or value == "" else str(value), []).append(row)
    return dict(sorted(groups.items()))


def latency(rows: Sequence[Row]) -> dict[str, Any]:
    """Latency and throughput, from each row's share of its batch's wall time.

    ``latency_s`` is the median in seconds, ``latency_p95_s`` the 95th percentile, ``items_per_minute`` 60
    divided by the mean, ``tokens_per_second`` all tokens divided by the total time. None without times.

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
