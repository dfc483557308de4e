"""Sections of the report: training curves; size, speed and memory of each model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from mlx_distill.report.origin_section import measured_on
from mlx_distill.report.tables import Report, metric_titles
from mlx_distill.run_models import dequantization_note, is_dequantized
from mlx_distill.text import NONE, counted, duration, gigabytes, integer, percent, significant, size, words

_TOTALS = ("loss", "valid_loss")
_SERIES_NAMES = {"valid_loss": "validation"}
_SHARES = {
    "valid_accuracy": "accuracy",
    "valid_positive_accuracy": "accuracy of positive rows",
    "valid_answer_f1": "answer F1",
    "valid_json_valid": "fits the task",
    "valid_token_accuracy": "right tokens",
}
_NUMBERS = {"valid_score_mae": "error of the score", "valid_perplexity": "perplexity"}
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
_WEIGHTS = {True: "weights dequantized", False: "weights quantized", None: ""}


def curves(report: Report) -> list[dict[str, Any]]:
    """The section of training curves: for each training a chart of its losses, and one of what it answered
    at its validations.
    """
    return [
        _chart(series)
        | {"model": stage, "summary": _summary(report["training"].get(stage) or {})}
        | {"answers": _answers_chart(series)}
        for stage, series in report["curves"].items()
    ]


def _answers_chart(series: Mapping[str, Any]) -> dict[str, Any] | None:
    """The shares among the figures of ``evaluate_rows`` as series, and in words the others at the end; None
    where a training has none.
    """
    shown = {name: series[name] for name in _SHARES if name in series}
    if not shown:
        return None
    classes = {name: f"s{i % 6}" for i, name in enumerate(shown)}
    names = [
        (classes[name], f"{_SHARES[name]} {percent(values['value'][-1])}") for name, values in shown.items()
    ]
    numbers = [
        f"{title} {significant(series[name]['value'][-1], 3)}"
        for name, title in _NUMBERS.items()
        if name in series
    ]
    return {"series": shown, "classes": classes, "legend": names, "numbers": ", ".join(numbers)}


def _chart(series: Mapping[str, Any]) -> dict[str, Any]:
    """The series that are drawn, the CSS class of each, and (class, name with the last value) pairs."""
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
    names = [
        (classes[name], f"{_SERIES_NAMES.get(name, words(name))} {significant(values['value'][-1], 3)}")
        for name, values in shown.items()
    ]
    return {"series": shown, "classes": classes, "legend": names}


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


def cost(report: Report) -> dict[str, Any]:
    """The section of size on disk, memory and speed."""
    provenance, metrics = report["provenance"], report["metrics"]
    settings = provenance["evaluations"]
    dequantized = dequantization_note({name: settings[name] for name in metrics})
    together = {settings[name].get("batch_size") for name in metrics} - {None}
    return {
        "measured_on": measured_on(provenance),
        "rows_together": together.pop() if len(together) == 1 else None,
        "dequantized": dequantized,
        "tables": {
            "Size and memory": _figures(report, _MEMORY),
            "Speed": _figures(report, _SPEED),
        },
        "weights": {
            name: _WEIGHTS[is_dequantized(settings[name])] if dequantized else "" for name in metrics
        },
    }


def _figures(report: Report, keys: Sequence[str]) -> dict[str, dict[str, tuple[str, str]]]:
    """Title of each column to the figure of each model and the note beside it."""
    titles = metric_titles(report["task_details"])
    return {
        titles.get(key, "Weights on disk"): {
            name: _size(report["sizes"].get(name)) if key == "size" else (_FORMATS[key](figures.get(key)), "")
            for name, figures in report["metrics"].items()
        }
        for key in keys
    }


def _size(sizes: Mapping[str, Any] | None) -> tuple[str, str]:
    if not sizes:
        return NONE, ""
    adapter, base = size(sizes["weights_bytes"], page=True), size(sizes["base_bytes"], page=True)
    parts = f"adapter {adapter} + base {base}" if sizes["base_bytes"] else ""
    return size(sizes["total_bytes"], page=True), parts
