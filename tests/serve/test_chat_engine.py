"""A request under way, as the event loop sees it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.small_model import write_small_model

from mlx_distill.infer.engine import Engine
from mlx_distill.infer.requests import Request
from mlx_distill.infer.worker import EngineWorker
from mlx_distill.models.load import load
from mlx_distill.serve.chat_engine import Answering, ChatModel


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineWorker]:
    folder: Path = tmp_path_factory.mktemp("model") / "small"
    write_small_model(folder)
    with EngineWorker(lambda: Engine(*load(folder))) as worker:
        yield worker


@pytest.fixture(scope="module")
def model(worker: EngineWorker) -> ChatModel:
    return ChatModel(worker.engine.tokenizer, None, frozenset(), 0, None, threading.Lock())


def answered(
    worker: EngineWorker, model: ChatModel, request: Request, **settings: Any
) -> tuple[str, int, int]:
    """The text, its tokens, and how often the event loop was called by the engine's thread."""
    calls = [0]

    async def ask() -> tuple[str, int]:
        loop = asyncio.get_running_loop()
        schedule = loop.call_soon_threadsafe

        def counting(*arguments: Any) -> Any:
            calls[0] += 1
            return schedule(*arguments)

        loop.call_soon_threadsafe = counting  # type: ignore[method-assign]
        answering = Answering(worker, model, request, **settings)
        text = "".join([piece.answer async for piece in answering.updates(60)])
        return text, answering.usage.completion

    return *asyncio.run(ask()), calls[0]


def test_the_event_loop_is_called_once_where_the_answer_is_wanted_as_a_whole(
    worker: EngineWorker, model: ChatModel
) -> None:
    request = Request([5, 6, 7], 40, stream=True)
    text, tokens, calls = answered(worker, model, request, piecewise=False)
    assert (tokens, calls) == (40, 1) and text
    assert answered(worker, model, request) == (text, 40, 41)
    part = text[4:8]
    before, _, _ = answered(worker, model, request, stop=(part,), piecewise=False)
    assert before == text[: text.find(part)]  # and the rest is not waited for


def test_tokens_of_a_request_that_was_given_up_are_counted(worker: EngineWorker, model: ChatModel) -> None:
    async def give_up() -> int:
        answering = Answering(worker, model, Request([5, 6], 10_000, stream=True), piecewise=False)
        while not answering.usage.completion:
            await asyncio.sleep(0.01)
        answering.cancel()
        return answering.usage.completion

    assert 0 < asyncio.run(give_up()) < 10_000
