"""A whole run through the entry point: output, interruption, and stages that are current."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from helpers.small_run import write_recipe

from mlx_distill.cli import cli

pytestmark = pytest.mark.slow

FOLDERS = [
    "data",
    "evaluations",
    "quantized",
    "student",
    "student_base",
    "targets",
    "teacher",
    "teacher_base",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A recipe that has been run once, and the result of the command."""
    from click.testing import CliRunner

    folder = tmp_path_factory.mktemp("run")
    recipe = write_recipe(folder)
    result = CliRunner().invoke(cli, ["run", str(recipe), "--out", str(folder / "out")])
    return recipe, result


def test_a_run_shows_its_progress_and_ends_with_the_report(finished: tuple[Path, Any]) -> None:
    recipe, result = finished
    out = recipe.parent / "out"
    assert result.exit_code == 0, result.output
    assert sorted(p.name for p in out.iterdir() if p.is_dir()) == FOLDERS
    assert result.stdout.splitlines()[-1] == f"report: {out / 'report.html'}"
    for stage in ("prepare", "convert", "teach", "targets", "distill", "quantize", "evaluate"):
        assert f"\n{stage}" in "\n" + result.stderr
    assert "Traceback" not in result.output


def test_stages_that_are_current_are_not_made_again(runner: Any, finished: tuple[Path, Any]) -> None:
    recipe, _ = finished
    out = recipe.parent / "out"
    before = {p: p.stat().st_mtime_ns for p in out.rglob("manifest.json")}
    began = time.perf_counter()
    result = runner.invoke(cli, ["run", str(recipe), "--out", str(out), "--json"])
    assert result.exit_code == 0, result.output
    assert {p: p.stat().st_mtime_ns for p in out.rglob("manifest.json")} == before
    assert time.perf_counter() - began < 20
    report = json.loads(result.stdout)
    assert {"teacher", "student_before", "student", "quantized"} <= set(report["metrics"])
    rate = report["metrics"]["student"]["verdict_agreement"]
    assert rate["low"] <= rate["value"] <= rate["high"]
    assert rate["n"] == 8


def test_a_changed_setting_makes_only_what_follows_from_it(runner: Any, finished: tuple[Path, Any]) -> None:
    recipe, _ = finished
    arguments = [
        "run",
        str(recipe),
        "--out",
        str(recipe.parent / "out"),
        "--dry-run",
        "--json",
        "--set",
        "distill.learning_rate=1e-4",
    ]
    plan = json.loads(runner.invoke(cli, arguments).stdout)
    states = {Path(stage["writes"]).name: stage["state"] for stage in plan["stages"]}
    for name in ("data", "teacher_base", "student_base", "teacher", "targets"):
        assert states[name] == "current"
    for name in ("student", "quantized"):
        assert states[name] != "current"


def test_one_stage_alone(runner: Any, finished: tuple[Path, Any]) -> None:
    recipe, _ = finished
    result = runner.invoke(cli, ["quantize", str(recipe), "--out", str(recipe.parent / "out")])
    assert result.exit_code == 0, result.output
    assert "quantized: current" in result.stderr


def test_ctrl_c_saves_and_the_same_command_continues(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    command = [
        sys.executable,
        "-m",
        "mlx_distill",
        "run",
        str(recipe),
        "--out",
        str(tmp_path / "out"),
        "--set",
        "teach.steps=100",
    ]
    command += ["--set", "evaluate.models=[student]", "--set", "teach.evaluate_every=0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        seen: list[str] = []
        for line in process.stderr:
            seen.append(line)
            if line.startswith("teach:"):
                time.sleep(0.5)
                process.send_signal(signal.SIGINT)
                break
        errors, output = process.stderr.read(), process.stdout.read() if process.stdout else ""
        assert process.wait(timeout=60) == 130, "".join(seen) + errors
    assert output == ""
    assert "Traceback" not in errors
    assert errors.splitlines()[-2].startswith("error:")
    assert errors.splitlines()[-1].startswith("fix:")
    assert not (tmp_path / "out" / "teacher").exists()
    again = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stderr
    assert "data: current" in again.stderr
    assert (
        json.loads((tmp_path / "out" / "teacher" / "manifest.json").read_text(encoding="utf-8"))["recorded"][
            "resumed"
        ]
        > 0
    )
    assert again.stdout.splitlines()[-1].startswith("report: ")
