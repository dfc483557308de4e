"""The report as one HTML file without scripts and external files, for all widths, light and dark."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_distill.report.environment import render
from mlx_distill.report.sections import CHAT_SECTIONS, SECTIONS
from mlx_distill.report.tables import Report, main_metrics, metric_titles
from mlx_distill.run_models import RESULTS, is_dequantized, model_phrase
from mlx_distill.text import (
    MINUS,
    counted,
    p_value,
    percent,
    signed_interval,
    signed_points,
    significant,
    size,
    words,
)


def render_html(report: Report) -> str:
    """The report as an HTML page.

    Text from data is escaped, and the page's content security policy forbids scripts and external files.

    Args:
        report: What :func:`mlx_distill.report.collect.build_report` returns, or ``report.json`` read back.

    Returns:
        A complete HTML document.
    """
    if report["task_details"].get("is_chats"):
        return _render_chats(report)
    views = [(section, view) for section in SECTIONS if (view := section.of(report))]
    return render("report.html.j2", report=report, views=views, head=_head(report))


def _render_chats(report: Report) -> str:
    """The page of a run without a task."""
    sections = [section for section in SECTIONS if section.id in CHAT_SECTIONS]
    views = [(section, view) for section in sections if (view := section.of(report))]
    shown = {"created": _created(report), "sentence": chat_sentence(report)}
    return render("chats.html.j2", report=report, views=views, **shown)


def chat_sentence(report: Report) -> str:
    """How the loss on held-out chats has changed, in one sentence."""
    after, change = report["metrics"]["teacher"]["loss"], report["change"]
    if after["value"] is None:
        return "No chat was held out, so the loss was not measured."
    rows = counted(after["n"], "held-out chat")
    sentence = f"On {rows} the loss is {significant(after['value'], 4)} nats a token"
    if change is None:
        return f"{sentence}."
    before = report["metrics"]["teacher_before"]["loss"]["value"]
    sentence += f", and was {significant(before, 4)} before the training"
    if change["low"] is None:
        return f"{sentence}."
    value, low, high = (significant(change[end], 3).replace("-", MINUS) for end in ("value", "low", "high"))
    return f"{sentence}: a change of {value} [{low} to {high}]."


def _created(report: Report) -> str:
    created = report["created"]
    return str(created[:16].replace("T", " ") + (" UTC" if created.endswith(("+00:00", "Z")) else ""))


def final_model(report: Report) -> str:
    """The model that the run is for: the quantized student, else the student, else the last one measured."""
    measured = report["metrics"]
    return next((name for name in reversed(RESULTS) if name in measured), list(measured)[-1])


def _head(report: Report) -> dict[str, Any]:
    """The final model's main metric and what stands around it; ``owner`` is whose label or answer it is
    compared with.
    """
    name = final_model(report)
    figures = report["metrics"][name]
    accuracy, agreement = main_metrics(report["task_details"])
    context = [_before(report, name), _accuracy(report, name), _size(report, name), _speed(report, name)]
    return {
        "model": name,
        "rate": figures[agreement] or figures[accuracy],
        "owner": "the teacher’s" if figures[agreement] else "the true",
        "label": words(report["task_details"]["label"] or "answer"),
        "context": [sentence for sentence in context if sentence],
        "created": _created(report),
    }


def _before(report: Report, name: str) -> str | None:
    """Agreement with the teacher before distillation; of the teacher its figure before fine-tuning."""
    main, agreement = main_metrics(report["task_details"])
    if name == "teacher":
        before = (report["metrics"].get("teacher_before") or {}).get(main)
        if not before or before["value"] is None:
            return None
        return f"Before fine-tuning it was {percent(before['value'])}."
    before = (report["metrics"].get("student_before") or {}).get(agreement)
    if not before or before["value"] is None or name not in RESULTS:
        return None
    return f"Before distillation it was {percent(before['value'])}."


def _accuracy(report: Report, name: str) -> str | None:
    """Accuracy of the model and the teacher, and their difference."""
    metrics = report["metrics"]
    comparison = metrics[name].get("versus_teacher")
    if not comparison:
        return None
    key, _ = main_metrics(report["task_details"])
    teacher, model = metrics["teacher"][key]["value"], metrics[name][key]["value"]
    gap = comparison["difference"]
    shown = round(round(100 * model, 1) - round(100 * teacher, 1), 1)
    title = metric_titles(report["task_details"])[key]
    note = "" if shown == round(100 * gap["value"], 1) else " (computed from the exact rates)"
    return (
        f"{title} is {percent(teacher)} for the teacher and {percent(model)} for {model_phrase(name)}: "
        f"a difference of {signed_points(gap['value'])} points [{signed_interval(gap)}]{note}, "
        f"{p_value(comparison['p_value'])}."
    )


def _size(report: Report, name: str) -> str | None:
    """Size of the weights on disk, and its share of the teacher's."""
    sizes = report["sizes"]
    if name == "teacher" or name not in sizes or "teacher" not in sizes:
        return None
    model, teacher = sizes[name], sizes["teacher"]
    share = percent(model["total_bytes"] / teacher["total_bytes"], 0)
    return (
        f"Its weights{_with_adapter(model)} take {size(model['total_bytes'], page=True)} on disk, "
        f"{share} of the teacher’s {size(teacher['total_bytes'], page=True)}{_with_adapter(teacher)}."
    )


def _with_adapter(sizes: Mapping[str, Any]) -> str:
    return " (base and adapter)" if sizes["base_bytes"] else ""


def _speed(report: Report, name: str) -> str | None:
    """Rows per minute; against the teacher's, if both were evaluated with the same kind of weights."""
    metrics, settings = report["metrics"], report["provenance"]["evaluations"]
    rate = metrics[name].get("items_per_minute")
    if name == "teacher" or not rate:
        return None
    reference = (metrics.get("teacher") or {}).get("items_per_minute")
    ratio = ""
    if reference and is_dequantized(settings[name]) == is_dequantized(settings["teacher"]):
        ratio = f", {significant(rate / reference, 2)} times the teacher’s speed"
    return f"It answers {significant(rate, 3)} rows per minute{ratio}."
