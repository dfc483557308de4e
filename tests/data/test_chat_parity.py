"""What the model reads equals what transformers' ``apply_chat_template`` gives for the same messages:
templates in the structure of thirteen families, conversations of many kinds, three kinds of tokenizers.
"""

from __future__ import annotations

from typing import Any

import pytest
from helpers.chat_families import FAMILIES, Family
from helpers.chat_oracle import ANSWER, decode, is_dropped, make_tokenizer, own

from mlx_distill.data.chat import prompt_ids, render
from mlx_distill.errors import DataError, ModelError
from mlx_distill.records import Message

THOUGHT = "<think>\nkind words\n</think>\n\nfine"


def user(content: str = "what a nice day", **extra: Any) -> Message:
    return Message("user", content, extra=extra)


def said(content: str = "fine", **extra: Any) -> Message:
    return Message("assistant", content, extra=extra)


def call(name: str = "look_up", id: str = "c12345678") -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": {"q": "<rain>", "n": 1}}}


LAST = said(ANSWER)
SYSTEM = Message("system", "You judge days.")
TOOL = Message("tool", "42 °C", extra={"tool_call_id": "c12345678", "name": "look_up"})
TOOLS = [{"type": "function", "function": {"name": "look_up", "description": "finds all"}}]
CONVERSATIONS: dict[str, list[Message]] = {
    "no system turn": [user(), LAST],
    "system turn": [SYSTEM, user(), LAST],
    "developer turn": [Message("developer", "You judge days."), user(), LAST],
    "several turns": [SYSTEM, user(), said(), user("and this one?"), said("not\nso fine"), user(), LAST],
    "thinking in an earlier turn": [user(), said(THOUGHT), user("and this one?"), LAST],
    "thinking in the turn before": [SYSTEM, user(), said(THOUGHT), said("<think>a</think>b</think>c"), LAST],
    "thinking by itself": [user(), said(reasoning_content="kind words"), user(), LAST],
    "thinking asked for": [user("<think> or </think>? <tool_call>"), said(), user("more /think"), LAST],
    "tool calls": [user(tools=TOOLS), said("", tool_calls=[call()]), TOOL, LAST],
    "calls beside content": [SYSTEM, user(), said("Hm.", tool_calls=[call()]), TOOL, said(), user(), LAST],
    "spaces at the ends": [Message("system", " a "), user("  a\n \n"), said(" \nok \t"), user("\n\nb"), LAST],
    "empty turns": [user(), said(""), user("a"), LAST],
    "line breaks only": [user("\n\n"), said("\n"), user("\n \n"), LAST],
    "Unicode": [user("日本 👩‍👩‍👧 e\u0301 \u200b\xa0 \U000f0000"), said("ß\u2028ﬁ"), user("\u3000x"), LAST],
    "JSON and braces": [user('{"a": [1, {{ x }}]} {% raise %}'), said(ANSWER), user("\\n \\\" '"), LAST],
    "long": [user("what a nice day and this one? " * 200), said("fine " * 200), user("a" * 999), LAST],
    "two questions": [user(), user("and this one?"), LAST],
}
SPELLED = "a{0} b {0}{0}user\n{1}\nx{0}"


def check(family: Family, tokenizer: Any, chat: list[Message]) -> str:
    """Hold a chat against transformers: ``equal``, or ``refused`` by us with a right reason."""
    try:
        expected = own(tokenizer, chat)
    except Exception:
        with pytest.raises(DataError, match=r"the chat template (refuses|does not know)"):
            render(tokenizer, chat)
        return "refused"
    refusal, row = "", None
    try:
        row = render(tokenizer, chat)
    except (DataError, ModelError) as error:
        refusal = error.message
    if row is None:
        assert is_dropped(refusal, decode(tokenizer, expected), chat), refusal
        return "refused"
    assert row.prompt.tolist() == prompt_ids(tokenizer, [*chat[:-1], said("")])
    trained = row.tokens[1:][row.trained].tolist()
    assert trained == [*row.answer.tolist(), *trained[len(row.answer) :]] and row.stop == trained[-1]
    ours = row.tokens.tolist()
    if family.joined:  # the answer is encoded by itself, as it is written at inference
        start = len(row.prompt) - 1
        assert ours[:start] == expected[:start]
        assert decode(tokenizer, ours) == decode(tokenizer, expected)[: len(decode(tokenizer, ours))]
    elif expected[-1] != row.stop and row.stop not in expected:  # a template that ends no answer
        assert ours[:-1] == expected and row.stop == tokenizer.eos_token_id
    elif any(token in turn.content for token in family.special for turn in chat if turn.role == "user"):
        # A special token that a question spells stays text, without the space behind a token.
        texts = [decode(tokenizer, ids).replace(" ", "") for ids in (ours, expected)]
        assert texts[1].startswith(texts[0])
    else:
        assert ours == expected[: len(ours)]
        # Behind it is white space, and with Phi's the end of the text.
        assert decode(tokenizer, expected[len(ours) :]).strip() in ("", family.eos)
    return "equal"


def check_spelled(family: Family, tokenizer: Any) -> None:
    """Special tokens spelled in contents stay text; those around them are those of other contents."""
    tokens = [token for token in (*family.special, family.eos) if token not in ("<think>", "</think>")]
    text = SPELLED.format(tokens[0], family.eos)
    spelled = [user(text), said(text), user(text), said(text)]
    harmless = [Message(turn.role, "a b") for turn in spelled]
    row, plain = render(tokenizer, spelled), render(tokenizer, harmless)
    controls = {int(n) for n, token in tokenizer.added_tokens_decoder.items()}
    assert [t for t in row.tokens.tolist() if t in controls] == [
        t for t in plain.tokens.tolist() if t in controls
    ]
    written = decode(tokenizer, row.tokens)
    assert decode(tokenizer, row.answer).strip() == text.strip() and written.count(text) == 4
    assert row.prompt.tolist() == prompt_ids(tokenizer, [*spelled[:-1], said("")])


KINDS = ["byte-level", "every text", "first text"]
QUICK = ["system turn", "thinking in an earlier turn", "spaces at the ends", "tool calls"]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_tokens_are_those_of_transformers(name: str) -> None:
    family = FAMILIES[name]
    tokenizer = make_tokenizer(name, "byte-level")
    results = [check(family, tokenizer, CONVERSATIONS[kind]) for kind in QUICK]
    assert results[:3] == ["equal"] * 3
    check_spelled(family, tokenizer)


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("name", ["qwen3", "phi3"])
def test_word_marks_stand_where_transformers_puts_them(name: str, kind: str) -> None:
    tokenizer = make_tokenizer(name, kind)
    chats = [CONVERSATIONS[title] for title in QUICK[:3]]
    assert [check(FAMILIES[name], tokenizer, chat) for chat in chats] == ["equal"] * 3
    check_spelled(FAMILIES[name], tokenizer)


@pytest.mark.parity
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_conversation_of_every_family_is_that_of_transformers(name: str, kind: str) -> None:
    family = FAMILIES[name]
    tokenizer = make_tokenizer(name, kind)
    results = {title: check(family, tokenizer, chat) for title, chat in CONVERSATIONS.items()}
    assert sum(result == "equal" for result in results.values()) >= 11, results
    check_spelled(family, tokenizer)
