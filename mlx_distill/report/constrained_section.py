"""Section of the report: answers under the grammar of the task beside the free ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_distill.report.markup import Html, el
from mlx_distill.report.tables import (
    Report,
    TableRow,
    main_metrics,
    metric_titles,
    model_heading,
    rate_cell,
    table,
)
from mlx_distill.run_models import model_class, model_title
from mlx_distill.text import MINUS, NONE, counted, p_value, signed_points

_NOTE = (
    "Constrained: at each token only those may be chosen that lead to an answer of the task’s schema, as "
    "analyze does by default. It makes answers parse, it does not make them right. The other sections show "
    "the free answers. An answer that reaches the task’s longest before it is complete does not parse here "
    "either. Differences are those on the same rows, with McNemar’s test (of F1: a sign test)."
)


def constrained(report: Report) -> Html | None:
    """The section; none where no model was measured under the grammar."""
    shown = {name: figures for name, figures in report["metrics"].items() if figures.get("constraint")}
    if not shown:
        return None
    titles = metric_titles(report["task_details"])
    keys = ["json_valid", *main_metrics(report["task_details"])]
    tables = [_table(shown, key, titles[key]) for key in keys]
    return el("div", el("p", _NOTE, class_="note"), tables)


def _table(models: Mapping[str, Any], key: str, title: str) -> Html | None:
    rows: list[TableRow] = []
    for name, figures in models.items():
        if figures.get(key) is None:
            continue
        free, under = figures[key], figures[f"{key}_constrained"]
        cells = [
            rate_cell(free, f"{model_title(name)}, {title}, free"),
            rate_cell(under, f"{model_title(name)}, {title}, constrained"),
        ]
        cells += _changed(figures) if key == "json_valid" else _difference(figures["constraint"].get(key))
        rows.append((model_heading(name), cells, model_class(name)))
    if not rows:
        return None
    heads = ["Model", "Free", "Constrained"]
    heads += ["Answers"] if key == "json_valid" else ["Difference", "p-value", "Rows"]
    return table(title, heads, rows, class_="headline")


def _changed(figures: Mapping[str, Any]) -> list[Any]:
    changed, invalid = figures["constraint"]["changed"], figures["constraint"]["invalid"]
    text = f"{changed:,} of {counted(figures['n'], 'row')} differ"
    example = f"row {invalid['id']}: {invalid['error']}" if invalid else None
    return [el("span", text, el("small", " ", example) if example else None)]


def _difference(comparison: Mapping[str, Any] | None) -> list[Any]:
    if not comparison:
        return [NONE, NONE, NONE]
    gap = comparison["difference"]
    ends = f"{signed_points(gap['low'])} to {signed_points(gap['high'])}"
    return [
        el("span", el("b", signed_points(gap["value"])), " ", el("small", ends)),
        p_value(comparison["p_value"]),
        f"+{comparison['first_only']} {MINUS}{comparison['second_only']}",
    ]
