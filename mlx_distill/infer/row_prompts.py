"""Rows to the prompts that a model reads, or to the reason why one cannot be asked."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from mlx_distill.data.rows import Item, to_item
from mlx_distill.errors import ConfigError, DataError
from mlx_distill.infer.long_items import CutItem, cut_middle
from mlx_distill.infer.predict import BAD_ROW, item_prompt, unread
from mlx_distill.records import Prediction
from mlx_distill.tasks.task import Task
from mlx_distill.text import listed

Row = Mapping[str, Any]

LONG_POLICIES = ("refuse", "cut")
_LONG_PROMPT = 8192  # tokens, from which on reading a prompt takes minutes on slow machines


def check_long(long: str) -> None:
    """Refuse another policy for long rows than the two that there are."""
    if long not in LONG_POLICIES:
        raise ConfigError(f"long: {long!r}", fix=f"one of {', '.join(LONG_POLICIES)}")


class RowPrompts:
    """From a row and its place to its item and prompt, or to the prediction of one that cannot be asked.

    Args:
        tokenizer: The model's.
        task: Its prompt.
        max_prompt_tokens: The longest prompt; None for any.
        long: What becomes of longer ones: ``refuse`` or ``cut``.
        note: Is told of prompts that take long to read.
    """

    def __init__(
        self,
        tokenizer: Any,
        task: Task,
        max_prompt_tokens: int | None,
        long: str = "refuse",
        note: Callable[[str], None] = lambda text: None,
    ) -> None:
        check_long(long)
        self.tokenizer, self.task, self.max_prompt_tokens, self.long = (
            tokenizer,
            task,
            max_prompt_tokens,
            long,
        )
        self._note = note
        self._longest = _LONG_PROMPT // 2  # prompt that was noted

    def __call__(
        self, row: Row | str | DataError, where: str, task: Task | None = None
    ) -> CutItem | Prediction:
        """An item and its prompt, or the prediction of one that cannot be asked."""
        task = task or self.task
        try:
            item = checked_item(row, task, where)
            prompt = item_prompt(self.tokenizer, item)
        except DataError as error:
            return _bad_row(row, task, where, error)
        limit = self.max_prompt_tokens
        if isinstance(row, DataError) or limit is None or len(prompt) <= limit:
            if len(prompt) >= 2 * self._longest:
                self._longest = len(prompt)
                self._note(f"note: {where}: a prompt of {len(prompt):,} tokens, which takes long to read")
            return CutItem(item, prompt, {})
        tokenize = functools.partial(item_prompt, self.tokenizer)
        short = cut_middle(row, item, task, limit, tokenize) if self.long == "cut" else None
        if short is not None:
            return short
        problem = f"the prompt has {len(prompt):,} tokens"
        fix = "long='cut' (--long cut) leaves out the middle of its text"
        if self.long == "cut":
            problem, fix = f"{problem}, too many even without its longest text", "give it less text"
        message = f"{where}: {problem}, and at most {limit:,} are read ({fix})"
        return replace(unread(item, len(prompt), limit), error=message)


def checked_item(row: Row | str | DataError, task: Task, where: str) -> Item:
    """The item of a row, which must have a text."""
    if isinstance(row, DataError):
        raise row
    item = to_item(row, task, where)
    if isinstance(row, Mapping) and all(name in row for name in task.input_fields):
        texts = [str(row[name]) for name in task.input_fields]
        named = listed(task.input_fields)
    else:
        texts = [row] if isinstance(row, str) else [m.content for m in item.messages if m.role == "user"]
        named = "the text"
    if not any(text.strip() for text in texts):
        raise DataError(f"{where}: {named}: empty", fix="fill it in, or leave the row out")
    return item


def _bad_row(row: Row | str | DataError, task: Task, where: str, error: DataError) -> Prediction:
    """The prediction of a row that cannot be asked; without an id of its own it has its place as one."""
    own = row.get(task.id, row.get("id")) if isinstance(row, Mapping) else None
    id = str(own) if isinstance(own, (str, int)) and own != "" else where
    return Prediction(id, "", None, None, None, error=str(error), error_kind=BAD_ROW)
