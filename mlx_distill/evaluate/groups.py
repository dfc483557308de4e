"""Error rates by group: whether they differ, which groups stand out, and what a change of model does in each.

The difference between the highest and the lowest of several groups is no evidence (see
:mod:`mlx_distill.metrics.homogeneity`) and is not given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mlx_distill.metrics.classification import (
    MIN_ITEMS,
    Row,
    confusion_counts,
    false_negative_rate,
    false_positive_rate,
    group_by,
    predicted_label,
    true_value,
)
from mlx_distill.metrics.homogeneity import benjamini_hochberg, funnel_limits, homogeneity_test
from mlx_distill.metrics.paired import compare_paired

INNER, OUTER = 0.95, 0.998
"""Levels of the limits of a funnel plot."""
NO_GROUP = "(none)"
CHANGES = (("teacher_before", "teacher"), ("teacher", "student"), ("teacher", "quantized"))
"""The pairs of models, before and after, that are compared within each group."""


class ErrorRate(NamedTuple):
    """A rate of errors, the keys of its counts, and whether its rows are those whose label is positive."""

    name: str
    errors: str
    items: str
    of_positives: bool


ERROR_RATES = (
    ErrorRate("false_positive_rate", "false_positives", "negatives", False),
    ErrorRate("false_negative_rate", "false_negatives", "positives", True),
)


def group_errors(
    rows: Sequence[Row],
    label: str,
    positive: Sequence[str],
    group: str,
    *,
    cluster: str | None = None,
    confidence: float = 0.95,
    min_items: int = MIN_ITEMS,
    permutations: int = 9_999,
    seed: int = 0,
) -> dict[str, Any]:
    """False-positive and false-negative rate of each group, and one test that a rate is the same in all.

    Args:
        rows: Predictions; rows without a true label are left out, and an invalid answer is wrong.
        label: The task's label field.
        positive: Classes that count as positive.
        group: The row's field that holds the group. Rows without one are shown as ``(none)`` and not tested.
        cluster: The row's field that related rows share, or None: the intervals are then those of clusters;
            the test and the limits take rows as independent.
        confidence: Level of the intervals, and of the tests.
        min_items: A rate over fewer items is flagged as few and left out of the test.
        permutations: Draws of the test.
        seed: Of the draws.

    Returns:
        ``field``, ``few_below``; ``groups``: for each its ``n``, both rates, their counts, ``few`` (the names
        of the flagged rates) and ``limits``: by rate, within which ends 95 and 99.8 % of groups of its size
        lie if all are equal, and ``outside``: ``"95"`` or ``"99.8"`` where it lies outside them, else None;
        ``tests``: by rate the homogeneity test (``p_value``, ``statistic``, ``pooled``, ``groups``) with
        ``adjusted_p`` (Benjamini-Hochberg over the rates), ``differs`` (whether that is below
        ``1 - confidence``) and ``left_out``, the flagged groups; None where fewer than two groups have enough
        rows.

    >>> rows = [
    ...     {"truth": {"kind": "a"}, "answer": {}, "label": "b" if i < k else "a", "fields": {"who": who}}
    ...     for who, k in (("x", 3), ("y", 20)) for i in range(40)
    ... ]
    >>> test = group_errors(rows, "kind", ["b"], "who")["tests"]["false_positive_rate"]
    >>> test["differs"], test["groups"], round(test["pooled"]["value"], 4)
    (True, 2, 0.2875)
    """
    labelled = [row for row in rows if true_value(row, label) is not None]
    members = group_by(labelled, group)
    groups = {
        name: _group(own, label, positive, cluster, confidence, min_items) for name, own in members.items()
    }
    tests = {
        rate.name: _test(members, groups, rate, label, positive, permutations, seed) for rate in ERROR_RATES
    }
    made = {name: test for name, test in tests.items() if test}
    adjusted = benjamini_hochberg([test["p_value"] for test in made.values()])
    for test, p in zip(made.values(), adjusted, strict=True):
        test |= {"adjusted_p": p, "differs": p < 1 - confidence}
    for rate in ERROR_RATES:
        _add_limits(groups, rate, tests[rate.name])
    return {"field": group, "few_below": min_items, "groups": groups, "tests": tests}


def _group(
    rows: Sequence[Row],
    label: str,
    positive: Sequence[str],
    cluster: str | None,
    confidence: float,
    min_items: int,
) -> dict[str, Any]:
    """Rates and counts of one group."""
    counts = confusion_counts(rows, label, positive, cluster=cluster)
    sizes = {"false_positive_rate": counts.negatives, "false_negative_rate": counts.positives}
    return {
        "n": len(rows),
        "false_positive_rate": false_positive_rate(counts, confidence),
        "false_positives": counts.false_positive,
        "negatives": counts.negatives,
        "false_negative_rate": false_negative_rate(counts, confidence),
        "false_negatives": counts.false_negative,
        "positives": counts.positives,
        "few": [name for name, n in sizes.items() if n < min_items],
        "limits": {},
    }


def _errors(rows: Sequence[Row], rate: ErrorRate, label: str, positive: Sequence[str]) -> dict[str, bool]:
    """Of each row that can have the error whether it has it: an answer that is not valid is wrong, as in
    :func:`mlx_distill.metrics.classification.confusion_counts`.
    """
    return {
        str(row.get("id", number)): (given := predicted_label(row)) is None
        or (given in positive) != rate.of_positives
        for number, row in enumerate(rows)
        if (true_value(row, label) in positive) == rate.of_positives
    }


def _test(
    members: Mapping[str, Sequence[Row]],
    groups: Mapping[str, Any],
    rate: ErrorRate,
    label: str,
    positive: Sequence[str],
    permutations: int,
    seed: int,
) -> dict[str, Any] | None:
    compared = [name for name in members if rate.name not in groups[name]["few"] and name != NO_GROUP]
    if len(compared) < 2:
        return None
    events, names = [], []
    for name in compared:
        errors = _errors(members[name], rate, label, positive)
        events += list(errors.values())
        names += [name] * len(errors)
    left_out = [name for name in members if name not in compared]
    test = homogeneity_test(events, names, permutations=permutations, seed=seed)
    return {**test, "adjusted_p": None, "differs": False, "left_out": left_out}


def _add_limits(groups: Mapping[str, Any], rate: ErrorRate, test: Mapping[str, Any] | None) -> None:
    """To each group that was tested, the limits of its size around the common rate."""
    for name, group in groups.items():
        if test is None or name in test["left_out"]:
            continue
        value, n = group[rate.name]["value"], group[rate.items]
        limits: dict[str, Any] = {"outside": None}
        for level, key in ((INNER, "95"), (OUTER, "99.8")):
            low, high = funnel_limits(test["pooled"]["value"], n, level)
            limits[key] = [low, high]
            if not low <= value <= high:
                limits["outside"] = key
        group["limits"][rate.name] = limits


def group_changes(
    models: Mapping[str, Sequence[Row]],
    label: str,
    positive: Sequence[str],
    group: str,
    *,
    cluster: str | None = None,
    confidence: float = 0.95,
    min_items: int = MIN_ITEMS,
) -> list[dict[str, Any]]:
    """What a change of model does to the error rates within each group, on the same rows.

    Args:
        models: Model name to its predictions on the same rows; of :data:`CHANGES` those pairs are compared
            both of whose models are there.
        label: The task's label field.
        positive: Classes that count as positive.
        group: The row's field that holds the group.
        cluster: The row's field that related rows share, or None.
        confidence: Level of the intervals.
        min_items: A rate over fewer items is flagged and has no interval.

    Returns:
        For each pair ``before``, ``after``, ``field`` and ``rates``: by rate and group ``n``, ``few``,
        ``before`` and ``after`` (the rates), ``difference`` (after minus before, so below 0 is fewer errors),
        ``fixed`` and ``broken`` (rows), ``p_value``, and ``adjusted_p`` by Benjamini-Hochberg over the groups
        and rates of the pair.
    """
    out = []
    for before, after in CHANGES:
        if before not in models or after not in models:
            continue
        rates = compare_groups(
            models[before],
            models[after],
            label,
            positive,
            group,
            cluster=cluster,
            confidence=confidence,
            min_items=min_items,
        )
        out.append({"before": before, "after": after, "field": group, "rates": rates})
    return out


def compare_groups(
    before: Sequence[Row],
    after: Sequence[Row],
    label: str,
    positive: Sequence[str],
    group: str,
    *,
    cluster: str | None = None,
    confidence: float = 0.95,
    min_items: int = MIN_ITEMS,
) -> dict[str, dict[str, Any]]:
    """The error rates within each group with one model and with another, on the same rows.

    Args:
        before: The predictions of the one.
        after: Those of the other.
        label: These and the following are those of :func:`group_changes`.
        positive: Classes that count as positive.
        group: The row's field that holds the group.
        cluster: The row's field that related rows share, or None.
        confidence: Level of the intervals.
        min_items: A rate over fewer items is flagged and has no interval.

    Returns:
        ``rates`` of :func:`group_changes`.
    """
    others = group_by(after, group)
    rates: dict[str, dict[str, Any]] = {
        rate.name: {
            name: _change(rows, others.get(name, []), rate, label, positive, cluster, confidence, min_items)
            for name, rows in group_by(before, group).items()
        }
        for rate in ERROR_RATES
    }
    compared = [entry for of_rate in rates.values() for entry in of_rate.values() if not entry["few"]]
    adjusted = benjamini_hochberg([entry["p_value"] for entry in compared])
    for entry, p in zip(compared, adjusted, strict=True):
        entry["adjusted_p"] = p
    return rates


def _change(
    before: Sequence[Row],
    after: Sequence[Row],
    rate: ErrorRate,
    label: str,
    positive: Sequence[str],
    cluster: str | None,
    confidence: float,
    min_items: int,
) -> dict[str, Any]:
    """One error rate of one group, before and after."""
    first, second = (_errors(rows, rate, label, positive) for rows in (before, after))
    ids = [row_id for row_id in first if row_id in second]
    n = len(ids)
    out: dict[str, Any] = {
        "n": n,
        "few": n < min_items,
        "before": sum(first[i] for i in ids) / n if n else None,
        "after": sum(second[i] for i in ids) / n if n else None,
        "fixed": sum(first[i] and not second[i] for i in ids),
        "broken": sum(second[i] and not first[i] for i in ids),
        "difference": None,
        "p_value": None,
        "adjusted_p": None,
    }
    if out["few"]:
        return out
    fields = {str(row.get("id")): (row.get("fields") or {}) for row in before}
    clusters = [fields[i].get(cluster) for i in ids] if cluster else None
    compared = compare_paired(
        [second[i] for i in ids], [first[i] for i in ids], clusters=clusters, confidence=confidence
    )
    return out | {"difference": compared["difference"], "p_value": compared["p_value"]}
