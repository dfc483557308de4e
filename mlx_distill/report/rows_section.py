"""Section of the report: the rows on which a model disagrees with the teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_distill.report.tables import Report
from mlx_distill.run_models import model_class, model_phrase, model_title
from mlx_distill.text import NONE, percent, shortened, value_text, words

_VISIBLE = 10
"""The number of rows of a model that are shown; more are folded."""


def disagreements(report: Report) -> list[dict[str, Any]]:
    """The section: one list for each model, those of the others folded. Empty where nothing was compared."""
    models = report["disagreements"]
    return [_model(report, name, entry, name == list(models)[-1]) for name, entry in models.items()]


def _model(report: Report, name: str, entry: Mapping[str, Any], is_open: bool) -> dict[str, Any]:
    cases = [_case(report, name, row) for row in entry["rows"]]
    # Two more are shown rather than folded.
    visible = _VISIBLE if len(cases) > _VISIBLE + 2 else len(cases)
    return {
        "summary": f"{model_title(name)}: {'; '.join(_counts(report, name))}",
        "model": name,
        "open": is_open,
        "visible": cases[:visible],
        "folded": cases[visible:],
        "limited_to": len(cases) if len(cases) < entry["count"] else None,
    }


def _counts(report: Report, name: str) -> list[str]:
    """The number of disagreements in each set; a rate over several sets would mean nothing."""
    out = []
    for set_name, models in report["by_set"].items():
        figures = models.get(name)
        if figures and figures["disagreements"] is not None:
            count, n = figures["disagreements"], figures["teacher_exact_match"]["n"]
            rows = "held-out rows" if set_name == report["main_set"] else f"rows of the set “{set_name}”"
            out.append(f"{count:,} of {n:,} {rows} ({percent(count / n) if n else NONE})")
    return out


def _case(report: Report, name: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """One row: its title, the labels of truth, teacher and model, the answers' fields, its input."""
    task = report["task_details"]
    fields = row.get("fields") or {}
    context = [str(fields[field]) for field in task["slices"] if fields.get(field) is not None]
    if row["set"] != report["main_set"]:
        context.append(f"set {row['set']}")
    return {
        "title": row["title"] or shortened(row.get("input") or "") or row["id"],
        "context": " · ".join(context),
        "chips": _label_chips(name, row, task["label"]) if task["label"] else _validity_chips(name, row),
        "has_truth": bool(row["truth"]),
        "fields": _fields(report, row),
        "invalid": [
            (model_phrase(who), answer["error"] or "no reason given", answer.get("text") or "(empty)")
            for who, answer in (("teacher", row["teacher"]), (name, row["model"]))
            if answer["answer"] is None
        ],
        "input": row.get("input"),
    }


def _label_chips(name: str, row: Mapping[str, Any], label: str) -> list[dict[str, Any]]:
    truth = (row["truth"] or {}).get(label)
    return [
        _chip("Truth", NONE if truth is None else words(truth), "truth"),
        _answer_chip("Teacher", row["teacher"], truth, "m-teacher"),
        _answer_chip(model_title(name), row["model"], truth, model_class(name)),
    ]


def _validity_chips(name: str, row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The models whose answer is invalid, in a task without a label."""
    models = (("Teacher", "teacher", "m-teacher"), (model_title(name), "model", model_class(name)))
    return [_chip(title, "invalid", css) for title, key, css in models if row[key]["answer"] is None]


def _answer_chip(title: str, answer: Mapping[str, Any], truth: str | None, class_: str) -> dict[str, Any]:
    label, score = answer["label"], answer["score"]
    correct = None if truth is None else label == truth
    return _chip(title, "invalid" if label is None else words(label), class_, score, correct)


def _chip(
    title: str, text: str, class_: str, score: float | None = None, correct: bool | None = None
) -> dict[str, Any]:
    number = None if score is None else f"{score:g}"
    return {"title": title, "text": text, "class": class_, "score": number, "correct": correct}


def _fields(report: Report, row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The answers of truth, teacher and model, field by field."""
    truth, teacher, model = row["truth"] or {}, row["teacher"]["answer"] or {}, row["model"]["answer"] or {}
    return [
        {
            "name": words(field),
            "differs": field in row["differs"],
            "truth": value_text(truth.get(field)),
            "teacher": value_text(teacher.get(field)),
            "model": value_text(model.get(field)),
        }
        for field in report["task_details"]["properties"]
    ]
