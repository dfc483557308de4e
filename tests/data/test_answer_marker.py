"""Prompts that hold the row's own answer: cut at a marker, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mlx_distill.data.prepare import prepare
from mlx_distill.data.rows import to_example
from mlx_distill.errors import DataError
from mlx_distill.recipe import DataConfig, SourceConfig
from mlx_distill.storage import read_jsonl, write_jsonl
from mlx_distill.tasks.task import Task

MARKER = "### Classification:"
SCHEMA = {
    "type": "object",
    "required": ["label"],
    "properties": {"label": {"enum": ["hate", "fine"]}, "why": {"type": "string"}},
}
TASK = Task(name="moderate", system="", user="Text: {text}\n\nJudge it.", schema=SCHEMA, label="label")


def chat(text: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]}


@pytest.mark.parametrize(
    "row",
    [
        {"text": f"Go home. {MARKER} hate"},
        {"text": f"Go home.\n\n{MARKER}\nhate\n", "label": "hate"},
        {"text": f'Go home. {MARKER} {{"label": "hate"}}'},
    ],
)
def test_a_field_is_cut_at_the_marker_and_what_is_behind_it_is_the_answer(row: dict[str, Any]) -> None:
    example = to_example(row, TASK, "f:1", answer_after=MARKER)
    assert [turn.content for turn in example.messages] == [
        "Text: Go home.\n\nJudge it.",
        '{"label": "hate"}',
    ]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": f"{MARKER} a {MARKER} hate"}]},
        chat(f"{MARKER} a {MARKER} hate", "hate"),
        chat(f"{MARKER} a\n{MARKER}", '{"label": "hate"}'),
        {"instruction": f"{MARKER} a", "input": f"{MARKER} hate", "output": ""},
        {"instruction": f"{MARKER} a {MARKER} Hate", "output": "hate"},
    ],
)
def test_a_question_is_cut_at_the_last_marker(row: dict[str, Any]) -> None:
    example = to_example(row, TASK, "f:1", answer_after=MARKER)
    assert example.messages[0].content == f"{MARKER} a" and example.answer == {"label": "hate"}


def test_a_row_without_the_marker_is_as_it_is_and_one_with_two_answers_an_error() -> None:
    row = chat("a", "fine")
    assert to_example(row, TASK, "f:1", answer_after=MARKER) == to_example(row, TASK, "f:1")
    with pytest.raises(DataError, match="behind '### Classification:' is 'hate', the answer 'fine'"):
        to_example(chat(f"a {MARKER} hate", "fine"), TASK, "f:1", answer_after=MARKER)
    with pytest.raises(DataError, match="f:1: no answer, and none behind '### Classification:'"):
        to_example({"text": "a"}, TASK, "f:1", answer_after=MARKER)
    with pytest.raises(DataError, match="does not fit the task"):
        to_example({"text": f"a {MARKER} perhaps"}, TASK, "f:1", answer_after=MARKER)


def prepared(tmp_path: Path, rows: list[dict[str, Any]], **source: Any) -> tuple[list[Any], list[str]]:
    write_jsonl(tmp_path / "rows.jsonl", rows)
    (tmp_path / "out").mkdir(exist_ok=True)
    config = DataConfig(
        sources=[SourceConfig(path=str(tmp_path / "rows.jsonl"), **source)],
        valid_fraction=0.0,
        test_fraction=0.0,
        near_duplicates=0.0,
    )
    warnings = prepare(config, TASK, None, tmp_path / "out")["warnings"]
    return [row for _, row in read_jsonl(tmp_path / "out" / "train.jsonl")], warnings


LEAKS = {
    "chat": [chat(f"text {n} {MARKER} {label}", label) for n, label in enumerate(["hate", "fine"] * 4)],
    "field": [
        {"text": f"text {n}.\nLabel = **{label}**.", "label": label}
        for n, label in enumerate(["hate", "fine"] * 4)
    ],
    "JSON": [chat(f'text {n} -> {{"label": "hate"}}', '{"label": "hate"}') for n in range(8)],
}


@pytest.mark.parametrize(("kind", "marker"), [("chat", MARKER), ("field", "Label ="), ("JSON", "->")])
def test_a_source_whose_prompts_hold_their_answers_is_refused(tmp_path: Path, kind: str, marker: str) -> None:
    with pytest.raises(DataError, match="in 8 of 8 rows the prompt ends with the row's own answer") as caught:
        prepared(tmp_path, LEAKS[kind])
    assert caught.value.fix == f"cut the prompts there: data.sources[0].answer_after: {marker!r}"


def test_the_fix_that_the_error_names_works(tmp_path: Path) -> None:
    rows, warnings = prepared(tmp_path, LEAKS["chat"], answer_after=MARKER)
    assert sorted(row["messages"][0]["content"] for row in rows) == [f"text {n}" for n in range(8)]
    assert not any("own answer" in text for text in warnings)
    rows, warnings = prepared(
        tmp_path, [{"text": row["messages"][0]["content"]} for row in LEAKS["chat"]], answer_after=MARKER
    )
    assert len(rows) == 8 and not any("own answer" in text for text in warnings)


def test_single_rows_that_hold_their_answer_are_a_warning(tmp_path: Path) -> None:
    clean = [
        chat(f"Is it hate or fine? text {n}: all is fine, or: not {label}", label)
        for n, label in enumerate(["hate", "fine"] * 4)
    ]
    rows, warnings = prepared(tmp_path, [*clean, LEAKS["chat"][0]])
    assert len(rows) == 9
    (warning,) = [text for text in warnings if "own answer" in text]
    assert "in 1 of 9 rows" in warning and "rows.jsonl:9" in warning and MARKER in warning
