"""The result of a cross-validation: ``validation.json``, the page ``validation.html``, and lines for the
terminal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markupsafe import Markup

from mlx_distill.report.environment import render
from mlx_distill.report.xy_charts import Axis, Series, dots, xy_chart
from mlx_distill.run_models import model_class, model_phrase, model_title
from mlx_distill.storage import write_json, write_text
from mlx_distill.text import MINUS, counted, interval, percent, signed_points, words

NAME = "validation"


@dataclass(frozen=True)
class ValidationReport:
    """The result of a cross-validation.

    ``path`` is ``validation.json`` and ``report`` its content: of each model the ``figures`` over the pooled
    rows, the ``comparisons`` of every two models, the ``learning_curve``, and the ``goals`` of the recipe.
    """

    path: Path
    report: Mapping[str, Any] = field(repr=False)

    @property
    def html(self) -> Path:
        """The page, in the same folder."""
        return self.path.with_suffix(".html")

    @property
    def figures(self) -> Mapping[str, Any]:
        """Of each model the ``estimate`` over the pooled rows and of each of the ``folds``."""
        return self.report["figures"]

    def to_dict(self) -> dict[str, Any]:
        """The short form for ``--json``: paths and figures."""
        keys = ("name", "task", "metric", "cluster", "figures", "comparisons", "learning_curve", "goals")
        return {"validation": str(self.path), "html": str(self.html)} | {
            key: self.report[key] for key in keys
        }

    def lines(self) -> list[str]:
        """The figures for the terminal, then the path of the page."""
        report = self.report
        lines = [f"{report['name']}: {first_sentence(report)}"]
        for name, figure in report["figures"].items():
            lines.append(
                f"{model_title(name)}: {_plain(estimate_text(figure['estimate']))}; {fold_text(figure)}"
            )
        for comparison in report["comparisons"]:
            lines.append(_plain(comparison_text(comparison)))
        curve = report["learning_curve"]
        if curve:
            points = [f"{p['rows']:,}: {_plain(percent(p['estimate']['value']))}" for p in curve["points"]]
            lines.append(f"learning curve, training rows: {', '.join(points)}. {curve['sentence']}")
        for goal in report["goals"]:
            lines.append(f"goal {words(goal['state'])}: {goal['text']}")
        return [*lines, f"page: {self.html}"]


def _plain(text: str) -> str:
    return text.replace("\u202f", " ").replace(MINUS, "-").replace("–", " to ")


def estimate_text(estimate: Mapping[str, Any]) -> str:
    """A pooled figure with its interval and rows.

    >>> estimate_text({"value": 0.8, "low": 0.7, "high": 0.9, "n": 50}).replace("\\u202f", " ")
    '80.0 % [70.0–90.0] over 50 rows'
    """
    ends = f" [{interval(estimate)}]" if estimate["low"] is not None else ""
    groups = f" in {counted(estimate['clusters'], 'cluster')}" if estimate.get("clusters") is not None else ""
    return f"{percent(estimate['value'])}{ends} over {counted(estimate['n'], 'row')}{groups}"


def fold_text(figure: Mapping[str, Any]) -> str:
    """The values of the folds."""
    return "folds " + ", ".join(percent(fold["value"]).replace("\u202f", " ") for fold in figure["folds"])


def comparison_text(comparison: Mapping[str, Any]) -> str:
    """Two models compared, in a sentence."""
    pooled, a, b = comparison["pooled"], model_phrase(comparison["a"]), model_phrase(comparison["b"])
    gap = comparison["pooled"]["difference"]
    ends = f" [{signed_points(gap['low'])} to {signed_points(gap['high'])}]" if gap["low"] is not None else ""
    word = {"better": "better", "worse": "worse"}.get(comparison["verdict"], "no difference is shown")
    return (
        f"{b} against {a}: {signed_points(gap['value'])} points{ends}, {word}; fixed {pooled['first_only']}, "
        f"broke {pooled['second_only']}"
    )


def first_sentence(report: Mapping[str, Any]) -> str:
    """What was done, in one sentence."""
    rows = next(iter(report["figures"].values()))["estimate"]["n"]
    folds = counted(len(report["folds"]), "fold")
    return f"{folds}; each of {counted(rows, 'row')} answered by a model that had not seen it"


def write_validation(folder: Path, report: Mapping[str, Any]) -> ValidationReport:
    """Write ``validation.json`` and ``validation.html``, each atomically."""
    page = render_validation(report)
    write_json(folder / f"{NAME}.json", report)
    write_text(folder / f"{NAME}.html", page)
    return ValidationReport(folder / f"{NAME}.json", report)


def render_validation(report: Mapping[str, Any]) -> str:
    """The page of a cross-validation, as HTML."""
    low, high = _range(report)
    limit = _limit([comparison["pooled"]["difference"] for comparison in report["comparisons"]])
    return render(
        "validation.html.j2",
        report=report,
        sentence=first_sentence(report),
        metric=words(report["metric"]).capitalize(),
        main=next(
            (name for name in ("quantized", "student", "teacher") if name in report["figures"]),
            next(iter(report["figures"])),
        ),
        dots={
            name: dots(model_class(name), "fold", [fold["value"] for fold in figure["folds"]], low, high)
            for name, figure in report["figures"].items()
        },
        axis=(low, high),
        limit=limit,
        curve=_curve_chart(report),
    )


def _range(report: Mapping[str, Any]) -> tuple[float, float]:
    """The ends of an axis that holds all folds and intervals, in steps of ten points."""
    values = [
        value
        for figure in report["figures"].values()
        for part in (figure["estimate"], *figure["folds"])
        for value in (part["value"], figure["estimate"]["low"], figure["estimate"]["high"])
        if value is not None
    ]
    low, high = min(values, default=0.0), max(values, default=1.0)
    return max(0.0, int(low * 10 - 0.5) / 10), min(1.0, int(high * 10 + 1.5) / 10)


def _limit(estimates: Sequence[Mapping[str, Any]]) -> float:
    """The end of an axis of differences that holds all intervals."""
    ends = [abs(value) for e in estimates for value in (e["low"], e["high"], e["value"]) if value is not None]
    return max(0.05, *ends) if ends else 0.05


def _curve_chart(report: Mapping[str, Any]) -> Markup | None:
    curve = report["learning_curve"]
    if not curve:
        return None
    points = [point for point in curve["points"] if point["estimate"]["value"] is not None]
    values = [point["estimate"]["value"] for point in points]
    ends = [
        (point["estimate"]["low"], point["estimate"]["high"])
        if point["estimate"]["low"] is not None
        else (point["estimate"]["value"],) * 2
        for point in points
    ]
    low, high = min(end[0] for end in ends), max(end[1] for end in ends)
    metric = words(report["metric"])
    series = Series(
        model_class("teacher"),
        "Teacher",
        [(point["rows"], value) for point, value in zip(points, values, strict=True)],
        ends,
    )
    rows = Axis(0, max(point["rows"] for point in points), "training rows", is_share=False)
    share = Axis(max(0.0, int(low * 10) / 10), min(1.0, int(high * 10 + 1) / 10), f"{metric}, %")
    return xy_chart([series], rows, share, f"{metric} of the teacher against its training rows")
