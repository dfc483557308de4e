"""A run of a task without a label: its answer is one text, and no stage asks for classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.small_chain import RecordedProgress, write_chain
from helpers.small_run import TASK, rows

from mlx_distill.distill.teacher_cache import TargetReader
from mlx_distill.infer.analyze import analyze
from mlx_distill.pipeline import run
from mlx_distill.storage import read_json, read_jsonl

pytestmark = pytest.mark.slow


def write_notes(folder: Path) -> Path:
    """A recipe for summaries, and its rows with the answer as a column."""
    training = {"steps": 2, "accumulate": 1, "batch_size": 4, "lora_rank": 4}
    targets = {"text": "data", "top_k": 8, "batch_size": 8}
    recipe = write_chain(folder, targets=targets, teach=training, distill=training)
    schema = {"type": "object", "properties": {"summary": {"type": "string"}}, "required": ["summary"]}
    task: dict[str, Any] = {
        **TASK,
        "name": "notes",
        "schema": schema,
        "slices": ["kind"],
        "max_answer_tokens": 32,
    }
    del task["label"]
    (folder / "task.yaml").write_text(yaml.safe_dump(task, sort_keys=False), encoding="utf-8")
    lines = [
        {"id": row["id"], "text": row["text"], "summary": row["text"].split(" at ")[0], "kind": row["colour"]}
        for row in rows(40)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines), encoding="utf-8")
    return recipe


def test_a_task_without_a_label_goes_through_the_whole_run(tmp_path: Path) -> None:
    recipe, out, progress = write_notes(tmp_path), tmp_path / "out", RecordedProgress()
    report = run(recipe, out, progress=progress)
    notes = [note for note in progress.notes if "no label" in note]
    assert notes == ["distill: the task has no label, so distill.label_weight has no effect"]
    assert read_json(out / "data" / "statistics.json")["labels"] == {"train": {}, "valid": {}, "test": {}}
    assert all(row.label_logprobs is None for row in TargetReader(out / "targets"))
    terms = {key for _, row in read_jsonl(out / "student" / "metrics.jsonl") for key in row}
    assert {"text", "token"} <= terms and "label" not in terms
    student = report.metrics["student"]  # type: ignore[union-attr]
    assert student["answer_f1"]["n"] > 3 and "accuracy" not in student
    assert student["by_slice"]["kind"].keys() == {"yes", "no"}
    assert (out / "report.html").is_file()
    found = analyze(out / "student", str(tmp_path / "task.yaml"), ["a red hare crosses bridge 3"])
    assert found[0].label is None and found[0].label_probs is None
