"""Sections of the report: the main table, goals, paired comparisons, slices and the other sets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from mlx_distill.evaluate.goals import goal_text
from mlx_distill.metrics.classification import MIN_ITEMS
from mlx_distill.report.tables import AGAINST_TEACHER, SCORES, Report, main_metrics, metric_titles
from mlx_distill.run_models import STUDENTS, model_class, model_title
from mlx_distill.text import duration, gigabytes, words

# The columns of the main table, for tasks with and without a label.
_LABEL = [
    "accuracy",
    "accuracy_by_distribution",
    "verdict_agreement",
    "agreement",
    "label_kl_interval",
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


def results(report: Report) -> dict[str, Any]:
    """The section of results: the columns of the main table and the paired comparisons."""
    return {"columns": _columns(report), "comparisons": _comparisons(report)}


def goals(report: Report) -> list[dict[str, str]]:
    """The section of goals: the state of each, and its figure in words."""
    return [{"state": goal["state"], "text": goal_text(goal)} for goal in report["goals"]]


def _columns(report: Report) -> dict[str, str]:
    """The metrics of the main table and their titles."""
    task = report["task_details"]
    keys = _LABEL if task["label"] else _NO_LABEL
    if not task["score"]:
        keys = [key for key in keys if key not in ("agreement", *SCORES)]
    for of_distribution in ("accuracy_by_distribution", "label_kl_interval"):
        if not any((figures.get(of_distribution) or {}).get("n") for figures in report["metrics"].values()):
            keys = [key for key in keys if key != of_distribution]
    titles = metric_titles(task)
    return {key: titles[key] for key in keys}


def _comparisons(report: Report) -> dict[str, Any] | None:
    """The tables of paired comparisons, and ``limit``, the end of their axis of differences."""
    entries = report["comparisons"]
    if not entries:
        return None
    task = report["task_details"]
    captions = {
        "verdict_agreement": f"Same {words(task['label'] or '')} as the teacher (rows gained and lost)",
        "accuracy": "Accuracy (rows that only the first or only the second model has correct)",
        "teacher_answer_f1": "F1 of the answers to the teacher’s (rows on which it is higher and lower)",
        "answer_f1": "F1 of the answers (rows on which it is higher and lower)",
    }
    rows = {
        metric: [
            entry | {"nothing": _nothing_compared(report, entry)}
            for entry in entries
            if entry["metric"] == metric
        ]
        for metric in captions
    }
    ends = [entry["difference"][end] for entry in entries for end in ("low", "high")]
    return {
        # Of a single row a difference has no interval.
        "limit": max([0.1, *(abs(end) for end in ends if end is not None)]),
        "tables": [(captions[metric], of_metric) for metric, of_metric in rows.items() if of_metric],
    }


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
    if entry["metric"] in AGAINST_TEACHER and "teacher" in invalid:
        return "no answer of the teacher fits the task"
    return "no answer of either model fits the task" if {*names} <= {*invalid} else ""


def slices(report: Report) -> dict[str, Any] | None:
    """The section of slices: agreement with the teacher, or accuracy without a teacher, by slice field."""
    metrics = report["metrics"]
    accuracy, agreement = main_metrics(report["task_details"])
    shown = [name for name in STUDENTS if name in metrics and metrics[name][agreement]]
    key = agreement if shown else accuracy
    shown = shown or list(metrics)
    tables = [
        {
            "field": field,
            "rows": [row for row in rows if row["n"] >= MIN_ITEMS],
            "few": [row for row in rows if row["n"] < MIN_ITEMS],
            "set": name,
        }
        for field in report["task_details"]["slices"]
        for name, rows in _first_with(report, field, shown, key)
    ]
    title = metric_titles(report["task_details"])[key]
    view = {"models": shown, "metric": title[0].lower() + title[1:], "tables": tables, "few_below": MIN_ITEMS}
    return view if tables else None


def _first_with(
    report: Report, field: str, shown: Sequence[str], key: str
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The rows of the main set, or of the first other set that has several values of the field, with the name
    of that set, empty for the main one; nothing where no set has it.
    """
    for name, metrics in report["by_set"].items():
        if not all(model in metrics for model in shown):
            continue
        rows = _slice_rows(metrics, field, shown, key)
        if len(rows) > 1:  # one value says nothing that the whole set does not
            yield "" if name == report["main_set"] else name, rows
            return


def _slice_rows(
    metrics: Mapping[str, Any], field: str, shown: Sequence[str], key: str
) -> list[dict[str, Any]]:
    """One row for each value of a field, the largest n first: the estimates of each model, those of the last
    one, and n.
    """
    by_value = {name: metrics[name]["by_slice"].get(field) or {} for name in shown}
    rows = []
    for value, entry in by_value[shown[0]].items():
        estimates = [(by_value[name].get(value) or {}).get(key) for name in shown]
        lines = [(model_class(n), model_title(n), e) for n, e in zip(shown, estimates, strict=True)]
        rows.append({"value": value, "lines": lines, "last": estimates[-1] or {}, "n": entry["n"]})
    # By size and not by rate: the extremes of a list by rate are its smallest slices.
    return sorted(rows, key=lambda row: (-row["n"], row["value"]))


def other_sets(report: Report) -> dict[str, Any] | None:
    """The section of the other sets: the main table for each of them."""
    others = [name for name in report["sets"] if name != report["main_set"]]
    return {"sets": others, "columns": _columns(report)} if others else None
