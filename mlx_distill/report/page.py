"""report.html: one file without network, scripts or outside fonts, for a desk and for a phone, light and
dark.
"""

from __future__ import annotations

from collections.abc import Mapping
from string import Template
from typing import Any

from mlx_distill.config import ASSETS
from mlx_distill.report import errors_section, origin_section, results_section, rows_section, training_section
from mlx_distill.report.charts import bar
from mlx_distill.report.markup import Html, el, join
from mlx_distill.run_models import RESULTS, is_dequantized, model_class, model_phrase, model_title
from mlx_distill.text import (
    counted,
    interval,
    p_value,
    percent,
    signed_points,
    significant,
    size,
    words,
)

Report = Mapping[str, Any]

# The longer form of what the navigation calls by a word.
_HEADINGS = {
    "sides": "Errors on either side",
    "groups": "Errors by group",
    "confusion": "Who says what",
    "slices": "Agreement by slice",
    "distributions": "Labels given",
    "disagreements": "Where they disagree",
    "cost": "Size, speed, memory",
    "origin": "Where the figures come from",
}


def render_html(report: Report) -> str:
    """The page. Every text from data is escaped; the page's own policy forbids scripts and loading anything.

    Args:
        report: What :func:`mlx_distill.report.collect.build_report` returns, or ``report.json`` read back.

    Returns:
        A complete HTML document.
    """
    sections = [(id_, title, body) for id_, title, body in _sections(report) if body]
    links = [el("li", el("a", title, href=f"#{id_}")) for id_, title, _ in sections]
    parts = [
        _header(report),
        el("nav", el("ul", links), aria_label="Sections"),
        el(
            "main",
            [
                el("section", el("h2", _HEADINGS.get(id_, title)), body, id=id_)
                for id_, title, body in sections
            ],
        ),
        el(
            "footer",
            f"Written by mlx-distill {report['provenance']['versions'].get('mlx-distill', '')}. This page loads nothing.",
        ),
    ]
    folder = ASSETS / "report"
    page = Template((folder / "page.html").read_text(encoding="utf-8"))
    style = (folder / "style.css").read_text(encoding="utf-8")
    return page.substitute(
        title=el("title", f"{report['name']}: distillation report"), style=style, body=join(parts)
    )


def _sections(report: Report) -> list[tuple[str, str, Html | None]]:
    return [
        ("results", "Results", results_section.results(report)),
        ("sides", "Either side", errors_section.sides(report)),
        ("groups", "Groups", errors_section.groups(report)),
        ("confusion", "Confusion", errors_section.confusions(report)),
        ("slices", "Slices", results_section.slices(report)),
        ("distributions", "Labels", errors_section.distributions(report)),
        ("sets", "Other sets", results_section.other_sets(report)),
        ("training", "Training", training_section.curves(report)),
        ("disagreements", "Disagreements", rows_section.disagreements(report)),
        ("cost", "Cost", training_section.cost(report)),
        ("origin", "Origin", origin_section.origin(report)),
    ]


def final_model(report: Report) -> str:
    """The model that the run was for: the quantized student, else the student, else the last one measured."""
    measured = report["metrics"]
    return next((name for name in reversed(RESULTS) if name in measured), list(measured)[-1])


def _header(report: Report) -> Html:
    name = final_model(report)
    figures = report["metrics"][name]
    label = words(report["task_details"]["label"])
    main = figures["verdict_agreement"] or figures["accuracy"]
    against = f"the teacher’s {label}" if figures["verdict_agreement"] else f"the true {label}"
    eyebrow = el(
        "p",
        el("span", "Distillation report"),
        el("span", report["task"]),
        el("time", _day(report["created"]), datetime=report["created"]),
        class_="eyebrow",
    )
    hero = el(
        "div",
        el("p", percent(main["value"]), class_="figure"),
        bar(main, f"{model_title(name)} gives {against}"),
        el(
            "p",
            f"{percent(report['confidence'], 0)} interval {interval(main)}, n = {main['n']}",
            class_="small",
        ),
        class_=f"hero {model_class(name)}",
    )
    sentence = el(
        "p",
        f"{model_phrase(name).capitalize()} gives {against} on ",
        el("strong", percent(main["value"])),
        f" of {counted(main['n'], 'held-out row')} [{interval(main)}].",
        class_="lead",
    )
    description = el("p", report["description"], class_="description") if report["description"] else None
    return el(
        "header",
        eyebrow,
        el("h1", report["name"]),
        description,
        el("div", hero, el("div", sentence, el("p", _context(report, name))), class_="summary"),
    )


def _day(created: str) -> str:
    return created[:16].replace("T", " ") + (" UTC" if created.endswith(("+00:00", "Z")) else "")


def _context(report: Report, name: str) -> list[Any]:
    """Two or three sentences around the first: before, against the truth, size and speed."""
    metrics, sizes = report["metrics"], report["sizes"]
    out: list[Any] = []
    before = (metrics.get("student_before") or {}).get("verdict_agreement")
    if before and before["value"] is not None and name in RESULTS:
        out.append(f"Before distillation it was {percent(before['value'])}. ")
    versus = metrics[name].get("versus_teacher")
    if versus:
        teacher, own = metrics["teacher"]["accuracy"], metrics[name]["accuracy"]
        gap = versus["difference"]
        out.append(
            f"Against the truth the teacher is right on {percent(teacher['value'])} and {model_phrase(name)} on {percent(own['value'])}: "
            f"a difference of {signed_points(gap['value'])} points [{signed_points(gap['low'])} to {signed_points(gap['high'])}]"
            f"{_rounding(own['value'], teacher['value'], gap['value'])}, {p_value(versus['p_value'])}. "
        )
    if name in sizes and "teacher" in sizes and name != "teacher":
        own_size, whole = sizes[name], sizes["teacher"]
        share = percent(own_size["total_bytes"] / whole["total_bytes"], 0)
        out.append(
            f"Its weights{_with_adapter(own_size)} take {size(own_size['total_bytes'], page=True)} on disk, "
        )
        out.append(
            f"{share} of the teacher’s {size(whole['total_bytes'], page=True)}{_with_adapter(whole)}. "
        )
    if name != "teacher":
        out.append(_pace(report, name))
    return out


def _rounding(first: float, second: float, difference: float) -> str:
    """Said where the shown rates seem to give another difference than the shown one."""
    return (
        ""
        if round(round(100 * first, 1) - round(100 * second, 1), 1) == round(100 * difference, 1)
        else " (rounded from the exact rates)"
    )


def _with_adapter(entry: Mapping[str, Any]) -> str:
    return " (base and adapter)" if entry["base_bytes"] else ""


def _pace(report: Report, name: str) -> str | None:
    """The model's pace, against the teacher's where both computed alike."""
    metrics, settings = report["metrics"], report["provenance"]["evaluations"]
    pace, reference = (
        metrics[name].get("items_per_minute"),
        (metrics.get("teacher") or {}).get("items_per_minute"),
    )
    if not pace:
        return None
    alike = reference and is_dequantized(settings[name]) == is_dequantized(settings["teacher"])
    against = f", {significant(pace / reference, 2)} times the teacher’s pace" if alike else ""
    return f"It answers {significant(pace, 3)} rows a minute{against}."
