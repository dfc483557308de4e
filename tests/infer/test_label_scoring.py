from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_distill.infer.label_scoring import label_prefix_tokens, label_probabilities, label_start
from mlx_distill.losses.labels import label_tokens
from mlx_distill.tasks.task import Task, load_task


@pytest.fixture(scope="module")
def task() -> Task:
    return load_task("moderation")


def test_label_probabilities_are_the_softmax_over_the_labels_tokens(
    model: Any, tokenizer: Any, task: Task
) -> None:
    labels = label_tokens(tokenizer, task.labels)
    random = np.random.default_rng(0)
    prompts = [random.integers(0, 300, length).tolist() for length in (3, 19, 8, 1, 8)]
    got = label_probabilities(model, prompts, labels, batch_size=2)
    for prompt, line in zip(prompts, got, strict=True):
        logits = np.array(model(mx.array([prompt]))[0, -1], dtype=np.float64)
        mass = np.array([np.exp(logits[list(ids)]).sum() for ids in labels.ids])
        np.testing.assert_allclose(line, mass / mass.sum(), atol=2e-5)
    np.testing.assert_allclose(got.sum(axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(label_probabilities(model, prompts, labels, batch_size=5), got, atol=2e-5)
    assert np.ptp(got[:, 0]) > 0.01


def test_the_prefix_is_what_every_answer_has_before_its_label(tokenizer: Any, task: Task) -> None:
    tokens = label_prefix_tokens(tokenizer, task)
    assert tokens is not None
    prefix, labels = tokens
    assert tokenizer.decode(prefix) == '{"label": "' and labels.labels == task.labels


@pytest.mark.parametrize(
    ("tokens", "start", "prefix", "expected"),
    [
        ([9, 1, 2, 7, 8], 1, [1, 2], 3),
        ([9, 1, 2, 7], 1, [], 1),
        ([9, 1, 3, 7], 1, [1, 2], None),
        ([9, 1, 2], 1, [1, 2], None),
        ([1], 1, [1], None),
    ],
)
def test_where_the_label_starts(
    tokens: list[int], start: int, prefix: list[int], expected: int | None
) -> None:
    assert label_start(tokens, start, prefix) == expected


def test_no_prefix_where_one_pass_cannot_tell_the_labels_apart(chatml: Any, task: Task) -> None:
    properties = task.schema["properties"]
    later = {
        **task.schema,
        "properties": {"confidence": properties["confidence"], "label": properties["label"]},
    }
    assert label_prefix_tokens(chatml, replace(task, schema=later)) is None
    alike = {**task.schema, "properties": {**properties, "label": {"enum": ["harsh", "hostile"]}}}
    assert label_prefix_tokens(chatml, replace(task, schema=alike)) is None
    merged = {**task.schema, "properties": {**properties, "label": {"enum": ["!!", "fine"]}}}
    joined = chatml.__class__(tokenizer_object=_joining(chatml), eos_token="<|im_end|>")
    joined.chat_template = chatml.chat_template
    assert label_prefix_tokens(joined, replace(task, schema=merged)) is None


def _joining(tokenizer: Any) -> Any:
    """The same tokens and a merge of the quote with a label's first character."""
    import json

    from tokenizers import Tokenizer

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["model"]["vocab"]['"!'] = 999
    state["model"]["merges"].insert(0, ['"', "!"])
    return Tokenizer.from_str(json.dumps(state))
