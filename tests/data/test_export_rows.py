"""Rows for other tools: read back they are the same, or refused with their numbers and the reason."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_distill.data.chatml import chatml_row
from mlx_distill.data.export_rows import LAYOUTS, export_rows
from mlx_distill.data.rows import to_example
from mlx_distill.data.sources import read_source
from mlx_distill.errors import ConfigError, DataError
from mlx_distill.recipe import SourceConfig
from mlx_distill.records import Example
from mlx_distill.tasks.task import CHATS, load_task

_TEXT = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        ["<|im_end|>", "a <|im_start|>user\nb", "\u2028line", "a\r\nb", '{"a": 1}', "[1]", "\u00a0x"]
    ),
)
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)
_CALL = st.builds(
    lambda name, arguments: {
        "id": "c1",
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    },
    st.sampled_from(["look", "save"]),
    _JSON,
)
_ANSWER = st.fixed_dictionaries(
    {"role": st.just("assistant"), "content": _TEXT},
    optional={
        "weight": st.sampled_from([0, 1]),
        "tool_calls": st.lists(_CALL, min_size=1, max_size=2),
        "reasoning_content": _TEXT,
    },
)
_ASKED = st.fixed_dictionaries({"role": st.just("user"), "content": _TEXT}, optional={"name": st.just("ada")})
_TOOL = st.fixed_dictionaries(
    {"role": st.just("tool"), "content": _TEXT}, optional={"tool_call_id": st.just("c1")}
)
_SYSTEM = st.fixed_dictionaries({"role": st.just("system"), "content": _TEXT})


@st.composite
def chats(draw: st.DrawFn) -> dict[str, Any]:
    """Rows with chats of every kind that the reader takes, and some that it does not."""
    turns = draw(st.lists(_SYSTEM, max_size=1))
    for _ in range(draw(st.integers(1, 3))):
        turns += [draw(_ASKED), *draw(st.lists(_TOOL, max_size=1)), draw(_ANSWER)]
    row: dict[str, Any] = {"messages": turns}
    if draw(st.booleans()):
        row["tools"] = [{"type": "function", "function": {"name": "look"}}]
    row |= draw(
        st.fixed_dictionaries({}, optional={"id": st.text(max_size=5), "genre": _JSON, "fields": _JSON})
    )
    return row


def examples(rows: list[dict[str, Any]]) -> list[Example]:
    found = []
    for row in rows:
        try:
            found.append(to_example(row, CHATS, "rows"))
        except DataError:
            continue
    return found


def expected_refusal(example: Example, layout: str) -> bool:
    """Whether a layout has no place for something of a chat."""
    turns = example.messages
    only_text = all(turn.trained and not turn.extra for turn in turns)
    if layout == "alpaca":
        return not only_text or [t.role for t in turns if t.role != "system"] != ["user", "assistant"]
    markers = any(mark in turn.content for turn in turns for mark in ("<|im_start|>", "<|im_end|>"))
    return layout == "chatml" and (markers or not only_text)


@settings(max_examples=120, deadline=None)
@given(rows=st.lists(chats(), min_size=1, max_size=3), layout=st.sampled_from(sorted(LAYOUTS)))
def test_an_export_is_read_back_equal_or_refused_with_its_rows(
    rows: list[dict[str, Any]], layout: str
) -> None:
    known = examples(rows)
    refused = [number for number, example in enumerate(known, 1) if expected_refusal(example, layout)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        rows_given = [("row", example) for example in known]
        if refused or not known:
            with pytest.raises(DataError) as caught:
                export_rows(rows_given, path, layout, CHATS)
            assert not list(path.parent.iterdir())
            assert known or "no rows" in caught.value.message
            assert all(f"row {number}: " in caught.value.message for number in refused)
            return
        export_rows(rows_given, path, layout, CHATS)
        source = SourceConfig(path=str(path), format=layout)
        read = [to_example(row, CHATS, where, format=layout) for where, row in read_source(source, CHATS)]
        assert read == known


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_rows_of_a_task_keep_their_answers_and_columns(tmp_path: Path, layout: str) -> None:
    task = load_task("moderation")
    source = SourceConfig(path="asset:moderation/sentences.jsonl", count=20)
    rows = list(read_source(source, task))
    known = [to_example(row, task, where) for where, row in rows]
    assert export_rows([("", example) for example in known], tmp_path / "x.jsonl", layout, task) == 20
    source = SourceConfig(path=str(tmp_path / "x.jsonl"), format=layout)
    assert [to_example(row, task, where, format=layout) for where, row in read_source(source, task)] == known


def test_what_a_row_is_without_ids_and_columns(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    known = to_example({"messages": turns, "id": "7", "genre": "folk"}, CHATS, "rows")
    expected = {
        "openai": {"messages": turns},
        "alpaca": {"instruction": "Hi", "input": "", "output": "Hello"},
        "chatml": {"text": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"},
    }
    for layout, row in expected.items():
        export_rows([("", known)], tmp_path / layout, layout, CHATS, bare=True)
        assert json.loads((tmp_path / layout).read_text()) == row
        export_rows([("", known)], tmp_path / f"{layout}-whole", layout, CHATS)
        whole = json.loads((tmp_path / f"{layout}-whole").read_text())
        assert whole == {**row, "id": "7", "fields": {"genre": "folk"}}


def test_rows_that_cannot_be_read_are_refused_too(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"2 of 2 rows.*row 1: no user turn; row 2: no user turn"):
        export_rows([("", DataError("no user turn"))] * 2, tmp_path / "x", "openai", CHATS)
    with pytest.raises(ConfigError, match=r"no layout 'alpacca'.*alpaca"):
        export_rows([], tmp_path / "x", "alpacca", CHATS)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Hi",
        "<|im_start|>user\nHi",
        "x<|im_start|>user\nHi<|im_end|>",
        "<|im_start|>user\na<|im_start|>b<|im_end|>",
    ],
)
def test_text_that_is_no_chatml_is_refused(text: str) -> None:
    with pytest.raises(DataError, match="no ChatML"):
        chatml_row({"text": text})
