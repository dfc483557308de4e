"""ChatML as text: the turns of a chat between its two markers, as many tools train on them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from mlx_distill.errors import DataError
from mlx_distill.records import Message

COLUMN = "text"
"""The column of the text."""
_START, _END = "<|im_start|>", "<|im_end|>"
_TURN = re.compile(r"<\|im_start\|>([a-z]+)\n(.*?)<\|im_end\|>\s*", re.DOTALL)


def to_chatml(messages: Sequence[Message]) -> str:
    r"""A chat as text. :func:`chatml_row` reads it.

    Raises:
        DataError: the text would lose something of the chat, or mean another one.

    >>> to_chatml([Message("user", "Hi"), Message("assistant", "Hello")])
    '<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n'
    """
    for number, message in enumerate(messages):
        for marker in (_START, _END):
            if marker in message.content:
                raise DataError(f"messages[{number}] contains {marker}, which would end or begin a turn")
        if message.extra:
            raise DataError(
                f"messages[{number}] has {', '.join(message.extra)}, for which ChatML has no place"
            )
        if not message.trained:
            raise DataError(f"messages[{number}] has weight 0, for which ChatML has no place")
    return "".join(f"{_START}{turn.role}\n{turn.content}{_END}\n" for turn in messages)


def chatml_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row whose column ``text`` is a chat in ChatML, as a row with ``messages``.

    Raises:
        DataError: it is no text, or another one.
    """
    text = row.get(COLUMN)
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"no ChatML: the column {COLUMN!r} holds no text")
    turns, end, text = [], 0, text.strip()
    for match in _TURN.finditer(text):
        if match.start() != end or _START in match[2]:
            break
        turns.append({"role": match[1], "content": match[2]})
        end = match.end()
    if end != len(text):
        raise DataError(
            f"no ChatML: character {end + 1} of the text is neither the beginning of a turn nor within one",
            fix=f"write each turn as {_START}ROLE, a line end, its text and {_END}",
        )
    return {**{key: value for key, value in row.items() if key != COLUMN}, "messages": turns}
