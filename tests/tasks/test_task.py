"""A task is a YAML file: what it must have, and what is said where it has it not."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlx_distill.config import keyed, to_mapping
from mlx_distill.errors import ConfigError, DataError
from mlx_distill.tasks.answer import check_answer
from mlx_distill.tasks.references import read_names
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
        ({"schema": schema(enum=["red", ["blue"]])}, "has no enum of two or more strings"),
        ({"positive": ["green"]}, "positive class 'green' is not one of red, blue"),
        ({"score": "height"}, "score field 'height' is not in the schema"),
        ({"score_scale": [0]}, "score_scale: 2 values are needed"),
        ({"score_scale": [100, 0]}, "score_scale: 100 is not below 0"),
        ({"score": "colour"}, "score field 'colour' is of the type string, not a number"),
        ({"open": ["hue"]}, "open: no property 'hue' in the schema"),
        ({"open": ["depth"]}, "open: 'depth' has no enum"),
        ({"open": ["colour"]}, "open: 'colour' is the label"),
        ({"max_answer_tokens": 0}, "max_answer_tokens: 0 is below 1"),
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


def test_an_enum_of_other_things_than_text_is_told_about_quotes() -> None:
    raw = changed(schema=schema(enum=[True, False]), positive=[])
    with pytest.raises(ConfigError, match="no enum of two or more strings") as caught:
        parse_task(raw, "task.yaml")
    assert "quotes (YAML reads yes and no as true and false)" in (caught.value.fix or "")


@pytest.mark.parametrize(
    ("limits", "scale", "is_valid"),
    [
        ({"minimum": 0, "maximum": 100}, [0, 100], True),
        ({"minimum": 0, "maximum": 10}, [0, 100], False),
        ({"minimum": 1, "maximum": 100}, [0, 100], False),
        ({"maximum": 10}, [0, 10], True),
        ({}, [0, 5], True),
        ({"enum": [1, 2]}, [1, 2], True),
        ({"type": ["integer", "null"]}, [0, 5], True),
        ({"type": "array"}, [0, 5], False),
        ({"enum": ["1", "2"]}, [1, 2], False),
    ],
)
def test_a_score_is_a_number_with_the_limits_of_its_scale(
    limits: dict[str, Any], scale: list[int], is_valid: bool
) -> None:
    raw = changed(score_scale=scale)
    raw["schema"]["properties"]["depth"] = limits
    if is_valid:
        assert parse_task(raw, "task.yaml").score_scale == tuple(scale)
        return
    with pytest.raises(ConfigError, match=r"^task\.yaml: .*score") as caught:
        parse_task(raw, "task.yaml")
    assert caught.value.fix


@pytest.mark.parametrize(
    ("properties", "words"),
    [
        (
            {"depth": {"type": "nmber"}},
            "schema.properties.depth.type: not a JSON schema: 'nmber' is not a type",
        ),
        ({"depth": {"minimun": 0}}, "schema.properties.depth: unknown keyword 'minimun'"),
        ({"depth": [1]}, "schema.properties.depth: not a JSON schema"),
        ({"tags": {"items": {"maxLenght": 3}}}, "schema.properties.tags.items: unknown keyword 'maxLenght'"),
        ({"tags": {"anyOf": [{}, {"type": 3}]}}, "schema.properties.tags.anyOf[1]"),
        ({"note": {"pattern": "("}}, "schema.properties.note.pattern: not a JSON schema: '(' is not"),
        ({"note": {"$ref": "#/$defs/none"}}, "schema.properties.note.$ref: '#/$defs/none' is not a part"),
        ({"note": {"enum": [float("nan")]}}, "schema cannot be written as JSON"),
        ({"note": {"enum": ["\ud800"]}}, "schema cannot be written as JSON"),
        ({True: {}}, "schema: the name True is not text"),
    ],
)
def test_a_schema_that_is_none_is_refused_with_the_path(properties: dict[Any, Any], words: str) -> None:
    raw = changed()
    raw["schema"]["properties"].update(properties)
    with pytest.raises(ConfigError) as caught:
        parse_task(raw, "task.yaml")
    assert caught.value.message.startswith("task.yaml: ") and words in caught.value.message
    assert caught.value.fix


def test_a_schema_that_no_answer_can_fit_is_refused() -> None:
    raw = changed()
    raw["schema"] |= {"additionalProperties": False, "required": ["colour", "dept"]}
    with pytest.raises(ConfigError, match=r"schema\.required: 'dept' is not one of the properties") as caught:
        parse_task(raw, "task.yaml")
    assert "did you mean 'depth'?" in (caught.value.fix or "")


def test_keywords_of_other_vocabularies_and_references_are_left_alone() -> None:
    raw = changed()
    raw["schema"] |= {"$defs": {"tag": {"type": "string"}}, "x-origin": "here", "title": "An answer"}
    raw["schema"]["properties"]["tag"] = {"$ref": "#/$defs/tag", "example": "a", "nullable": True}
    assert check_answer({"colour": "red", "tag": 3}, parse_task(raw, "task.yaml").schema) is not None


def test_open_fields_take_any_text_of_the_same_form() -> None:
    closed, task = load_task("music"), load_task({"name": "music", "open": ["themes", "emotion"]})
    answer = {
        "verdict": "RECOMMENDED",
        "score": 95,
        "themes": ["grace"],
        "sentiment": "positive",
        "safety": [],
    }
    answer |= {"emotion": "awe", "scripture_references": []}
    assert check_answer(answer, closed.schema) and check_answer(answer, task.schema) is None
    for wrong in ({"emotion": 3}, {"themes": "grace"}, {"themes": []}, {"sentiment": "awe"}):
        assert check_answer(answer | wrong, task.schema)
    assert closed.schema["properties"]["emotion"]["enum"]  # the packaged task is not touched


@pytest.mark.parametrize(
    ("prompt", "words", "fix"),
    [
        ('A {"label": "a"}.', 'line 1, character 3: \'{"label": "a"}\'', 'A {{"label": "a"}}.'),
        ('{"a": {"b": "{text}"}}', "line 1, character 1: a single {", '{{"a": {{"b": "{text}"}}}}'),
        ('{{"a": {"b": 1}}}', "line 1, character 8", '{{"a": {{"b": 1}}}}'),
        ("Say:\nUse } and {.", "line 2, character 5: a single }", "Use }} and {{."),
        ("{} {text}", "'{}' is not a field", "{{}} {text}"),
        ("{0}", "'{0}' is not a field", "{{0}}"),
        ("{ text }", "'{ text }' is not a field", "write {text};"),
        ("{a.b}", "'{a.b}' looks inside of a field", "such as {a}"),
        ("{a[0]}", "'{a[0]}' looks inside of a field", "such as {a}"),
        ("{a!r}", "'{a!r}': conversions", "write {a}"),
        ("{a:{b}}", "a single {", "{{"),
        ("{a:99999999}", "is not a field", "{{"),
        ("{a: b}", "is not a field", "{{a: b}}"),
        ("As {a, b, c}: {text}", "'{a, b, c}' is not a field", "As {{a, b, c}}: {text}"),
    ],
)
@pytest.mark.parametrize("key", ["system", "user"])
def test_braces_that_are_not_a_field_are_refused_with_the_corrected_line(
    prompt: str, words: str, fix: str, key: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_task(changed(**{key: prompt}), "task.yaml")
    assert caught.value.message.startswith(f"task.yaml: {key}: line") and words in caught.value.message
    assert fix in (caught.value.fix or "")


@pytest.mark.parametrize("key", ["system", "user"])
def test_a_prompt_that_would_hold_the_answer_is_refused(key: str) -> None:
    name = next(iter(TASK["schema"]["properties"]))
    with pytest.raises(ConfigError) as caught:
        parse_task(changed(**{key: f"About {{text}}, answer {{{name}}}."}), "task.yaml")
    assert f"task.yaml: {key}: {{{name}}}" in caught.value.message
    assert f"{{{{{name}}}}}" in (caught.value.fix or "")
    parse_task(changed(**{key: f"About {{text}}, answer {{{{{name}}}}}."}), "task.yaml")


def test_a_prompt_may_show_json_and_format_numbers() -> None:
    task = parse_task(
        changed(system='{{"a": "{thing}"}}', user="{text} {Deep Column} {size:.2f}"), "task.yaml"
    )
    assert task.input_fields == ("thing", "text", "Deep Column", "size")
    row = {"thing": "{x}", "text": "}", "Deep Column": 1, "size": 2}
    assert task.prompt(row) == ('{"a": "{x}"}', "} 1 2.00")
    with pytest.raises(DataError, match=r"size: 'big' cannot be written as {size:\.2f}") as caught:
        task.prompt({**row, "size": "big"})
    assert caught.value.fix


def test_a_prompt_may_list_the_options_of_a_field_of_the_answer() -> None:
    task = parse_task(changed(system="One of {colour:options} for {text}.", user="{text}"), "task.yaml")
    assert task.prompt({"text": "x"})[0] == f"One of {', '.join(task.labels)} for x."
    assert task.input_fields == ("text",) and task.lists_labels
    order = task.labels[::-1]
    turned = task.with_label_order(order)
    assert turned.prompt({"text": "x"})[0] == f"One of {', '.join(order)} for x." and turned.labels == order
    assert not parse_task(TASK, "task.yaml").lists_labels


@pytest.mark.parametrize("name", ["depth", "text", "color"])
def test_options_of_a_field_without_any_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}:options.*no field '{name}' with an enum") as caught:
        parse_task(changed(user=f"{{text}} {{{name}:options}}"), "task.yaml")
    assert "fields with an enum are: colour" in (caught.value.fix or "")


def test_what_is_measured_changes_no_stage_key() -> None:
    task = parse_task(TASK, "task.yaml")
    measured = {
        "positive": ["blue"],
        "metrics": ["accuracy"],
        "error_categories": {"wrong": {"label": "wrong"}},
    }
    assert keyed(parse_task({**TASK, **measured}, "task.yaml")) == keyed(task)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score_threshold": 50}, "score_threshold without score"),
        ({"metrics": [{"field": "x"}]}, r"metrics\[0\]: a metric without a name"),
    ],
)
def test_wrong_keys_of_what_is_measured_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_task({**{key: value for key, value in TASK.items() if key != "score"}, **change}, "task.yaml")


def test_a_task_as_plain_values_is_a_task_again() -> None:
    """Models keep the task that they were trained on in this form."""
    for name in ("music", "moderation"):
        task = load_task(name)
        assert task.folders and parse_task(to_mapping(task), "trained_on.json") == task


@pytest.mark.parametrize(
    ("references", "words", "fix"),
    [
        ({"colours": {"kind": "scripture"}}, "'colours' is no field", "did you mean 'colour'?"),
        ({"colour": {"kind": "scriptures"}}, "no checker 'scriptures'", "did you mean 'scripture'?"),
        ({"colour": ["scripture", {"kind": "vocabulary", "list": "a"}]}, "two checkers", "keep one"),
        ({"depth": {"kind": "vocabulary"}}, "vocabulary without list", "a name a line"),
        ({"colour": {"kind": "vocabulary", "lists": ["a"]}}, "unknown key 'lists'", "did you mean 'list'?"),
        ({"colour": {"kind": "vocabulary", "list": [True]}}, "list: [True]", "in quotes"),
        ({"colour": {"kind": "support", "in": []}}, "in: []", "give texts"),
        ({"colour": {"kind": "scripture", "versification": 3}}, "versification: 3", "file"),
        ({"colour": 3}, "3 is no checker", "{kind: scripture"),
    ],
)
def test_checkers_that_are_none_are_refused(references: dict[str, Any], words: str, fix: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_task({**changed(), "references": references}, "task.yaml")
    assert caught.value.message.startswith("task.yaml: references: ") and words in caught.value.message
    assert fix in (caught.value.fix or "")


def test_files_that_a_task_names_are_beside_it(tmp_path: Path) -> None:
    (tmp_path / "task.yaml").write_text(json.dumps(changed()))
    (tmp_path / "words.txt").write_text("# colours\nred\n\nblue\n")
    task = load_task("task.yaml", tmp_path)
    assert task.file("words.txt") == tmp_path / "words.txt"
    assert read_names(task.file("words.txt")) == ["red", "blue"]
    with pytest.raises(ConfigError, match=r"no file 'word\.txt'"):
        task.file("word.txt")
