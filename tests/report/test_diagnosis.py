"""What a report says of a run that came to nothing: the case, its reason and its fix."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from helpers.html_page import assert_loads_nothing

from mlx_distill.metrics.intervals import rate
from mlx_distill.report import write_report
from mlx_distill.report.diagnosis import diagnose
from mlx_distill.report.page import render_html


def figures(right: int, valid: int = 100, chosen: int | None = None, **more: Any) -> dict[str, Any]:
    """The metrics of a model that gives the true label and the teacher's on as many of 100 rows."""
    invalid = {"reason": "not JSON: …", "count": 1, "id": "r3", "error": "cut after 12 tokens: not JSON"}
    return {
        "accuracy": rate(right, 100),
        "accuracy_by_distribution": rate(right if chosen is None else chosen, 100),
        "verdict_agreement": rate(right, 100),
        "json_valid": rate(valid, 100),
        "invalid": None if valid == 100 else invalid,
        **more,
    }


def report_of(losses: list[float] | None = None, **models: dict[str, Any]) -> dict[str, Any]:
    series = {"valid_loss": {"step": list(range(len(losses or []))), "value": losses or []}}
    return {
        "metrics": models,
        "majority": {"label": "billing", "value": 0.4},
        "curves": {"teacher": series},
        "teacher_answers": None,
        "task_details": {"label": "queue", "score": None, "score_tolerance": 5.0},
    }


def test_a_good_run_says_nothing() -> None:
    good = report_of(
        [2.0, 0.1],
        teacher=figures(93),
        student_before=figures(0, 3),
        student=figures(92),
        quantized=figures(91),
    )
    assert diagnose(good) == []
    # Already good before: no training could show a difference.
    assert diagnose(report_of([0.1, 0.1], teacher_before=figures(95), teacher=figures(95))) == []


@pytest.mark.parametrize(
    ("report", "problem", "reason", "fix"),
    [
        (
            report_of(teacher_before=figures(55), teacher=figures(52), student=figures(60)),
            "The teacher is no better than before fine-tuning",
            "52.0\u202f% after it and 55.0\u202f% before",
            "teach.epochs",
        ),
        (
            report_of(teacher=figures(38), student=figures(60)),
            "The teacher is no better than the answer billing to every row",
            "40.0\u202f% of the held-out rows",
            "teach.epochs",
        ),
        (
            report_of([2.0, 2.1], teacher=figures(60), student=figures(60)),
            "The validation loss of the teacher did not fall",
            "2.00 at the first validation and 2.10",
            "teach.learning_rate",
        ),
        (
            report_of(teacher=figures(95), student=figures(10, 12)),
            "The answers of the student are mostly invalid: 12.0\u202f% fit the task",
            "row r3: cut after 12 tokens",
            "raise max_answer_tokens",
        ),
        (
            report_of(teacher=figures(95), student=figures(94), quantized=figures(10, 12)),
            "The answers of the quantized student are mostly invalid",
            "not JSON",
            "quantize.mode",
        ),
        (
            report_of(teacher=figures(95), student=figures(55, chosen=99)),
            "The student has 99.0\u202f% of the rows right by the distribution",
            "The queue is known and not spelled",
            "distill.text_weight",
        ),
        (
            report_of(teacher=figures(95), student_before=figures(50), student=figures(48)),
            "The student is no better than before distillation",
            "Same queue as teacher: 48.0",
            "distill.epochs",
        ),
    ],
)
def test_each_case_has_its_reason_and_its_fix(
    report: dict[str, Any], problem: str, reason: str, fix: str
) -> None:
    (entry,) = diagnose(report)
    assert entry["problem"].startswith(problem) and reason in entry["reason"] and fix in entry["fix"], entry


def test_a_student_and_its_quantized_copy_are_one_finding_with_the_reason_once() -> None:
    error = "Additional properties are not allowed ('verdict', 'themes' were unexpected)"
    invalid = {"reason": error.replace("'verdict', 'themes'", "…, …"), "count": 100, "id": "r1"}
    models = {
        name: figures(0, 0, chosen=chosen, invalid={**invalid, "error": error})
        for name, chosen in (("student", 90), ("quantized", 40))
    }
    report = report_of(teacher=figures(95), **models)
    report["task_details"]["properties"] = ["queue", "reason"]
    (entry,) = diagnose(report)
    assert entry["problem"].startswith(
        "The answers of the student and the quantized student are mostly invalid: 0\u202f% and 0\u202f% fit"
    )
    form = "it still answers in the form of another task"
    assert entry["reason"] == f"Most often, as in row r1: {error}; {form}"
    assert "label_probs of analyze have the right queue first in 90.0\u202f% of the rows" in entry["fix"]
    report["task_details"]["properties"] = ["verdict", "queue"]
    assert diagnose(report)[0]["reason"].endswith("were unexpected)")


def test_thinking_that_does_not_end_is_no_question_of_the_longest_answer() -> None:
    error = "cut after 12 tokens: thinking did not end"
    invalid = {"reason": error, "count": 100, "id": "r3", "error": error}
    entry = diagnose(report_of(teacher=figures(0, 0, invalid=invalid), student=figures(95)))[0]
    assert "targets.max_thinking_tokens" in entry["fix"] and "max_answer_tokens" not in entry["fix"]


def test_invalid_models_of_different_reasons_name_both() -> None:
    other = {"reason": "a JSON list", "count": 9, "id": "r8", "error": "a JSON list, not an object"}
    report = report_of(teacher=figures(95), student=figures(0, 0), quantized=figures(0, 0, invalid=other))
    (entry,) = diagnose(report)
    assert "row r3: cut after 12" in entry["reason"]
    assert "of the quantized student, as in row r8: a JSON list, not an object" in entry["reason"]


def test_a_label_is_known_only_where_it_is_clearly_above_the_most_frequent_class() -> None:
    few = report_of(teacher=figures(95), student=figures(0, chosen=45))
    assert not [entry for entry in diagnose(few) if "label_probs" in entry["fix"]]
    clear = report_of(teacher=figures(95), student=figures(0, chosen=60))
    assert [entry for entry in diagnose(clear) if "label_probs" in entry["fix"]]


@pytest.mark.parametrize(("steps", "fix"), [(0, ": teach.epochs or teach.steps,"), (80, ": teach.steps,")])
def test_the_advice_names_the_option_that_has_an_effect(steps: int, fix: str) -> None:
    report = report_of(teacher=figures(38), student=figures(60))
    report["provenance"] = {"recipe": {"teach": {"steps": steps}}}
    assert fix in diagnose(report)[0]["fix"]


def test_control_characters_are_shown_as_escapes() -> None:
    invalid = {"reason": "…", "count": 1, "id": "r1", "error": "queue: 'a\x0e' is not one of"}
    (entry,) = diagnose(report_of(teacher=figures(10, 10, invalid=invalid)))
    assert "a\\u000e'" in entry["reason"]


def test_zeros_are_not_named_where_the_answers_are_invalid_or_another_finding_has_the_cause() -> None:
    invalid = report_of(teacher=figures(95), student=figures(0, 0), quantized=figures(0, 0))
    invalid["metrics"]["teacher"]["verdict_agreement"] = None
    no_better = report_of(teacher=figures(0), student=figures(0), quantized=figures(0))
    for report in (invalid, no_better):
        assert not [entry for entry in diagnose(report) if "Same queue as teacher" in entry["problem"]]


def test_columns_of_zeros_with_valid_answers_are_named() -> None:
    report = report_of(teacher=figures(0), student=figures(0))
    report["majority"] = None
    (entry,) = diagnose(report)
    assert entry["problem"] == "Every model has 0 % in Accuracy and Same queue as teacher"


def test_a_gate_that_was_passed_by_force_is_named() -> None:
    report = report_of(teacher=figures(95), student=figures(94))
    cut = {"count": 9, "id": "r1", "error": "cut after 8 tokens", "text": "{"}
    report["teacher_answers"] = {"rows": 10, "valid": 1, "reasons": {"cut": cut}}
    (entry,) = diagnose(report)
    assert entry["problem"].startswith("Only 1 of 10 answers") and "row r1: cut after 8" in entry["reason"]
    assert "learnt the data’s own text on the others" in entry["problem"]


def test_a_teacher_that_thinks_has_no_targets_of_what_does_not_fit() -> None:
    report = report_of(teacher=figures(95), student=figures(94))
    unended = {"count": 9, "id": "r1", "error": "cut after 8 tokens: thinking did not end", "text": ""}
    kept = {"count": 20, "id": "r2", "error": "no thinking before the answer", "text": "{}"}
    reasons = {"thinking did not end": unended, "thinking cannot be kept": kept}
    report["teacher_answers"] = {"rows": 40, "valid": 10, "left_out": 29, "reasons": reasons}
    (entry,) = diagnose(report)
    assert entry["problem"].endswith("so the student did not learn from the others")
    assert "row r1" in entry["reason"]
    report["teacher_answers"]["valid_again"] = 3
    assert diagnose(report)[0]["problem"].endswith("other samples of 3 of the others and nothing of the rest")
    report["teacher_answers"] = {"rows": 0, "valid": 0, "left_out": 20, "reasons": {"a": kept}}  # text: data
    assert diagnose(report) == []


def test_the_head_of_the_page_and_the_last_lines_have_the_diagnosis(
    run: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    report = copy.deepcopy(run[1])
    assert report["diagnosis"] == [] and "Diagnosis" not in assert_loads_nothing(render_html(report)).text
    entry = {"problem": "The teacher <b> learnt nothing", "reason": "Too few steps", "fix": "more steps"}
    report["diagnosis"] = [entry]
    text = assert_loads_nothing(render_html(report)).text
    assert text.index("The teacher <b> learnt nothing. Too few steps. Fix: more steps.") < text.index(
        "Results"
    )
    result = write_report(tmp_path, report)
    assert result.diagnosis == [entry] and result.to_dict()["diagnosis"] == [entry]
    assert result.lines()[-4:-1] == [
        "problem: The teacher <b> learnt nothing.",
        "  reason: Too few steps.",
        "  fix: more steps.",
    ]
    assert "&lt;b&gt; learnt nothing" in result._repr_html_()


def test_a_report_measures_the_most_probable_label_and_the_most_frequent_class(
    run: tuple[Path, dict[str, Any]],
) -> None:
    _, report = run
    student = report["metrics"]["student_before"]
    assert student["accuracy_by_distribution"]["value"] >= student["accuracy"]["value"]
    assert student["invalid"]["error"] == student["invalid"]["reason"] == "the text ends inside a string"
    counts = [sum(row) for row in student["confusion"]["counts"]]
    assert report["majority"]["value"] == max(counts) / 60
    assert "Right by distribution" in assert_loads_nothing(render_html(report)).text
