"""The sections of the report, in the order of the page.

Each has a template, ``assets/report/sections/ID.html.j2``. It sees ``report``, the content of
``report.json``, and ``view``, what the section's function makes of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mlx_distill.report import (
    audit_section,
    calibration_section,
    comparison_section,
    constrained_section,
    costs_section,
    data_section,
    distillation_section,
    errors_section,
    fields_section,
    groups_section,
    metrics_section,
    origin_section,
    quantization_section,
    references_section,
    results_section,
    rows_section,
    training_section,
)
from mlx_distill.report.tables import Report


@dataclass(frozen=True)
class Section:
    """A section of the report.

    Attributes:
        id: Its anchor, and the name of its template.
        name: Its name in the navigation.
        heading: Its heading.
        view: What its template shows as ``view``: a function of the report, or a key of ``report.json``.
            Where that is empty or absent, the page has no such section.
    """

    id: str
    name: str
    heading: str
    view: str | Callable[[Report], Any]

    def of(self, report: Report) -> Any:
        """The view of a report."""
        return report.get(self.view) if isinstance(self.view, str) else self.view(report)


def _edge_cases(report: Report) -> dict[str, Any]:
    """How each model that was asked the edge cases handled them."""
    metrics = report["metrics"]
    return {name: entry for name, figures in metrics.items() if (entry := figures.get("edge_cases"))}


def _known_probabilities(report: Report) -> dict[str, Any]:
    """The figures of each model against exact probabilities, where the rows have them."""
    metrics = report["metrics"]
    return {name: entry for name, figures in metrics.items() if (entry := figures.get("known_probabilities"))}


def _losses(report: Report) -> dict[str, Any]:
    """The figures of each model on chats without a task."""
    return dict(report["metrics"]) if report["task_details"].get("is_chats") else {}


CHAT_SECTIONS = ("data", "goals", "audit", "losses", "training", "origin")
"""The sections of a report without a task."""

SECTIONS = (
    Section("data", "Rows", "Rows", data_section.data),
    Section("comparison", "Comparison", "Against the model that it replaces", comparison_section.comparison),
    Section("goals", "Goals", "Goals", results_section.goals),
    Section("results", "Results", "Results", results_section.results),
    Section("known-probabilities", "Exact", "Against the exact probabilities", _known_probabilities),
    Section("attribution", "Attribution", "From teacher to quantized student", "attribution"),
    Section("constrained", "Constrained", "Free and constrained answers", constrained_section.constrained),
    Section("disagreements", "Disagreements", "Disagreements with the teacher", rows_section.disagreements),
    Section("slices", "Slices", "Slices", results_section.slices),
    Section("confusion", "Confusion", "Confusion matrices", errors_section.confusions),
    Section("errors", "Errors", "Precision, recall, error rates", errors_section.binary_errors),
    Section("metrics", "Metrics", "Metrics of the task", metrics_section.task_metrics),
    Section("categories", "Kinds of errors", "Errors by kind", metrics_section.error_categories),
    Section("groups", "Groups", "Error rates by group", groups_section.groups),
    Section("references", "References", "Invalid claims", references_section.references),
    Section("edge-cases", "Edge cases", "Edge cases", _edge_cases),
    Section("fields", "Fields", "Fields of the answer", fields_section.fields),
    Section("distributions", "Labels", "Label distributions", errors_section.label_distributions),
    Section("calibration", "Calibration", "Label probabilities", calibration_section.calibration),
    Section("repeats", "Repeats", "Repeated answers", calibration_section.repeats),
    Section("sets", "Other sets", "Other sets", results_section.other_sets),
    Section("cost", "Cost", "Speed, size, memory", training_section.cost),
    Section("costs", "Prices", "What it costs", costs_section.costs),
    Section("quantization", "Quantization", "Quantization", quantization_section.quantization),
    Section("artifact", "Export", "The exported model", "artifact"),
    Section(
        "distillation",
        "Distillation",
        "What of the teacher reaches the student",
        distillation_section.distillation,
    ),
    Section("audit", "Audit", "Audit of the training", audit_section.audit),
    Section("losses", "Losses", "Loss on held-out chats", _losses),
    Section("training", "Training", "Training", training_section.curves),
    Section("origin", "Method", "Method and provenance", origin_section.origin),
)
