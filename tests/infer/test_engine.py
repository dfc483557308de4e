from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_distill.errors import ConfigError, DataError
from mlx_distill.infer.engine import (
    Generation,
    LogitsHook,
    generate,
)
from mlx_distill.infer.sampling import choose

VOCABULARY = 400
LONGEST = 14


class Numbers:
    """Spells a token as its number."""

    def decode(self, tokens: list[int]) -> str:
        assert tokens
        return " ".join(map(str, tokens))


class FewNumbers(Numbers):
    def get_vocab(self) -> dict[str, int]:
        return {str(i): i for i in range(50)}


def make_prompts() -> list[list[int]]:
    """Lengths from 1 to several times the sliding window, two of them alike, in no order."""
    random = np.random.default_rng(5)
    return [
        random.integers(0, VOCABULARY, length).tolist() for length in (9, 1, 30, 2, 5, 6, 7, 21, 9, 3, 17)
    ]


def one_by_one(model: Any, prompt: list[int], count: int) -> list[int]:
    """The reference: the model's own cache, one prompt, no batch."""
    from mlx_lm.models.cache import make_prompt_cache

    cache, inputs, out = make_prompt_cache(model), mx.array([prompt]), []
    for _ in range(count):
        token = mx.argmax(model(inputs, cache=cache)[:, -1], axis=-1)
        out.append(int(token.item()))
        inputs = token[:, None]
    return out


def without_cache(model: Any, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(mx.argmax(model(mx.array([tokens]))[0, -1]).item()))
    return tokens[len(prompt) :]


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return make_prompts()


@pytest.fixture(scope="module")
def plain(model: Any, prompts: list[list[int]]) -> list[list[int]]:
    return [one_by_one(model, prompt, LONGEST) for prompt in prompts]


def cut(tokens: list[int], stop: set[int]) -> tuple[list[int], str]:
    ends = [i for i, token in enumerate(tokens) if token in stop]
    return (tokens[: ends[0]], "stop") if ends else (tokens, "length")


def run(model: Any, prompts: list[list[int]], **options: Any) -> list[Generation]:
    return generate(model, Numbers(), prompts, **{"max_tokens": LONGEST, "stop": set(), **options})


def tokens_of(generations: list[Generation]) -> list[list[int]]:
    return [list(g.tokens) for g in generations]


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_a_batch_gives_the_answers_of_each_prompt_alone(
    model: Any, prompts: list[list[int]], plain: list[list[int]], batch_size: int
) -> None:
    assert len({token for tokens in plain for token in tokens}) > 20  # the model does not repeat itself
    assert tokens_of(run(model, prompts, batch_size=batch_size)) == plain


def test_the_reference_with_a_cache_equals_one_without(
    model: Any, prompts: list[list[int]], plain: list[list[int]]
) -> None:
    assert [without_cache(model, prompt, LONGEST) for prompt in prompts[:4]] == plain[:4]


@pytest.mark.slow
@pytest.mark.parametrize("width", [1, 3, 7])
def test_the_prefill_step_size_changes_nothing(
    model: Any, prompts: list[list[int]], plain: list[list[int]], width: int
) -> None:
    assert tokens_of(run(model, prompts, prefill_step_size=width)) == plain


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [3, 11])
def test_rows_that_stop_leave_the_batch_and_change_no_other(
    model: Any, prompts: list[list[int]], plain: list[list[int]], batch_size: int
) -> None:
    stop = {tokens[place] for tokens, place in zip(plain, (0, 3, 6, 9, 2, 13), strict=False)}
    wanted = [cut(tokens, stop) for tokens in plain]
    assert {finish for _, finish in wanted} == {"stop", "length"} and len(
        {len(tokens) for tokens, _ in wanted}
    ) > 3
    got = run(model, prompts, batch_size=batch_size, stop=stop)
    assert [(list(g.tokens), g.finish) for g in got] == wanted
    assert [g.text for g in got] == [" ".join(map(str, tokens)) for tokens, _ in wanted]


def test_answers_come_in_the_order_of_the_prompts(model: Any, prompts: list[list[int]]) -> None:
    got = run(model, prompts, max_tokens=2, batch_size=2)
    assert [g.prompt_tokens for g in got] == [len(prompt) for prompt in prompts]
    assert all(g.seconds > 0 for g in got)


def test_done_counts_up_to_all(model: Any, prompts: list[list[int]]) -> None:
    seen: list[int] = []
    run(model, prompts, max_tokens=1, batch_size=4, on_done=seen.append)
    assert seen == list(range(1, 12))


@pytest.mark.parametrize("temperature", [0.0, 3.0])
def test_logits_beyond_the_vocabulary_are_never_chosen(
    model: Any, prompts: list[list[int]], temperature: float
) -> None:
    got = generate(model, FewNumbers(), prompts, max_tokens=LONGEST, stop=set(), temperature=temperature)
    assert max(token for g in got for token in g.tokens) < 50


@pytest.mark.slow
def test_a_sampled_answer_depends_on_the_seed_and_not_on_the_batch(
    model: Any, prompts: list[list[int]]
) -> None:
    first = tokens_of(run(model, prompts, temperature=1.0, seed=4))
    assert tokens_of(run(model, prompts, temperature=1.0, seed=4, batch_size=3)) == first
    assert tokens_of(run(model, prompts, temperature=1.0, seed=5)) != first


def test_tokens_are_sampled_with_their_probabilities() -> None:
    logits = mx.array([[0.0, 1.0, -1.0, 2.0, -40.0]])
    count = 4000
    uniforms = np.random.default_rng(0).random(count).tolist()
    drawn = np.array(choose(mx.broadcast_to(logits, (count, 5)), [2.0] * count, uniforms))
    wanted = np.array(mx.softmax(logits[0] / 2.0))
    assert np.abs(np.bincount(drawn, minlength=5) / count - wanted).max() < 0.03
    assert not (drawn == 4).any()


def test_no_prompts_no_answers(model: Any) -> None:
    assert run(model, []) == []


@pytest.mark.parametrize(
    "options", [{"max_tokens": 0}, {"batch_size": 0}, {"temperature": -1.0}, {"prefill_step_size": 0}]
)
def test_invalid_settings_are_refused(model: Any, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        run(model, [[1]], **options)


def test_an_empty_prompt_is_named(model: Any) -> None:
    with pytest.raises(DataError, match="prompt 1 is empty"):
        run(model, [[1], []])


@pytest.mark.slow
@pytest.mark.parametrize("step", [0, 2, 5])
def test_a_logits_hook_reads_the_logits_of_its_step(model: Any, prompts: list[list[int]], step: int) -> None:
    plain = generate(model, Numbers(), prompts, max_tokens=6, batch_size=4, stop=set())
    stop = {plain[3].tokens[3], plain[5].tokens[0]}  # some answers end before they get there
    hooked = generate(
        model,
        Numbers(),
        prompts,
        max_tokens=6,
        batch_size=4,
        stop=stop,
        logits_hook=LogitsHook(step, lambda logits, *_: logits[:, :7]),
    )
    for prompt, answer in zip(prompts, hooked, strict=True):
        assert (answer.hook_output is None) == (len(answer.tokens) < step)
        if answer.hook_output is not None:
            logits = model(mx.array([[*prompt, *answer.tokens[:step]]]))[0, -1, :7]
            np.testing.assert_allclose(answer.hook_output, np.array(logits), atol=2e-5)
    assert step == 0 or any(answer.hook_output is None for answer in hooked)


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.8, 1.0])
def test_nucleus_sampling_draws_from_the_smallest_set_that_has_the_share(top_p: float) -> None:
    logits = np.random.default_rng(0).normal(size=12).astype(np.float32) * 2
    probabilities = np.exp(logits) / np.exp(logits).sum()
    falling = np.argsort(-probabilities)
    count = int(np.searchsorted(np.cumsum(probabilities[falling]), top_p)) + 1
    expected = np.zeros(12)
    kept = falling[:count]
    expected[kept] = probabilities[kept] / probabilities[kept].sum()
    rows = 4000
    uniforms = ((np.arange(rows) + 0.5) / rows).tolist()
    drawn = np.array(
        choose(mx.broadcast_to(mx.array(logits), (rows, 12)), [1.0] * rows, uniforms, [top_p] * rows)
    )
    assert np.abs(np.bincount(drawn, minlength=12) / rows - expected).max() < 2 / rows
    # A row with another share beside it is not changed.
    mixed = choose(mx.array(np.stack([logits, logits])), [1.0, 1.0], [0.97, 0.97], [top_p, 1.0])
    alone = choose(mx.array(logits[None]), [1.0], [0.97])
    assert int(mixed[1]) == int(alone[0])


def test_the_largest_number_draws_no_token_without_probability() -> None:
    largest = float(np.nextafter(np.float32(1), np.float32(0)))
    logits = mx.array([[0.0, 1.0, 2.0, -mx.inf, -mx.inf]])
    assert int(choose(logits, [1.0], [largest])[0]) == 2
    assert int(choose(logits, [1.0], [largest], [0.5])[0]) == 2
