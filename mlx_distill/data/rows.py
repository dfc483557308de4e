"""One row of a user's data as one checked chat: rows of any known layout in, :class:`Example` out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mlx_distill.data.alpaca import alpaca_turns
from mlx_distill.data.answer_marker import cut_fields, cut_turns
from mlx_distill.data.answers import DROP, answer_columns, valid_answer
from mlx_distill.data.chatml import chatml_row
from mlx_distill.data.json_values import json_row, json_types
from mlx_distill.data.layouts import chat_column, chat_of, closest, listed, missing_fields
from mlx_distill.data.messages import (
    OPENAI_ROLES,
    message_from_row,
    message_to_row,
    parse_turns,
    show,
    texts_of,
    with_tools,
)
from mlx_distill.errors import DataError
from mlx_distill.recipe import ValueConfig
from mlx_distill.records import Example, Message
from mlx_distill.tasks.answer import dump_answer, parse_answer
from mlx_distill.tasks.task import Task
from mlx_distill.thinking import split_block

Row = Mapping[str, Any]

_PREPARED = frozenset({"id", "messages", "fields", "answer", "set"})  # keys of a row of the prepare stage
# Keys of the chat formats; every other key is one of the row's fields.
_CHAT_KEYS = _PREPARED | {"prompt", "completion", "tools", "system"}
_NEEDS_CHATS = (
    "without a task each row is a chat: messages (or conversations), prompt and completion, or instruction "
    "and output; for rows with other columns name a task"
)
_ALPACA_KEYS = _CHAT_KEYS | {"instruction", "input", "output", "history"}


def to_example(
    raw: Row,
    task: Task,
    where: str,
    columns: Mapping[str, str] | None = None,
    format: str = "auto",
    values: Mapping[str, ValueConfig] | None = None,
    answer_after: str | None = None,
) -> Example:
    """A row of any known format as a checked chat whose last turn is the canonical text of a valid answer.

    The formats:

    - ``messages``: ``{"messages": [{"role", "content"}, ...]}``, with its own system prompt or none;
    - ``openai``: the same with developer and tool turns and content parts, or ``{"prompt", "completion"}``;
    - ``sharegpt``: the turns under ``conversations`` (or ``conversation``, ``dialogue``, ``dialog``,
      ``chat``), with ``from`` and ``value`` or with ``role`` and ``content``, and ``system``?;
    - ``alpaca``: ``{"instruction", "input"?, "output", "system"?, "history"?}``, where ``history`` holds
      the earlier turns as pairs;
    - ``chatml``: the column ``text`` with a chat in ChatML;
    - ``plain``: the fields that the task's prompt names, and ``answer`` or the answer's own fields as
      columns.

    The answer may be the label alone where the schema needs no other field. Values that JSON has no form for
    are written as text or left out, see :func:`~mlx_distill.data.json_values.json_row`.

    The id is the task's id field, else ``id``, else a hash of the chat. The answer's text is normalised to
    NFC here, and nowhere else.

    Args:
        raw: The row.
        task: Prompt and answer schema.
        where: ``file:line``, the beginning of every error message.
        columns: Field of the task to column of the row, where they differ.
        format: One of these, or ``auto``: by the row's keys.
        values: Field of the answer to how its values become those of the schema.
        answer_after: A marker at which the prompt is cut; what stands behind it is the answer of a row that
            has no other.

    Raises:
        DataError: what is wrong with the row, and in which file and line it is.

    >>> properties = {"kind": {"enum": ["ham", "spam"]}, "sure": {"type": "integer"}}
    >>> schema = {"type": "object", "properties": properties}
    >>> task = Task(name="mail", system="Sort mail.", user="{text}", schema=schema, label="kind")
    >>> row = {"text": "Hello!", "sure": 90, "kind": "ham", "sender": "Ann"}
    >>> example = to_example(row, task, "mail.jsonl:1")
    >>> example.messages[-1].content, dict(example.fields)
    ('{"kind": "ham", "sure": 90}', {'sender': 'Ann'})
    """
    columns, values = columns or {}, values or {}
    row, left_out = json_row(_renamed(raw, columns))
    answer: dict[str, Any] | None = None
    try:
        if format == "chatml":
            row, format = chatml_row(row), "openai"
        if task.is_chats:
            parsed, last = _parse_chat(row, task, format)
            _check_json({**parsed.fields, task.id: parsed.id}, (*parsed.prompt, last))
            chat = (*parsed.prompt, last)
            return Example(parsed.id or _hash_id(chat), chat, parsed.fields)
        row = answer_columns(row, values)
        if answer_after:
            parsed = _cut_at(row, task, format, answer_after)
        else:
            parsed = _parse_row(row, task, format, needs_answer=True)
        _check_turns(parsed)
        answer = valid_answer(parsed.answer, task, values)
        thought = {"reasoning_content": parsed.thinking} if parsed.thinking else {}
        chat = (*parsed.prompt, Message("assistant", dump_answer(answer, task.schema), extra=thought))
        _check_json({**parsed.fields, task.id: parsed.id}, chat)
    except DataError as error:
        fix = _absent_column(raw, columns) or error.fix or DROP
        raise DataError(f"{where}: {error.message}{_about(left_out)}", fix=fix) from error
    return Example(parsed.id or _hash_id(chat), chat, parsed.fields, answer)


def _renamed(raw: Row, columns: Mapping[str, str]) -> dict[str, Any]:
    """The row with its columns under the names of the task's fields."""
    renamed = {field: raw[column] for field, column in columns.items() if column in raw}
    return {key: value for key, value in raw.items() if key not in columns.values()} | renamed


def _absent_column(raw: Row, columns: Mapping[str, str]) -> str | None:
    """The fix for a row that lacks a column that ``columns`` names."""
    absent = [column for column in columns.values() if column not in raw]
    if not absent:
        return None
    near = closest(absent[0], raw)
    hint = f"; did you mean {near!r}?" if near else ""
    return f"correct columns: the row has no column {absent[0]!r}, it has {listed(raw)}{hint}"


def _about(left_out: Mapping[str, str]) -> str:
    """What to say of columns that are not text, in the error of a row that may need them."""
    return "".join(f"; the column {name!r} holds {kind}, not text" for name, kind in left_out.items())


class Item(NamedTuple):
    """One row that a model is to answer; ``messages`` are the turns before the answer."""

    id: str
    messages: tuple[Message, ...]
    fields: Mapping[str, Any]


def to_item(row: Row | str, task: Task, where: int | str = 1) -> Item:
    """A row that a model is to answer: one of any known format, with or without an answer, or a text alone.

    Id, prompt and fields are those of :func:`to_example`; the id of a row with neither an id nor a valid
    answer is a hash of its prompt. A prepared row is taken as it is.

    Args:
        row: The row, or the text of a task whose prompt names one field.
        task: Prompt and answer schema.
        where: The beginning of every error message: ``file:line``, or the number of the item.

    Raises:
        DataError: a field of the prompt is missing, or the row is neither a mapping nor a text.

    >>> schema = {"type": "object", "properties": {"answer": {"enum": ["yes", "no"]}}}
    >>> task = Task("t", system="", user="{text}", schema=schema, label="answer", slices=("group",))
    >>> item = to_item({"text": "Hello.", "group": "none", "id": 7}, task)
    >>> item.id, dict(item.fields), item.messages[0].role, item.messages[0].content
    ('7', {'group': 'none'}, 'user', 'Hello.')
    """
    where = f"item {where}" if isinstance(where, int) else where
    if isinstance(row, str):
        if len(task.input_fields) != 1:
            needed = ", ".join(task.input_fields)
            raise DataError(
                f"{where}: a text alone, and the task {task.name!r} needs {needed}",
                fix="give a mapping with these fields",
            )
        row = {task.input_fields[0]: row}
    if not isinstance(row, Mapping):
        raise DataError(
            f"{where}: a {type(row).__name__}, neither a mapping nor a text",
            fix="give one mapping an item",
        )
    if row.keys() == _PREPARED and row["id"] and _are_prepared(row["messages"]):
        prepared = from_row(row)
        return Item(str(prepared.id), _without_answer(prepared.messages), prepared.fields)
    row, left_out = json_row(row)
    try:
        parsed = _parse_row(row, task, "auto", needs_answer=False)
        _check_prompt(parsed.prompt)
        _check_json({}, parsed.prompt)
    except DataError as error:
        fix = "correct the row, or leave it out" if error.fix in (None, DROP) else error.fix
        raise DataError(f"{where}: {error.message}{_about(left_out)}", fix=fix) from error
    return Item(parsed.id or _item_id(parsed, task), parsed.prompt, parsed.fields)


def _are_prepared(turns: Any) -> bool:
    """Whether turns are those of a prepared row: texts with a role."""
    return (
        isinstance(turns, list)
        and bool(turns)
        and all(isinstance(turn, Mapping) and isinstance(turn.get("role"), str) for turn in turns)
        and all(isinstance(turn.get("content"), str) for turn in turns)
    )


class _ParsedRow(NamedTuple):
    """The parts of a row: its own id or None, the turns before the answer, the answer as the row has it or
    None, the other columns, and the thinking before the answer.
    """

    id: str | None
    prompt: tuple[Message, ...]
    answer: Any
    fields: Mapping[str, Any]
    thinking: str = ""


def _parse_row(row: Row, task: Task, format: str, *, needs_answer: bool) -> _ParsedRow:
    """Parse a row of any format. Without ``needs_answer`` a missing or empty answer is no error."""
    format = _format_of(row, task) if format == "auto" else format
    thought = ""
    if format == "plain":
        messages, answer = _plain(row, task, needs_answer)
    elif format == "alpaca":
        messages, answer = alpaca_turns(row, needs_answer)
    else:
        messages = _chat(row, task, {} if format == "messages" else OPENAI_ROLES, needs_answer)
        answer = _answer_turn(messages, needs_answer)
        thought = messages[-1].extra.get("reasoning_content", "") if answer is not None else ""
        messages = with_tools(_without_answer(messages), row.get("tools"))
    block = ""
    if isinstance(answer, str):
        block, answer = split_block(answer)
    if block and thought and block != thought.strip():
        raise DataError("the answer has a block of thinking, and reasoning_content differs from it", fix=DROP)
    fields = _fields(row, task, format)
    return _ParsedRow(_own_id(row, task), tuple(messages), answer, fields, block or thought.strip())


def _parse_chat(row: Row, task: Task, format: str) -> tuple[_ParsedRow, Message]:
    """A row of a recipe without a task, and its last turn, which is the assistant's and kept whole: a text,
    calls of tools, thinking; it may be shown without being trained where an earlier turn is.
    """
    format = _format_of(row, task) if format == "auto" else format
    if format == "plain":
        raise DataError(f"no chat: the row has {listed(row) or 'no columns'}", fix=_NEEDS_CHATS)
    if format == "alpaca":
        prompt, answer = alpaca_turns(row, needs_answer=True)
        messages = [*prompt, Message("assistant", answer or "")]
    else:
        messages = _chat(row, task, {} if format == "messages" else OPENAI_ROLES, needs_answer=True)
        messages = with_tools(messages, row.get("tools"))
    is_answered = bool(messages) and messages[-1].role == "assistant"
    prompt = messages[:-1] if is_answered else messages
    answer = messages[-1].content if is_answered else None
    parsed = _ParsedRow(_own_id(row, task), tuple(prompt), answer, _fields(row, task, format))
    _check_turns(parsed)
    if not any(turn.trained for turn in messages if turn.role == "assistant"):
        raise DataError("no turn of the assistant is to be trained (weight 0)", fix=DROP)
    return parsed, messages[-1]


def _cut_at(row: Row, task: Task, format: str, marker: str) -> _ParsedRow:
    """Parse a row whose prompt holds the answer behind a marker."""
    behind = None
    if (_format_of(row, task) if format == "auto" else format) == "plain":
        row, behind = cut_fields(row, task.input_fields, marker)
    own = _parse_row(row, task, format, needs_answer=False)
    if own.answer is not None:
        own = _parse_row(row, task, format, needs_answer=True)
    prompt, behind_turn = cut_turns(own.prompt, marker)
    behind = behind or behind_turn
    if own.answer is None:
        if not behind:
            raise DataError(f"no answer, and none behind {marker!r} in the prompt", fix=DROP)
        return own._replace(prompt=prompt, answer=behind)
    said, given = _label_of(behind, task), _label_of(own.answer, task)
    if behind and task.label and said.casefold() != given.casefold():
        raise DataError(f"the text behind {marker!r} is {show(said)}, the answer {show(given)}", fix=DROP)
    return own._replace(prompt=prompt)


def _label_of(answer: Any, task: Task) -> str:
    """The label of an answer as a row has it: an object, its JSON text, or the label alone."""
    parsed = parse_answer(answer, {})[0] if isinstance(answer, str) else answer
    return str(parsed.get(task.label or "") if isinstance(parsed, Mapping) else answer)


def _answer_turn(messages: Sequence[Message], needs_answer: bool) -> str | None:
    """The content of the last turn where that is the assistant's. What the turn holds besides is no part of a
    task's answer: an error where the answer is needed, never dropped.
    """
    if not messages or messages[-1].role != "assistant":
        return None
    last = messages[-1]
    if needs_answer and not last.trained:
        raise DataError("the last turn, which is the answer, is not to be trained (weight 0)", fix=DROP)
    if needs_answer and "tool_calls" in last.extra:
        raise DataError(
            "tool_calls in the last turn, which is the task's answer and nothing else",
            fix="remove it from the row's last turn, or " + DROP,
        )
    return last.content


def _without_answer(messages: Sequence[Message]) -> tuple[Message, ...]:
    return tuple(messages[:-1] if messages[-1:] and messages[-1].role == "assistant" else messages)


def _format_of(row: Row, task: Task) -> str:
    if "messages" in row:
        return "openai"
    if (
        not task.is_chats
        and all(name in row for name in task.input_fields)
        and ("answer" in row or _has_answer_columns(row, task))
    ):
        return "plain"
    if chat_column(row):
        return "sharegpt"
    if "instruction" in row and "output" in row:
        return "alpaca"
    return "openai" if "prompt" in row and "completion" in row else "plain"


def _has_answer_columns(row: Row, task: Task) -> bool:
    """Whether a row has the answer's fields as columns: the label, or of a task without one any field that is
    not one of the prompt's.
    """
    if task.label is not None:
        return task.label in row
    return any(name in row for name in task.schema["properties"] if name not in task.input_fields)


def _fields(row: Row, task: Task, format: str) -> dict[str, Any]:
    """The columns that are neither prompt nor answer; the title and the fields by which results are sliced
    or clustered are kept in any case.
    """
    kept = {task.title, task.group, task.cluster, *task.slices}
    used = {"answer", "messages", task.id, "id"} | (
        {*task.input_fields, *task.schema["properties"]}
        if format == "plain"
        else _ALPACA_KEYS
        if format == "alpaca"
        else {*_CHAT_KEYS, chat_column(row)}
    )
    fields = {key: value for key, value in row.items() if key in kept or key not in used}
    if format != "plain" and isinstance(row.get("fields"), Mapping):
        fields = {**row["fields"], **fields}
    return fields


def _own_id(row: Row, task: Task) -> str | None:
    """The row's id: the task's id field, else ``id``; None where the row has none."""
    value = row.get(task.id, row.get("id"))
    if value is None or value == "":
        return None
    if not isinstance(value, (str, int)):
        raise DataError(f"{task.id}: text or a whole number is needed, not {show(value)}", fix=DROP)
    return str(value)


def _hash_id(messages: Sequence[Message]) -> str:
    return chat_digest(messages)[:16]


def _item_id(parsed: _ParsedRow, task: Task) -> str:
    """The id of a row without one: that of :func:`to_example` where its answer is valid, else the hash of its
    prompt.
    """
    try:
        text = dump_answer(valid_answer(parsed.answer, task), task.schema)
    except DataError:
        return _hash_id(parsed.prompt)
    return _hash_id((*parsed.prompt, Message("assistant", text)))


def chat_digest(messages: Sequence[Message]) -> str:
    """Hex digest of a chat, from which the id of a row without one is made."""
    turns = [
        [message.role, message.content]
        if message.trained and not message.extra
        else [message.role, message.content, message.trained, message.extra]
        for message in messages
    ]
    text = json.dumps(turns, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _plain(row: Row, task: Task, needs_answer: bool) -> tuple[list[Message], Any]:
    for name in task.input_fields:
        if isinstance(row.get(name), (dict, list)):
            raise DataError(f"{name}: text is needed, not {show(row[name])}")
    properties = task.schema["properties"]
    if "answer" in row and "answer" not in properties:
        answer = row["answer"]
    else:
        answer = _answer_of_columns(row, task) if _has_answer_columns(row, task) else None
    no_answer = answer is None and needs_answer
    missing = [name for name in task.input_fields if row.get(name) is None]
    if missing or no_answer:
        raise missing_fields(row, task, missing, needs_answer=no_answer, has_columns=needs_answer)
    system, user = task.prompt(row)
    return [*([Message("system", system)] if system else []), Message("user", user)], answer


def _answer_of_columns(row: Row, task: Task) -> dict[str, Any]:
    """The answer's fields among the columns. Null is no value of a field that may be left out: tables have no
    other way to say so.
    """
    required = task.schema.get("required", ())
    return {
        key: row[key]
        for key, schema in task.schema["properties"].items()
        if key in row and (row[key] is not None or key in required or "null" in json_types(schema))
    }


def _chat(row: Row, task: Task, aliases: Mapping[str, str], needs_answer: bool) -> list[Message]:
    """The turns of a chat, with one system turn: leading system and developer turns are joined."""
    chat = chat_of(row, task)
    turns = parse_turns(chat.turns, aliases, needs_answer, chat.column)
    if chat.system and chat.system.strip():
        turns = [Message("system", chat.system.strip()), *turns]
    count = next((i for i, turn in enumerate(turns) if turn.role != "system"), len(turns))
    if count > 1:
        extra = {key: value for turn in turns[:count] for key, value in turn.extra.items()}
        text = "\n\n".join(turn.content for turn in turns[:count])
        turns = [Message("system", text, extra=extra), *turns[count:]]
    return turns


def _check_turns(parsed: _ParsedRow) -> None:
    """Refuse an order of turns that is not system?, user, ..., assistant."""
    roles = [message.role for message in parsed.prompt]
    if parsed.answer is None:
        if "assistant" not in roles:
            raise DataError("no assistant turn")
        raise DataError(f"the last turn is the {roles[-1]}'s, not the assistant's")
    _check_prompt(parsed.prompt)


def _check_prompt(prompt: Sequence[Message]) -> None:
    """Refuse turns before an answer that ask nothing, or have a system turn that is not the first."""
    roles = [message.role for message in prompt]
    if "user" not in roles:
        raise DataError("no user turn", fix=DROP)
    if "system" in roles[1:]:
        raise DataError(f"messages[{roles.index('system', 1)}]: a system turn that is not the first")
    if not any(message.content for message in prompt if message.role == "user"):
        raise DataError("the user turn is empty", fix=DROP)


def _check_json(fields: Mapping[str, Any], chat: Sequence[Message]) -> None:
    """Refuse what cannot be written as UTF-8: half surrogate pairs."""
    texts = [(repr(key)[1:-1], json.dumps({key: value}, ensure_ascii=False)) for key, value in fields.items()]
    texts += [(f"the {turn.role}'s turn", "".join(texts_of([turn.content, turn.extra]))) for turn in chat]
    for name, text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{name}: half a surrogate pair, which no text has", fix=DROP) from error


def to_row(example: Example, set_name: str) -> dict[str, Any]:
    """The row of a prepared file. :func:`from_row` is its inverse."""
    messages = [message_to_row(message) for message in example.messages]
    answer = None if example.answer is None else dict(example.answer)
    return {
        "id": example.id,
        "messages": messages,
        "fields": dict(example.fields),
        "answer": answer,
        "set": set_name,
    }


def from_row(row: Row) -> Example:
    """An example from a row of a prepared file, which is not checked again."""
    messages = tuple(message_from_row(turn) for turn in row["messages"])
    return Example(row["id"], messages, row.get("fields") or {}, row.get("answer"))
