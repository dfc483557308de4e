"""Answers of models that think first: limits, labels behind thinking, grammar, prompts."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest
from helpers.cache_kinds import make_cached_model

from mlx_distill.data.chat import prompt_ids, stop_ids
from mlx_distill.errors import ConfigError
from mlx_distill.infer.channels import channels_of
from mlx_distill.infer.engine import generate_all
from mlx_distill.infer.label_scorer import LabelScorer
from mlx_distill.infer.label_scoring import label_prefix_tokens, label_probabilities
from mlx_distill.infer.predict import AnswerRequests, label_distributions, predict, read_answer
from mlx_distill.infer.requests import Generation, Request
from mlx_distill.infer.text_stream import thinking_text
from mlx_distill.records import Message
from mlx_distill.tasks.answer import THINKING, error_kind
from mlx_distill.tasks.task import Task
from mlx_distill.thinking import set_thinking

ANSWER = '{"label": "fine"}'
THOUGHT = "lovely lovely weather."
BETWEEN = {
    "chatml": "\n</think>\n\n",
    "harmony": "<|end|><|start|>assistant<|channel|>final<|message|>",
}
SCHEMA = {
    "type": "object",
    "additionalProperties": False,
    "required": ["label"],
    "properties": {"label": {"type": "string", "enum": ["fine", "bad"]}},
}
TASK = Task("t", system="Judge.", user="{text}", schema=SCHEMA, label="label", max_answer_tokens=24)


@pytest.fixture
def thinking(tokenizer: Any) -> Any:
    set_thinking(tokenizer, 16)
    yield tokenizer
    set_thinking(tokenizer, 0)


class Scripted:
    """A model that says some tokens behind a prompt of one length, whatever that says."""

    def __init__(self, said: list[int], prompt: int) -> None:
        self.inner, self.said, self.prompt = make_cached_model("qwen3"), said, prompt
        self.layers = self.inner.layers

    def __call__(self, tokens: mx.array, cache: Any) -> mx.array:
        logits = self.inner(tokens % 50, cache=cache)
        after = cache[0].offset[:, None, None] - self.prompt
        script = mx.array([*self.said, 0])[mx.clip(after, 0, len(self.said))]
        wide = mx.zeros((*logits.shape[:-1], max(*self.said, logits.shape[-1]) + 50))
        return wide + 1e4 * (mx.arange(wide.shape[-1]) == script)


def said(tokenizer: Any, kind: str, thought: str = THOUGHT, answer: str = ANSWER) -> list[int]:
    text = thought + BETWEEN[kind] + answer + ("<|im_end|>" if kind == "chatml" else "<|return|>")
    return list(tokenizer.encode(text, add_special_tokens=False))


def answered(tokenizer: Any, script: list[int], **request: Any) -> Generation:
    prompt = prompt_ids(tokenizer, [Message("user", "the weather")])
    settings = {"max_tokens": 24, "stop": frozenset(stop_ids(tokenizer)), "max_thinking": 16, **request}
    (out,) = generate_all(Scripted(script, len(prompt)), tokenizer, [Request(prompt, **settings)])
    return out


def test_the_limits_are_those_of_the_thinking_and_of_the_answer_alone(thinking: Any, kind: str) -> None:
    script = said(thinking, kind)
    thought = len(thinking.encode(THOUGHT, add_special_tokens=False))
    answer = len(thinking.encode(ANSWER, add_special_tokens=False))
    got = answered(thinking, script)
    assert (got.text, got.finish, got.still_thinking) == (ANSWER, "stop", False)
    prompt = prompt_ids(thinking, [Message("user", "the weather")])
    assert thinking_text(thinking, channels_of(thinking), prompt, got) == THOUGHT
    # Exactly as long as it may be; what the template has behind it is not counted.
    most = thought + (1 if kind == "harmony" else 2)
    exact = answered(thinking, script, max_thinking=most + 1, max_tokens=answer + 1)
    assert exact.text == ANSWER and exact.finish == "stop"
    short = answered(thinking, script, max_thinking=thought - 2)
    assert short.still_thinking and len(short.tokens) == thought - 2 and short.text == ""
    answer_line, error = read_answer(short, SCHEMA)
    assert answer_line is None and error == f"cut after {thought - 2} tokens: {THINKING}"
    assert error_kind(short.finish, error) == THINKING
    cut = answered(thinking, script, max_tokens=answer - 2)
    assert cut.finish == "length" and not cut.still_thinking and ANSWER.startswith(cut.text)
    assert cut.answer_tokens == answer - 2
    assert str(read_answer(cut, SCHEMA)[1]).startswith(f"cut after {answer - 2} tokens: not JSON")


def test_thinking_that_goes_on_has_no_answer_whatever_it_says(thinking: Any, kind: str) -> None:
    """JSON within the thinking is not taken for the answer."""
    script = thinking.encode(ANSWER, add_special_tokens=False) * 9
    got = answered(thinking, list(script))
    assert got.still_thinking and got.text == "" and read_answer(got, SCHEMA)[0] is None


def test_requests_and_the_grammar_leave_thinking_open(thinking: Any, kind: str) -> None:
    prompt = prompt_ids(thinking, [Message("system", "Judge."), Message("user", "rain")])
    script = said(thinking, kind, answer='{"nonsense": 1}')
    model = Scripted(script, len(prompt))
    (free,) = predict(model, thinking, TASK, ["rain"], label_probs=False)
    assert free.answer is None and free.error and "nonsense" in free.text
    request = AnswerRequests(model, thinking, TASK, label_probs=False, constrain=False).request(prompt)
    assert (request.max_tokens, request.max_thinking) == (24, 16) and list(request.prompt) == prompt


def test_labels_are_read_behind_the_thinking(thinking: Any, kind: str, model: Any) -> None:
    prefix = label_prefix_tokens(thinking, TASK)
    assert prefix is not None
    prompt = prompt_ids(thinking, [Message("user", "rain")])
    thought = thinking.encode(THOUGHT + BETWEEN[kind], add_special_tokens=False)
    behind = Generation("hm", (*thought, 5), len(prompt), "stop", 0.0, answer_start=len(thought))
    cut = Generation("", tuple(thought[:4]), len(prompt), "length", 0.0, answer_start=4)
    found = label_distributions(model, [prompt, prompt], [behind, cut], prefix, thinks=True)
    wanted = label_probabilities(model, [[*prompt, *thought, *prefix[0]]], prefix[1])[0]
    assert found[1] is None and found[0] is not None
    assert list(found[0].values()) == pytest.approx(list(map(float, wanted)), rel=1e-4)
    with pytest.raises(ConfigError, match="thinks before it answers"):
        LabelScorer(model, thinking, TASK)


def test_chats_are_asked_with_thinking_open(thinking: Any, model: Any) -> None:
    pytest.importorskip("fastapi")
    from mlx_distill.serve.chat_engine import ChatModel, engine_request
    from mlx_distill.serve.chat_request import ChatRequest, read_chat

    body = {"model": "m", "messages": [{"role": "user", "content": "rain"}]}
    chat = read_chat(ChatRequest.model_validate(body))
    request = engine_request(ChatModel.of(model, thinking), chat)
    assert list(request.prompt) == prompt_ids(thinking, [Message("user", "rain")], thinking=True)
