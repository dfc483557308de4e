"""Section of the report: whether the label probabilities mean what they say, before and after calibration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_distill.report.markup import Html, el
from mlx_distill.report.tables import Report, TableRow, model_heading, number_cell, table
from mlx_distill.run_models import model_class
from mlx_distill.text import NONE, percent, significant

_NOTE = (
    "The probabilities of md.classify and of analyze --labels-only, on the held-out rows. Calibration "
    "divides log-probabilities by one temperature, fitted on the validation rows, which changes no label. "
    "Calibration error: the mean gap between confidence and accuracy over bins of equal numbers of rows (few "
    "rows show a gap by chance). Lower is better in every column."
)
_FIGURES = {"nll": "Negative log-likelihood", "ece": "Calibration error", "brier": "Brier score"}


def calibration(report: Report) -> Html | None:
    """The section: temperature, likelihood and calibration error of each model."""
    measured = {
        name: figures["calibration"]
        for name, figures in report["metrics"].items()
        if figures.get("calibration")
    }
    if not measured:
        return None
    rows: list[TableRow] = [
        (model_heading(name), _cells(entry), model_class(name)) for name, entry in measured.items()
    ]
    heads = ["Model", "Temperature", *_FIGURES.values(), "Rows"]
    return el(
        "div",
        el("p", _NOTE, class_="note"),
        table("Before → after calibration", heads, rows, class_="headline"),
    )


def _cells(entry: Mapping[str, Any]) -> list[Any]:
    before, after = entry["before"], entry["after"]
    temperature = entry["temperature"]
    shown = (
        number_cell(NONE, "" if entry["fitted_rows"] is None else entry["reason"] or "")
        if temperature is None
        else number_cell(significant(temperature, 3), f"{entry['fitted_rows']:,} validation rows")
    )
    figures = [
        number_cell(_figure(key, before[key])) if after is None else _change(key, before[key], after[key])
        for key in _FIGURES
    ]
    return [shown, *figures, f"{entry['n']:,}"]


def _change(key: str, before: float, after: float) -> Html:
    return number_cell(_figure(key, after), f"from {_figure(key, before)}")


def _figure(key: str, value: float) -> str:
    return percent(value) if key == "ece" else f"{value:.3f}"
