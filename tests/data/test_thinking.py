"""Chats with thinking: in the tokens of both families, where they are trained, and rows that have it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mlx_distill.data.chat import prompt_ids, render
from mlx_distill.data.rows import to_example, to_item
from mlx_distill.errors import DataError, FileError
from mlx_distill.records import Message
from mlx_distill.tasks.task import Task
from mlx_distill.thinking import read_thinking, set_thinking, thinking_budget, write_thinking

THOUGHT = "It rains, <|im_end|> or <|return|>?\nNo."
CHAT = [Message("system", "Be kind."), Message("user", "rain?")]
ANSWER = '{"label": "fine"}'
OPEN = {"chatml": "<|im_start|>assistant\n<think>\n", "harmony": "<|channel|>analysis<|message|>"}
BETWEEN = {
    "chatml": "\n</think>\n\n",
    "harmony": "<|end|><|start|>assistant<|channel|>final<|message|>",
}
STOP = {"chatml": "<|im_end|>", "harmony": "<|return|>"}


@pytest.fixture
def thinking(tokenizer: Any) -> Any:
    set_thinking(tokenizer, 64)
    yield tokenizer
    set_thinking(tokenizer, 0)


def kind_of(tokenizer: Any) -> str:
    return "chatml" if "<think>" in tokenizer.get_vocab() else "harmony"


def thought(text: str, content: str = ANSWER) -> list[Message]:
    return [*CHAT, Message("assistant", content, extra={"reasoning_content": text})]


def test_a_chat_is_trained_from_its_thinking_on(thinking: Any) -> None:
    kind = kind_of(thinking)
    row = render(thinking, thought(THOUGHT))
    assert row.thinking is not None
    start, end = row.thinking
    ids = row.tokens.tolist()
    assert thinking.decode(ids[start:]) == THOUGHT + BETWEEN[kind] + ANSWER + STOP[kind]
    assert thinking.decode(ids[start:end]).strip() == THOUGHT
    assert thinking.decode(ids[row.spans[-1][0] : row.spans[-1][1]]) == ANSWER
    assert row.trained[start - 1 :].all() and not row.trained[: start - 1].any() and row.start == start
    assert ids[:start] == prompt_ids(thinking, CHAT)
    assert thinking.decode(ids[:start]).endswith(OPEN[kind])
    control = {i for i, token in thinking.added_tokens_decoder.items() if token.special}
    assert not control.intersection(ids[start:end])  # what it spells stays text


def test_a_chat_without_spelled_tokens_is_that_of_transformers(thinking: Any) -> None:
    text = "It rains. Kind words help."
    message = {"role": "assistant", "content": ANSWER, "reasoning_content": text, "thinking": text}
    chat = [{"role": m.role, "content": m.content} for m in CHAT] + [message]
    own = thinking.apply_chat_template(chat, tokenize=True, return_dict=False)
    assert render(thinking, thought(text)).tokens.tolist() == own[: len(render(thinking, thought(text)))]


def test_without_the_setting_thinking_is_read_and_not_trained(tokenizer: Any) -> None:
    row = render(tokenizer, thought("Hm."))
    assert row.thinking is None and row.start == row.spans[-1][0]
    assert tokenizer.decode(row.tokens[row.start :].tolist()) == ANSWER + STOP[kind_of(tokenizer)]
    assert not tokenizer.decode(prompt_ids(tokenizer, CHAT)).endswith(OPEN[kind_of(tokenizer)])


def test_a_model_that_thinks_is_trained_without_where_a_row_has_none(thinking: Any) -> None:
    row = render(thinking, [*CHAT, Message("assistant", ANSWER)])
    assert row.thinking is None
    assert thinking.decode(row.tokens[: row.start].tolist()).endswith(BETWEEN[kind_of(thinking)])
    assert prompt_ids(thinking, CHAT, thinking=False) == row.tokens[: row.start].tolist()


def test_marks_within_thinking_are_refused(thinking: Any) -> None:
    with pytest.raises(DataError, match="no marks within"):
        render(thinking, thought("a</think>b"))


def test_a_tasks_row_may_have_thinking_under_its_key_or_as_a_block(task: Task) -> None:
    user = {"role": "user", "content": "Rain."}
    verdict = task.labels[0]
    content = f'{{"verdict": "{verdict}", "score": 3}}'
    rows = [
        {"messages": [user, {"role": "assistant", "content": content, "reasoning": " Hm. "}]},
        {"messages": [user, {"role": "assistant", "content": f"<think>\nHm.\n</think>\n\n{content}"}]},
        {"title": "a", "text": "b", "answer": f"<think>Hm.</think>{content}"},
    ]
    for raw in rows:
        example = to_example(raw, task, "x:1")
        assert example.messages[-1].extra == {"reasoning_content": "Hm."}
        assert example.answer is not None and example.answer["verdict"] == verdict
        assert "think" not in example.messages[-1].content
        assert all(message.role != "assistant" for message in to_item(raw, task).messages)
    rows[0]["messages"][1]["content"] = rows[1]["messages"][1]["content"].replace("Hm", "Ah")
    with pytest.raises(DataError, match="differs from it"):
        to_example(rows[0], task, "x:1")


def test_the_fact_of_a_folder(tmp_path: Path, tokenizer: Any) -> None:
    assert read_thinking(tmp_path) == 0
    write_thinking(tmp_path, 9)
    assert read_thinking(tmp_path) == 9
    write_thinking(tmp_path, 0)
    write_thinking(tmp_path, 0)
    assert read_thinking(tmp_path) == 0 == thinking_budget(tokenizer) == thinking_budget("text")
    for text in ("[]", '{"max_tokens": 0}', '{"max_tokens": true}', '{"max_tokens": "9"}'):
        (tmp_path / "thinking.json").write_text(text, encoding="utf-8")
        with pytest.raises(FileError, match="max_tokens"):
            read_thinking(tmp_path)
