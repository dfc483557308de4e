"""A task is a YAML file: what it must have, and what is said where it has it not."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlx_distill.errors import ConfigError, DataError
from mlx_distill.tasks.task import load_task, parse_task

TASK: dict[str, Any] = {
    "name": "colours",
    "system": "Which colour has {thing}?",
    "user": "{text} ({thing})",
    "label": "colour",
    "score": "depth",
    "positive": ["red"],
    "schema": {
        "type": "object",
        "properties": {"colour": {"type": "string", "enum": ["red", "blue"]}, "depth": {"type": "number"}},
    },
}


def changed(**changes: Any) -> dict[str, Any]:
    return {key: value for key, value in {**copy.deepcopy(TASK), **changes}.items() if value is not ...}


def schema(**label: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"colour": label, "depth": {}}}


@pytest.mark.parametrize("name", ["music", "moderation"])
def test_the_packaged_tasks_are_complete(name: str) -> None:
    task = load_task(name)
    assert task.name == name and len(task.labels) >= 2 and task.input_fields
    assert set(task.positive) < set(task.labels)
    assert (
        task.schema["required"] == list(task.schema["properties"])
        and task.schema["additionalProperties"] is False
    )
    assert (
        next(iter(task.schema["properties"])) == task.label
    )  # the label's distribution is read where nothing else was said yet


def test_the_prompt_is_filled_from_the_row() -> None:
    task = parse_task(TASK, "task.yaml")
    assert task.labels == ("red", "blue") and task.input_fields == ("thing", "text")
    assert task.prompt({"thing": "fire", "text": " it {burns} ", "more": 1}) == (
        "Which colour has fire?",
        "it {burns}  (fire)",
    )
    for row in ({"thing": "fire"}, {"thing": "fire", "text": None}):
        with pytest.raises(DataError, match="no field 'text'") as caught:
            task.prompt(row)
        assert "thing, text" in (caught.value.fix or "")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lable": "colour"}, "unknown key 'lable'"),
        ({"label": ..., "positive": ["red"]}, "positive without label"),
        ({"label": None, "positive": [], "group": "side"}, "group without label"),
        ({"schema": "text"}, "schema: a mapping is needed"),
        ({"schema": {"type": "array"}}, "schema is not an object with properties"),
        ({"schema": {"type": "object"}}, "schema is not an object with properties"),
        ({"label": "hue"}, "label field 'hue' has no enum"),
        ({"schema": schema(type="string")}, "label field 'colour' has no enum"),
        ({"schema": schema(enum=["red"])}, "has no enum of two or more strings"),
        ({"schema": schema(enum=["red", "red"])}, "has no enum of two or more strings"),
        ({"schema": schema(enum=["red", 1])}, "has no enum of two or more strings"),
        ({"positive": ["green"]}, "positive class 'green' is not one of red, blue"),
        ({"score": "height"}, "score field 'height' is not in the schema"),
        ({"score_scale": [0]}, "score_scale: 2 values are needed"),
    ],
)
def test_an_invalid_task_is_refused_with_file_and_fix(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_task(changed(**changes), "task.yaml")
    assert caught.value.message.startswith("task.yaml") and words in caught.value.message and caught.value.fix


def test_a_task_is_loaded_by_name_or_file_with_overrides(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(TASK), encoding="utf-8")
    assert load_task("mine.yaml", tmp_path) == load_task(str(tmp_path / "mine.yaml")) == parse_task(TASK, "x")
    assert load_task({"name": "mine.yaml", "max_answer_tokens": 9}, tmp_path).max_answer_tokens == 9
    short = load_task({"name": "moderation", "system": "Judge."})
    assert short.system == "Judge." and short.schema == load_task("moderation").schema
    for spec in ("nope", "", {"system": "x"}):
        with pytest.raises(ConfigError, match="no task") as caught:
            load_task(spec)
        assert "moderation, music" in (caught.value.fix or "")


def test_a_task_without_a_label_has_no_classes() -> None:
    schema = {"type": "object", "properties": {"summary": {"type": "string"}}}
    raw = {"name": "notes", "system": "", "user": "{text}", "schema": schema}
    task = parse_task(raw, "task.yaml")
    assert task.label is None and task.labels == ()
