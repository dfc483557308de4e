"""Sections of the report: the main table, goals, paired comparisons, slices and the other sets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from mlx_distill.report.charts import axis, strip
from mlx_distill.report.markup import Html, el
from mlx_distill.report.tables import (
    Report,
    TableRow,
    legend,
    main_metrics,
    metric_titles,
    model_heading,
    number_cell,
    rate_cell,
    table,
)
from mlx_distill.run_models import STUDENTS, model_class, model_phrase, model_title, run_model
from mlx_distill.text import (
    MINUS,
    NONE,
    counted,
    duration,
    gigabytes,
    interval,
    p_value,
    percent,
    signed_points,
    significant,
    words,
)

_AGAINST_TEACHER = (
    "verdict_agreement",
    "agreement",
    "score_gap",
    "teacher_answer_f1",
    "teacher_exact_match",
)
_SCORES = ("score_mae_interval", "score_gap")
# The columns of the main table, for tasks with and without a label.
_LABEL = [
    "accuracy",
    "accuracy_by_distribution",
    "verdict_agreement",
    "agreement",
    "json_valid",
    "macro_f1",
    "score_gap",
]
_NO_LABEL = [
    "answer_f1",
    "teacher_answer_f1",
    "exact_match",
    "teacher_exact_match",
    "json_valid",
    "score_mae_interval",
    "score_gap",
]
# The names of metrics in a sentence, where the title of their column does not fit.
_METRIC_NAMES = {
    "load_s": "time to load the model",
    "model_memory_gb": "memory after loading",
    "first_token_s": "median time to the first token",
    "latency_s": "median time per row",
    "latency_p95_s": "95th percentile of the time per row",
    "items_per_minute": "rows per minute",
}
_FORMATS: Mapping[str, Callable[[Any], str]] = {
    "latency_s": partial(duration, page=True),
    "latency_p95_s": partial(duration, page=True),
    "load_s": partial(duration, page=True),
    "first_token_s": partial(duration, page=True),
    "model_memory_gb": gigabytes,
    "peak_memory_gb": gigabytes,
}


_RATE_NOTE = (
    "Two models on the same rows: the difference of their rates in percentage points with its "
    "Bonett–Price interval, and the p-value of McNemar’s test (mid-p). "
    "Differences are computed from the exact rates."
)
_MEAN_NOTE = (
    "Two models on the same rows: the difference of their means in percentage points with its bootstrap "
    "interval, and the p-value of a sign test (mid-p)."
)


def results(report: Report) -> Html:
    """The section of results: the main table, the goals and the paired comparisons."""
    return el(
        "div",
        models_table(report, report["metrics"], report["main_set"]),
        _goals(report),
        _comparisons(report),
    )


def _columns(report: Report) -> dict[str, str]:
    """The metrics of the main table and their titles."""
    task = report["task_details"]
    keys = _LABEL if task["label"] else _NO_LABEL
    if not task["score"]:
        keys = [key for key in keys if key not in ("agreement", *_SCORES)]
    if not any(
        (figures.get("accuracy_by_distribution") or {}).get("n") for figures in report["metrics"].values()
    ):
        keys = [key for key in keys if key != "accuracy_by_distribution"]
    titles = metric_titles(task)
    return {key: titles[key] for key in keys}


def models_table(report: Report, metrics: Mapping[str, Any], set_name: str) -> Html:
    """The metrics of all models on one set."""
    columns = _columns(report)
    rows: list[TableRow] = []
    for model, figures in metrics.items():
        cells = [_metric_cell(model, figures, key, title) for key, title in columns.items()]
        rows.append((model_heading(model, run_model(model).note), cells, model_class(model)))
    title = "Held-out rows" if set_name == report["main_set"] else f"Set “{set_name}”"
    caption = (
        f"{title}, n = {report['sets'][set_name]:,}. Rates with {percent(report['confidence'], 0)} "
        "confidence intervals; an invalid answer counts as wrong."
    )
    if "accuracy_by_distribution" in columns:
        caption += (
            " Accuracy is right by the text; right by distribution: its most probable class is the true one."
        )
    return table(caption, ["Model", *columns.values()], rows, class_="headline")


def _metric_cell(model: str, figures: Mapping[str, Any], key: str, title: str) -> Html:
    if model == "teacher" and key in _AGAINST_TEACHER:
        return el("span", "the reference", class_="none")
    estimate = figures.get(key)
    if key not in _SCORES:
        return rate_cell(estimate, f"{model_title(model)}, {title}")
    if not estimate or estimate.get("value") is None:
        return number_cell(NONE)
    return number_cell(f"{estimate['value']:.1f}", f"{estimate['low']:.1f}–{estimate['high']:.1f}")


def _goals(report: Report) -> Html | None:
    if not report["goals"]:
        return None
    items = [_goal(report, goal) for goal in report["goals"]]
    return el("div", el("h3", "Goals"), el("ul", items, class_="goals"))


def _goal(report: Report, goal: Mapping[str, Any]) -> Html:
    measured = goal["measured"]
    if isinstance(measured, Mapping):
        show: Callable[[Any], str] = percent
        text = f"{percent(measured['value'])} [{interval(measured)}]"
    else:
        show = _FORMATS.get(goal["metric"], _number)
        text = show(measured)
    bound = "at_least" if "at_least" in goal else "at_most"
    state = "met" if goal["met"] else "missed"
    subject = f"{model_title(goal['model'])}, {_metric_name(report, goal['metric'])}"
    return el(
        "li",
        el("b", state, class_=state),
        f"{subject}: {text} (goal: {words(bound)} {show(goal[bound])})",
    )


def _number(value: float | None) -> str:
    return NONE if value is None else significant(value, 3)


def _metric_name(report: Report, metric: str) -> str:
    """A metric's name in a sentence."""
    titles = {key: title[0].lower() + title[1:] for key, title in _columns(report).items()}
    return (_METRIC_NAMES | titles).get(metric, words(metric)).replace("…and", "and")


def _comparisons(report: Report) -> Html | None:
    entries = report["comparisons"]
    if not entries:
        return None
    limit = max(0.1, *(abs(entry["difference"][end]) for entry in entries for end in ("low", "high")))
    task = report["task_details"]
    captions = {
        "verdict_agreement": f"Same {words(task['label'] or '')} as the teacher (rows gained and lost)",
        "accuracy": "Accuracy (rows that only the first or only the second model has correct)",
        "teacher_answer_f1": "F1 of the answers to the teacher’s (rows on which it is higher and lower)",
        "answer_f1": "F1 of the answers (rows on which it is higher and lower)",
    }
    note = _RATE_NOTE if task["label"] else _MEAN_NOTE
    tables = []
    for metric, caption in captions.items():
        rows = [_comparison(report, entry, limit) for entry in entries if entry["metric"] == metric]
        if rows:
            heads = ["Model", "Difference", "p-value", "Rows"]
            tables.append(table(caption, heads, rows, class_="compare"))
    return el("div", el("h3", "Paired comparisons"), el("p", note, class_="note"), tables)


def _nothing_compared(report: Report, entry: Mapping[str, Any]) -> str:
    """Why a comparison compares nothing, or an empty text: models of which no answer is valid do not differ,
    which is no result.
    """
    names = [entry["first"], entry["second"]]
    invalid = [
        name
        for name in {*names, "teacher"}
        if (report["metrics"].get(name, {}).get("json_valid") or {}).get("value") == 0
    ]
    if entry["metric"] in _AGAINST_TEACHER and "teacher" in invalid:
        return "no answer of the teacher fits the task"
    return "no answer of either model fits the task" if {*names} <= {*invalid} else ""


def _comparison(report: Report, entry: Mapping[str, Any], limit: float) -> TableRow:
    """The row of a comparison; ``limit`` is the end of the axis of differences."""
    first, gap = entry["first"], entry["difference"]
    heading = el("span", model_title(first), el("small", f" against {model_phrase(entry['second'])}"))
    if nothing := _nothing_compared(report, entry):
        return heading, [el("span", nothing, class_="none"), NONE, NONE], model_class(first)
    ends = f"{signed_points(gap['low'])} to {signed_points(gap['high'])}"
    drawn = strip([(model_class(first), model_title(first), gap)], -limit, limit, zero=0.0)
    difference = el("span", el("b", signed_points(gap["value"])), " ", el("small", ends))
    cells = [
        el("span", difference, drawn, class_="gap"),
        p_value(entry["p_value"]),
        f"+{entry['first_only']} {MINUS}{entry['second_only']}",
    ]
    return heading, cells, model_class(first)


def slices(report: Report) -> Html | None:
    """The section of slices: agreement with the teacher, or accuracy without a teacher, by slice field."""
    metrics = report["metrics"]
    accuracy, agreement = main_metrics(report["task_details"])
    shown = [name for name in STUDENTS if name in metrics and metrics[name][agreement]]
    key = agreement if shown else accuracy
    shown = shown or list(metrics)
    tables = [_slice_table(report, field, shown, key) for field in report["task_details"]["slices"]]
    if not any(tables):
        return None
    return el("div", legend([(model_class(name), model_title(name)) for name in shown]), tables)


def _slice_table(report: Report, field: str, shown: Sequence[str], key: str) -> Html | None:
    by_value = {name: report["metrics"][name]["by_slice"].get(field) or {} for name in shown}
    values = by_value[shown[0]]
    if not values:
        return None
    ticks = (0.0, 0.25, 0.5, 0.75, 1.0)
    rows: list[TableRow] = []
    for value, entry in values.items():
        estimates = [(by_value[name].get(value) or {}).get(key) for name in shown]
        last = estimates[-1] or {}
        lines = [(model_class(n), model_title(n), e) for n, e in zip(shown, estimates, strict=True)]
        cells = [
            strip(lines, 0.0, 1.0, ticks=ticks),
            el("span", percent(last.get("value"), 0), " ", el("small", interval(last, 0))),
            f"{entry['n']:,}",
        ]
        rows.append((value, cells, None))
    rows.append(("", [axis(0.0, 1.0, ticks), "", ""], "axis-row"))
    metric = metric_titles(report["task_details"])[key]
    metric = metric[0].lower() + metric[1:]
    heads = [words(field).capitalize(), f"{metric[0].upper()}{metric[1:]}, %", model_title(shown[-1]), "n"]
    return table(f"By {words(field)}: {metric}", heads, rows, class_="dots slices")


def other_sets(report: Report) -> Html | None:
    """The section of the other sets: the main table for each of them."""
    others = [name for name in report["sets"] if name != report["main_set"]]
    if not others:
        return None
    note = f"{counted(len(others), 'set')} besides the main one, measured in the same way."
    tables = [models_table(report, report["by_set"][name], name) for name in others]
    return el("div", el("p", note, class_="note"), tables)
