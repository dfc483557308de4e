"""Tables that become cards on a phone: every cell carries the name of its column."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mlx_distill.report.charts import bar
from mlx_distill.report.markup import Html, el
from mlx_distill.run_models import model_class, model_title
from mlx_distill.text import NONE, interval, percent, words

TableRow = tuple[Any, Sequence[Any], str | None]
"""One row of a table: its head, its cells, its CSS class."""


def table(caption: str, columns: Sequence[str], rows: Sequence[TableRow], *, class_: str = "") -> Html:
    """A table whose first column heads its rows.

    Args:
        caption: Read out before the table; shown above it.
        columns: Heads, the first column's among them.
        rows: (head, cells, CSS class) for each row.
        class_: More CSS classes.
    """
    # Display values other than a table's take the roles away in some browsers, so they are given outright.
    head = el("tr", [el("th", name, scope="col", role="columnheader") for name in columns], role="row")
    body = [
        el(
            "tr",
            el("th", first, scope="row", role="rowheader"),
            [
                el("td", cell, role="cell", data_label=name)
                for name, cell in zip(columns[1:], cells, strict=True)
            ],
            class_=row_class,
            role="row",
        )
        for first, cells, row_class in rows
    ]
    parts = [el("caption", caption), el("thead", head, role="rowgroup"), el("tbody", body, role="rowgroup")]
    return el("table", parts, class_=f"cards {class_}".strip(), role="table")


def rate_cell(estimate: Mapping[str, Any] | None, label: str) -> Html:
    """Value, interval and bar of a rate."""
    if not estimate or estimate.get("value") is None:
        return el("span", NONE, class_="none")
    return el(
        "span",
        el("b", percent(estimate["value"])),
        " ",
        el("small", interval(estimate)),
        bar(estimate, label),
        class_="rate",
    )


def number_cell(value: str, small: str = "") -> Html:
    """A figure without a bar."""
    return el(
        "span",
        el("b", value) if value != NONE else el("span", NONE, class_="none"),
        el("small", " ", small) if small else None,
        class_="number",
    )


def model_heading(name: str, note: str = "") -> Html:
    """A model's name with its colour."""
    return el(
        "span",
        el("i", class_="swatch", aria_hidden="true"),
        model_title(name),
        el("small", note) if note else None,
        class_=f"model {model_class(name)}",
    )


def legend(names: Sequence[tuple[str, str]]) -> Html:
    """(CSS class, name) as a list of swatches."""
    return el(
        "ul",
        [
            el("li", el("i", class_="swatch", aria_hidden="true"), name, class_=class_)
            for class_, name in names
        ],
        class_="legend",
    )


def scroll(content: Html, label: str) -> Html:
    """Wide content that scrolls by itself, by keyboard too, instead of widening the page."""
    return el("div", content, class_="scroll", tabindex=0, role="region", aria_label=label)


def metric_titles(task: Mapping[str, Any]) -> dict[str, str]:
    """What heads the column of each metric.

    Args:
        task: A report's ``task_details``; may be empty.

    >>> metric_titles({"label": "tone"})["verdict_agreement"]
    'Same tone as teacher'
    """
    label, score = words(task.get("label") or "label"), words(task.get("score") or "score")
    tolerance = task.get("score_tolerance")
    return {
        "accuracy": "Right",
        "verdict_agreement": f"Same {label} as teacher",
        "agreement": f"…and {score} within {tolerance:g}" if tolerance is not None else f"…and near {score}",
        "json_valid": "Valid JSON",
        "macro_f1": "Macro F1",
        "score_gap": f"{score.capitalize()} apart from teacher",
        "precision": "Precision",
        "recall": "Recall",
        "f1": "F1",
        "false_positive_rate": "False positives",
        "false_negative_rate": "False negatives",
        "latency_s": "Median a row",
        "latency_p95_s": "95th percentile",
        "items_per_minute": "Rows a minute",
        "tokens_per_second": "Tokens a second",
        "peak_memory_gb": "Peak memory",
    }
