"""Sections of the report: the metrics that a task names, its score threshold, and its error categories."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_distill.report.tables import Report, metric_titles
from mlx_distill.text import percent, words

_THRESHOLD = ("accuracy", "precision", "recall", "f1", "false_positive_rate", "false_negative_rate")


def task_metrics(report: Report) -> list[dict[str, Any]]:
    """The metrics that the task names, and the figures at its score threshold.

    Returns:
        For each row of the table ``title``, ``unit`` and the ``estimates`` by model. Metrics of several
        figures, such as those of each class, are in ``report.json`` alone.
    """
    models, details = report["metrics"], report["task_details"]
    rows: list[dict[str, Any]] = []
    for metric in details.get("metrics", ()):
        estimates = {name: figures["task_metrics"][metric["name"]] for name, figures in models.items()}
        if all("value" in estimate for estimate in estimates.values()):
            unit = {"seconds": " (s)", "points": " (points)", "nats": " (nats)"}.get(metric["unit"], "")
            rows.append({**metric, "title": f"{metric['title']}{unit}", "estimates": estimates})
    threshold = details.get("score_threshold")
    if threshold is not None:
        titles = metric_titles(details)
        place = f"{words(details['score'])} from {threshold:g} on"
        for key in _THRESHOLD:
            estimates = {name: figures["at_threshold"][key] for name, figures in models.items()}
            rows.append({"title": f"{titles[key]}, {place}", "unit": "share", "estimates": estimates})
    return rows


def error_categories(report: Report) -> list[dict[str, Any]]:
    """The error categories of the task.

    Returns:
        For each its ``title`` and the ``entries`` by model: the category's figures, and ``where``: its rate
        among the rows whose true answer makes the error possible, in words.
    """
    models = {name: figures.get("error_categories") or {} for name, figures in report["metrics"].items()}
    names = list(next(iter(models.values()), {}))
    return [
        {
            "title": words(name).capitalize(),
            "entries": {model: _entry(categories[name]) for model, categories in models.items()},
        }
        for name in names
    ]


def _entry(category: Mapping[str, Any]) -> dict[str, Any]:
    rate = category["rate_where_possible"]
    where = f"{percent(rate['value'])} of {rate['n']:,} where possible" if rate and rate["n"] else ""
    return {**category, "where": where}
