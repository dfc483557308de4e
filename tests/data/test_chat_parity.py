"""What the model reads equals what transformers' ``apply_chat_template`` gives for the same messages:
templates in the structure of thirteen families, conversations of many kinds, three kinds of tokenizers.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
from helpers.chat_families import FAMILIES, Family, template

from mlx_distill.data.chat import prompt_ids, render
from mlx_distill.errors import DataError, ModelError
from mlx_distill.records import Message

ANSWER = '{"label": "fine", "confidence": 80}'
THOUGHT = "<think>\nkind words\n</think>\n\nfine"
TEXTS = [ANSWER, "what a nice day, and this one? system user assistant\n\n", "kind, fine. Date: 2025"] * 9


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


def make_tokenizer(name: str, kind: str) -> Any:
    from tokenizers import (
        AddedToken,
        Tokenizer,
        models,
        trainers,
    )
    from transformers import PreTrainedTokenizerFast

    family = FAMILIES[name]
    core = Tokenizer(models.BPE(byte_fallback=kind != "byte-level", unk_token=None))
    trainer: dict[str, Any] = {"vocab_size": 600, "show_progress": False}
    if kind == "byte-level":
        trainer["initial_alphabet"] = set_byte_level(core)
    else:
        trainer["special_tokens"] = set_word_marks(core, kind)
    core.train_from_iterator(TEXTS, trainers.BpeTrainer(**trainer))
    if kind != "byte-level":  # bytes are no added tokens
        core = without_added_tokens(core)
    special = dict.fromkeys(["<s>", family.eos, *family.special])
    core.add_special_tokens(
        [AddedToken(text, special=True, normalized=False, rstrip=family.rstrip) for text in special]
    )
    core.add_tokens([AddedToken(text, special=False, normalized=False) for text in family.ordinary])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token=family.eos)
    # transformers' own rendering has the same fixed date as ours.
    date = "{%- macro strftime_now(f) %}{{ '2025-01-01' if '-' in f else '01 Jan 2025' }}{% endmacro %}"
    tokenizer.chat_template = (date if "strftime_now" in template(name) else "") + template(name)
    return tokenizer


def set_byte_level(core: Any) -> list[str]:
    """Byte-level pre-tokenizer and decoder; the alphabet."""
    from tokenizers import Regex, decoders, pre_tokenizers

    pattern = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    return list(pre_tokenizers.ByteLevel.alphabet())


def set_word_marks(core: Any, kind: str) -> list[str]:
    """Word marks before every text, or before the first one; the tokens of single bytes."""
    from tokenizers import decoders, normalizers, pre_tokenizers

    if kind == "every text":
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    spaces, first = decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)
    core.decoder = decoders.Sequence([spaces, decoders.ByteFallback(), decoders.Fuse(), first])
    return [f"<0x{byte:02X}>" for byte in range(256)]


def without_added_tokens(core: Any) -> Any:
    import json

    from tokenizers import Tokenizer

    return Tokenizer.from_str(json.dumps({**json.loads(core.to_str()), "added_tokens": []}))


def own(tokenizer: Any, chat: list[Message], **more: Any) -> list[int]:
    """transformers' tokens of a chat."""
    messages = [{"role": m.role, "content": m.content, **m.extra} for m in chat]
    tools = messages[0].pop("tools", None)
    ids = tokenizer.apply_chat_template(
        messages,
        tools=tools,
        return_dict=False,
        enable_thinking=False,
        reasoning_effort="low",
        **more,
    )
    return [int(token) for token in ids]


def decode(tokenizer: Any, tokens: Any) -> str:
    ids = [int(token) for token in tokens]
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


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


def is_dropped(reason: str, text: str, chat: list[Message]) -> bool:
    """Whether transformers' text indeed lacks what we refuse a chat for."""
    known = re.search(r"does not know (\w+)", reason)
    if known:
        shown = {"tools": "finds all", "tool_calls": "<rain>", "reasoning_content": "kind words"}
        return shown[known[1]] not in text
    role = re.search(r"does not show the (\w+) turn", reason)
    return role is not None and any(m.role == role[1] and m.content not in text for m in chat)


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
