"""Distributions over single values along an answer, held to a plain forward pass of each whole chat."""

from __future__ import annotations

import json
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_distill.assets.music import drawn_fields
from mlx_distill.config import ASSETS
from mlx_distill.data.chat import render
from mlx_distill.data.rows import to_example, to_row
from mlx_distill.errors import ConfigError, ModelError
from mlx_distill.infer.value_scoring import read_values, value_nodes, value_offset
from mlx_distill.losses.token_bytes import vocabulary
from mlx_distill.models.load import load
from mlx_distill.tasks.answer import dump_answer
from mlx_distill.tasks.task import load_task

TASK = load_task("music_drawn_fields")


@pytest.fixture(scope="module", params=["tiny-qwen3", "tiny-gpt-oss"])
def model(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    return load(ASSETS / "models" / request.param, dtype="float32")


def rows(count: int) -> list[dict[str, Any]]:
    return [to_row(to_example(row, TASK, "x"), "test") for row in drawn_fields.generate(count, 31, "test")]


def test_offsets_point_at_each_value_of_the_canonical_text() -> None:
    answer = {"verdict": "ACCEPTABLE", "score": 85, "themes": ["faith", "hope"]}
    text = dump_answer(answer, TASK.schema)
    found = {name: text[value_offset(answer, name, TASK.schema) :] for name in drawn_fields.VALUES}
    expected = {
        "verdict": "ACC",
        "score[0]": "85,",
        "score[1]": "5, ",
        "themes[0]": "fai",
        "themes[1]": "hop",
    }
    assert {name: rest[:3] for name, rest in found.items()} == expected
    assert value_offset({"kind": "é", "score": 7}, "score", {}) == len('{"kind": "é", "score": '.encode())
    assert value_offset({**answer, "score": 4}, "score[1]", TASK.schema) is None
    assert value_offset(answer, "themes[2]", TASK.schema) is None
    with pytest.raises(ConfigError, match="no value 'mood'"):
        value_offset(answer, "mood", TASK.schema)


@pytest.mark.slow
def test_readings_are_those_of_whole_chats_read_alone(model: tuple[Any, Any]) -> None:
    some = rows(5)
    some[1]["answer"]["score"] = 4  # no second digit
    chats = []
    for row in some:
        text = dump_answer(row["answer"], TASK.schema)
        chats.append([*row["messages"][:-1], {"role": "assistant", "content": text}])
    answers = [row["answer"] for row in some]
    found = read_values(*model, chats, answers, TASK.schema, drawn_fields.VALUES, batch_size=2)
    spelled, nodes = vocabulary(model[1]).tokens, value_nodes(model[1], drawn_fields.VALUES)
    assert found.missing == 1
    for i, (chat, answer) in enumerate(zip(chats, answers, strict=True)):
        tokenized = render(model[1], chat)
        start = tokenized.spans[-1][0]
        z = model[0](mx.array(tokenized.tokens)[None])[0].astype(mx.float32)
        p = np.array(mx.softmax(z, axis=-1)).astype(np.float64)
        ids = tokenized.tokens.tolist()
        own = sum(np.log(p[j - 1, ids[j]]) for j in range(start, len(ids)))
        assert found.logprobs[i] == pytest.approx(own, abs=2e-3) and found.tokens[i] == len(ids) - start
        for name, table in found.distributions.items():
            offset = value_offset(answer, name, TASK.schema)
            if offset is None:
                assert np.isnan(table[i]).all()
                continue
            j = start
            while sum(len(spelled[t]) for t in ids[start:j]) < offset:
                j += 1
            mass = [p[j - 1, list(branch)].sum() for branch in nodes[name].ids]
            np.testing.assert_allclose(table[i], [*mass, 1 - sum(mass)], atol=2e-4)


def test_a_token_that_begins_two_values_counts_for_none(model: tuple[Any, Any]) -> None:
    spelled = vocabulary(model[1]).tokens
    nodes = value_nodes(model[1], {"first": drawn_fields.FIRST, "tens": drawn_fields.TENS})
    for token in nodes["first"].ids[0]:
        assert spelled[token].startswith(b'faith"') or b'faith"'.startswith(spelled[token])
    assert all(spelled[t].startswith(b"2") for t in nodes["tens"].ids[0])
    assert json.dumps(sorted(nodes)) == '["first", "tens"]'
    with pytest.raises(ModelError, match="no token begins 'a'"):
        value_nodes(model[1], {"x": ["a", "a"]})
