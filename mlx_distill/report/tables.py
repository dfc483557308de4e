"""HTML tables of the report; every cell has its column's name, so that narrow screens can show cards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mlx_distill.report.charts import bar
from mlx_distill.report.markup import Html, el
from mlx_distill.run_models import model_class, model_title
from mlx_distill.text import NONE, interval, percent, words

Report = Mapping[str, Any]
"""What :func:`mlx_distill.report.collect.build_report` returns."""
TableRow = tuple[Any, Sequence[Any], str | None]
"""One row of a table: its heading, its cells, its CSS class."""


def table(caption: str, columns: Sequence[str], rows: Sequence[TableRow], *, class_: str = "") -> Html:
    """A table whose first column holds the headings of its rows.

    Args:
        caption: The caption, shown above the table.
        columns: Headings of all columns, the first one included.
        rows: Heading, cells and CSS class of each row.
        class_: More CSS classes.
    """
    # Explicit roles: some browsers drop those of a table that CSS displays as cards.
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
    """A cell with the value, the interval and the bar of a rate."""
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


def number_cell(value: str, note: str = "") -> Html:
    """A cell with a number and a note in small type."""
    return el(
        "span",
        el("b", value) if value != NONE else el("span", NONE, class_="none"),
        el("small", " ", note) if note else None,
        class_="number",
    )


def model_heading(name: str, note: str = "") -> Html:
    """The heading of a model's row: its colour, its name and a note in small type."""
    return el(
        "span",
        el("i", class_="swatch", aria_hidden="true"),
        model_title(name),
        el("small", note) if note else None,
        class_=f"model {model_class(name)}",
    )


def legend(names: Sequence[tuple[str, str]]) -> Html:
    """A legend of (CSS class, name) pairs."""
    return el(
        "ul",
        [
            el("li", el("i", class_="swatch", aria_hidden="true"), name, class_=class_)
            for class_, name in names
        ],
        class_="legend",
    )


def scroll(content: Html, label: str) -> Html:
    """A box that scrolls wide content, also by keyboard, so that the page does not become wider."""
    return el("div", content, class_="scroll", tabindex=0, role="region", aria_label=label)


def main_metrics(task: Mapping[str, Any]) -> tuple[str, str]:
    """The metrics by which models are compared: against the truth and against the teacher.

    Args:
        task: The ``task_details`` of a report.

    >>> main_metrics({"label": None})
    ('answer_f1', 'teacher_answer_f1')
    """
    return ("accuracy", "verdict_agreement") if task["label"] else ("answer_f1", "teacher_answer_f1")


def metric_titles(task: Mapping[str, Any]) -> dict[str, str]:
    """The title of each metric in tables.

    Args:
        task: The ``task_details`` of a report; may be empty.

    >>> metric_titles({"label": "tone"})["verdict_agreement"]
    'Same tone as teacher'
    """
    label, score = words(task.get("label") or "label"), words(task.get("score") or "score")
    tolerance = task.get("score_tolerance")
    return {
        "accuracy": "Accuracy",
        "accuracy_by_distribution": "Right by distribution",
        "verdict_agreement": f"Same {label} as teacher",
        "agreement": f"…and {score} within {tolerance:g}" if tolerance is not None else f"…and near {score}",
        "json_valid": "Fits the task",
        "exact_match": "Exact match",
        "teacher_exact_match": "Exact match with teacher",
        "answer_f1": "Answer F1",
        "teacher_answer_f1": "Answer F1 to teacher",
        "macro_f1": "Macro F1",
        "score_mae_interval": f"{score.capitalize()} error",
        "score_gap": f"{score.capitalize()} difference from teacher",
        "precision": "Precision",
        "recall": "Recall",
        "f1": "F1",
        "false_positive_rate": "False positives",
        "false_negative_rate": "False negatives",
        "first_token_s": "First token",
        "latency_s": "Median per row",
        "latency_p95_s": "95th percentile",
        "requests_per_second": "Requests per second",
        "items_per_minute": "Rows per minute",
        "tokens_per_second": "Tokens per second",
        "load_s": "Loading",
        "model_memory_gb": "Memory after loading",
        "peak_memory_gb": "Peak memory",
    }
