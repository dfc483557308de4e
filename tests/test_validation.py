"""The cross-validation of a recipe, end to end on tiny models."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from helpers.html_page import assert_loads_nothing
from helpers.small_chain import RecordedProgress
from helpers.small_run import write_recipe

from mlx_distill.cli import cli
from mlx_distill.data.predictions import read_predictions
from mlx_distill.errors import ConfigError, Interrupted
from mlx_distill.runtime import StopFlag
from mlx_distill.storage import read_manifest
from mlx_distill.text import size
from mlx_distill.validation import ValidationPlan, validate

_TEACH = {"steps": 2, "accumulate": 1, "batch_size": 4, "lora_rank": 4, "evaluate_every": 0}


class StoppingProgress(RecordedProgress):
    """Sets a flag when a task of this name begins."""

    def __init__(self, name: str, flag: StopFlag) -> None:
        super().__init__()
        self.name, self.flag = name, flag

    @contextmanager
    def task(self, name: str, total: float | None = None, unit: str = "", start: float = 0) -> Iterator[Any]:
        if self.name in name:
            self.flag.set = True
        with super().task(name, total, unit, start) as bar:
            yield bar


@pytest.mark.slow
def test_a_cross_validation_is_resumed_and_shares_its_conversions(folder: Path) -> None:
    recipe = write_recipe(folder, teach=_TEACH)
    settings: dict[str, Any] = {"folds": 2, "models": ["teacher"]}
    settings |= {"learning_curve": True, "overrides": ["evaluate.constrain=false", "data.sources.0.count=24"]}
    flag, out = StopFlag(), folder / "cv"
    stopping = StoppingProgress("fold 2 (2 of 5): teach", flag)
    with pytest.raises(Interrupted):
        validate(recipe, out, **settings, progress=stopping, stop=flag)
    assert not (out / "validation.json").exists()
    finished = read_manifest(out / "fold-1-of-2" / "teacher")
    assert any("5 trainings" in note and "teach on 3 to 11 rows" in note for note in stopping.notes)
    assert any("not known before the first fold" in note for note in stopping.notes)
    assert any("left, as fold 1 took" in note for note in stopping.notes)

    progress = RecordedProgress()
    result = validate(recipe, out, **settings, progress=progress)
    assert read_manifest(out / "fold-1-of-2" / "teacher") == finished
    assert sum("convert" in name for name, _, _ in stopping.tasks + progress.tasks) == 1
    weights = {path.stat().st_ino for path in out.glob("fold-*/teacher_base/*.safetensors")}
    assert len(weights) == 1 and len(list(out.glob("fold-*/teacher_base"))) == 5

    header, rows = read_predictions(out / "predictions" / "teacher.jsonl")
    assert header["folds"] == 2 and len({row["id"] for row in rows}) == len(rows) == 24
    report = json.loads((out / "validation.json").read_text())
    assert report["figures"]["teacher"]["estimate"]["n"] == 24
    assert [fold["n"] for fold in report["figures"]["teacher"]["folds"]] == [12, 12]
    assert [point["share"] for point in report["learning_curve"]["points"]] == [0.25, 0.5, 0.75, 1.0]
    page = assert_loads_nothing((out / "validation.html").read_text(encoding="utf-8"))
    assert "each of 24 rows answered by a model that had not seen it" in page.text
    assert result.lines()[-1] == f"page: {out / 'validation.html'}"  # type: ignore[operator]

    again = validate(recipe, out, **settings, dry_run=True)
    assert isinstance(again, ValidationPlan) and again.seconds == 0
    assert again.trainings[0]["done"] == again.trainings[0]["runs"] == 5


def test_a_dry_run_says_what_it_costs_and_writes_nothing(folder: Path) -> None:
    recipe = write_recipe(folder, teach={**_TEACH, "steps": 0, "epochs": 3})
    plan = validate(recipe, folder / "cv", folds=4, dry_run=True, overrides={"teach.batch_size": 2})
    assert isinstance(plan, ValidationPlan) and not (folder / "cv").exists()
    text = "\n".join(plan.lines)
    assert "40 rows in 4 folds" in text and "10 to test on" in text
    assert "4 trainings: teach on 28 rows, about 42 steps each" in text
    assert "answers: teacher 40 rows" in text and plan.seconds is None
    assert "memory" not in text


def test_a_dry_run_says_what_student_and_live_teacher_take(folder: Path) -> None:
    recipe = write_recipe(folder, distill={"teacher": "live"})
    plan = validate(recipe, folder / "cv", folds=2, dry_run=True, models=["student"])
    assert isinstance(plan, ValidationPlan) and plan.memory is not None
    assert f"memory: at least {size(plan.memory)}, student and live teacher" in plan.lines


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"folds": 1}, "1 fold"),
        ({"models": ["teachr"]}, "no model 'teachr'"),
        ({"models": ["student"], "learning_curve": True}, "that of the teacher"),
        ({"learning_curve": "some"}, "learning_curve is 'some'"),
    ],
)
def test_what_cannot_be_validated_is_refused(folder: Path, settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        validate(write_recipe(folder), folder / "cv", **settings)


def test_a_gate_without_a_goal_of_these_models_is_refused_before_anything_is_trained(folder: Path) -> None:
    goal = {"model": "student", "metric": "accuracy", "at_least": 0.5}
    recipe = write_recipe(folder, goals=[goal])
    asked = ["validate", str(recipe), "--out", str(folder / "cv"), "--gate", "--dry-run"]
    result = CliRunner().invoke(cli, asked)
    assert result.exit_code == 2 and "has no goals for teacher" in result.output
    assert not (folder / "cv").exists()
    assert CliRunner().invoke(cli, [*asked, "--models", "student"]).exit_code == 0
