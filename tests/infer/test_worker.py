"""Requests of several threads in one engine."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.cache_kinds import make_cached_model

from mlx_distill.errors import DataError
from mlx_distill.infer.engine import Engine, generate
from mlx_distill.infer.requests import LogitsHook, Request
from mlx_distill.infer.worker import Cancelled, EngineWorker


class Numbers:
    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [1, 2]

    def decode(self, tokens: Sequence[int]) -> str:
        return " ".join(map(str, tokens))


def make_prompts(count: int) -> list[list[int]]:
    random = np.random.default_rng(2)
    return [random.integers(0, 400, 3 + number % 5).tolist() for number in range(count)]


@pytest.fixture(scope="module")
def tiny() -> Any:
    return make_cached_model("qwen3")


def test_threads_share_a_batch_and_each_gets_its_own_answers(tiny: Any) -> None:
    prompts = make_prompts(16)
    expected = generate(tiny, Numbers(), prompts, max_tokens=6, stop=set())
    got: dict[int, Any] = {}
    together = threading.Barrier(4)
    with EngineWorker(lambda: Engine(tiny, Numbers(), batch_size=8)) as worker:

        def ask(thread: int) -> None:
            together.wait()
            handles = {i: worker.submit(Request(prompts[i], 6)) for i in range(thread, 16, 4)}
            got.update({i: handle.result(timeout=60) for i, handle in handles.items()})

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert worker.engine.stats.rows > 1
    assert [got[i].tokens for i in range(16)] == [g.tokens for g in expected]


def test_tokens_are_streamed_and_end_with_the_answer(tiny: Any) -> None:
    with EngineWorker(lambda: Engine(tiny, Numbers())) as worker:
        handle = worker.submit(Request([5, 6], 7, stream=True))
        assert tuple(event.token for event in handle) == handle.result().tokens
        assert handle.done


def test_a_listener_is_called_with_each_token_and_at_the_end(tiny: Any) -> None:
    heard: list[Any] = []
    ended = threading.Event()
    with EngineWorker(lambda: Engine(tiny, Numbers())) as worker:

        def listen(event: Any) -> None:
            heard.append(event and event.token)
            if event is None:
                ended.set()

        handle = worker.submit(Request([5, 6], 7, stream=True), listen)
        assert ended.wait(60)
        assert handle.done and heard == [*handle.result(0).tokens, None]


def test_a_cancelled_request_ends_and_the_others_go_on(tiny: Any) -> None:
    with EngineWorker(lambda: Engine(tiny, Numbers())) as worker:
        endless = worker.submit(Request([5, 6], 100_000, stream=True))
        other = worker.submit(Request([5, 6, 7], 9))
        next(iter(endless))
        endless.cancel()
        with pytest.raises(Cancelled):
            endless.result(timeout=60)
        with pytest.raises(Cancelled):
            list(endless)
        assert len(other.result(timeout=60).tokens) == 9
        other.cancel()
        assert len(other.result().tokens) == 9


def test_errors_of_one_request_are_its_own(tiny: Any) -> None:
    def fail(logits: mx.array, caches: Any) -> mx.array:
        raise ValueError("no hook")

    with EngineWorker(lambda: Engine(tiny, Numbers())) as worker:
        empty = worker.submit(Request([], 5))
        failing = worker.submit(Request([1], 5, logits_hook=LogitsHook(1, fail)))
        fine = worker.submit(Request([1], 5))
        with pytest.raises(DataError, match="empty"):
            empty.result(timeout=60)
        with pytest.raises(ValueError, match="no hook"):
            failing.result(timeout=60)
        assert len(fine.result(timeout=60).tokens) == 5


def test_a_closed_worker_gives_nothing_more(tiny: Any) -> None:
    worker = EngineWorker(lambda: Engine(tiny, Numbers()))
    handle = worker.submit(Request([5, 6], 100_000))
    worker.close()
    worker.close()
    with pytest.raises(Cancelled, match="closed"):
        handle.result(timeout=60)
    with pytest.raises(Cancelled, match="closed"):
        worker.submit(Request([5, 6], 2))
    assert not any(thread.name == "engine" for thread in threading.enumerate())


def test_an_error_of_the_model_reaches_every_request(tiny: Any) -> None:
    class Broken:
        layers = tiny.layers

        def __call__(self, tokens: mx.array, cache: Any) -> mx.array:
            raise RuntimeError("out of memory")

    worker = EngineWorker(lambda: Engine(Broken(), Numbers()))
    handles = [worker.submit(Request([5, 6], 2))]
    with pytest.raises(RuntimeError, match="out of memory"):
        handles[0].result(timeout=60)
    with pytest.raises(Cancelled):
        worker.submit(Request([5, 6], 2))


def test_an_engine_that_cannot_be_made_is_an_error_at_once() -> None:
    def make() -> Engine:
        raise ValueError("no model")

    with pytest.raises(ValueError, match="no model"):
        EngineWorker(make)


def test_no_answer_in_time_is_an_error(tiny: Any) -> None:
    with EngineWorker(lambda: Engine(tiny, Numbers())) as worker:
        handle = worker.submit(Request([5, 6], 100_000))
        with pytest.raises(TimeoutError):
            handle.result(timeout=0.01)
