"""What a report reads from a run's folders: sizes, training curves, seeds, stages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.report_runs import (
    MACHINE,
    MODELS,
    RECIPE,
    VERSIONS,
    make_log,
    make_predictions,
    make_run,
    make_task,
    write_evaluation,
)

from mlx_distill.report import build_report, provenance, render_html
from mlx_distill.report.origin_section import origin
from mlx_distill.storage import write_jsonl


def test_sizes_count_an_adapter_with_its_base(run: tuple[Path, dict[str, Any]]) -> None:
    _, report = run
    assert report["sizes"]["student"] == {
        "weights_bytes": 30_000,
        "base_bytes": 410_000,
        "total_bytes": 440_000,
        "folder": "student",
    }
    assert report["sizes"]["student_before"]["total_bytes"] == 410_000
    assert report["sizes"]["quantized"]["base_bytes"] == 0
    assert "student_labels" not in report["sizes"]  # has no weights on disk


def test_curves_hold_only_losses_and_are_downsampled(tmp_path: Path) -> None:
    paths = make_run(tmp_path, make_task(), models=("teacher", "student"))
    write_jsonl(tmp_path / "student" / "metrics.jsonl", make_log(1_000, ("label",), 0))
    report = build_report(tmp_path, RECIPE, make_task(), paths)
    assert list(report["curves"]) == ["teacher", "student"]
    assert set(report["curves"]["student"]) == {"loss", "label", "valid_loss", "valid_label"}
    loss = report["curves"]["student"]["loss"]
    assert len(loss["step"]) == len(loss["value"]) <= 400
    assert loss["step"][-1] == 1_000
    assert len(report["curves"]["student"]["valid_loss"]["step"]) == 25
    assert report["training"]["student"] == {
        "steps": 1_000,
        "seconds": 220.0,
        "tokens": 900_000,
        "peak_memory_gb": 0.26,
    }


def test_provenance_comes_from_the_manifests_of_the_evaluations(run: tuple[Path, dict[str, Any]]) -> None:
    _, report = run
    provenance = report["provenance"]
    assert (provenance["machine"], provenance["versions"]) == (MACHINE, VERSIONS)
    assert provenance["seeds"] == {"data.seed": 3, "data.sources.0.seed": 5, "distill.seed": 1}
    assert {entry["folder"] for entry in provenance["stages"]} == {f"evaluations/{name}" for name in MODELS}
    assert all(len(entry["key"]) == 64 and entry["seconds"] == 12.5 for entry in provenance["stages"])


def test_the_path_of_the_recipe_is_not_in_the_report(tmp_path: Path) -> None:
    paths = make_run(tmp_path, make_task(), models=("teacher",))
    report = build_report(tmp_path, {**RECIPE, "base": tmp_path / "secret"}, make_task(), paths)
    assert "secret" not in json.dumps(report)


def test_speed_and_memory_come_from_the_manifests(run: tuple[Path, dict[str, Any]]) -> None:
    _, report = run
    for figures in report["metrics"].values():
        assert (figures["load_s"], figures["model_memory_gb"]) == (1.25, 0.064)
        assert (figures["first_token_s"], figures["requests_per_second"]) == (0.0421, 7319.0)


@pytest.mark.parametrize("speed", [{}, {"load_s": 1.25, "first_token_s": None, "requests_per_second": None}])
def test_what_an_evaluation_did_not_measure_is_none(tmp_path: Path, speed: dict[str, Any]) -> None:
    """Manifests of an older version do not say it; a continued evaluation may have measured nothing."""
    task = make_task()
    lines = make_predictions(task, "teacher", {"test": 8})
    path = write_evaluation(tmp_path / "evaluations" / "teacher", lines, {"model": "teacher"}, speed=speed)
    report = build_report(tmp_path, RECIPE, task, {"teacher": path})
    figures = report["metrics"]["teacher"]
    found = {name: figures[name] for name in provenance.SPEED}
    assert found == dict.fromkeys(provenance.SPEED) | {name: speed[name] for name in speed}
    assert "Requests per second" in render_html(report)


def test_the_method_says_by_what_the_intervals_are_clustered(run: tuple[Path, dict[str, Any]]) -> None:
    _, report = run
    assert origin(report)["method"]["Intervals of rates"] == "Wilson, 95\u202f%"
    name, figures = next(iter(report["metrics"].items()))
    valid = {**figures["json_valid"], "clusters": 12, "few_clusters": True}
    metrics = {**report["metrics"], name: {**figures, "json_valid": valid}}
    details = {**report["task_details"], "cluster": "artist"}
    method = origin({**report, "metrics": metrics, "task_details": details})["method"]
    assert "clustered by artist, 12 clusters; fewer than 20" in method["Intervals of rates"]
