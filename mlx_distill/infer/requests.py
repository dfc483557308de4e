"""What an engine is asked, and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import mlx.core as mx
import numpy as np
from jaxtyping import Float

from mlx_distill.errors import ConfigError, DataError, DistillError
from mlx_distill.infer.kv_cache import Caches
from mlx_distill.models.token_ids import check_token_ids

_MARKS = 32  # tokens between thinking and answer at most


class LogitsHook(NamedTuple):
    """Reads the logits of one place in an answer: ``read(logits [b, v], caches) -> [b, c]`` is called with
    the logits that token ``step`` of some answers is chosen from, and with a batch cache of their tokens
    before, which it must leave as it is (:func:`~mlx_distill.infer.kv_cache.continue_from` does).
    """

    step: int
    read: Callable[[mx.array, Caches], mx.array]


@runtime_checkable
class Constraint(Protocol):
    """What one answer may consist of; it has the state of that answer.

    ``done``: the answer is complete, and only a stop token may follow.
    """

    done: bool

    def accept(self, token: int) -> None:
        """Take the next token, also those of thinking."""


# Fills the masks of the rows in place, and returns the errors of the rows whose constraints gave up.
FillMasks = Callable[[Sequence[Constraint | None], np.ndarray], Mapping[int, Exception]]


@dataclass(frozen=True)
class Request:
    """What is to be generated.

    Args:
        prompt: Token ids, at least one.
        max_tokens: Tokens after which the answer is cut.
        stop: Token ids that end the answer.
        temperature: 0 for greedy decoding, else the logits are divided by it and a token is sampled.
        seed: Of the sampling; requests with one seed get the same random numbers.
        constraint: What the answer may consist of; its own object.
        logits_hook: Is called if the answer reaches its step.
        stream: Report each token.
        top_p: Sample only from the most probable tokens whose probabilities sum to at least that.
        top_logprobs: Of a request that streams, report each token's log-probability with those of so many of
            the most probable tokens; None for none.
        max_thinking: Tokens of thinking after which a request whose prompt leaves it open ends without an
            answer; ``max_tokens`` are then those of the answer alone. 0: ``max_tokens`` are all tokens.
    """

    prompt: Sequence[int]
    max_tokens: int
    stop: frozenset[int] = frozenset()
    temperature: float = 0.0
    seed: tuple[int, ...] | int = 0
    constraint: Constraint | None = None
    logits_hook: LogitsHook | None = None
    stream: bool = False
    top_p: float = 1.0
    top_logprobs: int | None = None
    max_thinking: int = 0

    @property
    def limit(self) -> int:
        """The most tokens of thinking, what ends it, and answer together."""
        return self.max_tokens + (self.max_thinking + _MARKS if self.max_thinking else 0)


class TokenLogprobs(NamedTuple):
    """The log-probability of a token, and the most probable tokens with theirs, the most probable first.

    They are the model's own, over the tokenizer's tokens: without temperature, ``top_p`` and constraint.
    """

    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Generation:
    """One answer.

    ``text`` is the answer's, without thinking and without the stop token; ``tokens`` are all that were
    generated but the stop token, the answer's from ``answer_start`` on; ``prompt_tokens`` counts the
    prompt's; ``finish`` is ``stop`` (a stop token came) or ``length`` (``max_tokens`` were reached);
    ``error``, of :func:`~mlx_distill.infer.engine.generate` with ``keep_failed``, is why it has no answer
    (``finish`` is ``error`` then); ``seconds`` its share of the wall time, which those that were computed at
    the same time divide among them; ``hook_output`` what the logits hook returned for it, or None;
    ``thinking`` the text of what precedes the answer; ``first_token_seconds`` the time from its submission to
    its first token.
    """

    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    finish: str
    seconds: float
    hook_output: Float[np.ndarray, " c"] | None = None
    thinking: str = ""
    answer_start: int = 0
    first_token_seconds: float = 0.0
    error: DistillError | None = None

    @property
    def answer_tokens(self) -> int:
        """Tokens of the answer, without those of the thinking before it."""
        return len(self.tokens) - self.answer_start

    @property
    def still_thinking(self) -> bool:
        """Whether it was cut before its answer began."""
        return self.finish == "length" and 0 < self.answer_start == len(self.tokens)


class TokenEvent(NamedTuple):
    """A token of a request that streams; :mod:`mlx_distill.infer.text_stream` makes text of them."""

    request_id: int
    token: int
    thinking: bool
    logprobs: TokenLogprobs | None = None


class Finished(NamedTuple):
    """A request has its answer."""

    request_id: int
    generation: Generation


class Failed(NamedTuple):
    """A request's constraint or hook raised an error; the others go on."""

    request_id: int
    error: Exception


Event = TokenEvent | Finished | Failed


@dataclass(frozen=True)
class EngineStats:
    """Counts since the start: prompt tokens that were computed, and taken from the prefix cache; tokens that
    were generated, stop tokens included; steps of decoding; the most rows at once.
    """

    prompt_tokens: int
    reused_tokens: int
    tokens: int
    steps: int
    rows: int


def check_request(request: Request, rows: int, tokenizer: Any, name: str = "the prompt") -> None:
    """Refuse a request that cannot be answered.

    Args:
        request: To check.
        rows: Of the model's embedding; 0 where they are unknown.
        tokenizer: Named in the error.
        name: What the prompt is called there.

    Raises:
        DataError: an empty prompt.
        ModelError: a token that the model cannot read, or no token that can end the answer.
        ConfigError: ``max_tokens`` below 1, or a negative temperature, or ``top_p`` not above 0 and at
            most 1.
    """
    if not len(request.prompt):
        raise DataError(f"{name} is empty", fix="give every prompt at least one token")
    if request.max_tokens < 1:
        raise ConfigError(f"max_tokens {request.max_tokens}: below 1", fix="give 1 or more")
    if request.temperature < 0:
        raise ConfigError(
            f"temperature {request.temperature} is negative",
            fix="0 for greedy answers, 1 for the model's own distribution",
        )
    if not 0 < request.top_p <= 1:
        raise ConfigError(f"top_p {request.top_p}: not above 0 and at most 1", fix="give 1 for all tokens")
    check_token_ids([max(request.prompt)], rows, tokenizer)
    check_token_ids([min(request.stop)] if request.stop else [], rows, tokenizer)
