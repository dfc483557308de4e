from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.labels import LABEL_SETS, Counted, label_alone, tokens_behind, with_labels

from mlx_distill.data.chat import answer_ids
from mlx_distill.errors import ModelError
from mlx_distill.infer.label_scoring import (
    find_label_trie,
    label_place,
    label_prefix_tokens,
    label_probabilities,
    prompt_label_logprobs,
    task_label_trie,
)
from mlx_distill.losses import token_bytes
from mlx_distill.losses.labels import LabelNode, LabelTrie
from mlx_distill.tasks.task import Task, load_task


@pytest.fixture(scope="module")
def task() -> Task:
    return load_task("moderation")


def make_prompts(*lengths: int) -> list[list[int]]:
    random = np.random.default_rng(0)
    return [random.integers(0, 300, length).tolist() for length in lengths]


def last_logprobs(model: Any, tokens: Sequence[int]) -> np.ndarray:
    """Behind one text alone, read in full."""
    z = np.array(model(mx.array([list(tokens)]))[0, -1], dtype=np.float64)
    return z - np.log(np.exp(z - z.max()).sum()) - z.max()


def test_label_probabilities_are_the_softmax_over_the_labels_tokens(
    model: Any, tokenizer: Any, task: Task
) -> None:
    prefix = label_prefix_tokens(tokenizer, task)
    assert prefix is not None
    labels = prefix[1]
    prompts = make_prompts(3, 19, 8, 1, 8)
    got = label_probabilities(model, prompts, labels, batch_size=2)
    for prompt, line in zip(prompts, got, strict=True):
        logits = np.array(model(mx.array([prompt]))[0, -1], dtype=np.float64)
        mass = np.array([np.exp(logits[list(ids)]).sum() for ids in labels.nodes[0].ids])
        np.testing.assert_allclose(line, mass / mass.sum(), atol=2e-5)
    np.testing.assert_allclose(got.sum(axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(label_probabilities(model, prompts, labels, batch_size=5), got, atol=2e-5)
    assert np.ptp(got[:, 0]) > 0.01


@pytest.mark.parametrize("names", LABEL_SETS.values(), ids=LABEL_SETS)
def test_whole_labels_are_scored_as_each_prompt_and_label_alone(
    model: Any, tokenizer: Any, task: Task, names: tuple[str, ...]
) -> None:
    """In the cache, in full passes, in any batch: what one label at a time has, each text read in full."""
    prefix = label_prefix_tokens(tokenizer, with_labels(task, names))
    assert prefix is not None
    before, labels = prefix
    beginnings = make_prompts(3, 12)
    prompts = [[*beginning, *before] for beginning in beginnings]
    alone = np.array(
        [
            [
                label_alone(
                    name,
                    names,
                    partial(answer_ids, tokenizer),
                    token_bytes(tokenizer),
                    lambda tokens, beginning=beginning: last_logprobs(model, [*beginning, *tokens]),
                    after='", "',
                )
                for name in names[:8]
            ]
            for beginning in beginnings
        ]
    )
    for cached in (True, False):
        got = np.array(prompt_label_logprobs(model, prompts, labels, rest=True, cached=cached))
        np.testing.assert_allclose(np.exp(got[:, :-1][:, :8]), np.exp(alone), atol=1e-5)
        np.testing.assert_allclose(got[:, :-1][:, :8], alone, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(np.exp(got).sum(-1), 1, atol=1e-5)
        whole = np.exp(got[:, :-1])
        np.testing.assert_allclose(
            label_probabilities(model, prompts, labels, batch_size=1),
            whole / whole.sum(-1, keepdims=True),
            atol=1e-5,
        )


def test_each_prompt_is_read_once(model: Any, tokenizer: Any, task: Task) -> None:
    prompts = make_prompts(20, 20, 20)
    for names, nodes in ((task.labels, 1), (LABEL_SETS["share more"], 3), (LABEL_SETS["many"], 6)):
        labels = task_label_trie(tokenizer, with_labels(task, names))
        assert len(labels.nodes) == nodes
        counted = Counted(model)
        label_probabilities(counted, prompts, labels)
        assert counted.tokens == 3 * (20 + tokens_behind(labels))


def test_the_prefix_is_what_every_answer_has_before_its_label(tokenizer: Any, task: Task) -> None:
    tokens = label_prefix_tokens(tokenizer, task)
    assert tokens is not None
    prefix, labels = tokens
    assert tokenizer.decode(prefix) == '{"label": "' and labels.labels == task.labels


@pytest.mark.parametrize(
    ("tokens", "start", "prefix", "expected"),
    [
        ([9, 1, 2, 7, 8], 1, [1, 2], (3, 0)),
        ([9, 1, 2, 7], 1, [], (1, 0)),
        ([9, 1, 3, 7], 1, [1, 2], None),
        ([9, 1, 2], 1, [1, 2], None),
        ([1], 1, [1], None),
        ([9, 1, 2, 4, 8], 1, [1, 2], (3, 1)),
        ([9, 1, 2, 4], 1, [1, 2], (3, 0)),
        ([9, 1, 2, 4, 5, 6, 8], 1, [1, 2], (3, 2)),
        ([9, 1, 2, 4, 6, 6, 8], 1, [1, 2], (3, 1)),
    ],
)
def test_where_the_label_starts(
    tokens: list[int], start: int, prefix: list[int], expected: tuple[int, int] | None
) -> None:
    nodes = (
        LabelNode((), ((0, 1, 2), (3,)), ((4,), (7,))),
        LabelNode((4,), ((0, 1), (2,)), ((5,), (8,)), (0, 0)),
        LabelNode((4, 5, 6), ((0,), (1,)), ((8,), (9,)), (1, 0)),
    )
    assert label_place(tokens, start, prefix, LabelTrie(("a", "b", "c", "d"), nodes)) == expected


def test_the_root_may_stand_before_or_behind_the_end_of_the_text_before_the_label() -> None:
    nodes = (LabelNode((), ((0,), (1,)), ((4,), (7,))),)
    behind = LabelTrie(("a", "b"), nodes, shared=(3,))
    assert label_place([9, 1, 2, 3, 4, 8], 1, [1, 2], behind) == (4, 0)
    assert label_place([9, 1, 2, 5, 4, 8], 1, [1, 2], behind) is None
    before = LabelTrie(("a", "b"), nodes, cut=1)
    assert label_place([9, 1, 4, 8], 1, [1, 2], before) == (2, 0)


def test_no_prefix_where_the_label_is_not_first_or_cannot_be_written(chatml: Any, task: Task) -> None:
    notes: list[str] = []
    properties = task.schema["properties"]
    later = {
        **task.schema,
        "properties": {"confidence": properties["confidence"], "label": properties["label"]},
    }
    assert label_prefix_tokens(chatml, replace(task, schema=later), notes.append) is None
    assert "'label' is not the first property" in notes.pop()
    plain = _changed(chatml, decoder=None)
    assert label_prefix_tokens(plain, task, notes.append) is None
    assert "only answers as text" in notes.pop()
    assert find_label_trie(plain, task) is None
    with pytest.raises(ModelError, match=r"distill\.label_weight 0\.7 needs.*label_weight: 0"):
        find_label_trie(plain, task, 0.7)


def test_a_label_that_merges_with_the_quote_before_it_is_scored(chatml: Any, task: Task) -> None:
    joined = _changed(chatml, joined=True)
    prefix = label_prefix_tokens(joined, with_labels(task, ["!!", "fine"]))
    assert prefix is not None and joined.decode(prefix[0]) == '{"label":' and prefix[1].cut == 1
    assert [joined.decode(ids[-1:]) for ids in prefix[1].nodes[0].ids] == [' "!', ' "']


def _changed(tokenizer: Any, joined: bool = False, **state_of: Any) -> Any:
    """The tokenizer with other settings, or with a merge of the quote and a label's first character."""
    import json

    from tokenizers import Tokenizer

    state = {**json.loads(tokenizer.backend_tokenizer.to_str()), **state_of}
    if joined:
        state["model"]["vocab"]['Ġ"!'] = 999
        state["model"]["merges"].append(['Ġ"', "!"])
    core = Tokenizer.from_str(json.dumps(state))
    changed = tokenizer.__class__(tokenizer_object=core, eos_token="<|im_end|>")
    changed.chat_template = tokenizer.chat_template
    return changed
