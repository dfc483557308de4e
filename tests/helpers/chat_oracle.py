"""Tokenizers with the templates of the families, and transformers' tokens of a chat."""

from __future__ import annotations

import json
import re
from typing import Any

from helpers.chat_families import FAMILIES, template
from mlx_distill.records import Message

ANSWER = '{"label": "fine", "confidence": 80}'
TEXTS = [ANSWER, "what a nice day, and this one? system user assistant\n\n", "kind, fine. Date: 2025"] * 9


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


def is_dropped(reason: str, text: str, chat: list[Message]) -> bool:
    """Whether transformers' text indeed lacks what we refuse a chat for."""
    known = re.search(r"does not know (\w+)", reason)
    if known:
        shown = {"tools": "finds all", "tool_calls": "<rain>", "reasoning_content": "kind words"}
        return shown[known[1]] not in text
    role = re.search(r"does not show the (\w+) turn", reason)
    return role is not None and any(m.role == role[1] and m.content not in text for m in chat)
