"""Chat completions in OpenAI's format, as a whole or as a stream of server-sent events."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import ExitStack
from typing import Any

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from mlx_distill.errors import DistillError
from mlx_distill.serve.chat_engine import Answering, ChatModel, engine_request
from mlx_distill.serve.chat_request import Chat, ChatRequest, read_chat
from mlx_distill.serve.errors import ApiError, from_distill_error, unexpected
from mlx_distill.serve.responses import PlainJSON
from mlx_distill.serve.usage import Usage, usage_of

router = APIRouter()

_PING_SECONDS = 15.0  # of silence, after which a stream says that it lives
_LOOK_SECONDS = 0.5  # of silence, after which a stream looks whether the server stops


@router.post(
    "/v1/chat/completions",
    responses={200: {"content": {"text/event-stream": {}}, "description": "The completion, or its events."}},
)
async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
    """Answer a chat."""
    chat = read_chat(body)
    completion = await run_in_threadpool(
        _Completion, request.app.state.server, body.model, chat, usage_of(request)
    )
    headers = {"x-ignored-params": ", ".join(chat.ignored)} if chat.ignored else {}
    streams = False
    try:
        completion.start()
        if chat.stream:
            answer: Response = _EventStream(completion, request, headers)
            streams = True  # it closes the completion itself
        else:
            answer = PlainJSON(await _whole(completion, request), headers=headers)
        return answer
    finally:
        if not streams:
            completion.close()


@router.post("/v1/completions", include_in_schema=False)
def create_completion() -> Response:
    """Say where chats are answered: models here are trained on chats."""
    raise ApiError(404, "only chats are answered: POST /v1/chat/completions", code="not_found")


class _Completion:
    """A chat under way: the model that answers it, kept in memory until :meth:`close`.

    Args:
        server: Of the application.
        name: The model.
        chat: What is asked.
        usage: Of the request.
    """

    def __init__(self, server: Any, name: str | None, chat: Chat, usage: Usage) -> None:
        self.chat, self._usage, self.stopping = chat, usage, server.stopping
        self._stack = ExitStack()
        try:
            self._served = self._stack.enter_context(server.pool.get(name))
            usage.model = server.name(self._served.resolved)
            shared, key = self._served.loaded.shared, ("chat", self._served.context)
            if key not in shared:
                made = ChatModel.of(self._served.model, self._served.tokenizer, self._served.context)
                shared.setdefault(key, made)
            self._model: ChatModel = shared[key]
            self._request = engine_request(self._model, chat)
        except BaseException:
            self._stack.close()
            raise
        self._answering: Answering | None = None
        sha = self._served.resolved.sha
        self.head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion.chunk" if chat.stream else "chat.completion",
            "created": int(time.time()),
            "model": self._served.resolved.name,
            "system_fingerprint": f"fp_{sha[:12]}" if sha else None,
        }

    def start(self) -> None:
        """Submit it to the engine; called in the event loop."""
        self._answering = Answering(
            self._served.worker, self._model, self._request, self.chat.stop, piecewise=self.chat.stream
        )

    @property
    def answering(self) -> Answering:
        """What the engine does."""
        assert self._answering is not None
        return self._answering

    def usage(self) -> dict[str, Any]:
        """The tokens, as OpenAI counts them."""
        used = self.answering.usage
        return {
            "prompt_tokens": used.prompt,
            "completion_tokens": used.completion,
            "total_tokens": used.prompt + used.completion,
            "completion_tokens_details": {"reasoning_tokens": used.thinking},
        }

    def logprobs(self) -> dict[str, Any] | None:
        """Those of the answer's tokens since the last call, where they were asked for."""
        if self.chat.top_logprobs is None:
            return None
        return {"content": self.answering.take_logprobs(), "refusal": None}

    def close(self) -> None:
        """Give it up if it has no answer yet, and let the model go; may be called again."""
        if self._answering is not None:
            self._answering.cancel()
            used = self._answering.usage
            self._usage.calls, self._usage.prompt_tokens, self._usage.tokens = 1, used.prompt, used.completion
            cut = self._answering.finish == "length"
            self._usage.invalid = int(cut and self.chat.format != "text")  # JSON that does not end
        self._stack.close()


async def _whole(completion: _Completion, request: Request) -> dict[str, Any]:
    """The response of a completion that does not stream."""
    answer, thinking = await _while_connected(_texts(completion), request)
    message: dict[str, Any] = {"role": "assistant", "content": answer, "refusal": None}
    if thinking:
        message["reasoning_content"] = thinking
    choice = {
        "index": 0,
        "message": message,
        "logprobs": completion.logprobs(),
        "finish_reason": completion.answering.finish,
    }
    return {**completion.head, "choices": [choice], "usage": completion.usage()}


async def _texts(completion: _Completion) -> tuple[str, str]:
    pieces = [piece async for piece in completion.answering.updates(_PING_SECONDS)]
    return "".join(piece.answer for piece in pieces), "".join(piece.thinking for piece in pieces)


async def _while_connected(work: Any, request: Request) -> Any:
    """What a coroutine returns; it is cancelled where the client goes first."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ApiError(499, "the client has gone", code="disconnected")
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class _EventStream(StreamingResponse):
    """A completion as server-sent events, which ends with the connection."""

    def __init__(self, completion: _Completion, request: Request, headers: dict[str, str]) -> None:
        self._completion = completion
        request_id = request.scope.get("state", {}).get("request_id", completion.head["id"])
        headers = {"cache-control": "no-store", "x-accel-buffering": "no", **headers}
        super().__init__(
            _events(completion, str(request_id)), headers=headers, media_type="text/event-stream"
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._completion.close()


async def _events(completion: _Completion, request_id: str) -> AsyncIterator[bytes]:
    """The events of a stream: role, texts, why it ended, usage, the end."""
    counted = {"usage": None} if completion.chat.include_usage else {}

    def chunk(delta: dict[str, Any], finish: str | None = None) -> bytes:
        logprobs = completion.logprobs() if delta.get("content") or finish else None
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return _event({**completion.head, "choices": [choice], **counted})

    try:
        yield chunk({"role": "assistant", "content": "", "refusal": None})
        silent = time.monotonic()
        async for piece in completion.answering.updates(_LOOK_SECONDS):
            if completion.stopping.is_set():
                raise ApiError(503, "the server is stopping (ask again)", code="stopping", retry_after=5)
            delta = {}
            if piece.thinking:
                delta["reasoning_content"] = piece.thinking
            if piece.answer:
                delta["content"] = piece.answer
            if delta or time.monotonic() - silent >= _PING_SECONDS:
                silent = time.monotonic()
                yield chunk(delta) if delta else b": ping\n\n"
        yield chunk({}, completion.answering.finish)
        if completion.chat.include_usage:
            yield _event({**completion.head, "choices": [], "usage": completion.usage()})
        yield b"data: [DONE]\n\n"
    except Exception as error:  # the status is sent: what went wrong is an event
        yield _event(_as_api_error(error, request_id).body())


def _as_api_error(error: Exception, request_id: str) -> ApiError:
    if isinstance(error, ApiError):
        return error
    return from_distill_error(error) if isinstance(error, DistillError) else unexpected(error, request_id)


def _event(data: dict[str, Any]) -> bytes:
    # ASCII alone: some clients take U+2028 and others for the end of a line.
    return f"data: {json.dumps(data)}\n\n".encode()
