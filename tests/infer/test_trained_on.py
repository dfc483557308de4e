"""A run answers with its newest usable model, and models know the task and the prompts of their training."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.small_chain import RecordedProgress, finished

import mlx_distill as md
from mlx_distill.errors import ConfigError, ModelError
from mlx_distill.models.trained_on import TrainedOn, is_run, newest_model, prompt_notes, read_trained_on
from mlx_distill.storage import read_jsonl
from mlx_distill.tasks.task import load_task

SYSTEM = "Judge it."
USED = "model: {}, the quantized student"


def notes_of(task: str, systems: list[str], trained: tuple[str, ...] | None = (SYSTEM,)) -> str:
    trained_on = TrainedOn(load_task("music"), trained)
    return "\n".join(prompt_notes(trained_on, load_task(task), systems))


def test_the_task_and_prompt_of_the_training_need_no_note() -> None:
    assert notes_of("music", [SYSTEM, SYSTEM]) == ""
    assert notes_of("music", ["any", "prompt"], trained=None) == ""  # the rows had prompts of their own
    assert prompt_notes(None, load_task("music"), ["any"]) == []


def test_another_system_prompt_is_counted_and_quoted() -> None:
    text = notes_of("music", [SYSTEM, "Sort it.", ""])
    assert "2 of 3 items have another system prompt" in text and "'Sort it.', not 'Judge it.'" in text


def test_another_task_is_named() -> None:
    assert "the task 'music', not 'moderation'" in notes_of("moderation", [SYSTEM])


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A copy of a finished run."""
    shutil.copytree(finished() / "out", tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.slow
def test_a_run_means_its_newest_usable_model(run: Path) -> None:
    assert is_run(run) and not is_run(run / "quantized") and not is_run(run / "nothing")
    told: list[str] = []
    assert newest_model(run, told.append) == run / "quantized" and told == [USED.format(run / "quantized")]

    weights = next((run / "quantized").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1])
    assert newest_model(run, told.append) == run / "student"
    assert "passed over" in told[-3] and weights.name in told[-3]
    assert "0% of this model's unconstrained answers fitted" in told[-1]
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    (stage,) = [entry for entry in report["provenance"]["stages"] if entry["folder"] == "student"]
    stage["key"] = "of another training"
    (run / "report.json").write_text(json.dumps(report), encoding="utf-8")
    assert newest_model(run, told.append) == run / "student" and "unconstrained" not in told[-1]

    shutil.rmtree(run / "student")
    assert newest_model(run, told.append) == run / "teacher"
    assert any(note.endswith("teacher, the teacher, since the run has no student yet") for note in told)
    shutil.rmtree(run / "teacher")
    with pytest.raises(ModelError, match="no trained model in this run yet"):
        newest_model(run, told.append)


@pytest.mark.slow
def test_a_quantized_model_of_an_earlier_student_is_passed_over(run: Path) -> None:
    manifest = json.loads((run / "student" / "manifest.json").read_text(encoding="utf-8"))
    metrics = next(name for name in manifest["files"] if name.endswith(".safetensors"))
    manifest["files"][metrics]["sha256"] = "0" * 64  # as of another training
    (run / "student" / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    told: list[str] = []
    assert newest_model(run, told.append) == run / "student"
    assert told[0].endswith("student was made again since")


@pytest.mark.slow
def test_models_of_a_run_know_their_task_and_prompts(run: Path) -> None:
    task = md.load_recipe(finished() / "recipe.yaml").load_task()
    prompts = {row["messages"][0]["content"] for _, row in read_jsonl(run / "data" / "train.jsonl")}
    for name in ("teacher", "student", "quantized"):
        trained_on = read_trained_on(run / name)
        assert trained_on is not None and trained_on.task == task
        assert set(trained_on.system_prompts or ()) == prompts
    (run / "student" / "trained_on.json").unlink()
    assert read_trained_on(run / "student") == TrainedOn(task)  # from the manifest


@pytest.mark.slow
def test_analyze_asks_the_run_in_the_task_of_its_training(run: Path) -> None:
    row = next(row for _, row in read_jsonl(finished() / "rows.jsonl"))
    progress = RecordedProgress()
    (prediction,) = md.analyze(run, None, [row], progress=progress)
    task = load_task(str(finished() / "task.yaml"))
    (same,) = md.analyze(run / "quantized", task, [row], progress=RecordedProgress())
    assert prediction.text == same.text and prediction.prompt_tokens == same.prompt_tokens
    assert progress.notes == [USED.format(run / "quantized")] and progress.tasks[0][:2] == ("analyze", 1)

    other = RecordedProgress()
    md.analyze(run, "music", [{"title": "Rain", "lyrics": "rain on the roof"}], progress=other)
    assert any("the task 'colours', not 'music'" in note for note in other.notes)


@pytest.mark.slow
def test_a_model_that_does_not_know_its_task_needs_one(run: Path) -> None:
    with pytest.raises(ConfigError, match="no record of the task") as caught:
        md.analyze(run / "student_base", None, [{"text": "x"}])
    assert "--task" in str(caught.value.fix)


def test_a_folder_without_a_model_is_not_asked_for_its_task(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no model: neither config"):
        md.analyze(tmp_path, None, [{"text": "x"}])


@pytest.mark.slow
def test_the_command_reads_standard_input_and_counts_invalid_answers(run: Path, tmp_path: Path) -> None:
    rows = [row for _, row in read_jsonl(finished() / "rows.jsonl")][:3]
    long = {**rows[0], "id": "long", "text": "very " * 400}
    command = [sys.executable, "-m", "mlx_distill", "analyze", str(run), "-", "--max-prompt-tokens", "200"]
    command += ["--out", str(tmp_path / "out.jsonl"), "--no-constrain"]
    text = "".join(json.dumps(row) + "\n" for row in [*rows, long])
    result = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    answers = [row for _, row in read_jsonl(tmp_path / "out.jsonl")]
    assert [row["id"] for row in answers] == [*(str(row["id"]) for row in rows), "long"]
    assert "tokens, and at most 200 are read" in answers[-1]["error"] and answers[-1]["text"] == ""
    invalid = sum(row["error"] is not None for row in answers)
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith(f"written to {tmp_path / 'out.jsonl'}: 4 answers, in ")
    assert f"; {invalid} of them without a valid answer (" in last and "prompt too long 1" in last
    assert result.returncode == (invalid == 4)
    assert [path.name for path in tmp_path.glob(".*")] == []  # nothing to continue from
