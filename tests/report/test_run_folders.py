"""A report shows nothing of other models than its own: what an earlier training or recipe has left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.report_runs import RECIPE, make_log, make_run, make_task
from helpers.small_chain import finished

from mlx_distill import pipeline
from mlx_distill.distill.answer_check import FACT
from mlx_distill.progress import NullProgress
from mlx_distill.report import RunReport, build_report, render_html
from mlx_distill.report.run_folders import changed_parents
from mlx_distill.storage import open_partial, publish, read_manifest, stage_key, write_json, write_jsonl

PARENTS = {
    "data": (),
    "teacher_base": (),
    "student_base": (),
    "teacher": ("teacher_base", "data"),
    "targets": ("teacher", "data"),
    "student": ("student_base", "targets", "data"),
    "student_labels": ("student_base", "data"),
    "quantized": ("student", "student_base", "data"),
    "audit": ("teacher_base", "teacher", "student_base", "student", "targets", "data"),
}
RECORDED = {
    "targets": {FACT: {"rows": 10, "valid": 9}},
    "quantized": {"mode": "affine4", "bits_per_weight": 4.5},
}
FIGURES = [
    {"model": model, "set": "general", "id": str(n), "nats": 9.0 + n, "tokens": 3, "bytes": 10}
    for model in ("teacher_before", "teacher")
    for n in range(12)
]
FACTS = {
    "general_text": {"name": "g.txt", "packaged": True, "bytes": 120, "paragraphs": 12, "left_out": 0},
    "rows": {"train": 0, "valid": 0},
}


def write_stage(run: Path, name: str, version: int = 0) -> None:
    """Make a stage from its parents as they are; another version has another content."""
    parents = {}
    for parent in PARENTS[name]:
        manifest = read_manifest(run / parent)
        assert manifest is not None
        parents[parent] = manifest.content
    partial = open_partial(run / name, stage_key(name, 1, {"version": version}, parents))
    write_json(partial / "content.json", {"name": name, "version": version, "parents": parents})
    if name in ("teacher", "student", "student_labels"):
        write_jsonl(partial / "metrics.jsonl", make_log(4, ("text",), 0))
    if name == "audit":
        write_json(partial / "audit.json", FACTS)
        write_json(partial / "parts.json", {"coefficients": {}})
        write_jsonl(partial / "losses.jsonl", FIGURES)
        write_jsonl(partial / "divergences.jsonl", [])
    publish(run / name, name, 1, {"version": version}, parents, RECORDED.get(name, {}))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """All stages of a run with a control, and the evaluations of three models."""
    for name in PARENTS:
        write_stage(tmp_path, name)
    return tmp_path


def report_of(run: Path, *models: str, **evaluate: Any) -> dict[str, Any]:
    other = run / "elsewhere"  # predictions of the models, and files that are not read
    paths = make_run(other, make_task(), models=models or ("teacher", "student"))
    return build_report(run, {**RECIPE, "evaluate": evaluate}, make_task(), paths)


def test_what_belongs_to_the_models_is_shown(run: Path) -> None:
    report = report_of(run, audit_rows=3)
    assert report["left_out"] == []
    assert report["audit"]["bits_per_byte"]["teacher"]["general"]["n"] == 12
    assert report["teacher_answers"] == RECORDED["targets"][FACT]
    assert report["quantization"]["bits_per_weight"] == 4.5
    assert list(report["curves"]) == list(report["training"]) == ["teacher", "student"]
    stages = {entry["folder"] for entry in report["provenance"]["stages"]}
    assert stages == PARENTS.keys() - {"student_labels"}
    assert changed_parents(run, "audit") == changed_parents(run, "nothing") == []


def test_a_control_is_shown_where_it_is_measured(run: Path) -> None:
    report = report_of(run, "teacher", "student", "student_labels")
    assert list(report["curves"]) == ["teacher", "student", "student_labels"]
    assert "student_labels" in {entry["folder"] for entry in report["provenance"]["stages"]}


def test_of_a_student_that_was_trained_anew_neither_audit_nor_quantization_is_shown(run: Path) -> None:
    write_stage(run, "student", version=1)
    report = report_of(run)
    assert report["audit"] is None and report["quantization"] is None
    assert "Audit of the training" not in render_html(report)
    assert {entry["folder"]: entry["reason"] for entry in report["left_out"]} == dict.fromkeys(
        ("quantized", "audit"), "student has changed since it was made"
    )
    line = "audit is not shown: student has changed since it was made (to fix: run mlx-distill evaluate)"
    assert line in str(RunReport(run / "report.json", report))
    assert line in render_html(report)
    stages = {entry["folder"] for entry in report["provenance"]["stages"]}
    assert "student" in stages and not {"audit", "quantized"} & stages
    # Who measures the quantized model has that of the earlier student, whose training is not known.
    report = report_of(run, "teacher", "quantized")
    assert report["quantization"] and list(report["curves"]) == ["teacher"]


def test_of_another_teacher_the_answers_to_the_targets_are_not_counted(run: Path) -> None:
    write_stage(run, "teacher", version=1)
    report = report_of(run, "teacher")
    assert report["teacher_answers"] is None and report["audit"] is None
    assert [entry["folder"] for entry in report["left_out"]] == ["targets", "audit"]
    assert list(report["curves"]) == ["teacher"]
    alone = {**RECIPE, "student": None}  # nobody makes targets for it
    report = build_report(run, alone, make_task(), make_run(run / "own", make_task(), models=("teacher",)))
    assert [entry["folder"] for entry in report["left_out"]] == ["audit"]


def test_an_audit_that_is_not_asked_for_is_not_shown(run: Path) -> None:
    report = report_of(run, audit_rows=0)
    assert report["audit"] is None
    (entry,) = report["left_out"]
    assert entry["folder"] == "audit" and entry["reason"] == "evaluate.audit_rows is 0"


def test_the_same_content_made_again_is_the_same_model(run: Path) -> None:
    write_stage(run, "student")
    assert report_of(run)["audit"] is not None


@pytest.mark.slow
def test_what_is_read_as_it_is_stands_in_the_diagnosis(run_copy: Path) -> None:
    """The evaluations are current: nothing is made, and the models are of other settings."""
    recipe, options = finished() / "recipe.yaml", {"only": "evaluate", "progress": NullProgress()}
    report = pipeline.run(recipe, run_copy, overrides=["targets.top_k=4"], **options)
    assert isinstance(report, RunReport)
    own = [entry for entry in report.diagnosis if "not what the recipe makes now" in entry["problem"]]
    assert [(entry["problem"], entry["reason"]) for entry in own] == [
        ("Targets: not what the recipe makes now", "Since then: top_k was 8, is 4")
    ]
    assert own[0]["fix"].startswith("make it again: mlx-distill targets ")
    assert own[0]["problem"] in report.html.read_text(encoding="utf-8")
    report = pipeline.run(recipe, run_copy, **options)
    assert isinstance(report, RunReport)
    assert not [entry for entry in report.diagnosis if "not what" in entry["problem"]]
