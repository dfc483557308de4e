"""Rows as other tools read them: OpenAI's chats, Alpaca, ChatML, one JSON object a line.

An export is equal to its rows when it is read back, or there is none: each line is read with our own reader
while it is written, and rows that would change are named.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_distill.data.chatml import COLUMN, to_chatml
from mlx_distill.data.messages import message_to_row
from mlx_distill.data.rows import to_example
from mlx_distill.errors import ConfigError, DataError
from mlx_distill.records import Example, Message
from mlx_distill.storage import atomic_path, parse_line
from mlx_distill.tasks.task import Task
from mlx_distill.text import counted, known_names

_NAMED = 10  # rows that a refusal names


def openai_row(example: Example) -> dict[str, Any]:
    """A chat as OpenAI's fine-tuning reads it: ``messages``, and ``tools`` where the chat has some."""
    turns, tools = [], None
    for message in example.messages:
        turn = message_to_row(message)
        tools = turn.pop("tools", None) or tools
        if "tool_calls" in turn:
            turn["tool_calls"] = [_call(call) for call in turn["tool_calls"]]
        turns.append(turn)
    return {"messages": turns, **({"tools": tools} if tools else {})}


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    """A call with its arguments as JSON text, which is how OpenAI has them."""
    function = call.get("function", call)
    changed = {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}
    return {**call, "function": changed} if "function" in call else changed


def alpaca_row(example: Example) -> dict[str, Any]:
    """A chat of one question and one answer as ``instruction``, ``input`` and ``output``; its system prompt
    is ``system``.

    Raises:
        DataError: it has other turns, or more than texts.
    """
    turns = list(example.messages)
    system = turns.pop(0).content if turns and turns[0].role == "system" else None
    roles = [turn.role for turn in turns]
    if roles != ["user", "assistant"]:
        raise DataError(
            f"the turns are {', '.join(roles)}, and an Alpaca row holds one of the user and one answer"
        )
    for turn in example.messages:
        _check_plain(turn)
    row = {"instruction": turns[0].content, "input": "", "output": turns[1].content}
    return row if system is None else {**row, "system": system}


def _check_plain(turn: Message) -> None:
    if turn.extra:
        raise DataError(f"the {turn.role}'s turn has {', '.join(turn.extra)}, for which Alpaca has no place")
    if not turn.trained:
        raise DataError(f"the {turn.role}'s turn has weight 0, for which Alpaca has no place")


def chatml_text_row(example: Example) -> dict[str, Any]:
    """A chat as ``text`` in ChatML.

    Raises:
        DataError: it has more than texts, or a marker within one.
    """
    return {COLUMN: to_chatml(example.messages)}


LAYOUTS: Mapping[str, Callable[[Example], dict[str, Any]]] = {
    "openai": openai_row,
    "alpaca": alpaca_row,
    "chatml": chatml_text_row,
}
"""The layouts by the names that ``format`` of a recipe's source has for them."""


def export_line(example: Example, layout: str, task: Task, *, bare: bool = False) -> str:
    """A row as a line of a layout, which our own reader reads as the same row.

    Args:
        example: The row.
        layout: One of :data:`LAYOUTS`.
        task: The task of the row, or :data:`mlx_distill.tasks.task.CHATS`.
        bare: Leave out the id and the other columns; the chat alone is compared then.

    Raises:
        DataError: the layout cannot hold the row.
    """
    row = LAYOUTS[layout](example)
    if not bare:
        row[task.id] = example.id
        if example.fields:
            row["fields"] = dict(example.fields)
    line = json.dumps(row, ensure_ascii=False, allow_nan=False)
    read = to_example(parse_line(line.encode(), layout, 2) or {}, task, layout, format=layout)
    parts = ("messages", "answer") if bare else ("messages", "answer", "id", "fields")
    different = [part for part in parts if getattr(read, part) != getattr(example, part)]
    if different:
        raise DataError(f"read back, {' and '.join(different)} would differ")
    return line


def export_rows(
    rows: Iterable[tuple[str, Example | DataError]],
    path: str | Path,
    layout: str,
    task: Task,
    *,
    bare: bool = False,
) -> int:
    """Write rows as JSON lines of a layout; return how many.

    Args:
        rows: Where each row is from, and the row, or why it is none.
        path: The new file; it is written whole or not at all.
        layout, task, bare: See :func:`export_line`.

    Raises:
        DataError: rows that the layout cannot hold, by their numbers from 1 and the reasons; no rows.
        ConfigError: no such layout.
    """
    if layout not in LAYOUTS:
        raise ConfigError(f"no layout {layout!r}", fix=known_names(layout, list(LAYOUTS), "layouts"))
    refused: list[tuple[int, str]] = []
    count = 0
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for count, (_, example) in enumerate(rows, 1):
            try:
                if isinstance(example, DataError):
                    raise example
                file.write(export_line(example, layout, task, bare=bare) + "\n")
            except (DataError, ValueError) as error:
                refused.append((count, error.message if isinstance(error, DataError) else str(error)))
        if refused:
            raise DataError(_refusal(refused, count, layout), fix=_fix(layout))
        if not count:
            raise DataError("no rows to export", fix="check the data set: mlx-distill data check NAME")
    return count


def _refusal(refused: Sequence[tuple[int, str]], count: int, layout: str) -> str:
    named = "; ".join(f"row {number}: {reason}" for number, reason in refused[:_NAMED])
    more = len(refused) - _NAMED
    return (
        f"not exported to {layout}: {len(refused)} of {counted(count, 'row')} would not be the same: {named}"
        + (
            f"; and rows {', '.join(str(number) for number, _ in refused[_NAMED : _NAMED + 50])}"
            if more > 0
            else ""
        )
        + (" ..." if more > 50 else "")
    )


def _fix(layout: str) -> str:
    other = "" if layout == "openai" else "choose --to openai, which holds any chat, or "
    return f"{other}correct these rows, or leave them out"
