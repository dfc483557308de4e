"""What a run may replace in its folder, and what it refuses before anything is made."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from helpers.small_chain import finished, write_chain

from mlx_distill import pipeline
from mlx_distill.cli.main import cli
from mlx_distill.errors import FileError
from mlx_distill.models.convert import convert

pytestmark = pytest.mark.slow


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A copy of a finished run that may be changed."""
    shutil.copytree(finished(), tmp_path / "copy")
    return tmp_path / "copy"


@pytest.mark.parametrize("name", ["data", "teacher_base", "teacher", "evaluations/student"])
def test_a_folder_that_no_run_has_written_is_never_replaced(tmp_path: Path, name: str) -> None:
    recipe = write_chain(tmp_path)
    kept = tmp_path / "out" / name / "mails.csv"
    kept.parent.mkdir(parents=True)
    kept.write_text("sender,body\n", encoding="utf-8")
    for extra in ([], ["--dry-run"]):
        result = CliRunner().invoke(cli, ["run", str(recipe), "--out", str(tmp_path / "out"), *extra])
        assert result.exit_code == 1
        assert f"out/{name}: not empty and not written" in result.stderr and "another --out" in result.stderr
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == [kept]


def test_the_folder_of_a_command_alone_is_checked_too(tmp_path: Path) -> None:
    recipe = write_chain(tmp_path)
    (tmp_path / "out").mkdir()
    os.mkfifo(tmp_path / "out" / "data")
    with pytest.raises(FileError, match="out/data: not a folder"):
        pipeline.run(recipe, tmp_path / "out", only="prepare")
    assert (tmp_path / "out" / "data").is_fifo()


def test_a_converted_model_is_not_taken_for_a_stage_nor_a_stage_for_a_converted_model(copied: Path) -> None:
    for name, stage in (("student", "convert"), ("teacher", "teacher")):
        path = copied / "out" / name / "manifest.json"
        raw = json.loads(path.read_text(encoding="utf-8"))
        changed = {**raw, "stage": stage, "key": "another", "recorded": {}}
        path.write_text(json.dumps(changed), encoding="utf-8")
    with pytest.raises(FileError, match="out/student: made by 'convert', not by this stage"):
        pipeline.run(copied / "recipe.yaml", copied / "out")
    with pytest.raises(FileError, match="out/teacher: the stage 'teacher' of a run"):
        convert(copied / "out" / "student_base", copied / "out" / "teacher")


def test_a_source_inside_a_folder_that_the_run_writes_is_refused(copied: Path) -> None:
    rows = copied / "out" / "data" / "train.jsonl"
    sources = {"data.sources": [{"path": str(rows)}]}
    with pytest.raises(FileError, match=r"train\.jsonl: lies in data, which this run writes"):
        pipeline.run(copied / "recipe.yaml", copied / "out", overrides=sources)
    assert rows.is_file()
