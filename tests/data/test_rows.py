from __future__ import annotations

import json
import unicodedata
from dataclasses import replace
from typing import Any

import pytest

from mlx_distill.data.rows import from_row, to_example, to_item, to_row
from mlx_distill.errors import DataError
from mlx_distill.records import Message
from mlx_distill.tasks.task import Task, load_task

ANSWER = {"verdict": "yes", "score": 10}
TEXT = '{"verdict": "yes", "score": 10}'
PLAIN = {
    "id": "r1",
    "title": "Rain",
    "text": "la la",
    "genre": "folk",
    "rating": 4,
    "answer": {"score": 10, "verdict": "yes"},
}
TURNS = [
    {"role": "user", "content": "A song"},
    {"role": "assistant", "content": '{"score": 10, "verdict": "yes"}'},
]


@pytest.mark.parametrize(
    ("row", "chat"),
    [
        (PLAIN, [("system", "You judge songs."), ("user", "Rain\n\nla la"), ("assistant", TEXT)]),
        (
            {"title": "Rain", "text": "", **ANSWER},
            [("system", "You judge songs."), ("user", "Rain"), ("assistant", TEXT)],
        ),
        (
            {"title": "R", "text": "t", "answer": TEXT},
            [("system", "You judge songs."), ("user", "R\n\nt"), ("assistant", TEXT)],
        ),
        ({"messages": TURNS}, [("user", "A song"), ("assistant", TEXT)]),
        (
            {"messages": [{"role": "system", "content": " Own. "}, *TURNS, *TURNS]},
            [
                ("system", "Own."),
                ("user", "A song"),
                ("assistant", '{"score": 10, "verdict": "yes"}'),
                ("user", "A song"),
                ("assistant", TEXT),
            ],
        ),
        (
            {"instruction": "Judge", "input": "A song", "output": TEXT},
            [("user", "Judge\n\nA song"), ("assistant", TEXT)],
        ),
        ({"instruction": "Judge", "input": "", "output": ANSWER}, [("user", "Judge"), ("assistant", TEXT)]),
        (
            {"system": "S", "instruction": "J", "output": TEXT},
            [("system", "S"), ("user", "J"), ("assistant", TEXT)],
        ),
        ({"prompt": "A song", "completion": TEXT}, [("user", "A song"), ("assistant", TEXT)]),
        ({"prompt": TURNS[:1], "completion": TURNS[1:]}, [("user", "A song"), ("assistant", TEXT)]),
        (
            {
                "messages": [
                    {"role": "developer", "content": [{"type": "text", "text": "S"}]},
                    {
                        "role": "user",
                        "content": [{"type": "text", "text": "A "}, {"type": "text", "text": "song"}],
                    },
                    {
                        "role": "assistant",
                        "content": None,
                        "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}],
                    },
                    {"role": "tool", "content": "result"},
                    TURNS[1],
                ]
            },
            [
                ("system", "S"),
                ("user", "A song"),
                ("assistant", ""),
                ("tool", "result"),
                ("assistant", TEXT),
            ],
        ),
    ],
)
def test_every_format_becomes_one_chat(row: dict[str, Any], chat: list[tuple[str, str]], task: Task) -> None:
    example = to_example(row, task, "f:1")
    assert [(m.role, m.content) for m in example.messages] == chat
    assert example.answer == ANSWER and list(example.answer) == ["verdict", "score"]
    assert from_row(json.loads(json.dumps(to_row(example, "test")))) == example


def test_other_columns_are_kept_and_the_text_is_not_kept_twice(task: Task) -> None:
    assert dict(to_example(PLAIN, task, "f:1").fields) == {"title": "Rain", "genre": "folk", "rating": 4}
    chat = to_example({"id": 7, "messages": TURNS, "genre": "folk", "fields": {"decade": 80}}, task, "f:1")
    assert chat.id == "7" and dict(chat.fields) == {"genre": "folk", "decade": 80}


def test_the_id_of_a_row_without_one_is_a_hash_of_its_content(task: Task) -> None:
    first, same = (to_example({"messages": TURNS, "genre": g}, task, "f:1") for g in "ab")
    other = to_example({"messages": [{"role": "user", "content": "B"}, TURNS[1]]}, task, "f:1")
    assert first.id == same.id != other.id and len(first.id) == 16


def test_columns_can_be_mapped_to_fields(task: Task) -> None:
    row = {"name": "Rain", "lyrics": "la", "judgement": "yes", "score": 10}
    example = to_example(
        row, task, "f:1", columns={"title": "name", "text": "lyrics", "verdict": "judgement"}
    )
    assert (
        example.messages[1].content == "Rain\n\nla"
        and example.answer == ANSWER
        and dict(example.fields) == {"title": "Rain"}
    )


def test_the_answer_is_normalised_to_nfc_and_the_prompt_is_not(task: Task) -> None:
    decomposed = unicodedata.normalize("NFD", "déjà")
    row = {"title": decomposed, "text": decomposed, "answer": {**ANSWER, "why": decomposed}}
    example = to_example(row, task, "f:1")
    content = example.messages[-1].content
    assert example.answer is not None and example.answer["why"] == "déjà" and "déjà" in content
    assert unicodedata.is_normalized("NFC", content) and decomposed in example.messages[1].content
    again = to_example(to_row(example, "x"), task, "f:2")
    assert again.messages == example.messages and again.answer == example.answer and again.id == example.id


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": TURNS[:1]}, "no assistant turn"),
        ({"messages": []}, "no assistant turn"),
        ({"messages": TURNS[1:]}, "no user turn"),
        ({"messages": [*TURNS, TURNS[0]]}, "the last turn is the user's"),
        ({"messages": "hello"}, "a list of turns is needed, not 'hello'"),
        ({"messages": ["hello"]}, r"messages\[0\]: an object with role and content"),
        (
            {"messages": [{"role": "narrator", "content": "x"}, *TURNS]},
            r"messages\[0\]: unknown role 'narrator'",
        ),
        ({"messages": [{"content": "x"}, *TURNS]}, "unknown role None"),
        ({"messages": [{"role": ["user"], "content": "x"}, *TURNS]}, r"unknown role \['user'\]"),
        ({"messages": [{"role": "user", "content": " \n"}, TURNS[1]]}, r"messages\[0\]: content is empty"),
        ({"messages": [{"role": "user", "content": []}, TURNS[1]]}, "text is needed, not \\[\\]"),
        ({"messages": [{"role": "user", "content": None}, TURNS[1]]}, "text is needed, not None"),
        ({"messages": [{"role": "user", "content": 5}, TURNS[1]]}, "text is needed, not 5"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, TURNS[1]]},
            "a part of type 'image_url' is not text",
        ),
        (
            {"messages": [TURNS[0], {"role": "system", "content": "x"}, TURNS[1]]},
            r"messages\[1\]: a system turn that is not the first",
        ),
        (
            {"messages": [TURNS[0], {"role": "assistant", "content": "yes!"}]},
            "does not fit the task 'rain': not JSON",
        ),
        (
            {"messages": [TURNS[0], {"role": "assistant", "content": '{"verdict": "yes"}'}]},
            "'score' is a required property",
        ),
        ({**PLAIN, "answer": {"verdict": "perhaps", "score": 1}}, "verdict: 'perhaps' is not one of"),
        ({**PLAIN, "answer": ["yes"]}, "a JSON list, not an object"),
        ({**PLAIN, "answer": None}, "no answer: the column 'answer' is empty"),
        ({"title": "Rain", "text": "la"}, "no column 'verdict' or 'answer'; the row has title, text"),
        ({"title": "Rain", "verdict": "yes", "score": 1}, "no field 'text'"),
        ({**PLAIN, "text": None}, "the field 'text' is null"),
        ({**PLAIN, "text": ["la"]}, r"text: text is needed, not \['la'\]"),
        ({**PLAIN, "title": "", "text": " "}, "the user turn is empty"),
        ({**PLAIN, "id": [1]}, "id: text or a whole number"),
        ({**PLAIN, "genre": "\ud800"}, "genre: half a surrogate pair"),
        ({**PLAIN, "id": "\ud800"}, "id: half a surrogate pair"),
        ({**PLAIN, "\ud800": 1}, r"\\ud800: half a surrogate pair"),
        ({**PLAIN, "text": "\ud800"}, "the user's turn: half a surrogate pair"),
        ({**PLAIN, "text": b"\xff"}, "no field 'text'; .* the column 'text' holds bytes, not text"),
        ({"instruction": 3, "output": TEXT}, "instruction: text is needed, not 3"),
        ({"instruction": "J", "output": ""}, "no assistant turn: output is empty"),
        ({"prompt": "p", "completion": 3}, "text is needed, not 3"),
        ({}, "no field 'title'; the row has no columns"),
    ],
)
def test_a_bad_row_is_an_error_with_file_line_and_fix(row: dict[str, Any], reason: str, task: Task) -> None:
    with pytest.raises(DataError, match=reason) as caught:
        to_example(row, task, "songs.jsonl:17")
    assert (
        caught.value.message.startswith("songs.jsonl:17: ")
        and caught.value.fix
        and "\n" not in str(caught.value)
    )


@pytest.mark.parametrize(
    ("field", "fix"),
    [
        ("txt", "or correct the prompt: {text}, not {txt}"),
        ("one or two", "{{one or two}}"),
        ("labels", "the list of labels is written {verdict:options}"),
    ],
)
def test_a_field_of_the_prompt_that_no_column_is_may_be_a_slip_in_the_prompt(
    field: str, fix: str, task: Task
) -> None:
    with pytest.raises(DataError, match=f"no field '{field}'") as caught:
        to_example(PLAIN, replace(task, user=f"{{title}} {{{field}}}"), "f:1")
    assert fix in (caught.value.fix or "")


def test_a_format_can_be_required(task: Task) -> None:
    with pytest.raises(DataError, match="messages: a list of turns is needed"):
        to_example(PLAIN, task, "f:1", format="messages")
    with pytest.raises(DataError, match="unknown role 'tool'"):
        to_example({"messages": [{"role": "tool", "content": "x"}, *TURNS]}, task, "f:1", format="messages")


def test_invalid_rows_raise_nothing_but_data_errors(task: Task) -> None:
    junk = [None, True, 0, -1.5, "", "x", [], [[]], {}, {"role": None}, [{"role": "user"}], {"a": {"b": []}}]
    keys = [
        "messages",
        "instruction",
        "input",
        "output",
        "prompt",
        "completion",
        "answer",
        "title",
        "text",
        "verdict",
        "score",
        "id",
        "system",
    ]
    for key in keys:
        for value in junk:
            for base in (
                {},
                PLAIN,
                {"messages": TURNS},
                {"instruction": "a", "output": TEXT},
                {"prompt": "a", "completion": TEXT},
            ):
                try:
                    example = to_example({**base, key: value}, task, "f:1")
                except DataError:
                    continue
                assert example.messages[-1].role == "assistant" and example.answer is not None


@pytest.mark.parametrize(
    "row",
    [
        {**PLAIN, "song": "task"},
        PLAIN,
        {key: value for key, value in PLAIN.items() if key != "id"},
        {"title": "R", "text": "t", "answer": TEXT},
        {"title": "R", "text": "t", "genre": "folk", **ANSWER},
        {"messages": TURNS, "genre": "folk"},
        {"messages": [{"role": "developer", "content": " S "}, *TURNS], "fields": {"decade": 80}},
        {"instruction": "Judge", "input": "A song", "output": TEXT},
        {"prompt": "A song", "completion": TEXT},
    ],
)
@pytest.mark.parametrize("id_field", ["id", "song"])
def test_prepare_and_analyze_read_a_row_in_the_same_way(
    row: dict[str, Any], id_field: str, task: Task
) -> None:
    """The same id, prompt and fields; analyze once took ``id`` before the task's id field, and hashed a row
    without an id without its answer.
    """
    task = replace(task, id=id_field)
    example, item = to_example(row, task, "f:1"), to_item(row, task)
    assert (item.id, item.fields) == (example.id, example.fields)
    assert item.messages == example.messages[:-1]
    if "song" in row:
        assert item.id == ("task" if id_field == "song" else "r1")


def test_a_prepared_row_keeps_its_id(task: Task) -> None:
    example = to_example(PLAIN, task, "f:1")
    for id_field in ("id", "genre", "answer", "set"):
        item = to_item(to_row(example, "test"), replace(task, id=id_field))
        assert item == ("r1", example.messages[:-1], example.fields)


def test_a_row_without_an_id_and_a_valid_answer_has_a_hash_of_its_prompt_as_id(task: Task) -> None:
    prompt = {"title": "Rain", "text": "la"}
    item = to_item(prompt, task)
    assert len(item.id) == 16 != to_item({**prompt, "text": "lo"}, task).id
    chat = [{"role": m.role, "content": m.content} for m in item.messages]
    for row in (
        {**prompt, "genre": "folk"},
        {**prompt, "answer": None},
        {**prompt, "answer": "yes!"},
        {**prompt, "verdict": "perhaps"},
        {"messages": chat},
        {"messages": [*chat, {"role": "assistant", "content": ""}]},
        {"messages": [*chat, {"role": "assistant", "content": None}]},
        {"messages": [*chat, {"role": "assistant", "content": "yes!"}]},
    ):
        assert (to_item(row, task).id, to_item(row, task).messages) == (item.id, item.messages)
    assert to_item({**prompt, **ANSWER}, task).id != item.id
    with pytest.raises(DataError, match="item 3: the user's turn: half a surrogate"):
        to_item({**prompt, "text": "\ud800"}, task, 3)


def test_the_packaged_songs_and_sentences_fit_their_tasks() -> None:
    from mlx_distill.data.sources import read_source
    from mlx_distill.recipe import SourceConfig

    for name, file in (("music", "songs"), ("moderation", "sentences")):
        task = load_task(name)
        for source in (
            SourceConfig(path=f"asset:{name}/{file}.jsonl"),
            SourceConfig(generator=name, count=20),
        ):
            for where, raw in read_source(source, task):
                example = to_example(raw, task, where)
                assert example.messages[0] == Message("system", task.system.strip())
