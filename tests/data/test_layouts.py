"""Rows as public data sets have them, to the chat that a model is trained on."""

from __future__ import annotations

import datetime
import decimal
import json
import uuid
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mlx_distill.data.json_values import class_decoder, json_row, typed_text
from mlx_distill.data.layouts import CHAT_COLUMNS
from mlx_distill.data.rows import to_example, to_item
from mlx_distill.errors import DataError
from mlx_distill.tasks.task import Task

TEXT = '{"verdict": "yes", "score": 10}'
QUESTION, ANSWER = ("user", "A song"), ("assistant", TEXT)


def chat(row: dict[str, Any], task: Task, **settings: Any) -> list[tuple[str, str]]:
    return [(turn.role, turn.content) for turn in to_example(row, task, "f:1", **settings).messages]


def turns(human: str = "human", gpt: str = "gpt") -> list[dict[str, str]]:
    return [{"from": human, "value": "A song"}, {"from": gpt, "value": TEXT}]


@pytest.fixture
def label_task(task: Task) -> Task:
    """The task with the label alone."""
    properties = {"verdict": task.schema["properties"]["verdict"]}
    return replace(task, schema={"type": "object", "required": ["verdict"], "properties": properties})


@pytest.mark.parametrize("column", CHAT_COLUMNS)
def test_sharegpt_turns_under_each_name(column: str, task: Task) -> None:
    assert chat({column: turns()}, task) == [QUESTION, ANSWER]
    renamed = [{"role": turn["from"], "content": turn["value"]} for turn in turns("user", "assistant")]
    assert chat({column: renamed}, task) == [QUESTION, ANSWER]
    assert chat({column: json.dumps(turns())}, task) == [QUESTION, ANSWER]  # as a CSV file holds them
    example = to_example({column: turns(), "genre": "folk"}, task, "f:1")
    assert dict(example.fields) == {"genre": "folk"}


@pytest.mark.parametrize(
    ("human", "gpt"), [("user", "assistant"), ("human", "chatgpt"), ("human", "bing"), ("human", "bard")]
)
def test_sharegpt_names_of_the_roles(human: str, gpt: str, task: Task) -> None:
    assert chat({"conversations": turns(human, gpt)}, task) == [QUESTION, ANSWER]


def test_sharegpt_with_a_system_prompt_and_a_function(task: Task) -> None:
    call = {"name": "find", "arguments": {"title": "Rain"}}
    called = [
        {"from": "human", "value": "Find it"},
        {"from": "function_call", "value": json.dumps(call)},
        {"from": "observation", "value": "la la"},
        {"from": "gpt", "value": TEXT},
    ]
    own = [{"from": "system", "value": "Judge."}, *turns()]
    assert chat({"conversations": own}, task) == [("system", "Judge."), QUESTION, ANSWER]
    assert chat({"system": "Judge.", "conversations": turns()}, task)[0] == ("system", "Judge.")
    assert chat({"system": "Other.", "conversations": own}, task)[0] == ("system", "Judge.")
    assert chat({"system": "", "conversations": turns()}, task) == [QUESTION, ANSWER]
    assert chat({"system": "Judge.", "prompt": "A song", "completion": TEXT}, task)[0][0] == "system"
    messages = to_example({"conversations": called}, task, "f:1").messages
    assert [message.role for message in messages] == ["user", "assistant", "tool", "assistant"]
    assert messages[2].content == "la la" and messages[1].extra["tool_calls"][0]["function"] == call


def test_a_column_system_that_results_are_sliced_by_is_no_prompt(task: Task) -> None:
    sliced = replace(task, slices=("system",))
    example = to_example({"system": "Windows", "conversations": turns()}, sliced, "f:1")
    assert len(example.messages) == 2 and dict(example.fields) == {"system": "Windows"}


def test_a_prompts_own_field_may_be_called_conversation(task: Task) -> None:
    own = replace(task, user="{conversation}", title=None)
    row = {"conversation": "A: hello", "verdict": "yes", "score": 10}
    assert chat(row, own)[1:] == [("user", "A: hello"), ANSWER]
    assert to_item({"conversation": "A: hello"}, own).messages[1].content == "A: hello"


def test_leading_system_and_developer_turns_are_one(task: Task) -> None:
    roles = [("system", "Reasoning: low"), ("developer", "Judge."), *[QUESTION, ANSWER]]
    row = {"messages": [{"role": role, "content": content} for role, content in roles]}
    assert chat(row, task) == [("system", "Reasoning: low\n\nJudge."), QUESTION, ANSWER]


@pytest.mark.parametrize("content", ["", "  ", None, []])
@pytest.mark.parametrize("role", ["system", "developer"])
def test_an_empty_system_turn_is_none(role: str, content: Any, task: Task) -> None:
    empty = {"role": role, "content": content}
    row = {"messages": [empty, {"role": "user", "content": "A song"}, {"role": "assistant", "content": TEXT}]}
    assert chat(row, task) == [QUESTION, ANSWER]


def test_the_history_of_an_alpaca_row_comes_before_it(task: Task) -> None:
    pairs = [["one", "first"], ["two", "second"]]
    row = {"instruction": "A song", "output": TEXT, "history": pairs, "system": "Judge."}
    earlier = [("user", "one"), ("assistant", "first"), ("user", "two"), ("assistant", "second")]
    assert chat(row, task) == [("system", "Judge."), *earlier, QUESTION, ANSWER]
    assert chat({**row, "history": json.dumps(pairs)}, task)[1:5] == earlier
    assert not to_example(row, task, "f:1").fields
    for empty in ([], None, ""):
        assert chat({**row, "history": empty}, task) == [("system", "Judge."), QUESTION, ANSWER]
    for wrong, reason in (
        ([["one"]], r"history\[0\]: a question and an answer"),
        ([["one", 2]], r"history\[0\]: text"),
        ("one", "history: a list of pairs"),
    ):
        with pytest.raises(DataError, match=reason):
            to_example({**row, "history": wrong}, task, "f:1")


LABEL_ROWS = [
    {"messages": [{"role": "user", "content": "A song"}, {"role": "assistant", "content": " yes\n"}]},
    {"conversations": [{"from": "human", "value": "A song"}, {"from": "gpt", "value": "yes"}]},
    {"instruction": "A song", "input": "", "output": "yes"},
    {"prompt": "A song", "completion": " yes"},
    {"title": "A", "text": "song", "answer": "yes"},
    {"title": "A", "text": "song", "verdict": "yes"},
]


@pytest.mark.parametrize("row", LABEL_ROWS)
def test_an_answer_may_be_the_label_alone(row: dict[str, Any], label_task: Task, task: Task) -> None:
    example = to_example(row, label_task, "f:1")
    assert example.answer == {"verdict": "yes"} and example.messages[-1].content == '{"verdict": "yes"}'
    with pytest.raises(DataError) as caught:
        to_example(row, task, "f:1")
    assert "score" in caught.value.message and caught.value.message.startswith("f:1: the answer does not fit")
    if "verdict" not in row:
        assert "the schema requires score too" in caught.value.message


def test_the_only_field_of_a_task_without_a_label_may_be_a_text_alone(task: Task) -> None:
    schema = {"type": "object", "required": ["summary"], "properties": {"summary": {"type": "string"}}}
    summary = replace(task, label=None, schema=schema)
    example = to_example({"instruction": "Sum up", "output": "It rains."}, summary, "f:1")
    assert example.answer == {"summary": "It rains."}


def test_a_text_that_is_no_label_is_refused(label_task: Task) -> None:
    with pytest.raises(DataError, match="verdict: 'perhaps' is not one of"):
        to_example({"instruction": "A song", "output": "perhaps"}, label_task, "f:1")


@pytest.mark.parametrize(
    ("row", "fix"),
    [
        ({"talk": turns()}, "columns: {messages: talk}"),
        ({"titel": "Rain", "lyrics": "la", "class": "yes"}, "columns: {title: titel, verdict: class}"),
        ({"title": "Rain", "lyrics": "la", "class": "yes"}, "columns: {text: lyrics, verdict: class}"),
        ({"title": "Rain", "text": "la", "output": TEXT}, "columns: {answer: output}"),
        ({"x1": 1, "x2": 2}, "columns: {FIELD: COLUMN}"),
    ],
)
def test_an_unknown_layout_names_the_columns_and_the_nearest_fix(
    row: dict[str, Any], fix: str, task: Task
) -> None:
    with pytest.raises(DataError) as caught:
        to_example(row, task, "f:1")
    assert f"the row has {', '.join(row)}" in caught.value.message and fix in (caught.value.fix or "")
    if "title" not in row:
        assert "conversations" in (caught.value.fix or "")


def test_columns_that_a_row_lacks_are_named_with_the_nearest_one(task: Task) -> None:
    with pytest.raises(DataError) as caught:
        to_example({"name": "Rain", "lyrics": "la"}, task, "f:1", columns={"text": "lyric", "title": "name"})
    assert "no column 'lyric', it has name, lyrics; did you mean 'lyrics'?" in (caught.value.fix or "")


def test_columns_can_be_exchanged_and_used_twice(task: Task) -> None:
    row = {"text": "Rain", "title": "la", "verdict": "yes", "score": 10}
    assert chat(row, task, columns={"title": "text", "text": "title"})[1] == ("user", "Rain\n\nla")
    row = {"lyrics": "la", "verdict": "yes", "score": 10}
    assert chat(row, task, columns={"title": "lyrics", "text": "lyrics"})[1] == ("user", "la\n\nla")


class Picture:
    """A value that has no form as text."""


def test_columns_that_nobody_asks_for_may_hold_anything(task: Task) -> None:
    other = {
        "when": datetime.datetime(2024, 5, 1, 12),
        "day": datetime.date(2024, 5, 1),
        "took": datetime.timedelta(seconds=90),
        "key": uuid.UUID(int=1),
        "price": decimal.Decimal("1.5"),
        "count": decimal.Decimal("2"),
        "gap": float("nan"),
        "far": float("inf"),
        "small": np.float32(0.5),
        "vector": np.arange(2),
        "missing": np.datetime64("NaT"),
        "raw": b"text",
        "image": b"\xff\xd8",
        "picture": Picture(),
        "nested": {"at": datetime.date(2024, 5, 1), "cover": b"\xff", "list": [b"\xff", 1]},
    }
    row = {"title": "A", "text": "song", "verdict": "yes", "score": np.int64(10), **other}
    example = to_example(row, task, "f:1")
    assert example.answer == json.loads(TEXT)
    assert example.fields == {
        "title": "A",
        "when": "2024-05-01T12:00:00",
        "day": "2024-05-01",
        "took": "0:01:30",
        "key": "00000000-0000-0000-0000-000000000001",
        "price": 1.5,
        "count": 2,
        "gap": None,
        "far": "inf",
        "small": 0.5,
        "vector": [0, 1],
        "missing": None,
        "raw": "text",
        "nested": {"at": "2024-05-01", "list": [None, 1]},
    }
    json.dumps(example.fields, allow_nan=False)
    assert to_item(row, task).fields == example.fields
    with pytest.raises(DataError, match="the column 'image' holds bytes, not text"):
        to_item({**row, "text": None}, task)


def test_the_gaps_of_pandas_are_null() -> None:
    import pandas  # datasets needs it, so it is always there

    frame = pandas.DataFrame({"a": [1.0, None], "b": pandas.to_datetime(["2024-05-01", None])})
    rows = frame.astype({"a": "Int64"}).to_dict("records")
    assert json_row(rows[0])[0] == {"a": 1, "b": "2024-05-01T00:00:00"}
    assert json_row(rows[1])[0] == {"a": None, "b": None}


NUMBER = {"dtype": "int64", "_type": "Value"}
LABELS = {"names": ["no", "yes"], "_type": "ClassLabel"}


@pytest.mark.parametrize(
    ("feature", "value", "decoded"),
    [
        (LABELS, 1, "yes"),
        (LABELS, -1, None),
        (LABELS, None, None),
        ({"feature": LABELS, "_type": "List"}, [0, 1], ["no", "yes"]),
        ([LABELS], [1], ["yes"]),
        ({"kind": LABELS, "n": NUMBER}, {"kind": 0, "n": 1}, {"kind": "no", "n": 1}),
        ({"feature": {"kind": LABELS}, "_type": "Sequence"}, {"kind": [0, 1]}, {"kind": ["no", "yes"]}),
        ({"feature": {"kind": LABELS}, "_type": "List"}, [{"kind": 0}], [{"kind": "no"}]),
    ],
)
def test_class_numbers_become_names(feature: Any, value: Any, decoded: Any) -> None:
    decoder = class_decoder(feature)
    assert decoder is not None and decoder(value) == decoded


def test_columns_without_classes_are_not_decoded() -> None:
    assert class_decoder(NUMBER) is None
    assert class_decoder({"feature": NUMBER, "_type": "List"}) is None


@pytest.mark.parametrize(
    ("text", "schema", "value"),
    [
        ("0.95", {"type": "number"}, 0.95),
        (" 95 ", {"type": "integer"}, 95),
        ("95.0", {"type": "integer"}, 95.0),
        ("1e2", {"type": "number"}, 100.0),
        ("nan", {"type": "number"}, "nan"),
        ("1_0", {"type": "integer"}, "1_0"),
        ("high", {"type": "integer"}, "high"),
        ("", {"type": "integer"}, None),
        ("", {"type": "string"}, ""),
        ("7", {"type": "string"}, "7"),
        ("7", {"enum": ["7", "8"]}, "7"),
        ("7", {"enum": [7, 8]}, 7),
        ("7", {"type": ["integer", "null"]}, 7),
        ("null", {"type": ["integer", "null"]}, None),
        ("7", {"anyOf": [{"type": "integer"}, {"type": "null"}]}, 7),
        ("True", {"type": "boolean"}, True),
        ("0", {"type": "boolean"}, False),
        ("yes", {"type": "boolean"}, "yes"),
        ('["a"]', {"type": "array"}, ["a"]),
        ("a, b", {"type": "array"}, "a, b"),
        ('{"a": 1}', {"type": "object"}, {"a": 1}),
        ("7", {"$ref": "#/x"}, "7"),
    ],
)
def test_cells_of_text_are_read_as_the_schema_has_them(text: str, schema: Any, value: Any) -> None:
    read = typed_text(text, schema)
    assert read == value and type(read) is type(value)


def test_an_empty_cell_of_a_text_that_may_lack_is_null() -> None:
    assert typed_text("", {"type": "string"}, required=False) is None


def test_null_is_no_value_of_a_column_that_the_answer_may_lack(task: Task) -> None:
    row = {"title": "A", "text": "song", "verdict": "yes", "score": 10}
    assert to_example({**row, "why": None}, task, "f:1").answer == json.loads(TEXT)
    with pytest.raises(DataError, match="score: None is not of type"):
        to_example({**row, "score": None}, task, "f:1")
    nullable = {**task.schema["properties"], "why": {"type": ["string", "null"]}}
    own = replace(task, schema={**task.schema, "properties": nullable})
    assert to_example({**row, "why": None}, own, "f:1").answer == {**json.loads(TEXT), "why": None}
