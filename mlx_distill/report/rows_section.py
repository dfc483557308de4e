"""The rows on which two models disagree, side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_distill.report.markup import Html, el
from mlx_distill.run_models import model_class, model_phrase, model_title
from mlx_distill.text import NONE, percent, shortened, value_text, words

Report = Mapping[str, Any]
_OPEN = 10


def disagreements(report: Report) -> Html | None:
    """One foldable list a model; the one that the run was for stands open."""
    found = report["disagreements"]
    if not found:
        return None
    last = list(found)[-1]
    label = words(report["task_details"]["label"])
    note = f"Rows where the {label} differs from the teacher’s, farthest apart first. Fields that differ are marked ≠."
    return el(
        "div",
        el("p", note, class_="note"),
        [_model(report, name, entry, name == last) for name, entry in found.items()],
    )


def _model(report: Report, name: str, entry: Mapping[str, Any], opened: bool) -> Html:
    head = f"{model_title(name)}: {'; '.join(_counts(report, name))}"
    cut = f"The first {len(entry['rows'])} are shown." if len(entry["rows"]) < entry["count"] else None
    cases = [_case(report, name, row) for row in entry["rows"]]
    rest = (
        el("details", el("summary", f"{len(cases) - _OPEN} more"), cases[_OPEN:], class_="more")
        if len(cases) > _OPEN + 2
        else cases[_OPEN:]
    )
    body = [cases[:_OPEN], rest] if cases else el("p", "None.")
    return el(
        "details",
        el("summary", head),
        body,
        el("p", cut, class_="note") if cut else None,
        open=opened,
        class_="cases",
    )


def _counts(report: Report, name: str) -> list[str]:
    """How many rows of each set, for a rate over mixed sets is a rate of nothing."""
    out = []
    for set_name, models in report["by_set"].items():
        figures = models.get(name)
        if figures and figures["disagreements"] is not None:
            missed, n = figures["disagreements"], figures["verdict_agreement"]["n"]
            rows = "held-out rows" if set_name == report["main_set"] else f"rows of the set “{set_name}”"
            out.append(f"{missed:,} of {n:,} {rows} ({percent(missed / n) if n else NONE})")
    return out


def _title(row: Mapping[str, Any]) -> str:
    return row["title"] or shortened(row.get("input") or "") or row["id"]


def _case(report: Report, name: str, row: Mapping[str, Any]) -> Html:
    task = report["task_details"]
    truth = (row["truth"] or {}).get(task["label"])
    slices = [
        str(row["fields"][field])
        for field in task["slices"]
        if (row.get("fields") or {}).get(field) is not None
    ]
    where = [*slices, *([f"set {row['set']}"] if row["set"] != report["main_set"] else [])]
    name_of = el("span", _title(row), class_="title")
    summary = el(
        "summary",
        el("span", name_of, el("span", " · ".join(where), class_="where") if where else None),
        el(
            "span",
            _chip("Truth", truth, None, truth, "truth"),
            _chip("Teacher", row["teacher"]["label"], row["teacher"]["score"], truth, "m-teacher"),
            _chip(model_title(name), row["model"]["label"], row["model"]["score"], truth, model_class(name)),
            class_="chips",
        ),
    )
    source = (
        el("details", el("summary", "Input text"), el("pre", row["input"]), class_="source")
        if row.get("input")
        else None
    )
    return el("details", summary, _fields(report, name, row), source, class_="case")


def _chip(who: str, label: str | None, score: float | None, truth: str | None, class_: str) -> Html:
    said = (NONE if who == "Truth" else "not valid") if label is None else words(label)
    number = el("small", " ", f"{score:g}") if score is not None else None
    right = (
        None
        if who == "Truth" or truth is None
        else el(
            "i", "✓" if label == truth else "✗", class_="mark", title="right" if label == truth else "wrong"
        )
    )
    return el("span", el("em", who), el("span", el("b", said), number, right), class_=f"chip {class_}")


def _fields(report: Report, name: str, row: Mapping[str, Any]) -> Html:
    teacher, model, truth = (
        (row["teacher"]["answer"] or {}),
        (row["model"]["answer"] or {}),
        (row["truth"] or {}),
    )
    rows = []
    for field in report["task_details"]["properties"]:
        differs = field in row["differs"]
        cells = [el("td", value_text(truth.get(field)), data_label="Truth")] if truth else []
        cells.append(el("td", value_text(teacher.get(field)), data_label="Teacher"))
        cells.append(
            el(
                "td",
                el("span", "≠ ", class_="mark", title="differs from the teacher") if differs else None,
                value_text(model.get(field)),
                data_label=model_title(name),
            )
        )
        rows.append(
            el("tr", el("th", words(field), scope="row"), cells, class_="differs" if differs else None)
        )
    heads = ["Field", *(["Truth"] if truth else []), "Teacher", model_title(name)]
    notes = [
        _broken(model_phrase(who), side)
        for who, side in (("teacher", row["teacher"]), (name, row["model"]))
        if side["answer"] is None
    ]
    head = el("thead", el("tr", [el("th", text, scope="col") for text in heads]))
    caption = el("caption", f"The answers to {_title(row)}, field by field", class_="hidden")
    return el("div", el("table", caption, head, el("tbody", rows), class_="fields"), notes)


def _broken(who: str, side: Mapping[str, Any]) -> Html:
    return el(
        "p",
        f"The answer of {who} is not valid: {side['error'] or 'no reason given'}.",
        el("pre", side.get("text") or "(empty)"),
        class_="broken",
    )
