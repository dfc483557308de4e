"""Section of the report: each field of the answer against the truth and the teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mlx_distill.report.markup import Html, el
from mlx_distill.report.tables import Report, TableRow, model_heading, rate_cell, table
from mlx_distill.run_models import model_class, model_title
from mlx_distill.text import words


def fields(report: Report) -> Html | None:
    """The section: a table for each field that other sections do not measure, the label and the score."""
    task, metrics = report["task_details"], report["metrics"]
    shown = [name for name in task["properties"] if name not in (task["label"], task["score"])]
    if not shown:
        return None
    note = (
        "Equal: the same value. F1: of the items of a list or the words of a text, without regard to case. "
        "An invalid answer counts as 0; rows whose reference lacks the field are left out."
    )
    tables = [_table(metrics, name) for name in shown]
    return el("div", el("p", note, class_="note"), tables)


def _table(metrics: Mapping[str, Any], field: str) -> Html:
    heads = {"exact": "Equal", "f1": "F1", "teacher_exact": "Equal to teacher", "teacher_f1": "F1 to teacher"}
    keys = [key for key in heads if any(figures["fields"][field][key] for figures in metrics.values())]
    rows: list[TableRow] = [
        (model_heading(name), _cells(name, figures["fields"][field], keys, heads), model_class(name))
        for name, figures in metrics.items()
    ]
    return table(words(field).capitalize(), ["Model", *[heads[key] for key in keys]], rows, class_="headline")


def _cells(
    name: str, figures: Mapping[str, Any], keys: Sequence[str], heads: Mapping[str, str]
) -> list[Html]:
    return [
        el("span", "the reference", class_="none")
        if name == "teacher" and key.startswith("teacher_")
        else rate_cell(figures[key], f"{model_title(name)}, {heads[key]}")
        for key in keys
    ]
