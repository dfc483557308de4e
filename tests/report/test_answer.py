"""The first line of a report: is the final model as good as the one that it replaces?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.html_page import Page, assert_loads_nothing, page_text
from helpers.report_runs import RECIPE, make_predictions, make_task

from mlx_distill.errors import ConfigError
from mlx_distill.pipeline import run
from mlx_distill.report import RunReport, build_report, render_html
from mlx_distill.report.answer import final_pair
from mlx_distill.storage import write_json, write_jsonl


def make_report(folder: Path, n: int, wrong: dict[str, range], **options: Any) -> dict[str, Any]:
    """A report of models that are right on all rows but those given."""
    paths = {}
    for name, rows in wrong.items():
        header, *lines = make_predictions(make_task(), "teacher", {"test": n})
        for i, line in enumerate(lines):
            others = [label for label in make_task().labels if label != line["truth"]["tone"]]
            label = others[0] if i in rows else line["truth"]["tone"]
            line |= {"label": label, "answer": {**line["truth"], "tone": label}, "error": None}
            line["score"] = float(line["truth"]["points"])
        paths[name] = folder / f"{name}.jsonl"
        write_jsonl(paths[name], [header, *lines])
    return build_report(folder, RECIPE, make_task(), paths, **{"margin": "3pt", **options})


@pytest.mark.parametrize(
    ("n", "teacher", "student", "verdict", "words"),
    [
        (300, range(40), range(10), "better", "The student is better than the teacher"),
        (300, range(12), range(1, 13), "non_inferior", "is as good as the teacher within 3 points"),
        (300, range(12), range(60), "worse", "The student is worse than the teacher"),
        (40, range(4), range(4, 9), "inconclusive", "It is not shown that the student is as good"),
    ],
)
def test_the_answer_is_first_on_page_terminal_and_notebook(
    tmp_path: Path, n: int, teacher: range, student: range, verdict: str, words: str
) -> None:
    report = make_report(tmp_path, n, {"teacher": teacher, "student": student})
    answer = report["answer"]
    gap = (len(teacher) - len(student)) / n
    assert answer["verdict"] == verdict and answer["margin"] == 0.03
    assert answer["difference"]["value"] == pytest.approx(gap) and words in answer["sentence"]
    assert f"n = {n}" in answer["sentence"]
    assert json.loads(json.dumps(answer, allow_nan=False)) == answer
    text = assert_loads_nothing(render_html(report)).text
    assert text.index(answer["sentence"]) < text.index("held-out rows")
    result = RunReport(tmp_path / "report.json", report)
    assert " ".join(str(result).split()).startswith(answer["sentence"])
    assert answer["sentence"] in Page(result._repr_html_()).text
    assert result.answer == result.to_dict()["answer"] == answer
    assert bool(answer["advice"]) == (verdict in ("inconclusive", "worse"))
    if verdict == "inconclusive":
        assert answer["advice"] in text and "more rows" in answer["advice"]
        assert answer["advice"].split(".")[0] in " ".join(str(result).split())


def test_fixed_and_broken_rows_are_counted(tmp_path: Path) -> None:
    wrong = {"teacher": range(6), "student": range(2, 9), "quantized": range(4, 9)}
    report = make_report(tmp_path, 60, wrong)
    facts = report["final_comparison"]
    assert facts["models"] == ["teacher", "quantized"]
    assert facts["counts"] == {"fixed": 4, "broken": 3, "both_right": 51, "both_wrong": 2}
    text = page_text(report)
    assert "4 fixed 3 broken 51 both right 2 both wrong" in text
    section = render_html(report).split('id="comparison"')[1].split("</section>")[0]
    assert section.count('class="margin"') == 1 and section.count('class="zero"') == len(facts["metrics"])
    assert "McNemar mid-p" in section and facts["dataset_sha"][:16] in text


def test_without_a_margin_nothing_is_as_good(tmp_path: Path) -> None:
    report = make_report(tmp_path, 300, {"teacher": range(12), "student": range(1, 13)}, margin=None)
    assert report["answer"]["verdict"] == "inconclusive" and report["answer"]["margin"] is None
    section = render_html(report).split('id="comparison"')[1].split("</section>")[0]
    assert 'class="margin"' not in section


def test_which_models_are_compared(tmp_path: Path) -> None:
    assert final_pair(["teacher", "student_before", "student", "quantized"]) == ("teacher", "quantized")
    assert final_pair(["student_before", "student"]) is None
    report = make_report(tmp_path, 40, {"teacher_before": range(30), "teacher": range(2)})
    assert report["answer"]["sentence"].startswith("The teacher is better than the teacher before tuning")
    alone = make_report(tmp_path, 10, {"student": range(2)})
    assert alone["answer"] is None and alone["final_comparison"] is None
    assert 'class="answer' not in render_html(alone)


def test_a_comparison_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    report = make_report(tmp_path, 40, {"teacher": range(40), "student": range(4)}, margin="5%")
    assert report["answer"] is None and report["metrics"]["student"]["accuracy"]["value"] == 0.9
    found = report["diagnosis"][0]
    assert found["problem"] == "The final model is not compared" and "0" in found["reason"]
    paths = {}
    for name in ("teacher", "student"):
        header, *lines = make_predictions(make_task(), "teacher", {"test": 9})
        paths[name] = tmp_path / f"{name}.jsonl"
        write_jsonl(paths[name], [header, *({**line, "truth": None} for line in lines)])
    untrue = build_report(tmp_path, RECIPE, make_task(), paths, margin="3pt")
    assert untrue["answer"] is None
    assert not any("not compared" in entry["problem"] for entry in untrue["diagnosis"])


def test_models_that_answer_nothing_are_not_as_good(tmp_path: Path) -> None:
    paths = {}
    for name in ("teacher", "student"):
        header, *lines = make_predictions(make_task(), "teacher", {"test": 300})
        none = {"answer": None, "label": None, "score": None, "error": "not JSON"}
        paths[name] = tmp_path / f"{name}.jsonl"
        write_jsonl(paths[name], [header, *({**line, **none} for line in lines)])
    report = build_report(tmp_path, RECIPE, make_task(), paths, margin="3pt")
    assert report["answer"]["verdict"] == "inconclusive"
    assert report["answer"]["sentence"].startswith("Nothing is shown: no answer of the teacher")


def test_rows_drops_and_duplicates_are_counted(tmp_path: Path) -> None:
    statistics = {
        "read": 1000,
        "rows": {"train": 700, "valid": 30, "test": 250},
        "sets": {"test": 200, "written": 50},
        "labels": {split: {"light": 7, "dark": 3} for split in ("train", "valid", "test")},
        "dropped": {
            "duplicate": {"count": 12, "examples": ["rows.jsonl:3 (of rows.jsonl:1)"]},
            "near duplicate of a held-out row": {"count": 5, "examples": ["rows.jsonl:9"]},
            "duplicate of a held-out row": {"count": 3, "examples": ["rows.jsonl:<b>"]},
        },
        "near_duplicates": {"clusters": 4, "rows": 9, "largest": 3},
    }
    (tmp_path / "data").mkdir()
    write_json(tmp_path / "data" / "statistics.json", statistics)
    report = make_report(tmp_path, 40, {"teacher": range(4), "student": range(4)})
    assert report["data"]["read"] == 1000
    text = page_text(report)
    assert "1,000 rows read, 20 left out." in text
    assert "15 with the text of another row and 5 with nearly the text of a held-out row; 8 of these" in text
    assert "4 groups of 9 rows, the largest of 3" in text
    assert "250 test 200, written 50" in text and "rows.jsonl:<b>" in text
    assert "Rows read" not in page_text({**report, "data": None})


def test_slices_stand_by_size_and_small_ones_are_folded(tmp_path: Path) -> None:
    paths = {}
    for name in ("teacher", "student"):
        header, *lines = make_predictions(make_task(), name, {"test": 120})
        for i, line in enumerate(lines):
            line["fields"]["kind"] = "large" if i < 70 else "middle" if i < 110 else "small"
        paths[name] = tmp_path / f"{name}.jsonl"
        write_jsonl(paths[name], [header, *lines])
    section = render_html(build_report(tmp_path, RECIPE, make_task(), paths)).split('id="slices"')[1]
    section = section.split("</section>")[0]
    shown, folded = section.split("<details")
    assert shown.index(">large<") < shown.index(">middle<") and ">small<" not in shown
    assert "1 value of kind with too few rows" in folded and ">small<" in folded


def test_a_margin_that_is_none_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="margin 3 points: neither points nor a share"):
        run("tiny", tmp_path / "run", overrides={"evaluate": {"margin": "3 points"}})
    assert not (tmp_path / "run").exists()
