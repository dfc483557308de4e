"""Items whose prompt is longer than a model reads: the middle of their longest text is left out."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from mlx_distill.data.rows import Item, to_item
from mlx_distill.tasks.task import Task

MARK = " [...] "
"""What stands in a prompt for the text that was left out."""
_NEAR = 40  # characters within which a cut is moved to white space
_MOST_CHARACTERS = 64  # of a token: more are not tried


class CutItem(NamedTuple):
    """An item with a shorter prompt: its tokens, and what was left out: ``field``, ``removed_characters`` and
    ``removed_tokens``.
    """

    item: Item
    prompt: list[int]
    cut: Mapping[str, Any]


def cut_middle(
    row: Mapping[str, Any] | str,
    item: Item,
    task: Task,
    limit: int,
    tokenize: Callable[[Item], list[int]],
) -> CutItem | None:
    """Cut the middle out of an item's longest text, as little as it takes for the prompt to fit.

    The longest text is the longest of the fields that the task's prompt names, or in a chat the longest turn
    that is not the system's. Words are kept whole where white space is near.

    Args:
        row: The row.
        item: The item that it gave.
        task: Its task.
        limit: Tokens of the prompt, at most.
        tokenize: The prompt of an item.

    Returns:
        The item with its id and fields unchanged, or None where even without the text the prompt is too long.
    """
    field, text, build = _longest_text(row, item, task)

    def shortened(kept: int, whole_words: bool = False) -> tuple[Item, int]:
        start, end = (kept + 1) // 2, len(text) - kept // 2
        if whole_words:
            start, end = _word_end(text, start), _word_start(text, end)
        return build(text[:start].rstrip() + MARK + text[end:].lstrip()), end - start

    def fits(kept: int) -> bool:
        return len(tokenize(shortened(kept)[0])) <= limit

    low, high = 0, min(len(text) - 1, _MOST_CHARACTERS * limit)
    if high < 1 or not fits(0):
        return None
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    for whole_words in (True, False):
        short, removed = shortened(low, whole_words)
        prompt = tokenize(short)
        if len(prompt) <= limit:
            break
    facts = {
        "field": field,
        "removed_characters": removed,
        "removed_tokens": len(tokenize(item)) - len(prompt),
    }
    return CutItem(item._replace(messages=short.messages), prompt, facts)


def _longest_text(
    row: Mapping[str, Any] | str, item: Item, task: Task
) -> tuple[str, str, Callable[[str], Item]]:
    """The name of the longest text of a prompt, the text, and the item with another one in its place."""
    if isinstance(row, str):
        row = {task.input_fields[0]: row}
    texts = {name: row[name] for name in task.input_fields if isinstance(row.get(name), str)}
    if texts:
        field = max(texts, key=lambda name: len(texts[name]))
        if to_item({**row, field: f"{texts[field]}."}, task).messages != item.messages:
            return field, texts[field], lambda text: to_item({**row, field: text}, task)
    turns = item.messages  # a chat, which has none of the task's fields
    place = max(
        (i for i, turn in enumerate(turns) if turn.role != "system"), key=lambda i: len(turns[i].content)
    )

    def build(text: str) -> Item:
        changed = replace(turns[place], content=text)
        return item._replace(messages=(*turns[:place], changed, *turns[place + 1 :]))

    return f"messages[{place}]", turns[place].content, build


def _word_end(text: str, end: int) -> int:
    """The end of the last whole word before a place; of the last whole character where none is near."""
    for place in range(end, max(end - _NEAR, 0), -1):
        if text[place : place + 1].isspace():
            return place
    while end and _continues(text, end):
        end -= 1
    return end


def _word_start(text: str, start: int) -> int:
    """The start of the first whole word behind a place; of the first whole character where none is near."""
    for place in range(start, min(start + _NEAR, len(text))):
        if text[place - 1].isspace():
            return place
    while start < len(text) and _continues(text, start):
        start += 1
    return start


def _continues(text: str, place: int) -> bool:
    """Whether the character at a place belongs to the one before it: a combining mark, a part of an emoji."""
    character = text[place : place + 1]
    return bool(character) and (
        unicodedata.category(character).startswith("M")
        or character == "\u200d"
        or "\U0001f3fb" <= character <= "\U0001f3ff"
        or text[place - 1 : place] == "\u200d"
    )
