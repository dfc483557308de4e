"""The headline table, goals, paired comparisons, slices and the other sets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from mlx_distill.report.charts import axis, strip
from mlx_distill.report.markup import Html, el
from mlx_distill.report.tables import (
    TableRow,
    legend,
    metric_titles,
    model_heading,
    number_cell,
    rate_cell,
    table,
)
from mlx_distill.run_models import STUDENTS, model_class, model_phrase, model_title, run_model
from mlx_distill.text import (
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

Report = Mapping[str, Any]
_AGREEMENT = "verdict_agreement"
_NAMES = {
    "latency_s": "median time of a row",
    "latency_p95_s": "95th percentile of a row's time",
    "items_per_minute": "rows a minute",
}
_SHOW: Mapping[str, Callable[[Any], str]] = {
    "latency_s": partial(duration, page=True),
    "latency_p95_s": partial(duration, page=True),
    "peak_memory_gb": gigabytes,
}


def results(report: Report) -> Html:
    """Models against metrics, then what the recipe wished for, then what differs by more than luck."""
    return el(
        "div", headline(report, report["metrics"], report["main_set"]), _goals(report), _comparisons(report)
    )


def columns(report: Report) -> list[tuple[str, str, bool]]:
    """(metric, head, whether it is a rate) of the tables of models."""
    task = report["task_details"]
    scored = ("agreement", "score_gap")
    shown = ("accuracy", _AGREEMENT, "agreement", "json_valid", "macro_f1", "score_gap")
    named = metric_titles(task)
    return [(key, named[key], key != "score_gap") for key in shown if task["score"] or key not in scored]


def headline(report: Report, metrics: Mapping[str, Any], name: str) -> Html:
    """Models against metrics on one set."""
    heads = columns(report)
    rows: list[TableRow] = []
    for model, figures in metrics.items():
        cells = []
        for key, head, is_rate in heads:
            reference = model == "teacher" and key in (_AGREEMENT, "agreement", "score_gap")
            if reference:
                cells.append(el("span", "the reference", class_="none"))
            elif is_rate:
                cells.append(rate_cell(figures.get(key), f"{model_title(model)}, {head}"))
            else:
                cells.append(_points(figures.get(key)))
        rows.append(
            (
                model_heading(model, run_model(model).note),
                cells,
                model_class(model),
            )
        )
    held = "Held-out rows" if name == report["main_set"] else f"Set “{name}”"
    level = percent(report["confidence"], 0)
    caption = f"{held}, n = {report['sets'][name]:,}. Rates with {level} intervals; an answer that is not valid is wrong."
    return table(caption, ["Model", *[head for _, head, _ in heads]], rows, class_="headline")


def _points(estimate: Mapping[str, Any] | None) -> Html:
    if not estimate or estimate.get("value") is None:
        return number_cell(NONE)
    return number_cell(f"{estimate['value']:.1f}", f"{estimate['low']:.1f}–{estimate['high']:.1f}")


def _goals(report: Report) -> Html | None:
    if not report["goals"]:
        return None
    items = []
    for goal in report["goals"]:
        found = goal["measured"]
        is_rate = isinstance(found, Mapping)
        show = (
            percent
            if is_rate
            else _SHOW.get(goal["metric"], lambda value: NONE if value is None else significant(value, 3))
        )
        side, word = ("at_least", "at least") if "at_least" in goal else ("at_most", "at most")
        measured = f"{show(found['value'] if is_rate else found)}" + (
            f" [{interval(found)}]" if is_rate else ""
        )
        mark = el("b", "met" if goal["met"] else "missed", class_="met" if goal["met"] else "missed")
        items.append(
            el(
                "li",
                mark,
                f"{model_title(goal['model'])}, {_metric_name(report, goal['metric'])}: {measured} (goal: {word} {show(goal[side])})",
            )
        )
    return el("div", el("h3", "Goals"), el("ul", items, class_="goals"))


def _metric_name(report: Report, metric: str) -> str:
    heads = {key: head[0].lower() + head[1:] for key, head, _ in columns(report)}
    return (_NAMES | heads).get(metric, words(metric)).replace("…and", "and")


def _comparisons(report: Report) -> Html | None:
    found = report["comparisons"]
    if not found:
        return None
    reach = max(0.1, *(abs(entry["difference"][end]) for entry in found for end in ("low", "high")))
    groups = [
        (_AGREEMENT, f"Same {words(report['task_details']['label'])} as the teacher", "rows gained and lost"),
        ("accuracy", "Right", "rows that only the first, only the second has right"),
    ]
    parts: list[Any] = [el("h3", "More than luck?")]
    parts.append(
        el(
            "p",
            "Two models on the same rows: difference of the rates in percentage points (Bonett–Price interval) and the probability of so "
            "uneven a split if there were no difference (McNemar, mid-p). Differences are rounded from the exact rates.",
            class_="note",
        )
    )
    for metric, caption, rows_note in groups:
        rows = [
            (
                el(
                    "span",
                    model_title(entry["first"]),
                    el("small", f" against {model_phrase(entry['second'])}"),
                ),
                [
                    _difference(entry, reach),
                    p_value(entry["p_value"]),
                    f"+{entry['first_only']} {chr(0x2212)}{entry['second_only']}",
                ],
                model_class(entry["first"]),
            )
            for entry in found
            if entry["metric"] == metric
        ]
        if rows:
            parts.append(
                table(
                    f"{caption} ({rows_note})",
                    ["Model", "Difference", "Luck?", "Rows"],
                    rows,
                    class_="compare",
                )
            )
    return el("div", parts)


def _difference(entry: Mapping[str, Any], reach: float) -> Html:
    gap = entry["difference"]
    drawn = strip([(model_class(entry["first"]), model_title(entry["first"]), gap)], -reach, reach, zero=0.0)
    ends = f"{signed_points(gap['low'])} to {signed_points(gap['high'])}"
    return el(
        "span", el("span", el("b", signed_points(gap["value"])), " ", el("small", ends)), drawn, class_="gap"
    )


def slices(report: Report) -> Html | None:
    """Agreement with the teacher (accuracy where there is none) by the task's slice fields."""
    metrics = report["metrics"]
    shown = [name for name in STUDENTS if name in metrics and metrics[name][_AGREEMENT]]
    key = _AGREEMENT if shown else "accuracy"
    shown = shown or list(metrics)
    parts = [_slice(report, field, shown, key) for field in report["task_details"]["slices"]]
    return (
        el("div", legend([(model_class(name), model_title(name)) for name in shown]), parts)
        if any(parts)
        else None
    )


def _slice(report: Report, field: str, shown: Sequence[str], key: str) -> Html | None:
    metrics = report["metrics"]
    values = metrics[shown[0]]["by_slice"].get(field) or {}
    if not values:
        return None
    what = f"same {words(report['task_details']['label'])} as the teacher" if key == _AGREEMENT else "right"
    ticks = (0.0, 0.25, 0.5, 0.75, 1.0)
    rows: list[TableRow] = []
    for value, entry in values.items():
        found = [
            (model_class(m), model_title(m), (metrics[m]["by_slice"][field].get(value) or {}).get(key))
            for m in shown
        ]
        last = found[-1][2] or {}
        cells = [
            strip(found, 0.0, 1.0, ticks=ticks),
            el("span", percent(last.get("value"), 0), " ", el("small", interval(last, 0))),
            f"{entry['n']:,}",
        ]
        rows.append((value, cells, None))
    rows.append(("", [axis(0.0, 1.0, ticks), "", ""], "axis-row"))
    heads = [words(field).capitalize(), f"{what.capitalize()}, %", model_title(shown[-1]), "n"]
    return table(f"By {words(field)}: {what}", heads, rows, class_="dots slices")


def other_sets(report: Report) -> Html | None:
    """The same table for each set besides the main one."""
    others = [name for name in report["sets"] if name != report["main_set"]]
    if not others:
        return None
    note = f"{counted(len(others), 'set')} besides the main one, measured in the same way."
    return el(
        "div",
        el("p", note, class_="note"),
        [headline(report, report["by_set"][name], name) for name in others],
    )
