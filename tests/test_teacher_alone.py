"""A recipe without a student ends after teach, and compares the teacher before and after it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from mlx_distill.cli.main import cli
from mlx_distill.errors import ConfigError
from mlx_distill.graph import graph
from mlx_distill.pipeline import run
from mlx_distill.progress import NullProgress
from mlx_distill.recipe import Recipe, load_recipe
from mlx_distill.report import RunReport

RECIPE = {
    "name": "alone",
    "task": {"name": "moderation", "system": "Judge the message. Answer in JSON."},
    "teacher": "asset:models/tiny-qwen3",
    "compute_dtype": "float32",
    "dequantize": True,
    "data": {
        "sources": [
            {"generator": "moderation", "part": "train", "count": 60, "seed": 7},
            {"generator": "moderation", "part": "test", "count": 24, "seed": 8, "split": "test"},
        ],
        "valid_fraction": 0.1,
        "test_fraction": 0,
    },
    "teach": {"steps": 2, "batch_size": 8, "accumulate": 1, "learning_rate": 1e-4},
    "evaluate": {"batch_size": 24, "constrain": False, "audit_rows": 4},
    "goals": [{"model": "teacher", "metric": "accuracy", "at_least": 0.999}],
}


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    path = tmp_path / "alone.yaml"
    path.write_text(yaml.safe_dump(RECIPE), encoding="utf-8")
    return load_recipe(path)


def test_its_stages_end_after_teach(recipe: Recipe) -> None:
    stages = graph(recipe, recipe.load_task())
    evaluations = ["evaluations/teacher_before", "evaluations/teacher"]
    assert [stage.name for stage in stages] == ["data", "teacher_base", "teacher", *evaluations, "audit"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"controls.text": True}, "controls.text: the recipe has no student"),
        (
            {"evaluate.models": ["teacher", "quantized"]},
            "evaluate.models: 'quantized', and the recipe",
        ),
        ({"goals.0.model": "student"}, "goals: a goal of 'student', and the recipe has no student"),
    ],
)
def test_what_needs_a_student_is_refused(recipe: Recipe, overrides: dict[str, object], message: str) -> None:
    changed = load_recipe(recipe, overrides)
    with pytest.raises(ConfigError, match=message):
        graph(changed, changed.load_task())


@pytest.mark.parametrize("command", ["targets", "distill", "quantize"])
def test_a_stage_of_a_student_is_refused_by_name(recipe: Recipe, tmp_path: Path, command: str) -> None:
    for arguments in ({"only": command}, {"from_stage": command}):
        with pytest.raises(ConfigError, match=f"{command}: the recipe 'alone' has no student"):
            run(recipe, tmp_path / "out", progress=NullProgress(), **arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_run_compares_the_teacher_before_and_after(recipe: Recipe, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run(recipe, out, progress=NullProgress())
    assert isinstance(result, RunReport)
    assert list(result.metrics) == ["teacher_before", "teacher"]
    (comparison,) = result.report["comparisons"]
    assert (comparison["first"], comparison["second"]) == ("teacher", "teacher_before")
    assert result.report["goals"][0]["state"] in ("missed", "undecided")
    page = result.html.read_text(encoding="utf-8")
    assert "Before fine-tuning it was" in page and "what is lost there is forgotten" in page
    general = result.report["audit"]["changes"]["teacher"]["general"]
    assert general["n"] == 49 and general["low"] < general["value"] < general["high"]
    assert f"change in bits a byte of general text: teacher {general['value']:+.4f}" in str(result)
    assert result.to_dict()["audit"]["changes"]["teacher"]["general"] == general
    command = ["evaluate", str(tmp_path / "alone.yaml"), "--out", str(out), "--gate"]
    gated = CliRunner().invoke(cli, command)
    assert (gated.exit_code, "1 of 1 goal not met" in gated.output) == (3, True)
    ungoaled = CliRunner().invoke(cli, [*command, "--set", "goals=[]"])
    assert (ungoaled.exit_code, "has no goals" in ungoaled.output) == (2, True)
