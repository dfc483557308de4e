"""Training curves; what each model costs in bytes, seconds and memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_distill.report.charts import line_chart
from mlx_distill.report.markup import Html, el
from mlx_distill.report.tables import TableRow, legend, metric_titles, model_heading, number_cell, table
from mlx_distill.run_models import dequantization_note, is_dequantized, model_class, model_title
from mlx_distill.text import NONE, counted, duration, gigabytes, integer, significant, size, words

Report = Mapping[str, Any]

_SERIES_NAMES = {"valid_loss": "validation"}
_WEIGHTS = {True: "weights dequantized", False: "weights quantized", None: ""}


def curves(report: Report) -> Html | None:
    """One chart a training, side by side where there is room."""
    charts = [_chart(report, stage, series) for stage, series in report["curves"].items()]
    return el("div", charts, class_="charts") if charts else None


def _chart(report: Report, stage: str, series: Mapping[str, Any]) -> Html:
    total = series.get("loss")
    # A training with a single term logs it twice.
    shown = {
        k: s
        for k, s in series.items()
        if k in ("loss", "valid_loss") or (not k.startswith("valid_") and s != total)
    }
    shown = dict(
        sorted(
            shown.items(),
            key=lambda item: (
                ("loss", "valid_loss").index(item[0]) if item[0] in ("loss", "valid_loss") else 2
            ),
        )
    )
    terms = [name for name in shown if name not in ("loss", "valid_loss")]
    classes = {
        name: f"s{terms.index(name) % 6}" if name in terms else name.replace("_", "-") for name in shown
    }
    last = {name: s["value"][-1] for name, s in shown.items()}
    caption = el(
        "figcaption",
        el("b", model_title(stage)),
        " ",
        el("small", _summary(report["training"].get(stage) or {})),
    )
    names = [
        (classes[name], f"{_SERIES_NAMES.get(name, words(name))} {significant(value, 3)}")
        for name, value in last.items()
    ]
    text = f"Losses of {model_title(stage)} over the steps; at the end: " + ", ".join(
        text for _, text in names
    )
    return el(
        "figure",
        caption,
        line_chart(shown, classes, text),
        legend(names),
        class_=f"chart {model_class(stage)}",
    )


def _summary(training: Mapping[str, Any]) -> str:
    parts = []
    if training.get("steps"):
        parts.append(counted(training["steps"], "step"))
    if training.get("tokens"):
        parts.append(f"{training['tokens']:,} trained tokens")
    if training.get("seconds"):
        parts.append(duration(training["seconds"], page=True))
    if training.get("peak_memory_gb"):
        parts.append(f"peak {gigabytes(training['peak_memory_gb'])}")
    return ", ".join(parts)


def cost(report: Report) -> Html:
    """Bytes on disk, seconds a row, rows a minute, peak memory."""
    named, settings = metric_titles(report["task_details"]), report["provenance"]["evaluations"]
    keys = ("latency_s", "latency_p95_s", "items_per_minute", "tokens_per_second", "peak_memory_gb")
    heads = ["Model", "Weights on disk", *[named[key] for key in keys]]
    rows: list[TableRow] = []
    note = dequantization_note({name: settings[name] for name in report["metrics"]})
    for name, figures in report["metrics"].items():
        entry = report["sizes"].get(name)
        both = (
            f"adapter {size(entry['weights_bytes'], page=True)} + base {size(entry['base_bytes'], page=True)}"
            if entry and entry["base_bytes"]
            else ""
        )
        pace = figures.get("items_per_minute")
        cells = [
            number_cell(size(entry["total_bytes"], page=True) if entry else NONE, both),
            number_cell(duration(figures.get("latency_s"), page=True)),
            number_cell(duration(figures.get("latency_p95_s"), page=True)),
            number_cell(significant(pace, 3) if pace else NONE),
            number_cell(integer(figures.get("tokens_per_second"))),
            number_cell(gigabytes(figures.get("peak_memory_gb"))),
        ]
        computed = _WEIGHTS[is_dequantized(settings[name])] if note else ""
        rows.append((model_heading(name, computed), cells, model_class(name)))
    caption = "Time of a row: the wall time of its batch by the batch’s size. Memory: peak of MLX’s allocator during the evaluation."
    return el(
        "div", el("p", note, class_="note") if note else None, table(caption, heads, rows, class_="cost")
    )
