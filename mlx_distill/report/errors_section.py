"""Sections of the report: error rates, error rates by group, confusion matrices, label distributions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_distill.report.charts import nice_ticks
from mlx_distill.report.tables import Report, metric_titles
from mlx_distill.run_models import RESULTS, STUDENTS, model_class, model_title
from mlx_distill.text import words

# Rates of errors, and the keys of their counts: errors and items.
_ERROR_RATES = {
    "false_positive_rate": ("false_positives", "negatives"),
    "false_negative_rate": ("false_negatives", "positives"),
}


def binary_errors(report: Report) -> dict[str, str] | None:
    """The section of precision, recall, F1 and error rates: their titles, where the task has positive
    classes.
    """
    task = report["task_details"]
    if not task["positive"]:
        return None
    titles = metric_titles(task)
    return {key: titles[key] for key in ("precision", "recall", "f1", *_ERROR_RATES)}


def group_errors(report: Report) -> dict[str, Any] | None:
    """The section of false-positive and false-negative rates by group, with their counts."""
    groups = {
        name: figures["by_group"] for name, figures in report["metrics"].items() if figures.get("by_group")
    }
    if not groups:
        return None
    shown = [name for name in ("teacher", *RESULTS) if name in groups] or list(groups)
    groups = {name: groups[name] for name in shown}
    first, titles = groups[shown[0]], metric_titles(report["task_details"])
    return {
        "field": first["field"],
        "few_below": first["few_below"],
        "models": shown,
        "rates": [_group_rate(groups, rate) | {"title": titles[rate]} for rate in _ERROR_RATES],
    }


def _group_rate(groups: Mapping[str, Any], rate: str) -> dict[str, Any]:
    """One error rate by group: of each group the lines of the models and their counts, the axis, the largest
    difference of each model, and where there is none, the groups that have enough rows.

    Args:
        groups: Model name to its ``by_group``.
        rate: The error rate.
    """
    first = next(iter(groups.values()))
    limit, ticks = _group_axis(groups, rate)
    errors, items = _ERROR_RATES[rate]
    rows: dict[str, Any] = {}
    for value in first["groups"]:
        entries = {name: entry["groups"].get(value) for name, entry in groups.items()}
        rows[value] = {
            "lines": [
                (model_class(name), model_title(name), entry[rate] if entry else None)
                for name, entry in entries.items()
            ],
            "cells": [
                entry
                and {"rate": entry[rate], "errors": entry[errors], "items": entry[items]}
                | {"few": rate in entry["few"]}
                for entry in entries.values()
            ],
        }
    return {
        "rows": rows,
        "limit": limit,
        "ticks": ticks,
        "gaps": {name: entry["gaps"][rate] for name, entry in groups.items() if entry["gaps"][rate]},
        # The sizes of the groups depend on the true labels, not on the model.
        "enough": [value for value, group in first["groups"].items() if rate not in group["few"]],
    }


def _group_axis(groups: Mapping[str, Any], rate: str) -> tuple[float, list[float]]:
    """The upper limit and the ticks of an axis that holds the intervals of all groups."""
    highs = [
        group[rate]["high"]
        for entry in groups.values()
        for group in entry["groups"].values()
        if group[rate]["n"]
    ]
    ticks = nice_ticks(0.0, max([0.1, *highs]))
    limit = min(1.0, ticks[-1])
    return limit, [x for x in ticks if x <= limit]


def confusions(report: Report) -> dict[str, Any] | None:
    """The section of confusion matrices: the teacher against the truth, each student against the teacher.

    The others are folded. None for a task without a label.
    """
    if not report["task_details"]["label"]:
        return None
    metrics = report["metrics"]
    shown: list[dict[str, Any]] = []
    folded: list[dict[str, Any]] = []
    for name, figures in metrics.items():
        if figures["teacher_confusion"]:
            matrix = {"model": name, "reference": "teacher", "confusion": figures["teacher_confusion"]}
            (shown if name in STUDENTS else folded).append(matrix)
        matrix = {"model": name, "reference": "truth", "confusion": figures["confusion"]}
        (shown if name == "teacher" or "teacher" not in metrics else folded).append(matrix)
    return {"shown": shown, "folded": folded}


def label_distributions(report: Report) -> dict[str, Any] | None:
    """The section of each model's label distribution, and of the KL divergence of its label probabilities."""
    metrics, labels = report["metrics"], report["task_details"]["labels"]
    if not labels:
        return None
    names = [(f"l{i % 8}", words(label)) for i, label in enumerate(labels)]
    with_invalid = [*names, ("invalid", "invalid")]
    truth = [sum(row) for row in next(iter(metrics.values()))["confusion"]["counts"]]
    models = {}
    for model, figures in metrics.items():
        totals = [sum(column) for column in zip(*figures["confusion"]["counts"], strict=True)]
        models[model] = {
            "parts": [(*name, count) for name, count in zip(with_invalid, totals, strict=True)],
            "kl": figures.get("label_kl_interval"),
        }
    return {
        "legend": with_invalid,
        "truth": [(*name, count) for name, count in zip(names, truth, strict=True)] if sum(truth) else None,
        "models": models,
    }
