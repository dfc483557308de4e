"""A chat as a request to the engine of one model, and what the engine answers, for the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import threading
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from mlx_distill.data.chat import prompt_ids, stop_ids
from mlx_distill.errors import ConfigError, DataError, DistillError, ModelError
from mlx_distill.infer.channels import Channels, channels_of
from mlx_distill.infer.constrained import AnswerGrammar
from mlx_distill.infer.predict import context_length, shortest
from mlx_distill.infer.requests import Request, TokenEvent, TokenLogprobs
from mlx_distill.infer.text_stream import AnswerStream, Piece
from mlx_distill.infer.worker import Cancelled, EngineWorker
from mlx_distill.losses.token_bytes import vocabulary
from mlx_distill.models.forward import head_columns
from mlx_distill.serve.chat_request import Chat
from mlx_distill.serve.errors import ApiError, from_distill_error
from mlx_distill.tasks.grammar import check_schema
from mlx_distill.thinking import thinking_budget

MAX_TOKENS = 4096
"""The longest answer where a request does not say."""
_SCHEMA = "response_format.json_schema.schema"


@dataclass(frozen=True)
class ChatModel:
    """What chats need of a model, found once.

    Attributes:
        tokenizer: With the chat template.
        channels: How it marks thinking.
        stop: The tokens that end an answer.
        columns: Of its logits.
        context: The tokens that it was made for, or None.
        lock: Held while a prompt is tokenized or a grammar is made: both have state of their own.
    """

    tokenizer: Any
    channels: Channels | None
    stop: frozenset[int]
    columns: int
    context: int | None
    lock: threading.Lock

    @classmethod
    def of(cls, model: Any, tokenizer: Any, context: int | None = None) -> ChatModel:
        """Of a model and its tokenizer, with at most ``context`` tokens."""
        return cls(
            tokenizer,
            channels_of(tokenizer),
            frozenset(stop_ids(tokenizer)),
            head_columns(model),
            shortest(context_length(model), context),
            threading.Lock(),
        )


def engine_request(model: ChatModel, chat: Chat) -> Request:
    """The request to the engine: the prompt that training and ``analyze`` give the same messages.

    Raises:
        ApiError: 400, messages that the chat template refuses or that are too long, a schema that a grammar
            cannot enforce, or a ``reasoning_effort`` that is not the model's.
    """
    chat.check_effort(thinking_budget(model.tokenizer) > 0)
    with model.lock:
        try:
            prompt = prompt_ids(model.tokenizer, chat.messages)
        except DistillError as error:
            raise ApiError(400, str(error), code="invalid_messages", param="messages") from error
        room = None if model.context is None else model.context - len(prompt)
        if room is not None and room < 1:
            raise ApiError(
                400,
                f"the messages have {len(prompt):,} tokens, and the model's context {model.context:,} "
                "(shorten them)",
                code="context_length_exceeded",
                param="messages",
            )
        grammar = _grammar(model, chat)
        constraint = None if grammar is None else grammar.constraint(prompt)
    most = MAX_TOKENS if chat.max_tokens is None else chat.max_tokens
    return Request(
        prompt,
        most if room is None else min(most, room),
        model.stop,
        chat.temperature,
        _seed(chat.seed),
        constraint,
        stream=True,
        top_p=chat.top_p,
        top_logprobs=chat.top_logprobs,
    )


def _seed(seed: int | None) -> tuple[int, ...]:
    """A seed of numpy, which has no sign."""
    return (secrets.randbits(63),) if seed is None else (abs(seed), int(seed < 0))


def _grammar(model: ChatModel, chat: Chat) -> AnswerGrammar | None:
    if chat.format == "text":
        return None
    try:
        if chat.schema is not None:
            check_schema(chat.schema, _SCHEMA)
        return AnswerGrammar(model.tokenizer, chat.schema, model.columns, model.stop)
    except DistillError as error:
        place = error.message.partition(": ")[0]
        param = place if place.startswith(_SCHEMA) else "response_format"
        raise ApiError(
            400,
            f"{error.message} (change that part of the schema, or ask without response_format)",
            code="unsupported_schema" if isinstance(error, ConfigError) else "model_error",
            param=param,
        ) from error
    except Exception as error:  # a schema is a program from elsewhere, and three libraries read it
        raise ApiError(
            400,
            f"{_SCHEMA}: cannot be read: {type(error).__name__}",
            code="unsupported_schema",
            param=_SCHEMA,
        ) from error


@dataclass(frozen=True)
class Usage:
    """Tokens of the prompt, and of what was generated: all, and of thinking."""

    prompt: int
    completion: int
    thinking: int


class Answering:
    """A request under way. Iterate over :meth:`updates`, then read ``finish`` and ``usage``.

    Args:
        worker: Of the model.
        model: What chats need of it.
        request: From :func:`engine_request`.
        stop: Strings that end the answer.
        piecewise: Whether each token is told to the event loop as it comes. Else the loop is left alone until
            the answer is whole, unless a stop string may end it before.
    """

    def __init__(
        self,
        worker: EngineWorker,
        model: ChatModel,
        request: Request,
        stop: tuple[str, ...] = (),
        *,
        piecewise: bool = True,
    ) -> None:
        self.finish = ""
        self._stop = stop
        self._request, self._tokenizer = request, model.tokenizer
        self._logprobs: list[dict[str, Any]] = []
        self._text = AnswerStream(model.tokenizer, model.channels, request.prompt, stop)
        self._events: deque[TokenEvent | None] = deque()
        self._news = asyncio.Event()
        loop, at_once = asyncio.get_running_loop(), piecewise or bool(stop)

        def tell(event: TokenEvent | None) -> None:  # in the engine's thread
            self._events.append(event)
            if event is None or at_once:
                with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                    loop.call_soon_threadsafe(self._news.set)

        try:
            self._handle = worker.submit(request, tell)
        except Cancelled as error:
            raise _unloaded() from error

    @property
    def usage(self) -> Usage:
        """The tokens so far, those too that have come and were not read."""
        come = [] if self._text.stopped else [event for event in tuple(self._events) if event is not None]
        thinking = sum(event.thinking for event in come)
        tokens = self._text.tokens + len(come)
        return Usage(len(self._request.prompt), tokens, self._text.thinking_tokens + thinking)

    def take_logprobs(self) -> list[dict[str, Any]]:
        """Those of the answer's tokens that have come since the last call."""
        taken, self._logprobs = self._logprobs, []
        return taken

    async def updates(self, patience: float) -> AsyncIterator[Piece]:
        """Yield what there is new; an empty piece where nothing came for ``patience`` seconds.

        Raises:
            ApiError: 422, the constraint failed; 503, the model was unloaded meanwhile.
            Exception: a bug.
        """
        try:
            ended = False
            while not (ended or self._text.stopped):
                events, ended = await self._next(patience)
                yield self._add(events)
            if ended and not self._text.stopped:
                yield self._last()
            self.finish = "stop" if self._text.stopped else self.finish
        finally:
            self.cancel()

    async def _next(self, patience: float) -> tuple[list[TokenEvent], bool]:
        """All tokens that have come, and whether they are the last ones; none where nothing was told for
        ``patience`` seconds.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience):
                await self._news.wait()
        self._news.clear()
        events, ended = list[TokenEvent](), False
        while self._events:
            event = self._events.popleft()
            if event is None:
                ended = True
            else:
                events.append(event)
        return events, ended

    def _add(self, events: list[TokenEvent]) -> Piece:
        """The texts of the next tokens: decoded together, or one by one where a stop string may end them."""
        pieces = []
        for part in [[event] for event in events] if self._stop else [events]:
            if not self._text.stopped:
                pieces.append(self._text.add(part))
                self._logprobs += [
                    logprob_json(self._tokenizer, event.token, event.logprobs)
                    for event in part
                    if event.logprobs is not None and not event.thinking
                ]
        return Piece("".join(p.answer for p in pieces), "".join(p.thinking for p in pieces))

    def _last(self) -> Piece:
        try:
            generation = self._handle.result(0)
            piece = self._text.end(generation)
        except Cancelled as error:
            raise _unloaded() from error
        except DistillError as error:
            raise _failed(error) from error
        self.finish = generation.finish
        return piece

    def cancel(self) -> None:
        """Give the request up; nothing happens if it has its answer."""
        if not self._handle.done:
            self._handle.cancel()


def logprob_json(tokenizer: Any, token: int, found: TokenLogprobs) -> dict[str, Any]:
    """A token of an answer as OpenAI tells its log-probability."""
    top = [_token_json(tokenizer, one, logprob) for one, logprob in found.top]
    return {**_token_json(tokenizer, token, found.logprob), "top_logprobs": top}


def _token_json(tokenizer: Any, token: int, logprob: float) -> dict[str, Any]:
    """A token that is part of a character has a replacement character as its text, and its own bytes."""
    try:
        known = vocabulary(tokenizer)
        special = known.special.get(token)
        own = special.encode() if special is not None else known.tokens[token]
    except ModelError:  # a tokenizer that does not tell the bytes of its tokens
        return {"token": tokenizer.decode([token]), "logprob": logprob, "bytes": None}
    return {"token": own.decode(errors="replace"), "logprob": logprob, "bytes": list(own)}


def _unloaded() -> ApiError:
    return ApiError(
        503, "the model was unloaded before it had answered (ask again)", code="unloaded", retry_after=5
    )


def _failed(error: DistillError) -> ApiError:
    """A constraint or a text that cannot go on is not the server's failure: the request's schema and this
    tokenizer do not go together.
    """
    if isinstance(error, ModelError):
        return ApiError(422, str(error), code="constraint_failed", param="response_format")
    if isinstance(error, DataError):
        return ApiError(400, str(error), code="invalid_messages", param="messages")
    return from_distill_error(error)
