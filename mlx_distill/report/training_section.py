"""Sections of the report: training curves; size, speed and memory of each model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_distill.report.charts import line_chart
from mlx_distill.report.markup import Html, el
from mlx_distill.report.tables import (
    Report,
    TableRow,
    legend,
    metric_titles,
    model_heading,
    number_cell,
    table,
)
from mlx_distill.run_models import dequantization_note, is_dequantized, model_class, model_title
from mlx_distill.text import NONE, counted, duration, gigabytes, integer, significant, size, words

_TOTALS = ("loss", "valid_loss")
_SERIES_NAMES = {"valid_loss": "validation"}
_WEIGHTS = {True: "weights dequantized", False: "weights quantized", None: ""}


def curves(report: Report) -> Html | None:
    """The section of training curves: one chart for each training."""
    charts = [_chart(report, stage, series) for stage, series in report["curves"].items()]
    return el("div", charts, class_="charts") if charts else None


def _chart(report: Report, stage: str, series: Mapping[str, Any]) -> Html:
    total = series.get("loss")
    totals = [name for name in _TOTALS if name in series]
    # With a single term, the term equals the loss and is not drawn again.
    terms = [
        name
        for name, values in series.items()
        if name not in _TOTALS and not name.startswith("valid_") and values != total
    ]
    shown = {name: series[name] for name in [*totals, *terms]}
    classes = {name: name.replace("_", "-") for name in totals}
    classes |= {name: f"s{i % 6}" for i, name in enumerate(terms)}
    names = []
    for name, values in shown.items():
        text = f"{_SERIES_NAMES.get(name, words(name))} {significant(values['value'][-1], 3)}"
        names.append((classes[name], text))
    title = model_title(stage)
    label = f"Losses of {title} over the steps; at the end: {', '.join(text for _, text in names)}"
    caption = el(
        "figcaption", el("b", title), " ", el("small", _summary(report["training"].get(stage) or {}))
    )
    return el(
        "figure",
        caption,
        line_chart(shown, classes, label),
        legend(names),
        class_=f"chart {model_class(stage)}",
    )


def _summary(training: Mapping[str, Any]) -> str:
    """Steps, tokens, duration and peak memory of a training, as far as they are known."""
    out = []
    if training.get("steps"):
        out.append(counted(training["steps"], "step"))
    if training.get("tokens"):
        out.append(f"{training['tokens']:,} trained tokens")
    if training.get("seconds"):
        out.append(duration(training["seconds"], page=True))
    if training.get("peak_memory_gb"):
        out.append(f"peak {gigabytes(training['peak_memory_gb'])}")
    return ", ".join(out)


def cost(report: Report) -> Html:
    """The section of size on disk, latency, throughput and peak memory."""
    titles, settings = metric_titles(report["task_details"]), report["provenance"]["evaluations"]
    keys = ("latency_s", "latency_p95_s", "items_per_minute", "tokens_per_second", "peak_memory_gb")
    heads = ["Model", "Weights on disk", *[titles[key] for key in keys]]
    note = dequantization_note({name: settings[name] for name in report["metrics"]})
    rows: list[TableRow] = []
    for name, figures in report["metrics"].items():
        rate = figures.get("items_per_minute")
        cells = [
            _size_cell(report["sizes"].get(name)),
            number_cell(duration(figures.get("latency_s"), page=True)),
            number_cell(duration(figures.get("latency_p95_s"), page=True)),
            number_cell(significant(rate, 3) if rate else NONE),
            number_cell(integer(figures.get("tokens_per_second"))),
            number_cell(gigabytes(figures.get("peak_memory_gb"))),
        ]
        weights = _WEIGHTS[is_dequantized(settings[name])] if note else ""
        rows.append((model_heading(name, weights), cells, model_class(name)))
    caption = (
        "Time per row: the wall time of its batch divided by the batch size. "
        "Memory: peak of MLX’s allocator during the evaluation."
    )
    return el(
        "div", el("p", note, class_="note") if note else None, table(caption, heads, rows, class_="cost")
    )


def _size_cell(sizes: Mapping[str, Any] | None) -> Html:
    if not sizes:
        return number_cell(NONE)
    adapter, base = size(sizes["weights_bytes"], page=True), size(sizes["base_bytes"], page=True)
    parts = f"adapter {adapter} + base {base}" if sizes["base_bytes"] else ""
    return number_cell(size(sizes["total_bytes"], page=True), parts)
