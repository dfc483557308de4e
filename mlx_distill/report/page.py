"""The report as one HTML file without scripts and external files, for all widths, light and dark."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from string import Template
from typing import Any

from mlx_distill.config import ASSETS
from mlx_distill.report import (
    calibration_section,
    constrained_section,
    errors_section,
    fields_section,
    origin_section,
    quantization_section,
    results_section,
    rows_section,
    training_section,
)
from mlx_distill.report.charts import bar
from mlx_distill.report.markup import Html, el, join
from mlx_distill.report.tables import Report, main_metrics, metric_titles
from mlx_distill.run_models import RESULTS, is_dequantized, model_class, model_phrase, model_title
from mlx_distill.text import counted, interval, p_value, percent, signed_points, significant, size, words


@dataclass(frozen=True)
class _Section:
    """A section of the page: the anchor, the name in the navigation, the heading, the content."""

    id: str
    name: str
    heading: str
    content: Html | None


def render_html(report: Report) -> str:
    """The report as an HTML page.

    Text from data is escaped, and the page's content security policy forbids scripts and external files.

    Args:
        report: What :func:`mlx_distill.report.collect.build_report` returns, or ``report.json`` read back.

    Returns:
        A complete HTML document.
    """
    sections = [section for section in _sections(report) if section.content]
    links = [el("li", el("a", section.name, href=f"#{section.id}")) for section in sections]
    contents = [
        el("section", el("h2", section.heading), section.content, id=section.id) for section in sections
    ]
    version = report["provenance"]["versions"].get("mlx-distill", "")
    body = [
        _header(report),
        el("nav", el("ul", links), aria_label="Sections"),
        el("main", contents),
        el("footer", f"Written by mlx-distill {version}. This page loads no external files."),
    ]
    folder = ASSETS / "report"
    page = Template((folder / "page.html").read_text(encoding="utf-8"))
    style = (folder / "style.css").read_text(encoding="utf-8")
    title = el("title", f"{report['name']}: distillation report")
    return page.substitute(title=title, style=style, body=join(body))


def _sections(report: Report) -> list[_Section]:
    return [
        _Section("results", "Results", "Results", results_section.results(report)),
        _Section(
            "constrained",
            "Constrained",
            "Free and constrained answers",
            constrained_section.constrained(report),
        ),
        _Section("errors", "Errors", "Precision, recall, error rates", errors_section.binary_errors(report)),
        _Section("groups", "Groups", "Error rates by group", errors_section.group_errors(report)),
        _Section("confusion", "Confusion", "Confusion matrices", errors_section.confusions(report)),
        _Section("fields", "Fields", "Fields of the answer", fields_section.fields(report)),
        _Section("slices", "Slices", "Slices", results_section.slices(report)),
        _Section(
            "distributions", "Labels", "Label distributions", errors_section.label_distributions(report)
        ),
        _Section(
            "calibration", "Calibration", "Label probabilities", calibration_section.calibration(report)
        ),
        _Section("sets", "Other sets", "Other sets", results_section.other_sets(report)),
        _Section("training", "Training", "Training", training_section.curves(report)),
        _Section(
            "disagreements",
            "Disagreements",
            "Disagreements with the teacher",
            rows_section.disagreements(report),
        ),
        _Section("quantization", "Quantization", "Quantization", quantization_section.quantization(report)),
        _Section("cost", "Cost", "Size, speed, memory", training_section.cost(report)),
        _Section("origin", "Provenance", "Provenance", origin_section.origin(report)),
    ]


def final_model(report: Report) -> str:
    """The model that the run is for: the quantized student, else the student, else the last one measured."""
    measured = report["metrics"]
    return next((name for name in reversed(RESULTS) if name in measured), list(measured)[-1])


def _header(report: Report) -> Html:
    """Name of the run, the final model's main metric, and a paragraph around it."""
    name = final_model(report)
    figures = report["metrics"][name]
    accuracy, agreement = main_metrics(report["task_details"])
    rate, answer = figures[agreement] or figures[accuracy], words(report["task_details"]["label"] or "answer")
    owner = "the teacher’s" if figures[agreement] else "the true"
    eyebrow = el(
        "p",
        el("span", "Distillation report"),
        el("span", report["task"]),
        el("time", _minute(report["created"]), datetime=report["created"]),
        class_="eyebrow",
    )
    level = percent(report["confidence"], 0)
    hero = el(
        "div",
        el("p", percent(rate["value"]), class_="figure"),
        bar(rate, f"{model_title(name)} against {owner} {answer}"),
        el("p", f"{level} confidence interval {interval(rate)}, n = {rate['n']}", class_="small"),
        class_=f"hero {model_class(name)}",
    )
    sentence = _sentence(report, name, rate, owner)
    description = el("p", report["description"], class_="description") if report["description"] else None
    context = [_before(report, name), _accuracy(report, name), _size(report, name), _speed(report, name)]
    summary = el("div", hero, el("div", sentence, el("p", context)), class_="summary")
    return el("header", eyebrow, el("h1", report["name"]), description, _diagnosis(report), summary)


def _diagnosis(report: Report) -> Html | None:
    """What is wrong with the result, why, and what to change; None where nothing is."""
    items = [
        el("li", el("b", f"{entry['problem']}."), f" {entry['reason']}. ", el("em", f"Fix: {entry['fix']}."))
        for entry in report.get("diagnosis", ())
    ]
    return (
        el("div", el("h2", "Diagnosis"), el("ul", items), class_="diagnosis", role="note") if items else None
    )


def _sentence(report: Report, name: str, rate: Mapping[str, Any], owner: str) -> Html:
    """The main metric in words; ``owner`` is whose label or answer it compares with."""
    label, model = report["task_details"]["label"], model_phrase(name)
    value = el("strong", percent(rate["value"]))
    rows = counted(rate["n"], "held-out row")
    if label:
        before, after = f"{model} gives {owner} {words(label)} on ", f" of {rows} [{interval(rate)}]."
    else:
        before = f"Over {rows}, the answers of {model} have an F1 of "
        after = f" [{interval(rate)}] to {owner} ones: the mean over the fields of each answer."
    return el("p", before[0].upper() + before[1:], value, after, class_="lead")


def _minute(created: str) -> str:
    """An ISO time without seconds."""
    return created[:16].replace("T", " ") + (" UTC" if created.endswith(("+00:00", "Z")) else "")


def _before(report: Report, name: str) -> str | None:
    """Agreement with the teacher before distillation."""
    _, agreement = main_metrics(report["task_details"])
    before = (report["metrics"].get("student_before") or {}).get(agreement)
    if not before or before["value"] is None or name not in RESULTS:
        return None
    return f"Before distillation it was {percent(before['value'])}. "


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
        f"a difference of {signed_points(gap['value'])} points "
        f"[{signed_points(gap['low'])} to {signed_points(gap['high'])}]{note}, "
        f"{p_value(comparison['p_value'])}. "
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
        f"{share} of the teacher’s {size(teacher['total_bytes'], page=True)}{_with_adapter(teacher)}. "
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
