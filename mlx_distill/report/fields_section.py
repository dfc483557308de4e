"""Section of the report: each field of the answer against the truth and the teacher."""

from __future__ import annotations

from mlx_distill.report.tables import Report

_TITLES = {"exact": "Equal", "f1": "F1", "teacher_exact": "Equal to teacher", "teacher_f1": "F1 to teacher"}


def fields(report: Report) -> dict[str, dict[str, str]]:
    """The section: of each field that other sections do not measure, the label and the score, the measured
    metrics and their titles.
    """
    task, metrics = report["task_details"], report["metrics"]
    return {
        field: {
            key: title
            for key, title in _TITLES.items()
            if any(figures["fields"][field][key] for figures in metrics.values())
        }
        for field in task["properties"]
        if field not in (task["label"], task["score"])
    }
