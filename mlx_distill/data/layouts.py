"""The layouts of public data sets: which columns of a row hold a chat, and what is missing in a row that has
none of them.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from mlx_distill.errors import DataError
from mlx_distill.tasks.task import Task

Row = Mapping[str, Any]

CHAT_COLUMNS = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat")
_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "observation": "tool",
}
_KNOWN = (
    "messages or conversations (chats), instruction and output (Alpaca), prompt and completion, or the "
    "task's own fields"
)
# What columns are called in public data sets, for a field of the task that a row lacks.
_INPUT_NAMES = (
    "text content sentence question query prompt input instruction body message review document lyrics"
)
_LABEL_NAMES = "label labels class category target intent tag label_text class_name"
_ANSWER_NAMES = "output response completion result annotation annotations target"


class Chat(NamedTuple):
    """The turns of a row, each a mapping with ``role`` and ``content`` where the row has them so; the column
    that they are from; and the system prompt of a column of its own.
    """

    column: str
    turns: Any
    system: str | None = None


def chat_column(row: Row) -> str | None:
    """The column that holds a chat: ``messages``, or one of the other names with a list of turns."""
    if "messages" in row:
        return "messages"
    return next((name for name in CHAT_COLUMNS if _is_turns(turn_list(row.get(name)))), None)


def chat_of(row: Row, task: Task) -> Chat:
    """The chat of a row: the turns of :func:`chat_column`, or prompt and completion; the system prompt is
    that of the column ``system`` where the chat has none.
    """
    column = chat_column(row) or "messages"
    turns = turn_list(row.get(column))
    if turns is None and "prompt" in row and "completion" in row:
        prompt, completion = turn_list(row["prompt"]), turn_list(row["completion"])
        before = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        after = completion if isinstance(completion, list) else [{"role": "assistant", "content": completion}]
        turns = [*before, *after]
    if isinstance(turns, list):
        turns = [_plain_turn(turn) for turn in turns]
    system = row.get("system")
    named = {task.title, task.group, task.cluster, *task.slices}
    if not isinstance(system, str) or "system" in named or _starts_with_system(turns):
        system = None
    return Chat(column, turns, system)


def turn_list(value: Any) -> Any:
    """The value; a list of turns that a CSV file or a database holds as JSON text, as that list."""
    if isinstance(value, str) and value.lstrip().startswith("[") and value.rstrip().endswith("]"):
        with suppress(ValueError, RecursionError):
            parsed = json.loads(value)
            return parsed if _is_turns(parsed) else value
    return value


def _is_turns(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(turn, Mapping) for turn in value)


def _starts_with_system(turns: Any) -> bool:
    if not _is_turns(turns) or turns[0].get("role") not in ("system", "developer"):
        return False
    return bool(turns[0].get("content"))


def _plain_turn(turn: Any) -> Any:
    """A turn with ``from`` and ``value`` as one with ``role`` and ``content``, and its role under the usual
    name.
    """
    if not isinstance(turn, Mapping):
        return turn
    out = {key: value for key, value in turn.items() if key not in ("from", "value")}
    out.setdefault("role", turn.get("from"))
    if "content" not in out and "value" in turn:
        out["content"] = turn["value"]
    role = out["role"]
    if role == "function_call":
        return {**out, "role": "assistant", **_call(out.get("content"))}
    if isinstance(role, str):
        out["role"] = _ROLES.get(role, role)
    return out


def _call(text: Any) -> dict[str, Any]:
    """The content of a ``function_call`` turn as ``tool_calls``; the text itself where it is no call."""
    with suppress(ValueError, RecursionError, TypeError):
        parsed = json.loads(text)
        calls = parsed if isinstance(parsed, list) else [parsed]
        if calls and all(isinstance(call, dict) and "name" in call for call in calls):
            return {"content": "", "tool_calls": [{"type": "function", "function": call} for call in calls]}
    return {"content": text}


def missing_fields(
    row: Row, task: Task, missing: Sequence[str], *, needs_answer: bool, has_columns: bool = True
) -> DataError:
    """The error of a row that lacks fields of the task's prompt, or its answer, or has no known layout.

    Args:
        row: The row.
        task: Whose fields it lacks.
        missing: The fields of the prompt that it lacks.
        needs_answer: Whether it lacks an answer too.
        has_columns: Whether the row is of a recipe's source, which may say ``columns:``.
    """
    keys = _listed(row)
    if missing and missing[0] in row:
        return DataError(f"the field {missing[0]!r} is null", fix="fill it in, or leave the row out")
    if missing:
        message = f"no field {missing[0]!r}; the row has {keys}"
    elif "answer" in row:
        message = "no answer: the column 'answer' is empty"
    else:
        message = f"no answer: no column {_or([*_label_column(task), 'answer'])}; the row has {keys}"
    chats = [key for key, value in row.items() if _is_turns(turn_list(value))]
    columns: dict[str, str] = {}
    if chats:
        columns = {"messages": chats[0]}
    else:
        columns = _suggested(row, task, missing, needs_answer)
    wanted = ", ".join(task.input_fields)
    needs = f"the task {task.name!r} needs {wanted}" if missing else "add the answer"
    if not has_columns:
        known = "".join(f", such as {column} to {field}" for field, column in columns.items())
        fix = f"{needs}; rename the column of the row{known}"
    elif columns:
        spelled = ", ".join(f"{field}: {column}" for field, column in columns.items())
        fix = f"write columns: {{{spelled}}} in the source, if that is what they are; {needs}"
    else:
        fix = f"{needs}, or name the columns with columns: {{FIELD: COLUMN}}"
    if missing:
        fix += _corrected_prompt(row, task, missing[0])
    if missing and needs_answer:
        fix += f"; layouts known: {_KNOWN}"
    return DataError(message, fix=fix)


_LABEL_LISTS = ("labels", "options", "classes", "categories", "values", "choices")


def _corrected_prompt(row: Row, task: Task, field: str) -> str:
    """The other fix for a field of the prompt: another spelling of it, the list of labels, or that it is
    none.
    """
    if task.label and field in (*_LABEL_LISTS, f"{task.label}s"):
        return f"; or correct the prompt: the list of labels is written {{{task.label}:options}}"
    if near := closest(field, row):
        return f"; or correct the prompt: {{{near}}}, not {{{field}}}"
    if " " in field:
        return f"; or correct the prompt: braces that are text are written {{{{{field}}}}}"
    return ""


def _label_column(task: Task) -> list[str]:
    """The column that a row's answer is known by: the label, or the first field of a task without one."""
    return [task.label or next(iter(task.schema["properties"]), "answer")]


def _suggested(row: Row, task: Task, missing: Sequence[str], needs_answer: bool) -> dict[str, str]:
    """The columns of the row that the missing fields of the task may be called by."""
    own = {*task.input_fields, *task.schema["properties"]}
    free = [key for key in row if key not in own]
    columns: dict[str, str] = {}
    for field in missing:
        usual = _INPUT_NAMES if len(missing) == 1 else ""
        _suggest(columns, field, [key for key in free if isinstance(row[key], str)], usual)
    if needs_answer:
        left = [key for key in free if key not in columns.values()]
        for label in _label_column(task):
            _suggest(columns, label, left, _LABEL_NAMES)
        if "answer" not in row and not set(_label_column(task)) & columns.keys():
            _suggest(columns, "answer", left, _ANSWER_NAMES)
    return columns


def _suggest(columns: dict[str, str], field: str, free: Sequence[str], usual: str) -> None:
    near = closest(field, free) or next((name for name in usual.split() if name in free), None)
    if near:
        columns[field] = near


def closest(name: str, options: Iterable[str]) -> str | None:
    """The option that is spelled most like the name, or None.

    >>> closest("chanel", ["body", "Channel"])
    'Channel'
    """
    lower = {option.lower(): option for option in options}
    near = difflib.get_close_matches(name.lower(), lower, n=1)
    return lower[near[0]] if near else None


def listed(names: Iterable[str], most: int = 12) -> str:
    """Names for a message, at most ``most`` of them."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _listed(row: Row) -> str:
    return listed(row) or "no columns"


def _or(names: Sequence[str]) -> str:
    return " or ".join(repr(name) for name in names)
