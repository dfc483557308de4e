"""Sections of the report: training curves; size, speed and memory of each model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from string import Template
from typing import Any

from mlx_distill.report.charts import line_chart
from mlx_distill.report.markup import Html, el
from mlx_distill.report.origin_section import measured_on
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
_MEMORY = ("size", "load_s", "model_memory_gb", "peak_memory_gb")
_SPEED = (
    "first_token_s",
    "latency_s",
    "latency_p95_s",
    "requests_per_second",
    "items_per_minute",
    "tokens_per_second",
)


def _three_digits(value: float | None) -> str:
    return significant(value, 3) if value else NONE


_FORMATS: Mapping[str, Callable[[Any], str]] = {
    **dict.fromkeys(("load_s", "first_token_s", "latency_s", "latency_p95_s"), partial(duration, page=True)),
    **dict.fromkeys(("model_memory_gb", "peak_memory_gb"), gigabytes),
    **dict.fromkeys(("requests_per_second", "items_per_minute"), _three_digits),
    "tokens_per_second": integer,
}
_SPEED_NOTE = Template(
    "Loading: until the weights are in memory; the system may have had the files in its cache. Memory: what "
    "MLX’s arrays take after loading, and at most during the evaluation. First token: the median of rows "
    "asked one at a time. Requests per second: rows over the wall time of whole chunks, $rows decoded "
    "together. Time per row: its share of the wall time, divided among the rows that are decoded together; "
    "rows per minute are 60 seconds over its mean."
)
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
    """The section of size on disk, memory and speed."""
    provenance, metrics = report["provenance"], report["metrics"]
    settings = provenance["evaluations"]
    dequantized = dequantization_note({name: settings[name] for name in metrics})
    together = {settings[name].get("batch_size") for name in metrics} - {None}
    rows = f"{together.pop()} rows" if len(together) == 1 else "as many rows as the settings say"
    texts = [measured_on(provenance), _SPEED_NOTE.substitute(rows=rows), dequantized]
    notes = [el("p", text, class_="note") for text in texts if text]
    tables = [
        _figures(report, caption, keys, bool(dequantized))
        for caption, keys in (("Size and memory", _MEMORY), ("Speed", _SPEED))
    ]
    return el("div", notes, tables)


def _figures(report: Report, caption: str, keys: Sequence[str], weights: bool) -> Html:
    """One table of figures of all models; ``weights`` says beside each name what it computed with."""
    titles, settings = metric_titles(report["task_details"]), report["provenance"]["evaluations"]
    rows: list[TableRow] = []
    for name, figures in report["metrics"].items():
        cells = [
            _size_cell(report["sizes"].get(name))
            if key == "size"
            else number_cell(_FORMATS[key](figures.get(key)))
            for key in keys
        ]
        note = _WEIGHTS[is_dequantized(settings[name])] if weights else ""
        rows.append((model_heading(name, note), cells, model_class(name)))
    heads = ["Model", *(titles.get(key, "Weights on disk") for key in keys)]
    return table(caption, heads, rows, class_="cost")


def _size_cell(sizes: Mapping[str, Any] | None) -> Html:
    if not sizes:
        return number_cell(NONE)
    adapter, base = size(sizes["weights_bytes"], page=True), size(sizes["base_bytes"], page=True)
    parts = f"adapter {adapter} + base {base}" if sizes["base_bytes"] else ""
    return number_cell(size(sizes["total_bytes"], page=True), parts)
