"""One row of anybody's data to one checked chat: messages, Alpaca, OpenAI and plain rows in, :class:`Example`
out.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_distill.data.sources import read_source as read_source
from mlx_distill.errors import DataError
from mlx_distill.records import Example, Message
from mlx_distill.storage import read_jsonl
from mlx_distill.tasks.answer import check_answer, dump_answer, parse_answer
from mlx_distill.tasks.task import Task

Row = Mapping[str, Any]

_DROP = "drop the row, or leave such rows out with --set data.drop_invalid=true"
_CHAT_KEYS = frozenset(
    {
        "messages",
        "instruction",
        "input",
        "output",
        "prompt",
        "completion",
        "answer",
        "id",
        "fields",
        "set",
        "tools",
    }
)
_ROLES = ("system", "user", "assistant")
_OPENAI_ROLES = {"developer": "system", "tool": "user", "function": "user"}


def to_example(
    raw: Row, task: Task, where: str, columns: Mapping[str, str] | None = None, format: str = "auto"
) -> Example:
    """A row of any known shape as a checked chat whose last turn is the canonical text of a valid answer.

    ========
    =====================================================================================================
    messages ``{"messages": [{"role", "content"}, ...]}``: its own system prompt, or none openai   the same
    with developer and tool turns and content parts, or ``{"prompt", "completion"}`` alpaca
    ``{"instruction", "input"?, "output", "system"?}`` plain    the fields that the task's prompt names, and
    ``answer`` or the answer's own fields as columns ========
    =====================================================================================================

    The answer's text is brought to Unicode's NFC here, and nowhere else.

    Args:
        raw: The row.
        task: Prompt and answer schema.
        where: ``file:line``, the beginning of every message.
        columns: Field of the task to column of the row, where they differ.
        format: One of the four, or ``auto``: by the row's keys.

    Raises:
        DataError: what is wrong with the row, and where it stands.

    >>> schema = {"type": "object", "properties": {"kind": {"enum": ["ham", "spam"]}, "sure": {"type": "integer"}}}
    >>> task = Task(name="mail", system="Sort mail.", user="{text}", schema=schema, label="kind")
    >>> example = to_example({"text": "Hello!", "sure": 90, "kind": "ham", "sender": "Ann"}, task, "mail.jsonl:1")
    >>> example.messages[-1].content, dict(example.fields)
    ('{"kind": "ham", "sure": 90}', {'sender': 'Ann'})
    """
    row = dict(raw)
    for field, column in (columns or {}).items():
        if column in row:
            row[field] = row.pop(column)
    kind = _format(row, task) if format == "auto" else format
    try:
        if kind == "plain":
            messages, answer = _plain(row, task)
        else:
            messages = {"alpaca": _alpaca, "openai": _openai, "messages": _messages}[kind](row)
            answer = _answer(_check_turns(messages), task)
        if not any(message.content for message in messages if message.role == "user"):
            raise DataError("the user turn is empty", fix=_DROP)
        example = _example(row, task, kind, messages, answer)
    except DataError as error:
        raise DataError(f"{where}: {error.message}", fix=error.fix or _DROP) from error
    return example


def _format(row: Row, task: Task) -> str:
    if "messages" in row:
        return "openai"
    if all(name in row for name in task.input_fields) and ("answer" in row or task.label in row):
        return "plain"
    if "instruction" in row and "output" in row:
        return "alpaca"
    return "openai" if "prompt" in row and "completion" in row else "plain"


def _example(row: Row, task: Task, kind: str, messages: Sequence[Message], answer: Row) -> Example:
    # What the chat already says is not kept twice; the title and the fields that results are split by are.
    shown = {task.title, task.group, *task.slices}
    taken = {"answer", "messages", task.id, "id"} | (
        set(task.input_fields) | set(task.schema["properties"]) if kind == "plain" else _CHAT_KEYS
    )
    fields = {key: value for key, value in row.items() if key in shown or key not in taken}
    if kind != "plain" and isinstance(row.get("fields"), Mapping):
        fields = {**row["fields"], **fields}
    chat = (*messages[:-1], Message("assistant", dump_answer(answer, task.schema)))
    try:
        json.dumps(
            [fields, [message.content for message in chat]], ensure_ascii=False, allow_nan=False
        ).encode()
    except (TypeError, ValueError) as error:
        raise DataError(
            f"a value that cannot be written as JSON: {' '.join(str(error).split())[:120]}", fix=_DROP
        ) from error
    name = row.get(task.id, row.get("id"))
    if name is not None and not isinstance(name, (str, int)):
        raise DataError(f"{task.id}: text or a whole number is needed, not {_show(name)}", fix=_DROP)
    return Example(str(name) if name not in (None, "") else content_digest(chat)[:16], chat, fields, answer)


def content_digest(messages: Sequence[Message]) -> str:
    """Hex digest of a chat: what a row is called that has no id of its own."""
    text = json.dumps([[message.role, message.content] for message in messages], ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _plain(row: Row, task: Task) -> tuple[list[Message], dict[str, Any]]:
    for name in task.input_fields:
        if isinstance(row.get(name), (dict, list)):
            raise DataError(f"{name}: text is needed, not {_show(row[name])}")
    properties = task.schema["properties"]
    if "answer" in row and "answer" not in properties:
        answer = row["answer"]
        given = answer is not None
    else:
        answer = {key: row[key] for key in properties if key in row}
        given = task.label in row
    if not given:
        raise DataError("no assistant turn, no 'answer' and no column " + repr(task.label), fix=_DROP)
    system, user = task.prompt(row)
    turns = [Message("system", system)] if system else []
    return [*turns, Message("user", user), Message("assistant", "")], _answer(answer, task)


def _alpaca(row: Row) -> list[Message]:
    instruction, output = row.get("instruction"), row.get("output")
    if not isinstance(instruction, str):
        raise DataError(f"instruction: text is needed, not {_show(instruction)}")
    extra = row.get("input") or ""
    if not isinstance(extra, str):
        raise DataError(f"input: text is needed, not {_show(extra)}")
    if output is None or output == "":
        raise DataError("no assistant turn: output is empty")
    turns = [Message("system", _text(row["system"], "system"))] if row.get("system") else []
    user = f"{instruction.strip()}\n\n{extra.strip()}".strip()
    return [*turns, Message("user", user), Message("assistant", _text(output, "output"))]


def _openai(row: Row) -> list[Message]:
    turns = row.get("messages")
    if turns is None and "prompt" in row and "completion" in row:
        prompt, completion = row["prompt"], row["completion"]
        before = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        after = completion if isinstance(completion, list) else [{"role": "assistant", "content": completion}]
        turns = [*before, *after]
    return _turns(turns, _OPENAI_ROLES)


def _messages(row: Row) -> list[Message]:
    return _turns(row.get("messages"), {})


def _turns(turns: Any, aliases: Mapping[str, str]) -> list[Message]:
    if not isinstance(turns, list):
        raise DataError(f"messages: a list of turns is needed, not {_show(turns)}")
    out = []
    for index, turn in enumerate(turns):
        place = f"messages[{index}]"
        if not isinstance(turn, Mapping):
            raise DataError(f"{place}: an object with role and content is needed, not {_show(turn)}")
        role = turn.get("role")
        role = aliases.get(role, role) if isinstance(role, str) else role
        if role not in _ROLES:
            raise DataError(
                f"{place}: unknown role {_show(role)}", fix=f"use {', '.join([*_ROLES, *aliases])}"
            )
        content = turn.get("content")
        if not content and turn.get("tool_calls") and aliases:
            content = {
                "tool_calls": [
                    call.get("function", call) for call in turn["tool_calls"] if isinstance(call, Mapping)
                ]
            }
        out.append(Message(role, _text(content, f"{place}: content")))
    return out


def _text(content: Any, place: str) -> str:
    """Text as it is, parts of text joined, an object as JSON; white space at the ends is nobody's answer."""
    if isinstance(content, list) and content:
        content = "".join(_part(part, place) for part in content)
    if isinstance(content, Mapping):
        content = json.dumps(content, ensure_ascii=False)
    if not isinstance(content, str):
        raise DataError(f"{place}: text is needed, not {_show(content)}")
    if not content.strip():
        raise DataError(f"{place} is empty")
    return content.strip()


def _part(part: Any, place: str) -> str:
    text = part.get("text") if isinstance(part, Mapping) else part
    if not isinstance(text, str):
        kind = part.get("type") if isinstance(part, Mapping) else part
        raise DataError(f"{place}: a part of type {_show(kind)} is not text")
    return text


def _check_turns(messages: Sequence[Message]) -> str:
    """The answer's text, where the order of the turns makes sense."""
    roles = [message.role for message in messages]
    if "assistant" not in roles:
        raise DataError("no assistant turn")
    if roles[-1] != "assistant":
        raise DataError(f"the last turn is the {roles[-1]}'s, not the assistant's")
    if "user" not in roles:
        raise DataError("no user turn")
    if "system" in roles[1:]:
        raise DataError(f"messages[{roles.index('system', 1)}]: a system turn that is not the first")
    return messages[-1].content


def _answer(value: Any, task: Task) -> dict[str, Any]:
    """The answer in NFC, valid under the task's schema."""
    if isinstance(value, str):
        parsed, error = parse_answer(value, task.schema)
        value = parsed if error is None else value
    else:
        error = check_answer(value, task.schema)
    if error is None and (normal := _nfc(value)) != value:
        value, error = normal, check_answer(normal, task.schema)
    if error is not None:
        raise DataError(
            f"the answer does not fit the task {task.name!r}: {error}", fix="mend the answer, or " + _DROP
        )
    return dict(json.loads(dump_answer(value, task.schema)))


def _nfc(value: Any) -> Any:
    if isinstance(value, str):
        return unicodedata.normalize("NFC", value)
    if isinstance(value, Mapping):
        return {key: _nfc(item) for key, item in value.items()}
    return [_nfc(item) for item in value] if isinstance(value, (list, tuple)) else value


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def to_row(example: Example, set_name: str) -> dict[str, Any]:
    """The row of a prepared file. :func:`from_row` is its inverse."""
    messages = [{"role": message.role, "content": message.content} for message in example.messages]
    answer = None if example.answer is None else dict(example.answer)
    return {
        "id": example.id,
        "messages": messages,
        "fields": dict(example.fields),
        "answer": answer,
        "set": set_name,
    }


def from_row(row: Row) -> Example:
    """An example from a row of a prepared file, which is trusted."""
    messages = tuple(Message(turn["role"], turn["content"]) for turn in row["messages"])
    return Example(row["id"], messages, row.get("fields") or {}, row.get("answer"))


def read_prepared(path: str | Path) -> Iterator[tuple[str, Example]]:
    """Yield ``(set, example)`` of a prepared file: ``train.jsonl``, ``valid.jsonl`` or ``test.jsonl``."""
    for number, row in read_jsonl(path):
        try:
            yield str(row.get("set", "test")), from_row(row)
        except (KeyError, TypeError) as error:
            raise DataError(
                f"{path}:{number}: not a prepared row: {error}", fix="delete the folder and run prepare again"
            ) from error


def prepare_item(item: Row | str, task: Task, number: int = 1) -> dict[str, Any]:
    """A row with ``id``, ``messages``, ``fields``, whatever shape it came in. An item without an id is called
    by a hash of its prompt.

    >>> schema = {"type": "object", "properties": {"answer": {"enum": ["yes", "no"]}}}
    >>> task = Task("t", system="", user="{text}", schema=schema, label="answer", slices=("group",))
    >>> row = prepare_item({"text": "Hello.", "group": "none", "id": 7}, task)
    >>> row["id"], row["fields"], row["messages"][-1]
    ('7', {'group': 'none'}, {'role': 'user', 'content': 'Hello.'})
    """
    if isinstance(item, str):
        if len(task.input_fields) != 1:
            raise DataError(
                f"item {number}: a text alone, and the task {task.name!r} needs {', '.join(task.input_fields)}",
                fix="give a mapping with these fields",
            )
        item = {task.input_fields[0]: item}
    if not isinstance(item, Mapping):
        raise DataError(
            f"item {number}: a {type(item).__name__}, neither a mapping nor a text",
            fix="give one mapping an item",
        )
    if "messages" in item:
        fields = dict(item.get("fields") or {})
        messages = [{"role": str(turn["role"]), "content": str(turn["content"])} for turn in item["messages"]]
    else:
        try:
            system, user = task.prompt(item)
        except DataError as error:
            raise DataError(f"item {number}: {error.message}", fix=error.fix) from error
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": user})
        shown = {task.title, task.group, *task.slices}
        hidden = {"id", "answer", task.id, *task.input_fields, *task.schema["properties"]}
        fields = {key: value for key, value in item.items() if key in shown or key not in hidden}
    name = item.get("id", item.get(task.id))
    if name is None or name == "":
        name = hashlib.sha256(repr(messages).encode("utf-8", "replace")).hexdigest()[:16]
    return {"id": str(name), "messages": messages, "fields": fields}
