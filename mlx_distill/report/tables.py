"""The metrics of a report: which are the main ones, and what each is called."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_distill.evaluate import figures
from mlx_distill.text import words

Report = Mapping[str, Any]
"""What :func:`mlx_distill.report.collect.build_report` returns."""
AGAINST_TEACHER = (
    "verdict_agreement",
    "agreement",
    "score_gap",
    "label_kl_interval",
    "teacher_answer_f1",
    "teacher_exact_match",
)
"""Metrics that compare a model with the teacher."""
SCORES = ("score_mae_interval", "score_gap")
"""Metrics in points of the task's score."""
DECIMALS = {"score_mae_interval": 1, "score_gap": 1, "label_kl_interval": 3}
"""Metrics that are no rates, and how many decimals of them are shown."""


def main_metrics(task: Mapping[str, Any]) -> tuple[str, str]:
    """The metrics by which models are compared: against the truth and against the teacher.

    Args:
        task: The ``task_details`` of a report.

    >>> main_metrics({"label": None})
    ('answer_f1', 'teacher_answer_f1')
    """
    return figures.main_metrics(task["label"])


def metric_titles(task: Mapping[str, Any]) -> dict[str, str]:
    """The title of each metric in tables.

    Args:
        task: The ``task_details`` of a report; may be empty.

    >>> metric_titles({"label": "tone"})["verdict_agreement"]
    'Same tone as teacher'
    """
    label, score = words(task.get("label") or "label"), words(task.get("score") or "score")
    tolerance = task.get("score_tolerance")
    return {
        "accuracy": "Accuracy",
        "accuracy_by_distribution": "Right by distribution",
        "verdict_agreement": f"Same {label} as teacher",
        "agreement": f"…and {score} within {tolerance:g}" if tolerance is not None else f"…and near {score}",
        "json_valid": "Fits the task",
        "exact_match": "Exact match",
        "teacher_exact_match": "Exact match with teacher",
        "answer_f1": "Answer F1",
        "teacher_answer_f1": "Answer F1 to teacher",
        "macro_f1": "Macro F1",
        "score_mae_interval": f"{score.capitalize()} error",
        "score_gap": f"{score.capitalize()} difference from teacher",
        "label_kl_interval": f"KL of {label} from teacher, nats",
        "precision": "Precision",
        "recall": "Recall",
        "f1": "F1",
        "false_positive_rate": "False positives",
        "false_negative_rate": "False negatives",
        "first_token_s": "First token",
        "latency_s": "Median per row",
        "latency_p95_s": "95th percentile",
        "requests_per_second": "Requests per second",
        "items_per_minute": "Rows per minute",
        "tokens_per_second": "Tokens per second",
        "load_s": "Loading",
        "model_memory_gb": "Memory after loading",
        "peak_memory_gb": "Peak memory",
    }
