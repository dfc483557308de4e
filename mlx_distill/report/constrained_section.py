"""Section of the report: answers under the grammar of the task beside the free ones."""

from __future__ import annotations

from typing import Any

from mlx_distill.report.tables import Report, main_metrics, metric_titles


def constrained(report: Report) -> list[dict[str, Any]]:
    """The section: a table for each metric, with the models that were measured under the grammar; empty
    where none was.
    """
    shown = {name: figures for name, figures in report["metrics"].items() if figures.get("constraint")}
    titles = metric_titles(report["task_details"])
    tables = []
    for key in ("json_valid", *main_metrics(report["task_details"])):
        models = {name: figures for name, figures in shown.items() if figures.get(key) is not None}
        if models:
            tables.append({"metric": key, "title": titles[key], "models": models})
    return tables
