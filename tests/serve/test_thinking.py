"""A model that thinks before it answers, asked through the server: thinking and answer apart, and counted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import small_run
from helpers.served import MODEL, client_of, make_app
from helpers.thinking import LEARNED, write_thinking_model

from mlx_distill.data.chat import answer_ids, prompt_ids
from mlx_distill.models.load import load_tokenizer
from mlx_distill.tasks.answer import THINKING

TEXT = "a red otter"
THOUGHT, ANSWER = LEARNED[TEXT]
CHATS = "/v1/chat/completions"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("root")
    (folder / MODEL).parent.mkdir()
    write_thinking_model(folder / MODEL)
    return folder


@pytest.fixture(scope="module")
def client(root: Path) -> Iterator[Any]:
    with client_of(make_app(root)) as client:
        yield client


@pytest.fixture(scope="module")
def counts(root: Path) -> tuple[int, int]:
    """Tokens of the thinking with its end, and of the answer."""
    tokenizer = load_tokenizer(root / MODEL)
    return len(answer_ids(tokenizer, f"{THOUGHT}\n")) + 2, len(answer_ids(tokenizer, ANSWER))


def chat(client: Any, **body: Any) -> Any:
    messages = [
        {"role": "system", "content": small_run.TASK["system"]},
        {"role": "user", "content": TEXT},
    ]
    return client.post(CHATS, json={"messages": messages, **body})


def analyzed(client: Any, text: str = TEXT, **body: Any) -> dict[str, Any]:
    response = client.post("/v1/analyze", json={"item": {"text": text}, **body})
    assert response.status_code == 200
    answer: dict[str, Any] = response.json()
    return answer


@pytest.mark.parametrize("constrain", [True, False])
def test_rows_are_answered_behind_the_thinking(client: Any, constrain: bool, counts: Any) -> None:
    for text, (_, answer) in LEARNED.items():
        got = analyzed(client, text, constrain=constrain)
        assert got["text"] == answer and got["answer"] == json.loads(answer) and got["error"] is None
        probabilities = got["label_probs"]
        assert max(probabilities, key=probabilities.get) == got["label"] and max(probabilities.values()) > 0.9
    assert analyzed(client, constrain=constrain)["usage"]["completion_tokens"] == sum(counts)


def test_the_longest_answer_is_that_behind_the_thinking(client: Any, counts: Any) -> None:
    thought, answer = counts
    assert analyzed(client, max_tokens=answer)["text"] == ANSWER
    cut = analyzed(client, max_tokens=answer - 2)
    assert cut["answer"] is None and ANSWER.startswith(cut["text"]) and cut["text"]
    assert f"cut after {answer - 2} tokens" in cut["error"]["message"]
    assert cut["usage"]["completion_tokens"] == thought + answer - 2


def test_labels_alone_are_refused(client: Any) -> None:
    response = client.post("/v1/classify", json={"items": [{"text": TEXT}]})
    assert response.status_code == 400 and "thinks before it answers" in response.json()["error"]["message"]


def test_a_chat_has_its_thinking_beside_its_content(client: Any, root: Path, counts: Any) -> None:
    whole = chat(client).json()
    (choice,) = whole["choices"]
    assert choice["message"]["content"] == ANSWER and choice["finish_reason"] == "stop"
    assert choice["message"]["reasoning_content"].strip() == THOUGHT
    used = whole["usage"]
    assert used["completion_tokens"] == sum(counts)
    assert used["completion_tokens_details"] == {"reasoning_tokens": counts[0]}
    turns = [{"role": "system", "content": small_run.TASK["system"]}, {"role": "user", "content": TEXT}]
    assert used["prompt_tokens"] == len(prompt_ids(load_tokenizer(root / MODEL), turns))
    events = [line[6:] for line in chat(client, stream=True).text.splitlines() if line.startswith("data: {")]
    deltas = [json.loads(event)["choices"][0]["delta"] for event in events]
    for name in ("content", "reasoning_content"):
        assert "".join(delta.get(name, "") for delta in deltas) == choice["message"][name]
    first = [next(i for i, delta in enumerate(deltas) if delta.get(name)) for name in ("content",)]
    assert not any(delta.get("reasoning_content") for delta in deltas[first[0] :])


def test_the_tokens_of_a_chat_count_its_thinking(client: Any, counts: Any) -> None:
    thought, answer = counts
    for most in (2, thought, thought + 3, thought + answer):
        got = chat(client, max_tokens=most).json()
        (choice,) = got["choices"]
        assert got["usage"]["completion_tokens"] == most and choice["finish_reason"] == "length"
        assert ANSWER.startswith(choice["message"]["content"])
        assert bool(choice["message"]["content"]) is (most > thought)
        assert THOUGHT.startswith(choice["message"]["reasoning_content"].strip())


def test_a_schema_binds_the_answer_alone(client: Any) -> None:
    """One that neither thinking nor the answer that was learned fits; a stop string is none of thinking."""
    other = {"type": "object", "additionalProperties": False, "required": ["hue"]}
    other |= {"properties": {"hue": {"enum": ["warm", "cold"]}}}
    wanted = {"type": "json_schema", "json_schema": {"name": "hue", "schema": other}}
    (choice,) = chat(client, response_format=wanted, stop=["red"]).json()["choices"]
    assert json.loads(choice["message"]["content"])["hue"] in ("warm", "cold")
    assert choice["message"]["reasoning_content"].strip() == THOUGHT


def test_no_effort_is_refused_by_a_model_that_thinks(client: Any) -> None:
    response = chat(client, reasoning_effort="none")
    assert response.status_code == 400 and response.json()["error"]["param"] == "reasoning_effort"
    assert chat(client, reasoning_effort="low").status_code == 200


def test_thinking_that_does_not_end_is_an_error_of_the_row(root: Path) -> None:
    from mlx_distill.infer.predict import predict
    from mlx_distill.models.load import load
    from mlx_distill.tasks.task import parse_task
    from mlx_distill.thinking import set_thinking

    model, tokenizer = load(root / MODEL)
    set_thinking(tokenizer, 3)
    (got,) = predict(model, tokenizer, parse_task(small_run.TASK, "task"), [TEXT])
    assert (got.text, got.answer, got.label_probs) == ("", None, None) and got.error_kind == THINKING
