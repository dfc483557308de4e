"""What a report reads from a run's folders: sizes, training curves, seeds, stages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from helpers.report_runs import (
    MACHINE,
    MODELS,
    RECIPE,
    VERSIONS,
    make_log,
    make_run,
    make_task,
)

from mlx_distill.report import build_report
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
    paths = make_run(tmp_path, make_task(), models=("teacher",))
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
