"""Whether a model thinks before it answers: a fact of its folder, and of the tokenizer that is read from it.

``thinking.json`` beside the tokenizer has ``max_tokens``, the most tokens before the answer. Prompts of such
a tokenizer (:func:`mlx_distill.data.chat.prompt_ids`) end where its chat template begins thinking; without
the file they end where the answer begins.
"""

from __future__ import annotations

import re
import weakref
from pathlib import Path
from typing import Any

from mlx_distill.errors import FileError
from mlx_distill.storage import read_json, write_json

FILE_NAME = "thinking.json"
_BLOCK = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)
_budgets: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()


def thinking_budget(tokenizer: Any) -> int:
    """The most tokens that the tokenizer's model thinks before an answer; 0 where it answers at once."""
    try:
        return _budgets.get(tokenizer, 0)
    except TypeError:  # no weak references: not one of ours
        return 0


def set_thinking(tokenizer: Any, max_tokens: int) -> None:
    """Let prompts of a tokenizer leave thinking open, or with 0 begin the answer."""
    if max_tokens:
        _budgets[tokenizer] = max_tokens
    else:
        _budgets.pop(tokenizer, None)


def read_thinking(folder: Path) -> int:
    """The ``max_tokens`` of a model's folder; 0 where it has no such file.

    Raises:
        FileError: a file that says something else.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        return 0
    raw = read_json(path)
    value = raw.get("max_tokens") if isinstance(raw, dict) else None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise FileError(f"{path}: max_tokens: a whole number above 0 is needed", fix="correct it")
    return value


def write_thinking(folder: Path, max_tokens: int) -> None:
    """Write ``thinking.json``, or with 0 remove one that came with the base."""
    if max_tokens:
        write_json(folder / FILE_NAME, {"max_tokens": max_tokens})
    else:
        (folder / FILE_NAME).unlink(missing_ok=True)


def split_block(text: str) -> tuple[str, str]:
    """The thinking that a text begins with, in a block of its own, and what stands behind it.

    >>> split_block("<think>\\nIt rains.\\n</think>\\n\\n{}"), split_block("{}")
    (('It rains.', '{}'), ('', '{}'))
    """
    match = _BLOCK.match(text)
    return (match[1].strip(), text[match.end() :]) if match else ("", text)
