from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.labels import LABEL_SETS, Counted, with_labels
from helpers.small_chain import RecordedProgress

import mlx_distill as md
from mlx_distill.data.chat import answer_ids, prompt_ids
from mlx_distill.data.rows import to_item
from mlx_distill.errors import ConfigError, DataError
from mlx_distill.infer.analyze import Analyzer
from mlx_distill.infer.label_scorer import NORMALIZATIONS, label_orders
from mlx_distill.infer.label_scoring import (
    label_prefix_tokens,
    label_probabilities,
    label_string_logprobs,
    prompt_label_logprobs,
    task_label_strings,
)
from mlx_distill.infer.shared_prefix import SharedPrefix
from mlx_distill.losses.labels import LabelStrings
from mlx_distill.tasks.task import Task, load_task

SYSTEM = list(range(30, 52))  # past the sliding window of the tiny models
ITEMS = [{"id": i, "text": "Gardeners are kind" + " and kind" * (i % 4), "group": "x"} for i in range(11)]


@pytest.fixture(scope="module")
def task() -> Task:
    listed = "You moderate messages. One of {label:options}."
    return replace(
        with_labels(load_task("moderation"), ["positive", "possible", "negative", "neutral"]), system=listed
    )


def make_prompts(vocabulary: int, *lengths: int) -> list[list[int]]:
    random = np.random.default_rng(3)
    return [SYSTEM + random.integers(0, vocabulary, length).tolist() for length in lengths]


def summed(model: Any, prompt: Sequence[int], path: Sequence[int]) -> float:
    """The log-probability of some tokens behind a prompt, by one full pass over both."""
    z = np.array(model(mx.array([[*prompt, *path]]))[0].astype(mx.float32), dtype=np.float64)
    z = z[len(prompt) - 1 : -1]
    z = z - z.max(axis=1, keepdims=True)
    z = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
    return float(z[np.arange(len(path)), list(path)].sum())


PATHS = ((7, 8, 9), (7, 8, 10, 11, 12), (13,), (14, 7))
STRINGS = LabelStrings(("a", "b", "c", "d"), (), PATHS, (3, 5, 1, 2))


def test_whole_labels_are_the_sum_over_their_tokens_in_full_passes(any_model: Any) -> None:
    """Prompts of different lengths behind a shared prefix, in one batch."""
    prompts = make_prompts(60, 3, 9, 1, 6)
    expected = [[summed(any_model, prompt, path) for path in PATHS] for prompt in prompts]
    for batch_size in (1, 3, 4):
        got = label_string_logprobs(any_model, prompts, STRINGS, batch_size=batch_size)
        np.testing.assert_allclose(got, expected, atol=2e-3, rtol=1e-4)
    assert np.ptp(got[:, 0]) > 0.05


@pytest.mark.parametrize("names", [LABEL_SETS["differ at once"], LABEL_SETS["share more"]])
def test_a_shared_prefix_changes_no_probability(any_model: Any, chatml: Any, names: Sequence[str]) -> None:
    prefix = label_prefix_tokens(chatml, with_labels(load_task("moderation"), names))
    assert prefix is not None
    before, labels = prefix
    prompts = [[*prompt, *before] for prompt in make_prompts(60, 3, 9, 1, 6)]
    alone = [prompt_label_logprobs(any_model, [prompt], labels, cached=False)[0] for prompt in prompts]
    for batch_size in (1, 4):
        got = label_probabilities(any_model, prompts, labels, batch_size=batch_size)
        np.testing.assert_allclose(got, np.exp(np.array(mx.stack(alone))), atol=5e-5)


def test_the_shared_prefix_is_read_once_for_all_batches_and_calls(model: Any) -> None:
    counted = Counted(model)
    prompts = make_prompts(300, 4, 4, 4, 4, 4, 4)
    prefix = SharedPrefix(counted)
    single = LabelStrings(("a", "b"), (), ((7,), (8,)), (2, 2))
    for _ in range(2):
        label_string_logprobs(counted, prompts, single, batch_size=2, prefix=prefix)
    assert counted.tokens == len(SYSTEM) + 2 * 6 * 4
    other = [prompt[5:] for prompt in prompts]
    label_string_logprobs(counted, other, single, batch_size=2, prefix=prefix)
    assert counted.tokens == len(SYSTEM) + 2 * 6 * 4 + len(SYSTEM) - 5 + 6 * 4


def test_prompts_that_are_one_another_keep_a_token_to_read(model: Any) -> None:
    prompts = [SYSTEM, SYSTEM, [*SYSTEM, 3]]
    got = label_string_logprobs(model, prompts, STRINGS)
    expected = [[summed(model, prompt, path) for path in PATHS] for prompt in prompts]
    np.testing.assert_allclose(got, expected, atol=2e-3)


def probabilities(found: Sequence[md.Classification]) -> np.ndarray:
    return np.array([list((c.probabilities or {}).values()) for c in found])


def classify(model: Any, tokenizer: Any, task: Task, items: Sequence[Any], **options: Any) -> Any:
    return md.classify((model, tokenizer), task, items, progress=RecordedProgress(), **options)


def test_classifications_are_the_distributions_of_predictions(model: Any, tokenizer: Any, task: Task) -> None:
    found = classify(model, tokenizer, task, ITEMS)
    predicted = md.analyze((model, tokenizer), task, ITEMS, max_tokens=2, progress=RecordedProgress())
    for own, other in zip(found, predicted, strict=True):
        assert own.id == other.id and own.fields == other.fields and own.error is None
        assert own.probabilities == pytest.approx(other.label_probs, abs=2e-5)
        assert own.label == max(own.probabilities, key=own.probabilities.get) and not own.calibrated
        assert list(own.probabilities) == list(task.labels)
        assert sum(own.probabilities.values()) == pytest.approx(1, abs=1e-6)
    one_by_one = classify(model, tokenizer, task, ITEMS, batch_size=1)
    np.testing.assert_allclose(probabilities(one_by_one), probabilities(found), atol=2e-5)


@pytest.mark.parametrize("normalize", NORMALIZATIONS[1:])
def test_scores_are_normalized_as_asked(model: Any, tokenizer: Any, task: Task, normalize: str) -> None:
    strings = task_label_strings(tokenizer, task)
    found = probabilities(classify(model, tokenizer, task, ITEMS[:3], normalize=normalize))
    for item, line in zip(ITEMS, found, strict=False):
        prompt = [*prompt_ids(tokenizer, to_item(item, task).messages), *strings.before]
        scores = np.array([summed(model, prompt, path) for path in strings.paths])
        tokens = np.array([len(path) for path in strings.paths])
        scores = scores / {"string": 1, "tokens": tokens, "bytes": np.array(strings.bytes)}[normalize]
        np.testing.assert_allclose(line, np.exp(scores) / np.exp(scores).sum(), atol=1e-3)


@pytest.mark.parametrize("names", LABEL_SETS.values(), ids=LABEL_SETS)
def test_whole_labels_end_with_their_quote(tokenizer: Any, names: Sequence[str]) -> None:
    task = with_labels(load_task("moderation"), names)
    strings = task_label_strings(tokenizer, task)
    whole = answer_ids(tokenizer, '{"label": "')
    assert list(strings.before) == whole[: len(strings.before)]
    for name, path, size in zip(names, strings.paths, strings.bytes, strict=True):
        quoted = json.dumps(name, ensure_ascii=False)[1:]
        assert size == len(quoted.encode())
        text = tokenizer.decode([*strings.before, *path])
        assert text.startswith(f'{{"label": "{quoted}') and len(text) <= len(quoted) + len('{"label": "",')
        assert tokenizer.decode([*strings.before, *path[:-1]]) < f'{{"label": "{quoted}'


def test_a_temperature_divides_the_scores(model: Any, tokenizer: Any, task: Task) -> None:
    plain = probabilities(classify(model, tokenizer, task, ITEMS[:3]))
    warm = probabilities(classify(model, tokenizer, task, ITEMS[:3], temperature=2.0))
    np.testing.assert_allclose(warm, plain**0.5 / (plain**0.5).sum(1, keepdims=True), atol=1e-6)


def test_shuffled_options_are_averaged_in_log_probabilities(model: Any, tokenizer: Any, task: Task) -> None:
    found = probabilities(classify(model, tokenizer, task, ITEMS[:3], shuffle_options=3, seed=5))
    logs = []
    for order in label_orders(task.labels, 3, 5):
        turned = classify(model, tokenizer, task.with_label_order(order), ITEMS[:3])
        logs.append(np.log([[c.probabilities[label] for label in task.labels] for c in turned]))
    expected = np.exp(np.mean(logs, axis=0))
    np.testing.assert_allclose(found, expected / expected.sum(1, keepdims=True), atol=5e-5)
    assert np.ptp(np.exp(logs), axis=0).max() > 0.01  # the order matters to this model


def test_orders_have_each_label_at_each_place_equally_often() -> None:
    labels = ["a", "b", "c", "d"]
    for cycles in (1, 2):
        orders = np.array(label_orders(labels, 4 * cycles, seed=1))
        for place in orders.T:
            assert sorted(place) == sorted(labels * cycles)
    assert len(set(label_orders(labels, 100))) == math.factorial(4)
    assert label_orders(labels, 3, 0) != label_orders(labels, 3, 1)


def test_a_row_that_cannot_be_asked_has_an_error_of_its_own(model: Any, tokenizer: Any, task: Task) -> None:
    items = [ITEMS[0], {"id": "none"}, {"id": "long", "text": "kind " * 60}, ITEMS[1]]
    limit = max(len(prompt_ids(tokenizer, to_item(item, task).messages)) for item in ITEMS[:2])
    found = classify(model, tokenizer, task, items, max_prompt_tokens=limit)
    assert [c.id for c in found] == ["0", "none", "long", "1"]
    assert [c.label is None for c in found] == [False, True, True, False]
    assert "text" in str(found[1].error) and "tokens" in str(found[2].error)
    assert found[1].probabilities is None and not found[1].calibrated
    others = classify(model, tokenizer, task, ITEMS[:2])
    np.testing.assert_allclose(probabilities([found[0], found[3]]), probabilities(others), atol=2e-5)


def test_a_chat_of_its_own_cannot_be_shuffled(model: Any, tokenizer: Any, task: Task) -> None:
    chat = {"id": "c", "messages": [{"role": "user", "content": "One of these?"}]}
    found = classify(model, tokenizer, task, [chat, ITEMS[0]], shuffle_options=2)
    assert found[0].label is None and "chat of its own" in str(found[0].error) and found[1].label


def test_options_that_do_not_suit_the_task_are_refused_before_a_model_is_loaded(task: Task) -> None:
    plain = load_task("moderation")
    properties = plain.schema["properties"]
    turned = {"confidence": properties["confidence"], "label": properties["label"]}
    later = replace(plain, schema={**plain.schema, "properties": turned})
    cases: list[tuple[Task, dict[str, Any], str, str]] = [
        (plain, {"shuffle_options": 2}, "no place for the list", "{label:options}"),
        (task, {"shuffle_options": 0}, "shuffle_options is 0", "1 or more"),
        (task, {"normalize": "words"}, "normalize is 'words'", "none, string, tokens, bytes"),
        (task, {"temperature": 0.0}, "temperature is 0", "positive"),
        (replace(plain, label=None, positive=(), group=None), {}, "has no label", "label"),
        (later, {}, "not the first property", "first property"),
    ]
    for bad, options, message, fix in cases:
        with pytest.raises(ConfigError, match=message) as caught:
            md.classify("no/such/model", bad, ITEMS, progress=RecordedProgress(), **options)
        assert fix in (caught.value.fix or "")
    with pytest.raises(DataError, match="one item alone"):
        md.classify("no/such/model", task, "text")


def test_an_analyzer_classifies_and_analyzes(model: Any, tokenizer: Any, task: Task) -> None:
    analyzer = Analyzer((model, tokenizer), task, max_tokens=2, progress=RecordedProgress())
    found = analyzer.classify(ITEMS[:3])
    np.testing.assert_allclose(
        probabilities(found), probabilities(classify(model, tokenizer, task, ITEMS[:3])), atol=2e-5
    )
    assert analyzer.analyze(ITEMS[:1])[0].label_probs == pytest.approx(found[0].probabilities, abs=2e-5)
