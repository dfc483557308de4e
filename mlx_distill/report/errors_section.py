"""Sections of the report: error rates, confusion matrices, label distributions."""

from __future__ import annotations

from typing import Any

from mlx_distill.report.tables import Report, metric_titles
from mlx_distill.run_models import STUDENTS
from mlx_distill.text import words


def binary_errors(report: Report) -> dict[str, str] | None:
    """The section of precision, recall, F1 and error rates: their titles, where the task has positive
    classes.
    """
    task = report["task_details"]
    if not task["positive"]:
        return None
    titles = metric_titles(task)
    keys = ("precision", "recall", "f1", "false_positive_rate", "false_negative_rate")
    return {key: titles[key] for key in keys}


def confusions(report: Report) -> dict[str, Any] | None:
    """The section of confusion matrices: the teacher against the truth, each student against the teacher.

    The others are folded. None for a task without a label.
    """
    if not report["task_details"]["label"]:
        return None
    metrics = report["metrics"]
    shown: list[dict[str, Any]] = []
    folded: list[dict[str, Any]] = []
    for name, figures in metrics.items():
        if figures["teacher_confusion"]:
            matrix = {"model": name, "reference": "teacher", "confusion": figures["teacher_confusion"]}
            (shown if name in STUDENTS else folded).append(matrix)
        matrix = {"model": name, "reference": "truth", "confusion": figures["confusion"]}
        (shown if name == "teacher" or "teacher" not in metrics else folded).append(matrix)
    return {"shown": shown, "folded": folded}


def label_distributions(report: Report) -> dict[str, Any] | None:
    """The section of each model's label distribution, and of the KL divergence of its label probabilities."""
    metrics, labels = report["metrics"], report["task_details"]["labels"]
    if not labels:
        return None
    names = [(f"l{i % 8}", words(label)) for i, label in enumerate(labels)]
    with_invalid = [*names, ("invalid", "invalid")]
    truth = [sum(row) for row in next(iter(metrics.values()))["confusion"]["counts"]]
    models = {}
    for model, figures in metrics.items():
        totals = [sum(column) for column in zip(*figures["confusion"]["counts"], strict=True)]
        models[model] = {
            "parts": [(*name, count) for name, count in zip(with_invalid, totals, strict=True)],
            "kl": figures.get("label_kl_interval"),
        }
    return {
        "legend": with_invalid,
        "truth": [(*name, count) for name, count in zip(names, truth, strict=True)] if sum(truth) else None,
        "models": models,
    }
