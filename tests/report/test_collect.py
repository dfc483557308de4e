"""The figures of a report: metrics, comparisons, disagreements, goals."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from helpers.html_page import Page, assert_loads_nothing
from helpers.report_runs import (
    MODELS,
    RECIPE,
    make_predictions,
    make_run,
    make_task,
)

from mlx_distill.errors import ConfigError, DataError
from mlx_distill.metrics.intervals import wilson
from mlx_distill.report import build_report, render_html
from mlx_distill.storage import write_jsonl


def test_report_is_plain_json_without_nan(run: tuple[Path, dict[str, Any]]) -> None:
    _, report = run
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_every_model_has_all_metrics(run: tuple[Path, dict[str, Any]]) -> None:
    _, report = run
    assert (report["format"], report["name"], report["task"]) == (1, "try", "colours")
    assert report["main_set"] == "test"
    assert report["sets"] == {"test": 60, "written": 15}
    assert list(report["metrics"]) == list(MODELS)
    for name, figures in report["metrics"].items():
        for key in (
            "accuracy",
            "json_valid",
            "macro_f1",
            "precision",
            "recall",
            "f1",
            "false_positive_rate",
            "false_negative_rate",
        ):
            assert set(figures[key]) - {"classes"} == {"value", "low", "high", "n"}
            assert figures[key]["low"] <= figures[key]["value"] <= figures[key]["high"]
        for key in ("score_mae", "latency_s", "items_per_minute", "peak_memory_gb"):
            assert isinstance(figures[key], float)
        for key in (
            "verdict_agreement",
            "agreement",
            "score_gap",
            "label_kl",
            "disagreements",
            "teacher_confusion",
        ):
            assert (figures[key] is None) == (name == "teacher")
    assert report["metrics"] == report["by_set"]["test"]
    assert report["metrics"]["student"]["peak_memory_gb"] == 0.31
    assert report["controls"] == ["student_labels", "student_text"]


def test_metrics_equal_a_plain_count(run: tuple[Path, dict[str, Any]]) -> None:
    """The report against a loop over the file."""
    folder, report = run
    lines = {}
    for model in ("teacher", "student"):
        text = (folder / "evaluations" / model / "predictions.jsonl").read_text()
        lines[model] = [json.loads(line) for line in text.splitlines()[1:]]
    teacher = {row["id"]: row for row in lines["teacher"]}
    for set_name in ("test", "written"):
        rows = [row for row in lines["student"] if row["set"] == set_name]
        same = near = correct = 0
        for row in rows:
            other = teacher[row["id"]]
            both = row["answer"] and other["answer"] and row["label"] == other["label"]
            same += bool(both)
            near += bool(both and abs(row["score"] - other["score"]) <= 5)
            correct += bool(row["answer"] and row["label"] == row["truth"]["tone"])
        figures = report["by_set"][set_name]["student"]
        for key, hits in (("verdict_agreement", same), ("agreement", near), ("accuracy", correct)):
            low, high = wilson(hits, len(rows))
            assert figures[key] == {"value": hits / len(rows), "low": low, "high": high, "n": len(rows)}
        assert figures["disagreements"] == len(rows) - same


def test_disagreements_are_listed(run: tuple[Path, dict[str, Any]]) -> None:
    _, report = run
    entry = report["disagreements"]["quantized"]
    counts = [report["by_set"][name]["quantized"]["disagreements"] for name in report["sets"]]
    assert entry["of"] == 75
    assert entry["count"] == len(entry["rows"]) == sum(counts)
    for row in entry["rows"]:
        assert row["teacher"]["label"] != row["model"]["label"] or row["model"]["label"] is None


def test_comparisons(run: tuple[Path, dict[str, Any]]) -> None:
    _, report = run
    pairs = [(entry["metric"], entry["first"], entry["second"]) for entry in report["comparisons"]]
    assert pairs[:4] == [
        ("verdict_agreement", "student", "student_before"),
        ("verdict_agreement", "quantized", "student"),
        ("verdict_agreement", "student", "student_labels"),
        ("verdict_agreement", "student", "student_text"),
    ]
    assert {pair[1] for pair in pairs[4:]} == set(MODELS) - {"teacher"}
    gain = report["comparisons"][0]
    student, before = (
        report["metrics"][name]["verdict_agreement"]["value"] for name in ("student", "student_before")
    )
    assert gain["difference"]["value"] == pytest.approx(student - before)
    assert gain["p_value"] < 0.001


@pytest.mark.slow
def test_goals_are_checked_against_the_measured_value(run: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = run
    goals = [
        {"model": "student", "metric": "verdict_agreement", "at_least": 0.5},
        {"model": "student", "metric": "verdict_agreement", "at_least": 1.01},
        {"model": "student", "metric": "latency_s", "at_most": 3},
        {"model": "absent", "metric": "latency_s", "at_most": 3},
    ]
    paths = {name: folder / "evaluations" / name for name in MODELS[:4]}  # folders instead of files
    report = build_report(folder, RECIPE, make_task(), paths, goals=goals)
    assert [goal["met"] for goal in report["goals"]] == [True, False, True, False]
    text = Page(render_html(report)).text
    assert "Student: verdict agreement at least 50 %; measured" in text
    states = [goal["state"] for goal in report["goals"]]
    assert states == ["met", "missed", "met", "not_measured"]
    assert "Control: absent: latency at most 3 s; not measured" in text
    with pytest.raises(ConfigError, match="a goal needs"):
        build_report(folder, RECIPE, make_task(), paths, goals=[{"model": "student"}])


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "predictions.jsonl: empty"),
        ([{"format": 3}], "format 3, and this version reads format 2"),
        ([{"format": 1}], "no predictions"),
        ([{"format": 1}, {"id": "a", "set": "test"}], "predictions.jsonl:2: no field 'fields'"),
    ],
)
def test_errors_in_predictions_name_the_line(
    tmp_path: Path, lines: list[dict[str, Any]], message: str
) -> None:
    write_jsonl(tmp_path / "predictions.jsonl", lines)
    with pytest.raises(DataError, match=re.escape(message)):
        build_report(tmp_path, RECIPE, make_task(), {"student": tmp_path})


def test_no_evaluations_is_an_error_with_a_fix(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="mlx-distill evaluate"):
        build_report(tmp_path, RECIPE, make_task(), {})


def test_a_model_that_missed_a_set_is_left_out_of_it(tmp_path: Path) -> None:
    task = make_task()
    paths = make_run(tmp_path, task, models=("teacher", "student"), sets={"test": 10, "more": 5})
    header, *rows = make_predictions(task, "student", {"test": 10, "more": 5})
    more = [row for row in rows if row["set"] == "more"]
    write_jsonl(paths["student"], [{**header, "set_counts": {"more": 5}}, *more])
    report = build_report(tmp_path, RECIPE, task, paths)
    assert list(report["metrics"]) == ["teacher"]
    assert list(report["by_set"]["more"]) == ["teacher", "student"]
    assert_loads_nothing(render_html(report))
