"""What the report says of answers under the grammar of the task."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.html_page import Page
from helpers.report_runs import RECIPE, make_run, make_task

from mlx_distill.metrics.intervals import rate
from mlx_distill.metrics.paired import compare_paired
from mlx_distill.report import build_report, render_html
from mlx_distill.report.diagnosis import diagnose
from mlx_distill.tasks.task import Task


def with_constrained(path: Path, every: int) -> list[dict[str, Any]]:
    """Free answers of the file become invalid, and have a valid one under the grammar but for the first."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[0] |= {"format": 2, "constrained": True}
    for number, line in enumerate(lines[1:]):
        line["constrained"] = None
        if number % every == 0 and line["answer"] is not None:
            kept = {key: line[key] for key in ("text", "answer", "error", "label", "score")}
            if number == 0:
                kept |= {
                    "answer": None,
                    "label": None,
                    "score": None,
                    "error": "cut after 9 tokens: not JSON",
                }
            line |= {"constrained": kept, "answer": None, "label": None, "score": None, "error": "not JSON"}
    path.write_text("\n".join(map(json.dumps, lines)))
    return lines[1:]


@pytest.fixture
def task() -> Task:
    return make_task()


def test_figures_under_the_grammar_equal_a_plain_count(tmp_path: Path, task: Task) -> None:
    paths = make_run(tmp_path, task, models=("teacher", "student"), sets={"test": 60})
    lines = with_constrained(paths["student"], 3)
    teacher = {
        row["id"]: row["label"] for row in map(json.loads, paths["teacher"].read_text().splitlines()[1:])
    }
    report = build_report(tmp_path, RECIPE, task, paths)
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    figures = report["metrics"]["student"]
    others = [{**line, **(line["constrained"] or {})} for line in lines]
    changed = sum(line["constrained"] is not None for line in lines)
    assert figures["constraint"]["changed"] == changed > 15

    def right(rows: list[dict[str, Any]]) -> list[bool]:
        return [row["label"] == row["truth"]["tone"] for row in rows]

    def same(rows: list[dict[str, Any]]) -> list[bool]:
        return [row["label"] is not None and row["label"] == teacher[row["id"]] for row in rows]

    assert figures["json_valid"] == rate(sum(line["answer"] is not None for line in lines), 60)
    assert figures["json_valid_constrained"] == rate(sum(row["answer"] is not None for row in others), 60)
    assert figures["accuracy_constrained"] == rate(sum(right(others)), 60)
    assert figures["verdict_agreement_constrained"] == rate(sum(same(others)), 60)
    assert figures["constraint"]["accuracy"] == compare_paired(right(others), right(lines))
    assert figures["constraint"]["verdict_agreement"] == compare_paired(same(others), same(lines))
    assert figures["constraint"]["invalid"]["error"].startswith("cut after")
    # Nobody measured the teacher's.
    assert report["metrics"]["teacher"]["json_valid_constrained"] is None
    assert report["metrics"]["teacher"]["constraint"] is None


def test_the_page_shows_both_and_what_it_does_not_do(tmp_path: Path, task: Task) -> None:
    paths = make_run(tmp_path, task, models=("teacher", "student"), sets={"test": 60})
    report = build_report(tmp_path, RECIPE, task, paths)
    assert "Free and constrained answers" not in render_html(report)
    with_constrained(paths["student"], 2)
    report = build_report(tmp_path, RECIPE, task, paths)
    text = Page(render_html(report)).text
    assert "Free and constrained answers" in text and "does not make them right" in text
    valid = report["metrics"]["student"]["json_valid_constrained"]["value"]
    assert f"{100 * valid:.1f}" in text and "cut after 9 tokens" in text


def test_a_task_without_a_label_is_compared_by_the_f1_of_its_answers(tmp_path: Path) -> None:
    task = make_task(label=None, positive=[], group=None)
    paths = make_run(tmp_path, make_task(), models=("teacher", "student"), sets={"test": 40})
    with_constrained(paths["student"], 2)
    report = build_report(tmp_path, RECIPE, task, paths)
    figures = report["metrics"]["student"]
    assert figures["answer_f1_constrained"]["value"] > figures["answer_f1"]["value"]
    assert figures["constraint"]["answer_f1"]["difference"]["value"] > 0
    assert "accuracy_constrained" not in figures
    assert "Answer F1" in Page(render_html(report)).text


def test_the_diagnosis_of_invalid_answers_says_what_the_grammar_would_give() -> None:
    figures = {
        "accuracy": rate(10, 100),
        "accuracy_by_distribution": rate(10, 100),
        "verdict_agreement": rate(10, 100),
        "json_valid": rate(12, 100),
        "json_valid_constrained": rate(99, 100),
        "accuracy_constrained": rate(71, 100),
        "invalid": {"reason": "not JSON", "count": 1, "id": "r3", "error": "not JSON"},
    }
    report = {
        "metrics": {"student": figures},
        "majority": None,
        "curves": {},
        "teacher_answers": None,
        "task_details": {"label": "tone", "score": None, "score_tolerance": None},
    }
    assert "99.0 % of them fit then, with Accuracy 71.0 %" in diagnose(report)[0]["fix"].replace(
        "\u202f", " "
    )
    figures["json_valid_constrained"] = rate(20, 100)  # most are cut there too
    assert "constrains" not in diagnose(report)[0]["fix"]
