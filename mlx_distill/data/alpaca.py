"""The layout of Alpaca: a row with an instruction, its input and an output."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from mlx_distill.data.messages import parse_text, show
from mlx_distill.errors import DataError
from mlx_distill.records import Message


def alpaca_turns(row: Mapping[str, Any], needs_answer: bool) -> tuple[list[Message], str | None]:
    """The turns before the answer, and the answer: of a row with instruction, input, output, system and
    history.

    Args:
        row: The row.
        needs_answer: Whether an empty output is an error; else the answer is None.

    Raises:
        DataError: what is wrong.
    """
    instruction, output = row.get("instruction"), row.get("output")
    if not isinstance(instruction, str):
        raise DataError(f"instruction: text is needed, not {show(instruction)}")
    extra = row.get("input") or ""
    if not isinstance(extra, str):
        raise DataError(f"input: text is needed, not {show(extra)}")
    empty = output is None or output == ""
    if empty and needs_answer:
        raise DataError("no assistant turn: output is empty")
    turns = [Message("system", parse_text(row["system"], "system"))] if row.get("system") else []
    turns += _history(row.get("history"))
    user = f"{instruction.strip()}\n\n{extra.strip()}".strip()
    return [*turns, Message("user", user)], None if empty else parse_text(output, "output")


def _history(pairs: Any) -> list[Message]:
    """The earlier turns of an Alpaca row, which are pairs of a question and an answer."""
    if isinstance(pairs, str) and pairs.strip():
        with suppress(ValueError, RecursionError):  # a CSV file holds them as JSON text
            pairs = json.loads(pairs)
    if not pairs:
        return []
    if not isinstance(pairs, list):
        raise DataError(f"history: a list of pairs is needed, not {show(pairs)}")
    turns = []
    for index, pair in enumerate(pairs):
        if not isinstance(pair, list) or len(pair) != 2:
            raise DataError(f"history[{index}]: a question and an answer are needed, not {show(pair)}")
        for role, text in zip(("user", "assistant"), pair, strict=True):
            turns.append(Message(role, parse_text(text, f"history[{index}]")))
    return turns
