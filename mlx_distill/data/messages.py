"""One turn of a row's chat: role, text, whether it is trained, and what else a chat template reads."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mlx_distill.errors import DataError
from mlx_distill.records import Message

ROLES = ("system", "user", "assistant")
OPENAI_ROLES = {"developer": "system", "tool": "tool", "function": "tool"}

# Keys of a prepared turn that go to the chat template as they are.
_TEMPLATE_KEYS = ("tools", "tool_calls", "reasoning_content", "tool_call_id", "name")
# The names under which rows have an assistant's thinking; templates get it as reasoning_content and thinking.
_REASONING = ("reasoning_content", "thinking", "reasoning")
_WEIGHTS = ("weight", "train", "training")  # OpenAI and Mistral; axolotl
# What a turn may hold and this library cannot show to a model.
_REFUSED = (
    *("image", "images", "audio", "audios", "video", "videos", "refusal"),
    *("train_detail", "training_detail", "functions", "function_calls"),
)


def parse_turns(
    turns: Any, aliases: Mapping[str, str], needs_answer: bool, column: str = "messages"
) -> list[Message]:
    """The turns of a row's chat.

    Args:
        turns: The list that the row has under ``column``.
        aliases: Other names of roles, and the roles that they mean.
        needs_answer: Whether an empty last turn of the assistant is an error; else it is left out.
        column: Where the turns stand, for error messages.

    Raises:
        DataError: what is wrong, and in which turn.
    """
    if not isinstance(turns, list):
        raise DataError(f"{column}: a list of turns is needed, not {show(turns)}")
    if not needs_answer and turns and _is_empty_answer(turns[-1]):
        turns = turns[:-1]
    return [
        _turn(turn, f"{column}[{index}]", aliases)
        for index, turn in enumerate(turns)
        if not _is_empty_system(turn)
    ]


def _is_empty_system(turn: Any) -> bool:
    """Whether a system turn says nothing, which many data sets write for a chat without one."""
    return _is_empty(turn, ("system", "developer"))


def _is_empty_answer(turn: Any) -> bool:
    return _is_empty(turn, ("assistant",))


def _is_empty(turn: Any, roles: Sequence[str]) -> bool:
    """Whether a turn of one of some roles has no text, nor anything else that could be shown or refused."""
    if not isinstance(turn, Mapping) or turn.get("role") not in roles:
        return False
    if any(turn.get(key) for key in ("tools", "tool_calls", "function_call", *_REASONING, *_REFUSED)):
        return False
    content = turn.get("content")
    return not (content.strip() if isinstance(content, str) else content)


def _turn(turn: Any, where: str, aliases: Mapping[str, str]) -> Message:
    if not isinstance(turn, Mapping):
        raise DataError(f"{where}: an object with role and content is needed, not {show(turn)}")
    role = turn.get("role")
    role = aliases.get(role, role) if isinstance(role, str) else role
    if not isinstance(role, str) or role not in (*ROLES, *aliases.values()):
        raise DataError(f"{where}: unknown role {show(role)}", fix=f"use {', '.join([*ROLES, *aliases])}")
    for key in _REFUSED:
        if turn.get(key):
            raise DataError(f"{where}: {key}: cannot be shown to a model here", fix="remove it from the row")
    extra = _template_values(turn, role, where)
    content = turn.get("content")
    no_text = content is None or (isinstance(content, str) and not content.strip())
    text = "" if no_text and "tool_calls" in extra else parse_text(content, f"{where}: content")
    return Message(role, text, _is_trained(turn, role, where), extra)


def parse_text(content: Any, where: str) -> str:
    """The content as text without white space at its ends: parts are joined, an object is written as JSON.

    Raises:
        DataError: no text, or a part that is none.

    >>> parse_text([{"type": "text", "text": "what a "}, {"type": "text", "text": "day "}], "content")
    'what a day'
    """
    if isinstance(content, list) and content:
        content = "".join(_part_text(part, where) for part in content)
    if isinstance(content, Mapping):
        content = json.dumps(content, ensure_ascii=False)
    if not isinstance(content, str):
        raise DataError(f"{where}: text is needed, not {show(content)}")
    if not content.strip():
        raise DataError(f"{where} is empty")
    return content.strip()


def _part_text(part: Any, where: str) -> str:
    text = part.get("text") if isinstance(part, Mapping) else part
    if not isinstance(text, str):
        part_type = part.get("type") if isinstance(part, Mapping) else part
        raise DataError(f"{where}: a part of type {show(part_type)} is not text")
    return text


def _is_trained(turn: Mapping[str, Any], role: str, where: str) -> bool:
    """False where a weight of the assistant's turn is 0: it is shown and not trained."""
    trained = True
    for key in _WEIGHTS:
        value = turn.get(key)
        if value is None:
            continue
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise DataError(
                f"{where}: {key}: {show(value)} is neither 0 nor 1",
                fix="use 1 for a turn that is trained and 0 for one that is only shown",
            )
        if role == "assistant":
            trained = trained and bool(value)
        elif value and key != "weight":
            raise DataError(f"{where}: {key}: only the assistant's turns can be trained", fix="remove it")
    return trained


def _template_values(turn: Mapping[str, Any], role: str, where: str) -> dict[str, Any]:
    """What the turn holds besides its content, by the names that chat templates read."""
    out: dict[str, Any] = {}
    if calls := _tool_calls(turn, where):
        out["tool_calls"] = calls
    thoughts = {key: turn[key] for key in _REASONING if turn.get(key)}
    for key, value in thoughts.items():
        if not isinstance(value, str):
            raise DataError(f"{where}: {key}: text is needed, not {show(value)}")
    if len(set(thoughts.values())) > 1:
        raise DataError(f"{where}: {' and '.join(thoughts)} differ", fix="keep one of them")
    if thoughts:
        out["reasoning_content"] = next(iter(thoughts.values()))
    if out and role != "assistant":
        raise DataError(f"{where}: {next(iter(out))} in a turn of the {role}", fix="remove it")
    for key in ("tool_call_id", "name"):
        if turn.get(key) is not None:
            out[key] = turn[key]
    if tools := _tools(turn.get("tools"), f"{where}: tools"):
        out["tools"] = tools
    return out


def _tool_calls(turn: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """The turn's calls, with arguments as an object: templates write it as JSON, and would quote a text."""
    calls = turn.get("tool_calls") or []
    if turn.get("function_call"):  # OpenAI's older form, of one call
        calls = [*calls, {"type": "function", "function": turn["function_call"]}]
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise DataError(f"{where}: tool_calls: a list of objects is needed, not {show(calls)}")
    out = []
    for call in calls:
        function = call.get("function", call)
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise DataError(f"{where}: tool_calls: a call without the function's name: {show(call)}")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except ValueError:
                arguments = function["arguments"]
        changed = {**function, "arguments": {} if arguments is None else arguments}
        out.append({**call, "function": changed} if "function" in call else changed)
    return out


def with_tools(messages: Sequence[Message], tools: Any) -> list[Message]:
    """The turns with the row's tools, which the first turn keeps.

    Args:
        messages: The turns.
        tools: What the row has under ``tools``: a list of function schemas, such a list as JSON, or nothing.

    Raises:
        DataError: something else.
    """
    of_turns = [message.extra["tools"] for message in messages if "tools" in message.extra]
    found = [*of_turns, *filter(None, [_tools(tools, "tools")])]
    if not found or not messages:
        return list(messages)
    if any(other != found[0] for other in found):
        raise DataError("the row and its turns have different tools", fix="give tools once, in the row")
    first, *others = (
        replace(message, extra={k: v for k, v in message.extra.items() if k != "tools"})
        for message in messages
    )
    return [replace(first, extra={**first.extra, "tools": found[0]}), *others]


def _tools(tools: Any, where: str) -> list[Any]:
    """A list of function schemas, or such a list as JSON; empty for nothing."""
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: not JSON: {show(tools)}") from error
    if not tools or (isinstance(tools, str) and not tools.strip()):
        return []
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise DataError(f"{where}: a list of function schemas is needed, not {show(tools)}")
    return tools


def message_to_row(message: Message) -> dict[str, Any]:
    """The turn as a prepared row has it. :func:`message_from_row` is the inverse.

    >>> message_to_row(Message("assistant", "fine", trained=False))
    {'role': 'assistant', 'content': 'fine', 'weight': 0}
    """
    weight = {} if message.trained else {"weight": 0}
    return {"role": message.role, "content": message.content, **weight, **message.extra}


def message_from_row(row: Mapping[str, Any]) -> Message:
    """The turn of a prepared row.

    Raises:
        DataError: role or content is no text; the rest is not checked again.
    """
    role, content = row.get("role"), row.get("content")
    if not isinstance(role, str) or not isinstance(content, str):
        raise DataError(f"a prepared turn has role and content as text, not {show(row)}")
    extra = {key: row[key] for key in _TEMPLATE_KEYS if row.get(key) is not None}
    return Message(role, content, row.get("weight") != 0, extra)


def with_system(turns: Sequence[Mapping[str, Any]], system: str) -> list[dict[str, Any]]:
    """The turns of a prepared row with another system prompt, or with one where they had none.

    >>> with_system([{"role": "user", "content": "Hi."}], "Be kind.")[0]
    {'role': 'system', 'content': 'Be kind.'}
    """
    of_row = dict(turns[0]) if turns and turns[0]["role"] == "system" else {"role": "system"}
    others = turns[1:] if turns and turns[0]["role"] == "system" else turns
    return [{**of_row, "content": system}, *map(dict, others)]


def without_thinking(turns: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """The turns of a prepared row without the thinking of the last one, which is a task's answer.

    >>> without_thinking([{"role": "assistant", "content": "{}", "reasoning_content": "It rains."}])
    [{'role': 'assistant', 'content': '{}'}]
    """
    if not turns or "reasoning_content" not in turns[-1]:
        return turns
    last = {key: value for key, value in turns[-1].items() if key != "reasoning_content"}
    return [*turns[:-1], last]


def texts_of(value: Any) -> Iterator[str]:
    """All texts within a JSON value, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from texts_of(key)
            yield from texts_of(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from texts_of(item)


def show(value: Any) -> str:
    """A value for an error message, cut after 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
