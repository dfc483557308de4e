"""Section of the report: the rows on which a model disagrees with the teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_distill.report.markup import Html, el
from mlx_distill.report.tables import Report
from mlx_distill.run_models import model_class, model_phrase, model_title
from mlx_distill.text import NONE, percent, shortened, value_text, words

_VISIBLE = 10
"""The number of rows of a model that are shown; more are folded."""


def disagreements(report: Report) -> Html | None:
    """The section: one foldable list for each model, the last of them open."""
    models = report["disagreements"]
    if not models:
        return None
    last = list(models)[-1]
    label = report["task_details"]["label"]
    note = (
        f"Rows whose {words(label or 'answer')} differs from the teacher’s, largest difference first. "
        "Fields that differ are marked ≠."
    )
    lists = [_model(report, name, entry, name == last) for name, entry in models.items()]
    return el("div", el("p", note, class_="note"), lists)


def _model(report: Report, name: str, entry: Mapping[str, Any], is_open: bool) -> Html:
    summary = f"{model_title(name)}: {'; '.join(_counts(report, name))}"
    listed = len(entry["rows"])
    limit = f"The first {listed} are shown." if listed < entry["count"] else None
    cases = [_case(report, name, row) for row in entry["rows"]]
    visible, folded = cases[:_VISIBLE], cases[_VISIBLE:]
    more: Any = folded
    if len(folded) > 2:
        more = el("details", el("summary", f"{len(folded)} more"), folded, class_="more")
    return el(
        "details",
        el("summary", summary),
        [visible, more] if cases else el("p", "None."),
        el("p", limit, class_="note") if limit else None,
        open=is_open,
        class_="cases",
    )


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


def _title(row: Mapping[str, Any]) -> str:
    return row["title"] or shortened(row.get("input") or "") or row["id"]


def _case(report: Report, name: str, row: Mapping[str, Any]) -> Html:
    """One foldable row: its title, the labels of truth, teacher and model, then the answers' fields."""
    task = report["task_details"]
    fields = row.get("fields") or {}
    context = [str(fields[field]) for field in task["slices"] if fields.get(field) is not None]
    if row["set"] != report["main_set"]:
        context.append(f"set {row['set']}")
    where = el("span", " · ".join(context), class_="where") if context else None
    chips = _label_chips(name, row, task["label"]) if task["label"] else _validity_chips(name, row)
    summary = el(
        "summary",
        el("span", el("span", _title(row), class_="title"), where),
        el("span", chips, class_="chips"),
    )
    source = None
    if row.get("input"):
        source = el("details", el("summary", "Input text"), el("pre", row["input"]), class_="source")
    return el("details", summary, _fields(report, name, row), source, class_="case")


def _label_chips(name: str, row: Mapping[str, Any], label: str) -> list[Html]:
    truth = (row["truth"] or {}).get(label)
    return [
        _chip("Truth", NONE if truth is None else words(truth), None, None, "truth"),
        _answer_chip("Teacher", row["teacher"], truth, "m-teacher"),
        _answer_chip(model_title(name), row["model"], truth, model_class(name)),
    ]


def _validity_chips(name: str, row: Mapping[str, Any]) -> list[Html]:
    """The models whose answer is invalid, in a task without a label."""
    models = (("Teacher", "teacher", "m-teacher"), (model_title(name), "model", model_class(name)))
    invalid = [(title, css) for title, key, css in models if row[key]["answer"] is None]
    return [_chip(title, "invalid", None, None, css) for title, css in invalid]


def _answer_chip(title: str, answer: Mapping[str, Any], truth: str | None, class_: str) -> Html:
    label = answer["label"]
    text = "invalid" if label is None else words(label)
    return _chip(title, text, answer["score"], None if truth is None else label == truth, class_)


def _chip(title: str, text: str, score: float | None, is_correct: bool | None, class_: str) -> Html:
    number = el("small", " ", f"{score:g}") if score is not None else None
    mark = None
    if is_correct is not None:
        mark = el("i", "✓" if is_correct else "✗", class_="mark", title="correct" if is_correct else "wrong")
    return el("span", el("em", title), el("span", el("b", text), number, mark), class_=f"chip {class_}")


def _fields(report: Report, name: str, row: Mapping[str, Any]) -> Html:
    """The answers of truth, teacher and model as a table of fields; below it the text of invalid ones."""
    truth, teacher, model = row["truth"], row["teacher"]["answer"] or {}, row["model"]["answer"] or {}
    title = model_title(name)
    rows = []
    for field in report["task_details"]["properties"]:
        differs = field in row["differs"]
        mark = el("span", "≠ ", class_="mark", title="differs from the teacher") if differs else None
        cells = [
            el("td", value_text(truth.get(field)), data_label="Truth") if truth else None,
            el("td", value_text(teacher.get(field)), data_label="Teacher"),
            el("td", mark, value_text(model.get(field)), data_label=title),
        ]
        head = el("th", words(field), scope="row")
        rows.append(el("tr", head, cells, class_="differs" if differs else None))
    heads = ["Field", *(["Truth"] if truth else []), "Teacher", title]
    invalid = [
        _invalid(model_phrase(who), answer)
        for who, answer in (("teacher", row["teacher"]), (name, row["model"]))
        if answer["answer"] is None
    ]
    table_head = el("thead", el("tr", [el("th", text, scope="col") for text in heads]))
    caption = el("caption", f"The answers to {_title(row)}, field by field", class_="hidden")
    return el("div", el("table", caption, table_head, el("tbody", rows), class_="fields"), invalid)


def _invalid(model: str, answer: Mapping[str, Any]) -> Html:
    return el(
        "p",
        f"The answer of {model} is invalid: {answer['error'] or 'no reason given'}.",
        el("pre", answer.get("text") or "(empty)"),
        class_="broken",
    )
