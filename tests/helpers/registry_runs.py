"""Finished runs for the registry, made without a training: a packaged tiny model as their quantized student,
and an evaluation with exactly the wrong answers that a test asks for.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from mlx_distill.config import ASSETS
from mlx_distill.data.predictions import write_predictions
from mlx_distill.models.trained_on import write_trained_on
from mlx_distill.records import Prediction
from mlx_distill.storage import open_partial, publish, write_json, write_jsonl
from mlx_distill.tasks.task import Task, parse_task

TASK: Mapping[str, Any] = {
    "name": "colours",
    "system": "Which colour? Answer in JSON.",
    "user": "{text}",
    "label": "colour",
    "positive": ["dark"],
    "group": "who",
    "max_answer_tokens": 12,
    "schema": {
        "type": "object",
        "additionalProperties": False,
        "required": ["colour"],
        "properties": {"colour": {"type": "string", "enum": ["light", "dark"]}},
    },
}
LABELS = ("light", "dark")


def make_task(**changes: Any) -> Task:
    return parse_task({**TASK, **changes}, "task")


def make_run(
    folder: Path,
    *,
    seed: int = 0,
    n: int = 60,
    wrong: Collection[int] = (),
    invalid: Collection[int] = (),
    leaked: Collection[int] = (),
    latency_s: float = 0.1,
    goals: Collection[Mapping[str, Any]] = (),
    **task: Any,
) -> Path:
    """A run with ``data``, ``quantized``, ``evaluations/quantized`` and ``report.json``.

    Args:
        folder: Of the run.
        seed: Another one is another model.
        n: Test rows.
        wrong, invalid: Those whose answer is wrong, or no JSON.
        leaked: Test rows that are also training rows.
        latency_s: Of each answer.
        goals: As they were judged in the report.
        task: Changes of the task.
    """
    asked = make_task(**task)
    rows = [_row(i) for i in range(n)]
    trained = [{**_row(1000 + i), "set": "train"} for i in range(5)] + [rows[i] for i in leaked]
    data = _publish(folder / "data", {}, lambda path: write_jsonl(path / "train.jsonl", trained), "train")

    def model(path: Path) -> None:
        shutil.copytree(ASSETS / "models" / "tiny-qwen3", path, dirs_exist_ok=True)
        (path / "notes.txt").write_text(str(seed))
        write_trained_on(path, asked, trained)

    quantized = _publish(folder / "quantized", {"data": data.content}, model)

    def evaluation(path: Path) -> None:
        answers = [_prediction(row, i, wrong, invalid, latency_s) for i, row in enumerate(rows)]
        write_predictions(path / "predictions.jsonl", "quantized", asked, rows, answers)

    parents = {"quantized": quantized.content, "data": data.content}
    _publish(folder / "evaluations" / "quantized", parents, evaluation, task=asked)
    right = sum(i not in wrong and i not in invalid for i in range(n)) / n
    report = {
        "format": 1,
        "metrics": {"quantized": {"accuracy": {"value": right, "low": 0.0, "high": 1.0, "n": n}}},
        "goals": list(goals),
        "provenance": {"stages": [{"folder": "quantized", "key": quantized.key}]},
    }
    write_json(folder / "report.json", report)
    return folder


def _publish(folder: Path, parents: Mapping[str, str], write: Any, rows: str = "", task: Any = None) -> Any:
    from mlx_distill.config import to_mapping

    partial = open_partial(folder, "")
    write(partial)
    recorded: dict[str, Any] = {"recipe": "colours", "rows": {"train": 5}} if rows else {"recipe": "colours"}
    config = {} if task is None else {"task": to_mapping(task)}
    return publish(folder, folder.name, 1, config, parents, recorded)


def _row(i: int) -> dict[str, Any]:
    answer = {"colour": LABELS[i % 2]}
    return {
        "id": f"r{i}",
        "messages": [
            {"role": "system", "content": TASK["system"]},
            {"role": "user", "content": f"Text number {i}."},
            {"role": "assistant", "content": json.dumps(answer)},
        ],
        "fields": {"who": ["women", "men"][i // 2 % 2]},
        "answer": answer,
        "set": "test",
    }


def _prediction(
    row: Mapping[str, Any], i: int, wrong: Collection[int], invalid: Collection[int], latency_s: float
) -> Prediction:
    truth = row["answer"]["colour"]
    label = LABELS[1 - LABELS.index(truth)] if i in wrong else truth
    answer = None if i in invalid else {"colour": label}
    return Prediction(
        row["id"],
        "no JSON" if i in invalid else json.dumps(answer),
        answer,
        None if i in invalid else label,
        None,
        error="no JSON" if i in invalid else None,
        latency_s=latency_s,
        prompt_tokens=10,
        tokens=5,
        fields=row["fields"],
    )
