"""Requests that join and leave a batch have the answers that mlx-lm gives each alone, token for token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.cache_kinds import WINDOW, make_cached_model

from mlx_distill.errors import ConfigError
from mlx_distill.infer.engine import Engine, Failed, Finished, Request, TokenEvent, generate
from mlx_distill.infer.requests import LogitsHook

LONGEST = 3 * WINDOW
TIE = 1e-4  # logits that differ by less are equal: another batch may choose the other token


class Numbers:
    def decode(self, tokens: Sequence[int]) -> str:
        return " ".join(map(str, tokens))


class Words(Numbers):
    """For streaming: two tokens make one character."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [1, 2]

    def decode(self, tokens: Sequence[int]) -> str:
        whole, rest = divmod(len(tokens), 2)
        return "x" * whole + "\ufffd" * rest


def make_prompts(*lengths: int, seed: int = 5) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(0, 400, length).tolist() for length in lengths]


def alone(model: Any, prompt: list[int], count: int = LONGEST) -> list[int]:
    """The reference."""
    from mlx_lm.generate import generate_step

    return [int(token) for token, _ in generate_step(mx.array(prompt), model, max_tokens=count)]


def check(model: Any, prompt: list[int], got: Sequence[int], expected: Sequence[int]) -> int:
    """Both are the same up to a tie, if there is one; return whether there is."""
    different = [i for i, (a, b) in enumerate(zip(got, expected, strict=True)) if a != b]
    if not different:
        return 0
    at = different[0]
    logits = np.array(model(mx.array([[*prompt, *expected[:at]]]))[0, -1])
    best = np.sort(logits)[-2:]
    assert best[1] - best[0] <= TIE, f"token {at} of prompt {prompt[:5]}..."
    return 1


def run(engine: Engine, numbers: dict[int, int], out: dict[int, list[int]], steps: int | None = None) -> None:
    done = 0
    while engine.busy and (steps is None or done < steps):
        for event in engine.step():
            assert isinstance(event, Finished)
            out[numbers[event.request_id]] = list(event.generation.tokens)
        done += 1


@pytest.mark.parametrize("step_size", [pytest.param(3, marks=pytest.mark.slow), 1024])
def test_a_batch_with_joining_and_leaving_requests_equals_each_alone(any_model: Any, step_size: int) -> None:
    """Unequal prompts, past the sliding window, with a shared beginning, one request that joins while others
    are decoded, and one that is cancelled.
    """
    shared = make_prompts(40, seed=1)[0]
    prompts = make_prompts(9, 1, 30, 2)
    prompts += [shared + rest for rest in make_prompts(4, 11, 1, 7)]
    expected = [alone(any_model, prompt) for prompt in prompts]
    assert len({token for tokens in expected for token in tokens}) > 15  # the model does not repeat itself
    engine = Engine(any_model, Numbers(), batch_size=4, prefill_step_size=step_size)
    out: dict[int, list[int]] = {}
    numbers = {engine.submit(Request(prompt, LONGEST)): i for i, prompt in enumerate(prompts[:-1])}
    cancelled = engine.submit(Request(make_prompts(6)[0], LONGEST))
    run(engine, numbers, out, steps=5)
    numbers[engine.submit(Request(prompts[-1], LONGEST))] = len(prompts) - 1
    engine.cancel(2)
    run(engine, numbers, out, steps=WINDOW)
    engine.cancel(cancelled)
    run(engine, numbers, out)
    assert sorted(out) == [0, 1, 3, 4, 5, 6, 7]
    ties = sum(check(any_model, prompts[i], tokens, expected[i]) for i, tokens in out.items())
    assert ties <= 1
    assert engine.stats.reused_tokens >= 3 * 40 and engine.stats.rows == 4


def test_a_shared_beginning_is_computed_once() -> None:
    model = make_cached_model("gpt_oss")
    shared = make_prompts(50, seed=2)[0]
    rests = make_prompts(5, 9, 3, 5, 8, 6)
    prompts = [shared + rest for rest in rests]
    engine = Engine(model, Numbers(), batch_size=3)
    for prompt in prompts:
        engine.submit(Request(prompt, 4))
    run(engine, dict(enumerate(range(6))), {})
    read = 50 + sum(len(rest) - 1 for rest in rests)
    assert engine.stats.prompt_tokens == read and engine.stats.reused_tokens == 5 * 50
    engine.submit(Request(prompts[0], 4))  # later too
    run(engine, {6: 0}, {})
    assert engine.stats.prompt_tokens == read + len(rests[0]) - 1
    plain = Engine(model, Numbers(), batch_size=3, prefix_cache_tokens=0)
    for prompt in prompts:
        plain.submit(Request(prompt, 4))
    run(plain, dict(enumerate(range(6))), {})
    assert plain.stats.reused_tokens == 0 and plain.stats.prompt_tokens == read + 5 * 50


def test_tokens_are_read_while_the_pass_behind_them_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """All arrays of one ``async_eval`` become readable when the last of them is."""
    calls: list[list[mx.array]] = []
    submit = mx.async_eval

    def recorded(*arrays: Any) -> None:
        calls.append([array for array in arrays if isinstance(array, mx.array)])
        submit(*arrays)

    monkeypatch.setattr(mx, "async_eval", recorded)
    engine = Engine(make_cached_model("qwen3"), Numbers())
    engine.submit(Request([1, 2, 3], 5))
    run(engine, {0: 0}, {})
    kinds = [{array.ndim for array in call} for call in calls]
    assert {1} in kinds and {2} in kinds and {1, 2} not in kinds


class Only:
    """Even tokens alone; behind ``fails`` of them an error, behind ``gives_up`` no mask."""

    done = False

    def __init__(self, fails: int = 99, gives_up: int = 99) -> None:
        self.seen: list[int] = []
        self.fails, self.gives_up = fails, gives_up

    def accept(self, token: int) -> None:
        self.seen.append(token)
        if len(self.seen) == self.fails:
            raise ValueError("no more")


def fill_even(constraints: Sequence[Any], masks: np.ndarray) -> dict[int, Exception]:
    assert (masks == -1).all()
    errors: dict[int, Exception] = {}
    for row, (constraint, mask) in enumerate(zip(constraints, masks, strict=True)):
        if constraint is not None:
            mask[:] = 0x55555555
            if len(constraint.seen) >= constraint.gives_up:
                errors[row] = ValueError("no mask")
    return errors


def test_constrained_rows_stand_among_others() -> None:
    model = make_cached_model("qwen3")
    prompts = make_prompts(5, 9, 3, 7)
    engine = Engine(model, Numbers(), batch_size=3, fill_masks=fill_even)
    constraints = [Only(), None, Only(), None]
    for prompt, constraint in zip(prompts, constraints, strict=True):
        engine.submit(Request(prompt, 8, constraint=constraint))
    out: dict[int, list[int]] = {}
    run(engine, dict(enumerate(range(4))), out)
    for i, (prompt, constraint) in enumerate(zip(prompts, constraints, strict=True)):
        if constraint is None:
            check(model, prompt, out[i], alone(model, prompt, 8))
            continue
        assert constraint.seen == out[i][:-1]
        tokens = list(prompt)
        for token in out[i]:
            logits = np.array(model(mx.array([tokens]))[0, -1])
            assert token == 2 * int(logits[::2].argmax())
            tokens.append(token)


def test_an_error_of_one_request_leaves_the_others(kind: str) -> None:
    model = make_cached_model("qwen3" if kind == "chatml" else "gpt_oss")
    prompts = make_prompts(5, 9, 3, 4)

    def fail(logits: mx.array, caches: Any) -> mx.array:
        raise ValueError("no hook")

    engine = Engine(model, Numbers(), fill_masks=fill_even)
    engine.submit(Request(prompts[0], 8, constraint=Only(fails=3)))
    engine.submit(Request(prompts[1], 8))
    engine.submit(Request(prompts[2], 8, logits_hook=LogitsHook(2, fail)))
    engine.submit(Request(prompts[3], 8, constraint=(gives_up := Only(gives_up=2))))
    events = []
    while engine.busy:
        events += engine.step()
    failed = {event.request_id: str(event.error) for event in events if isinstance(event, Failed)}
    assert failed == {0: "no more", 2: "no hook", 3: "no mask"} and len(gives_up.seen) == 2
    (finished,) = (event for event in events if isinstance(event, Finished))
    assert list(finished.generation.tokens) == alone(model, prompts[1], 8)


def test_tokens_are_streamed() -> None:
    model = make_cached_model("qwen3")
    engine = Engine(model, Words())
    number = engine.submit(Request(make_prompts(5)[0], 5, stream=True))
    engine.submit(Request(make_prompts(5)[0], 5))
    events = []
    while engine.busy:
        events += engine.step()
    streamed = [event for event in events if isinstance(event, TokenEvent)]
    assert len(streamed) == 5
    assert {event.request_id for event in streamed} == {number}
    generations = [event.generation for event in events if isinstance(event, Finished)]
    assert all(generation.tokens == tuple(event.token for event in streamed) for generation in generations)
    assert all(g.first_token_seconds > 0 and g.seconds > 0 for g in generations)


def test_time_is_shared_by_requests_whose_prompts_are_read_too() -> None:
    """Also where no request is being decoded: reading prompts is part of their time."""
    engine = Engine(make_cached_model("qwen3"), Words())
    for _ in range(2):
        engine.submit(Request(make_prompts(5)[0], 5))
    engine.step()
    assert len(engine._requests) == 2 and all(row.seconds > 0 for row in engine._requests.values())


def test_thinking_is_kept_apart(tokenizer: Any, kind: str) -> None:
    """A model that is made to think, and then to answer."""
    text = {
        "chatml": "<think>\nlovely\n</think>\n\nfine<|im_end|>",
        "harmony": "<|channel|>analysis<|message|>lovely<|end|><|start|>assistant<|channel|>final<|message|>"
        "fine<|return|>",
    }[kind]
    said = tokenizer.encode(text, add_special_tokens=False)
    inner = make_cached_model("qwen3")

    class Scripted:
        layers = inner.layers

        def __call__(self, tokens: mx.array, cache: Any) -> mx.array:
            logits = inner(tokens, cache=cache)
            after = cache[0].offset[:, None, None] - 1  # one token of the prompt
            script = mx.array([*said, 0])[mx.minimum(after, len(said))]
            return logits + 1e4 * (mx.arange(logits.shape[-1]) == script)

    stop = set(tokenizer.encode("<|im_end|>" if kind == "chatml" else "<|return|><|end|>"))
    hook = LogitsHook(0, lambda logits, caches: logits[:, :5])
    (answer,) = generate(Scripted(), tokenizer, [[1]], max_tokens=40, stop=stop, logits_hook=hook)
    assert answer.text == "fine" and answer.finish == "stop" and "lovely" in answer.thinking
    assert tokenizer.decode(list(answer.tokens[answer.answer_start :])) == "fine"
    logits = inner(mx.array([[1, *answer.tokens[: answer.answer_start]]]))[0, -1, :5]
    np.testing.assert_allclose(answer.hook_output, np.array(logits), atol=2e-5)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_keys_and_values_of_a_batch_equal_mlx_lms_of_one_row(bits: int) -> None:
    from mlx_lm.models.cache import QuantizedKVCache

    model = make_cached_model("qwen3_wide")
    prompts = make_prompts(9, 1, 20, 5, 14)
    got = generate(model, Numbers(), prompts, max_tokens=9, batch_size=3, stop=set(), kv_bits=bits)
    for prompt, answer in zip(prompts, got, strict=True):
        plain = _plain(model, prompt[:-1])
        caches = [cache.to_quantized(group_size=64, bits=bits) for cache in plain]
        assert all(isinstance(cache, QuantizedKVCache) for cache in caches)
        token, expected = prompt[-1], []
        for _ in range(9):
            logits = model(mx.array([[token]]), cache=caches)[0, -1]
            token = int(mx.argmax(logits).item())
            expected.append(token)
        assert list(answer.tokens) == expected
    exact = generate(model, Numbers(), prompts, max_tokens=9, stop=set())
    assert bits == 8 or [g.tokens for g in exact] != [g.tokens for g in got]


def _plain(model: Any, prompt: list[int]) -> list[Any]:
    from mlx_lm.models.cache import make_prompt_cache

    caches = make_prompt_cache(model)
    if prompt:
        model(mx.array([prompt]), cache=caches)
    return list(caches)


@pytest.mark.parametrize(
    ("kind", "bits", "words"),
    [
        ("gpt_oss", 8, "RotatingKVCache"),
        ("lfm2", 8, "ArraysCache"),
        ("qwen3", 4, "width 8"),
        ("qwen3", 3, "3"),
    ],
)
def test_keys_and_values_that_cannot_be_quantized_are_refused(kind: str, bits: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Engine(make_cached_model(kind), Numbers(), kv_bits=bits)
