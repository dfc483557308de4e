"""What a turn holds besides its text is shown to the model or refused, never dropped."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mlx_distill.data.rows import chat_digest, from_row, to_example, to_item, to_row
from mlx_distill.errors import DataError
from mlx_distill.records import Message
from mlx_distill.tasks.task import Task

ANSWER = '{"verdict": "yes", "score": 10}'
USER = {"role": "user", "content": "A song"}
LAST = {"role": "assistant", "content": ANSWER}
CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"q": 1}'}}
TOOLS = [{"type": "function", "function": {"name": "look"}}]


def turns(*middle: dict[str, Any], last: dict[str, Any] = LAST, **row: Any) -> dict[str, Any]:
    return {"messages": [USER, *middle, last], **row}


def with_turn(**assistant: Any) -> dict[str, Any]:
    return turns({"role": "assistant", **assistant}, USER)


def messages(row: dict[str, Any], task: Task) -> tuple[Message, ...]:
    example = to_example(row, task, "f:1")
    assert from_row(json.loads(json.dumps(to_row(example, "train")))) == example
    assert to_item(row, task).messages == example.messages[:-1]
    return example.messages


@pytest.mark.parametrize(
    ("keys", "trained"),
    [
        ({}, True),
        ({"weight": 1}, True),
        ({"weight": 0}, False),
        ({"weight": 0.0}, False),
        ({"train": False}, False),
        ({"training": False}, False),
        ({"training": True, "weight": None}, True),
        ({"training": True, "weight": 0}, False),
    ],
)
def test_a_turn_of_weight_0_is_marked(keys: dict[str, Any], trained: bool, task: Task) -> None:
    chat = messages(with_turn(content="no", **keys), task)
    assert [message.trained for message in chat] == [True, trained, True, True]
    prepared = to_row(to_example(with_turn(content="no", **keys), task, "f:1"), "train")
    assert ("weight" in prepared["messages"][1]) == (not trained)


def test_an_answer_of_weight_0_is_an_error_and_no_obstacle_to_answer_again(task: Task) -> None:
    row = turns(last={**LAST, "weight": 0})
    with pytest.raises(DataError, match="f:1: the last turn, which is the answer, is not to be trained"):
        to_example(row, task, "f:1")
    assert to_item(row, task).messages == (Message("user", "A song"),)


def test_calls_tools_and_thinking_are_kept(task: Task) -> None:
    call = {**CALL, "function": {"name": "look", "arguments": {"q": 1}}}  # a text of JSON becomes an object
    row = turns(
        {"role": "assistant", "content": "Let me look.", "tool_calls": [CALL], "thinking": "Hm."},
        {"role": "tool", "tool_call_id": "c1", "name": "look", "content": "42"},
        tools=TOOLS,
    )
    assert messages(row, task) == (
        Message("user", "A song", extra={"tools": TOOLS}),
        Message("assistant", "Let me look.", extra={"tool_calls": [call], "reasoning_content": "Hm."}),
        Message("tool", "42", extra={"tool_call_id": "c1", "name": "look"}),
        Message("assistant", ANSWER),
    )
    assert messages({**row, "tools": json.dumps(TOOLS)}, task)[0].extra == {"tools": TOOLS}
    old = with_turn(content=None, function_call=CALL["function"])
    assert messages(old, task)[1].extra["tool_calls"] == [{"type": "function", "function": call["function"]}]


def test_tools_of_a_turn_are_those_of_the_row(task: Task) -> None:
    system = {"role": "system", "content": "Judge.", "tools": json.dumps(TOOLS)}
    developer = {"role": "developer", "content": "Kindly."}
    for extra in ({}, {"tools": TOOLS}):
        row = {"messages": [system, developer, USER, LAST], **extra}
        assert messages(row, task)[0] == Message("system", "Judge.\n\nKindly.", extra={"tools": TOOLS})
    late = {"messages": [USER, {"role": "assistant", "content": "no"}, {**USER, "tools": TOOLS}, LAST]}
    assert [m.extra for m in messages(late, task)] == [{"tools": TOOLS}, {}, {}, {}]
    with pytest.raises(DataError, match="the row and its turns have different tools"):
        to_example({"messages": [system, USER, LAST], "tools": [*TOOLS, *TOOLS]}, task, "f:1")


def test_the_id_of_a_chat_depends_on_all_of_it_and_not_on_how_plain_turns_are_kept() -> None:
    plain = [Message("user", "a"), Message("assistant", "b")]
    # As it always was: ids of prepared rows must not change.
    assert chat_digest(plain)[:16] == "c99a374cab27ed14"
    other = [Message("user", "a", extra={"tools": TOOLS}), Message("assistant", "b")]
    third = [Message("user", "a"), Message("assistant", "b", trained=False)]
    assert len({chat_digest(chat) for chat in (plain, other, third)}) == 3


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (with_turn(content="no", weight=0.5), r"messages\[1\]: weight: 0.5 is neither 0 nor 1"),
        (with_turn(content="no", weight="0"), r"messages\[1\]: weight: '0' is neither"),
        (with_turn(content="no", training_detail=[{"train": False}]), "training_detail: cannot be shown"),
        (with_turn(content="no", images=["a.png"]), "images: cannot be shown"),
        (with_turn(content="no", thinking="a", reasoning_content="b"), "and thinking differ"),
        (with_turn(content="no", thinking=["a"]), "thinking: text is needed"),
        (with_turn(content="no", tool_calls="look"), "tool_calls: a list of objects"),
        (with_turn(content="no", tool_calls=[{"id": "c"}]), "without the function's name"),
        (with_turn(content=None), "content: text is needed, not None"),
        (turns({**USER, "training": True}, LAST, USER), "only the assistant's turns can be trained"),
        (turns({**USER, "thinking": "hm"}, LAST, USER), "reasoning_content in a turn of the user"),
        (turns(last={**LAST, "tool_calls": [CALL]}), "tool_calls in the last turn"),
        (turns(tools="look"), "tools: not JSON"),
        (turns({**USER, "tools": "look"}), r"messages\[1\]: tools: not JSON"),
        (with_turn(content="no", functions=[1]), "functions: cannot be shown"),
        (
            {"messages": [{"role": "system", "content": "", "tool_calls": [CALL]}, USER, LAST]},
            "of the system",
        ),
        (turns(tools={"a": 1}), "tools: a list of function schemas"),
    ],
)
def test_what_cannot_be_shown_is_refused_by_name(row: dict[str, Any], reason: str, task: Task) -> None:
    with pytest.raises(DataError, match=reason):
        to_example(row, task, "f:1")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [{"role": "user", "content": None}]}, r"messages\[0\]: content: text is"),
        ({"messages": []}, "item 7: no user turn"),
        ({"messages": [{"role": "system", "content": "S"}]}, "item 7: no user turn"),
        ({"messages": [{"content": "x"}]}, r"item 7: messages\[0\]: unknown role None"),
        ({"messages": "hello"}, "item 7: messages: a list of turns is needed"),
        ({"messages": [USER, {"role": "system", "content": "S"}]}, r"item 7: messages\[1\]: a system turn"),
        ({"title": "Rain", "text": ["a", "b"]}, "item 7: text: text is needed"),
        ({"title": "Rain", "text": "half \ud83d pair"}, "item 7: the user's turn: half a surrogate pair"),
    ],
)
def test_an_item_to_answer_is_held_to_the_rules_of_a_row(row: Any, reason: str, task: Task) -> None:
    with pytest.raises(DataError, match=reason):
        to_item(row, task, 7)


def test_a_row_that_looks_prepared_and_is_not_is_parsed_like_any_other(task: Task) -> None:
    row = {"id": "a", "fields": {}, "answer": None, "set": "test"}
    assert to_item({**row, "messages": [USER, LAST]}, task).messages == (Message("user", "A song"),)
    parts = [{"role": "user", "content": [{"type": "text", "text": "A song"}]}, LAST]
    assert to_item({**row, "messages": parts}, task).messages == (Message("user", "A song"),)
    for wrong in (["x"], "x", [{"role": "user"}], [{"content": "x"}]):
        with pytest.raises(DataError, match="item 1: messages"):
            to_item({**row, "messages": wrong}, task)


def test_an_item_to_answer_may_have_parts_and_developer_and_tool_turns(task: Task) -> None:
    parts = [{"type": "text", "text": "what a "}, {"type": "text", "text": "nice day"}]
    row = {
        "messages": [
            {"role": "developer", "content": "S"},
            {"role": "user", "content": parts},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "content": "42"},
        ]
    }
    item = to_item(row, task)
    assert [(turn.role, turn.content) for turn in item.messages] == [
        ("system", "S"),
        ("user", "what a nice day"),
        ("assistant", ""),
        ("tool", "42"),
    ]
