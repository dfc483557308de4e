"""What a chat completion may ask for, without HTTP."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from mlx_distill.serve.chat_request import IGNORED, Chat, ChatRequest, read_chat
from mlx_distill.serve.errors import ApiError

HELLO = [{"role": "user", "content": "hello"}]


def read(**body: Any) -> Chat:
    return read_chat(ChatRequest.model_validate({"model": "m", "messages": HELLO, **body}))


def refusal(**body: Any) -> ApiError:
    with pytest.raises(ApiError) as error:
        read(**body)
    assert error.value.status == 400
    return error.value


def test_honoured_parameters_are_read() -> None:
    chat = read(
        stream=True,
        stream_options={"include_usage": True, "include_obfuscation": False},
        temperature=0.7,
        seed=-3,
        max_completion_tokens=5,
        stop="END",
        response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}},
    )
    assert chat.stream and chat.include_usage and chat.temperature == 0.7 and chat.seed == -3
    assert chat.max_tokens == 5 and chat.stop == ("END",) and chat.ignored == ()
    assert chat.format == "json_schema" and chat.schema == {"type": "object"}


def test_without_parameters_the_answer_is_greedy_text() -> None:
    chat = read(temperature=None, n=None, tools=None, response_format=None, anything=None)
    assert (chat.temperature, chat.format, chat.max_tokens, chat.stop) == (0.0, "text", None, ())


def test_harmless_parameters_are_accepted_and_named() -> None:
    assert set(read(**{name: {"any": "value"} for name in IGNORED}).ignored) == IGNORED


@pytest.mark.parametrize(
    ("name", "value", "neutral"),
    [
        ("n", 2, 1),
        ("n", True, 1),
        ("presence_penalty", 0.5, 0),
        ("frequency_penalty", -1, 0.0),
        ("logit_bias", {"5": 100}, {}),
        ("tools", [{"type": "function", "function": {"name": "f"}}], []),
        ("tool_choice", "required", "auto"),
        ("functions", [{}], []),
        ("function_call", {"name": "f"}, "none"),
        ("modalities", ["text", "audio"], ["text"]),
        ("audio", {"voice": "alloy"}, None),
        ("verbosity", "low", "medium"),
        ("web_search_options", {}, None),
        ("moderation", {}, None),
    ],
)
def test_parameters_that_would_change_the_answer_are_refused_by_name(
    name: str, value: Any, neutral: Any
) -> None:
    error = refusal(**{name: value})
    assert error.param == name and str(error.param) in error.message
    assert read(**{name: neutral}).ignored == ()


@pytest.mark.parametrize(("thinks", "neutral"), [(False, {"none", "minimal", "low"}), (True, {"low"})])
def test_an_effort_is_that_of_the_training(thinks: bool, neutral: set[str]) -> None:
    read().check_effort(thinks)
    for effort in ("none", "minimal", "low", "medium", "high", "a lot"):
        chat = read(reasoning_effort=effort)
        if effort in neutral:
            chat.check_effort(thinks)
            continue
        with pytest.raises(ApiError, match=repr(effort)) as caught:
            chat.check_effort(thinks)
        assert (caught.value.param, caught.value.status) == ("reasoning_effort", 400)


def test_what_is_not_known_is_refused() -> None:
    for name in ("top_k", "guided_json", "format", "repetition_penalty", "chat_template_kwargs", "x" * 999):
        error = refusal(**{name: 1})
        assert error.code == "unknown_parameter" and len(error.message) < 200


def test_top_p_and_logprobs_are_honoured() -> None:
    assert read(top_p=0.5, temperature=1.0).top_p == 0.5 and read().top_p == 1.0
    assert refusal(top_p=0.0).param == "top_p"
    assert read(logprobs=True).top_logprobs == 0 and read(logprobs=True, top_logprobs=3).top_logprobs == 3
    assert read().top_logprobs is None and refusal(top_logprobs=3).param == "top_logprobs"


@pytest.mark.parametrize("temperature", [-0.1, 2.1])
def test_a_temperature_out_of_range_is_refused(temperature: float) -> None:
    assert refusal(temperature=temperature).param == "temperature"


@pytest.mark.parametrize(
    "body",
    [
        {"temperature": "1"},
        {"temperature": float("nan")},
        {"seed": 1.5},
        {"seed": 2**63},
        {"max_tokens": 0},
        {"max_tokens": True},
        {"stop": 5},
        {"messages": []},
        {"messages": "hello"},
        {"messages": [{"content": "no role"}]},
        {"messages": [{"role": "user", "content": 5}]},
        {"stream": "yes"},
        {"response_format": "json"},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "with space", "schema": {}}}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": True}}},
    ],
)
def test_values_of_another_type_are_refused(body: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        read(**body)


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([{"role": "tool", "content": "x", "tool_call_id": "1"}], "messages[0].role"),
        ([*HELLO, {"role": "assistant", "content": "hi"}], "messages"),
        ([{"role": "user", "content": "  "}], "messages[0]"),
        ([{"role": "user"}], "messages[0]"),
        ([{"role": "user", "content": "\ud800"}], "messages[0]"),
        ([{"role": "user", "content": [{"type": "text", "text": "\udfff"}]}], "messages[0]"),
        ([{"role": "system", "content": ""}], "messages"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
            "messages[0].content[0].type",
        ),
        ([{"role": "assistant", "content": None, "tool_calls": [{}]}, *HELLO], "messages[0].tool_calls"),
        ([{"role": "assistant", "content": None, "refusal": "no"}, *HELLO], "messages[0]"),
    ],
)
def test_messages_that_cannot_be_shown_are_refused(messages: list[Any], param: str) -> None:
    assert refusal(messages=messages).param == param


def test_messages_are_those_of_a_row() -> None:
    answer = {"role": "assistant", "content": " hi ", "refusal": None, "tool_calls": None, "audio": None}
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
    chat = read(
        messages=[
            {"role": "developer", "content": "be kind"},
            *HELLO,
            {**answer, "reasoning_content": "hm", "annotations": []},
            {"role": "user", "content": parts},
        ]
    )
    assert [(turn.role, turn.content, dict(turn.extra)) for turn in chat.messages] == [
        ("system", "be kind", {}),
        ("user", "hello", {}),
        ("assistant", "hi", {}),
        ("user", "a b", {}),
    ]


@pytest.mark.parametrize("stop", [["a"] * 5, [""], ["x" * 1001], ["\ud800"]])
def test_stop_strings_have_limits(stop: list[str]) -> None:
    assert refusal(stop=stop).param == "stop"
    assert read(stop=[]).stop == ()


def test_formats() -> None:
    assert read(response_format={"type": "text"}).format == "text"
    assert read(response_format={"type": "json_object"}).format == "json_object"
    assert refusal(response_format={"type": "xml"}).param == "response_format.type"
    without = refusal(response_format={"type": "json_schema", "json_schema": {"name": "a"}})
    assert without.param == "response_format.json_schema.schema"
    assert refusal(response_format={"type": "json_schema"}).param == "response_format.json_schema"


def test_two_different_limits_are_refused() -> None:
    assert refusal(max_tokens=3, max_completion_tokens=4).param == "max_tokens"
    assert read(max_tokens=3, max_completion_tokens=3).max_tokens == 3
    assert refusal(stream_options={"include_usage": True}).param == "stream_options"
