"""The section of error rates by group: rates, whether they differ, what a change of model does in each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_distill.evaluate.groups import ERROR_RATES, ErrorRate
from mlx_distill.report.charts import nice_ticks
from mlx_distill.report.funnel_chart import funnel_chart
from mlx_distill.report.tables import Report, metric_titles
from mlx_distill.run_models import RESULTS, model_class, model_title


def groups(report: Report) -> dict[str, Any] | None:
    """Of both error rates each group's rates and counts, the test of each model and its funnel plot; and the
    changes from one model to the next. None for a task without groups.
    """
    measured = {
        name: figures["by_group"] for name, figures in report["metrics"].items() if figures.get("by_group")
    }
    if not measured:
        return None
    shown = [name for name in ("teacher", *RESULTS) if name in measured] or list(measured)
    first, titles = measured[shown[0]], metric_titles(report["task_details"])
    entries = {name: measured[name] for name in shown}
    return {
        "field": first["field"],
        "few_below": first["few_below"],
        "models": shown,
        "alpha": 1 - report["confidence"],
        "rates": [_rate(entries, rate) | {"title": titles[rate.name]} for rate in ERROR_RATES],
        "changes": [
            {**change, "titles": {rate.name: titles[rate.name] for rate in ERROR_RATES}}
            for change in report.get("group_changes", [])
        ],
    }


def _rate(models: Mapping[str, Any], rate: ErrorRate) -> dict[str, Any]:
    """One error rate.

    Args:
        models: Model name to its ``by_group``.
        rate: The error rate.
    """
    first = next(iter(models.values()))
    limit, ticks = _axis(models, rate.name)
    rows = {}
    for value in first["groups"]:
        entries = {name: figures["groups"].get(value) for name, figures in models.items()}
        rows[value] = {
            "lines": [
                (model_class(name), model_title(name), entry[rate.name] if entry else None)
                for name, entry in entries.items()
            ],
            "cells": [
                entry
                and {
                    "rate": entry[rate.name],
                    "errors": entry[rate.errors],
                    "items": entry[rate.items],
                    "few": rate.name in entry["few"],
                }
                for entry in entries.values()
            ],
        }
    return {
        "rows": rows,
        "limit": limit,
        "ticks": ticks,
        "tests": {name: _test(name, figures, rate) for name, figures in models.items()},
        # The sizes of the groups depend on the true labels, not on the model.
        "enough": [value for value, group in first["groups"].items() if rate.name not in group["few"]],
    }


def _test(model: str, figures: Mapping[str, Any], rate: ErrorRate) -> dict[str, Any] | None:
    """The test of one model, the groups outside the limits, and the funnel plot."""
    test = figures["tests"][rate.name]
    if test is None:
        return None
    tested = {name: group for name, group in figures["groups"].items() if name not in test["left_out"]}
    limits = {name: group["limits"][rate.name]["outside"] for name, group in tested.items()}
    points = [(name, group[rate.items], group[rate.name]["value"]) for name, group in tested.items()]
    title = f"{model_title(model)}, {rate.name.replace('_', ' ')} by rows of the group"
    return {
        **test,
        "outside": {name: level for name, level in limits.items() if level},
        "chart": funnel_chart(points, test["pooled"]["value"], title, f"{rate.items}, logarithmic"),
    }


def _axis(models: Mapping[str, Any], rate: str) -> tuple[float, list[float]]:
    """The upper limit and the ticks of an axis that holds the intervals of all groups."""
    highs = [
        group[rate]["high"]
        for figures in models.values()
        for group in figures["groups"].values()
        if group[rate]["n"]
    ]
    ticks = nice_ticks(0.0, max([0.1, *highs]))
    limit = min(1.0, ticks[-1])
    return limit, [x for x in ticks if x <= limit]
