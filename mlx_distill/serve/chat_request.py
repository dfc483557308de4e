"""What a chat completion asks for: parameters are honoured, ignored where they cannot change an answer, and
refused where they would.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from mlx_distill.data.messages import parse_turns
from mlx_distill.errors import DataError
from mlx_distill.records import Message
from mlx_distill.serve.errors import ApiError

IGNORED = frozenset(
    "user store metadata safety_identifier prompt_cache_key prompt_cache_options prompt_cache_retention "
    "service_tier prediction parallel_tool_calls".split()
)
"""Parameters that cannot change an answer here: accepted, and named in the header ``x-ignored-params``."""


def _is(*values: Any) -> Callable[[Any], bool]:
    # True is no 1: a flag where a number is due is refused like any other value.
    return lambda value: any(value == other and type(value) is not bool for other in values)


_REFUSED: dict[str, tuple[Callable[[Any], bool], str]] = {
    # The value that changes nothing, and why another one is refused.
    "n": (_is(1), "one answer a request; ask several times, with other seeds"),
    "presence_penalty": (_is(0), "penalties are not implemented"),
    "frequency_penalty": (_is(0), "penalties are not implemented"),
    "logit_bias": (_is({}), "biases are not implemented"),
    "tools": (_is([]), "tools are not implemented"),
    "tool_choice": (_is("none", "auto"), "tools are not implemented"),
    "functions": (_is([]), "functions are not implemented"),
    "function_call": (_is("none", "auto"), "functions are not implemented"),
    "modalities": (_is(["text"]), "answers are text"),
    "audio": (_is(), "answers are text"),
    "verbosity": (_is("medium"), "say in the messages how long the answer is to be"),
    "web_search_options": (_is(), "nothing is searched"),
    "moderation": (_is(), "answers are not moderated"),
}
_ROLES = ("system", "developer", "user", "assistant")
_MOST_STOPS = 4
_LONGEST_STOP = 1000  # characters
# Of a message; thinking of earlier answers is left out, as templates do.
_REFUSED_OF_MESSAGE = ("tool_calls", "function_call", "tool_call_id", "audio", "images", "tools")
_Number = Field(default=None, allow_inf_nan=False)


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")


class TextPart(_Strict):
    """A part of a message."""

    type: str
    text: str | None = None


class ChatMessage(_Strict):
    """One message of the chat so far."""

    role: str
    content: str | list[TextPart] | None = None
    name: str | None = None
    refusal: str | None = None


class StreamOptions(_Strict):
    """What a stream has besides."""

    include_usage: bool | None = None


class JsonSchema(_Strict):
    """The schema that the answer must fit."""

    name: str = Field(min_length=1, max_length=64, pattern="^[A-Za-z0-9_-]+$")
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None
    description: str | None = None


class ResponseFormat(_Strict):
    """What the answer is written in."""

    type: str
    json_schema: JsonSchema | None = None


class ChatRequest(_Strict):
    """The body of ``POST /v1/chat/completions``."""

    model: str | None = None
    messages: list[ChatMessage] = Field(min_length=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = _Number
    top_p: float | None = _Number
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    stop: str | list[str] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    reasoning_effort: str | None = None
    response_format: ResponseFormat | None = None


@dataclass(frozen=True)
class Chat:
    """What is asked.

    Attributes:
        messages: The turns so far, of which the last is not the assistant's.
        stream: Whether the answer is sent while it is written.
        include_usage: Whether a stream ends with the number of tokens.
        temperature: 0 for the most probable tokens.
        top_p: Share of the probability of the tokens that are sampled from; 1 for all.
        top_logprobs: How many log-probabilities are told beside each token's own; None for none at all.
        seed: Of the sampling; None for another one each time.
        max_tokens: The longest answer; None for as long as the model can.
        stop: Strings that end the answer.
        format: What it is written in.
        schema: Of the format ``json_schema``.
        reasoning_effort: How much the model is to think; None for what it was trained to.
        ignored: Parameters of the request that were ignored.
    """

    messages: tuple[Message, ...]
    stream: bool = False
    include_usage: bool = False
    temperature: float = 0.0
    top_p: float = 1.0
    top_logprobs: int | None = None
    seed: int | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    format: Literal["text", "json_object", "json_schema"] = "text"
    schema: Mapping[str, Any] | None = None
    reasoning_effort: str | None = None
    ignored: tuple[str, ...] = ()

    def check_effort(self, thinks: bool) -> None:
        """Refuse an effort that is not that of the model's training.

        Args:
            thinks: Whether the model was trained to think before it answers.

        Raises:
            ApiError: 400.
        """
        effort = self.reasoning_effort
        if thinks and effort not in (None, "low"):
            reason = f"{effort!r}: this model thinks before it answers, as it was trained: low"
            raise _refused("reasoning_effort", reason, "unsupported_parameter")
        if not thinks and effort not in (None, "none", "minimal", "low"):
            reason = f"{effort!r}: this model answers without thinking first, as it was trained: none"
            raise _refused("reasoning_effort", reason, "unsupported_parameter")


def read_chat(body: ChatRequest) -> Chat:
    """The request of a body.

    Raises:
        ApiError: 400, with the parameter that is wrong or cannot be honoured.
    """
    ignored = _check_extras(body.model_extra or {})
    temperature = body.temperature or 0.0
    if not 0 <= temperature <= 2:
        raise _refused("temperature", f"{temperature:g} is not between 0 and 2")
    if body.top_p is not None and not 0 < body.top_p <= 1:
        raise _refused("top_p", f"{body.top_p:g} is not above 0 and at most 1")
    if body.top_logprobs and not body.logprobs:
        raise _refused("top_logprobs", "only with logprobs: true")
    if body.max_tokens and body.max_completion_tokens and body.max_tokens != body.max_completion_tokens:
        raise _refused("max_tokens", "differs from max_completion_tokens (give one of them)")
    if body.stream_options is not None and not body.stream:
        raise _refused("stream_options", "only with stream: true")
    kind, schema = _format(body.response_format)
    return Chat(
        messages=_messages(body.messages),
        stream=bool(body.stream),
        include_usage=bool(body.stream_options and body.stream_options.include_usage),
        temperature=temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        seed=body.seed,
        max_tokens=body.max_completion_tokens or body.max_tokens,
        stop=_stops(body.stop),
        format=kind,
        schema=schema,
        reasoning_effort=body.reasoning_effort,
        ignored=ignored,
    )


def _refused(param: str, reason: str, code: str = "unsupported_value") -> ApiError:
    return ApiError(400, f"{param}: {reason}", code=code, param=param)


def _check_extras(extras: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of those that are ignored; the others must say nothing."""
    ignored = []
    for name, value in extras.items():
        if value is None:
            continue
        if name in IGNORED:
            ignored.append(name)
        elif name in _REFUSED:
            neutral, reason = _REFUSED[name]
            if not neutral(value):
                raise _refused(name, reason, "unsupported_parameter")
        else:
            shown = name if len(name) <= 60 else name[:57] + "..."
            raise ApiError(
                400,
                f"{shown!r}: no such parameter here, and it could change the answer (leave it out)",
                code="unknown_parameter",
                param=shown,
            )
    return tuple(ignored)


def _format(
    asked: ResponseFormat | None,
) -> tuple[Literal["text", "json_object", "json_schema"], Mapping[str, Any] | None]:
    if asked is None or asked.type == "text":
        return "text", None
    if asked.type == "json_object":
        return "json_object", None
    if asked.type != "json_schema":
        raise _refused("response_format.type", "none of text, json_object, json_schema")
    if asked.json_schema is None or asked.json_schema.schema_ is None:
        missing = "response_format.json_schema" + ("" if asked.json_schema is None else ".schema")
        raise _refused(missing, "missing", "missing_required_parameter")
    return "json_schema", asked.json_schema.schema_


def _stops(stop: str | list[str] | None) -> tuple[str, ...]:
    stops = [stop] if isinstance(stop, str) else stop or []
    if len(stops) > _MOST_STOPS:
        raise _refused("stop", f"more than {_MOST_STOPS} strings")
    if any(not 0 < len(string) <= _LONGEST_STOP for string in stops):
        raise _refused("stop", f"a string that is empty, or longer than {_LONGEST_STOP} characters")
    for string in stops:
        _check_text(string, "stop")
    return tuple(stops)


def _check_text(text: str, where: str) -> None:
    """Refuse half surrogate pairs, which JSON can hold and no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _refused(where, "half a surrogate pair, which is no character", "invalid_value") from error


def _messages(messages: list[ChatMessage]) -> tuple[Message, ...]:
    rows = []
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if message.role not in _ROLES:
            raise _refused(f"{where}.role", f"none of {', '.join(_ROLES)} (tools are not implemented)")
        parts = message.content if isinstance(message.content, list) else []
        for place, part in enumerate(parts):
            if part.type != "text" or part.text is None:
                raise _refused(f"{where}.content[{place}].type", "not text, which is all that is read")
        texts = [part.text or "" for part in parts] or [str(message.content or "")]
        for text in (*texts, message.name or ""):
            _check_text(text, where)
        for key in _REFUSED_OF_MESSAGE:
            if (message.model_extra or {}).get(key):
                raise _refused(f"{where}.{key}", "not implemented")
        rows.append(
            {
                "role": message.role,
                "content": [part.model_dump() for part in parts] or message.content,
                "refusal": message.refusal,
                "name": message.name or None,
            }
        )
    if rows[-1]["role"] == "assistant":
        raise _refused("messages", "the last one is the assistant's, so there is nothing to answer")
    try:
        turns = parse_turns(rows, {"developer": "system"}, needs_answer=False)
    except DataError as error:
        where = error.message.partition(": ")[0]
        raise ApiError(400, str(error), code="invalid_messages", param=where) from error
    if not turns:
        raise _refused("messages", "no text in them")
    return tuple(turns)
