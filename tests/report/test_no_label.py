"""The report of a task without a label: whole answers and their fields, and nothing that needs a label."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.html_page import assert_loads_nothing
from helpers.report_runs import write_evaluation

from mlx_distill.report import build_report, write_report
from mlx_distill.report.page import render_html
from mlx_distill.storage import write_json
from mlx_distill.tasks.task import Task, parse_task

RECIPE = {"name": "notes", "task": "notes"}
LABEL_METRICS = {"accuracy", "verdict_agreement", "agreement", "macro_f1", "confusion", "label_kl"}


def make_task(properties: dict[str, Any], **more: Any) -> Task:
    raw = {"name": "notes", "system": "", "user": "{text}", "slices": ["kind"]}
    return parse_task({**raw, "schema": {"type": "object", "properties": properties}, **more}, "task")


EXTRACTION = make_task(
    {
        "summary": {"type": "string"},
        "people": {"type": "array", "items": {"type": "string"}},
        "urgency": {"type": "integer"},
    },
    score="urgency",
)
SUMMARY = make_task({"summary": {"type": "string"}})


def predictions(task: Task, model: str, answers: list[dict[str, Any] | None], truth: list[Any]) -> list[Any]:
    rows = []
    for i, (answer, true) in enumerate(zip(answers, truth, strict=True)):
        score = None if answer is None or task.score is None else float(answer[task.score])
        row = {
            "id": f"r{i}",
            "set": "test",
            "fields": {"kind": "ab"[i % 2]},
            "title": None,
            "input": f"text {i}",
        }
        row |= {"truth": true, "text": "..." if answer is None else "{}", "answer": answer}
        row |= {"error": "not JSON" if answer is None else None, "label": None, "score": score}
        row |= {"label_probs": None, "latency_s": 0.5, "prompt_tokens": 9, "tokens": 7}
        rows.append(row)
    header = {"format": 1, "model": model, "task": task.name, "labels": [], "set_counts": {"test": len(rows)}}
    return [{**header, "settings": {}}, *rows]


def report_of(folder: Path, task: Task, models: dict[str, list[Any]], truth: list[Any]) -> dict[str, Any]:
    paths = {}
    for model, answers in models.items():
        lines = predictions(task, model, answers, truth)
        paths[model] = write_evaluation(folder / "evaluations" / model, lines, {"model": model})
    for name in ("teacher_base", "student_base", "teacher", "student"):
        write_json(folder / name / "config.json", {})
    return build_report(folder, RECIPE, task, paths)


def answer(summary: str, people: list[str], urgency: int) -> dict[str, Any]:
    return {"summary": summary, "people": people, "urgency": urgency}


TRUTH = [answer("a red door", ["Ann"], 50), answer("two cats", ["Bo", "Cy"], 20)]
TEACHER = [answer("a red door", ["Ann"], 53), answer("two dogs", ["Bo"], 20)]
STUDENT = [answer("red door", ["ann"], 53), None]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    models: dict[str, list[Any]] = {"teacher": TEACHER, "student": STUDENT}
    return report_of(tmp_path_factory.mktemp("run"), EXTRACTION, models, TRUTH)


def test_what_needs_a_label_is_absent_and_the_fields_are_measured(report: dict[str, Any]) -> None:
    teacher, student = report["metrics"]["teacher"], report["metrics"]["student"]
    assert not LABEL_METRICS & teacher.keys() and not LABEL_METRICS & student.keys()
    assert teacher["exact_match"]["value"] == 0.0 and teacher["json_valid"]["value"] == 1.0
    # The score of the first row is within the tolerance; the lists share one of one and two of three names.
    assert teacher["answer_f1"]["value"] == pytest.approx((1 + (1 / 2 + 2 / 3 + 1) / 3) / 2)
    assert student["answer_f1"]["value"] == pytest.approx((0.8 + 1 + 1) / 3 / 2)
    assert student["teacher_answer_f1"]["value"] == pytest.approx((0.8 + 1 + 1) / 3 / 2)
    assert student["fields"]["people"]["f1"]["value"] == 0.5
    assert student["fields"]["people"]["teacher_exact"]["value"] == 0.0  # "ann" is not "Ann"
    assert student["fields"]["urgency"]["teacher_exact"]["value"] == 0.5
    assert student["fields"]["urgency"]["f1"] is None
    # The invalid answer of the second row has the largest error that it can have, 80 of 100.
    assert student["score_mae"] == (3.0 + 80.0) / 2 and student["score_gap"]["value"] == 0.0
    assert student["json_valid"]["value"] == 0.5 and student["disagreements"] == 2
    assert student["by_slice"]["kind"]["b"]["teacher_answer_f1"]["value"] == 0.0
    assert {entry["metric"] for entry in report["comparisons"]} == {"answer_f1"}
    listed = report["disagreements"]["student"]
    assert listed["count"] == 2 and listed["rows"][0]["id"] == "r1"  # the least similar first


def test_the_page_and_the_table_show_them(report: dict[str, Any], tmp_path: Path) -> None:
    text = assert_loads_nothing(render_html(report)).text
    for words in (
        "Answer F1",
        "Urgency error",
        "Exact match with teacher",
        "F1 to teacher",
        "People",
        "not JSON",
    ):
        assert words in text, words
    for words in ("Accuracy", "Confusion", "None", "KL"):
        assert words not in text, words
    result = write_report(tmp_path, report)
    assert "answer F1" in str(result) and "accuracy" not in str(result)
    assert "answer F1" in result._repr_html_() and result.to_dict()["metrics"]["student"]


def test_a_single_text_and_no_teacher(tmp_path: Path) -> None:
    truth = [{"summary": "a red door"}, None]
    models: dict[str, list[Any]] = {"student": [{"summary": "a red car"}, {"summary": "x"}]}
    report = report_of(tmp_path, SUMMARY, models, truth)
    figures = report["metrics"]["student"]
    assert figures["answer_f1"]["value"] == pytest.approx(2 / 3) and figures["answer_f1"]["n"] == 1
    assert figures["teacher_answer_f1"] is None and figures["exact_match"]["value"] == 0.0
    assert "have an F1 of" in assert_loads_nothing(render_html(report)).text


def test_models_without_a_valid_answer_are_not_compared(tmp_path: Path) -> None:
    none: list[Any] = [None, None]
    models: dict[str, list[Any]] = {"teacher": TEACHER, "student_before": none, "student": none}
    report = report_of(tmp_path, EXTRACTION, models, TRUTH)
    before, *others = report["comparisons"]
    assert (before["second"], before["both"], before["neither"]) == ("student_before", 0, 2)
    text = assert_loads_nothing(render_html(report)).text
    assert text.count("no answer of either model fits the task") == 1 and len(others) == 2
    report = report_of(tmp_path / "teacher", EXTRACTION, models | {"teacher": none}, TRUTH)
    text = assert_loads_nothing(render_html(report)).text
    assert "no answer of the teacher fits the task" in text
