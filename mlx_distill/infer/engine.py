"""Continuous batching: requests join and leave while others are being decoded.

The device is one step ahead of the host. While it computes the logits of the next token, the host reads the
tokens before them, ends requests, and fills the masks of constrained ones; then it submits two things at
once: the choice of the next tokens, and the pass behind them. Prompts are read in between, some columns a
step (:mod:`mlx_distill.infer.prefill`).

The caches are mlx-lm's (:mod:`mlx_distill.infer.kv_cache`), so every architecture that mlx-lm batches is
served.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import mlx.core as mx
import numpy as np
from jaxtyping import Bool, Float, Int, Integer

from mlx_distill.errors import ConfigError, DistillError
from mlx_distill.infer.channels import AnswerStart, channels_of
from mlx_distill.infer.engine_row import EngineRow, row_logprobs
from mlx_distill.infer.kv_cache import Caches, select
from mlx_distill.infer.prefill import PromptReader, PromptRow
from mlx_distill.infer.prefix_cache import PrefixCache
from mlx_distill.infer.quantized_cache import check_quantizable, quantize
from mlx_distill.infer.requests import Constraint as Constraint
from mlx_distill.infer.requests import (
    EngineStats,
    Event,
    Failed,
    FillMasks,
    Finished,
    Generation,
    LogitsHook,
    Request,
    TokenEvent,
    TokenLogprobs,
    check_request,
)
from mlx_distill.infer.sampling import allow_tokens, choose, column_words, padded_columns, token_logprobs
from mlx_distill.models.forward import embedding_rows
from mlx_distill.models.token_ids import used_ids

_KEPT_WHEN_ENDED = 0.75  # rows that are left, below which the others are removed from the caches
_STEPS_A_CLEARING = 256  # of MLX's buffers


class Engine:
    """Decodes many requests at once. One thread owns it (:mod:`mlx_distill.infer.worker` serves several).

    Args:
        model: An mlx-lm model: ``model(tokens [b, l], cache=...) -> logits [b, l, v]``.
        tokenizer: Any object with ``decode(ids)``; columns of the logits that are none of its tokens are
            never chosen.
        batch_size: Requests that are read or decoded at the same time.
        prefill_step_size: Prompt tokens of a row in one pass; of all rows in one pass while others wait for
            their next token.
        prefix_cache_tokens: Tokens of shared beginnings of prompts that are kept; 0 for none.
        kv_bits: Keys and values in 4 or 8 bits; None as they are.
        kv_group_size: Keys or values that share a scale.
        fill_masks: Of constrained requests; :func:`mlx_distill.infer.constrained.fill_masks` where None.

    Raises:
        ConfigError: ``batch_size`` or ``prefill_step_size`` below 1, or a model whose keys and values cannot
            be quantized.

    >>> engine = Engine(model, tokenizer)                                                # doctest: +SKIP
    >>> engine.submit(Request([1, 2, 3], max_tokens=9))                                  # doctest: +SKIP
    >>> while engine.busy: print(engine.step())                                          # doctest: +SKIP
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        batch_size: int = 16,
        prefill_step_size: int = 1024,
        prefix_cache_tokens: int = 8192,
        kv_bits: int | None = None,
        kv_group_size: int = 64,
        fill_masks: FillMasks | None = None,
    ) -> None:
        if batch_size < 1 or prefill_step_size < 1:
            raise ConfigError(
                f"batch_size {batch_size}, prefill_step_size {prefill_step_size}: below 1",
                fix="give 1 or more",
            )
        if kv_bits is not None:
            check_quantizable(model, kv_bits, kv_group_size)
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self._kv = kv_bits and (kv_bits, kv_group_size)
        self._fill_masks = fill_masks or _fill_masks
        self._channels = channels_of(tokenizer)
        used = used_ids(tokenizer)
        self._used: np.ndarray | None = used
        self._used_words: Int[np.ndarray, "1 w"] | None = None
        self._allowed: Bool[mx.array, "1 v"] | None = None
        self._reader = PromptReader(model, PrefixCache(prefix_cache_tokens), prefill_step_size)
        self._requests: dict[int, EngineRow] = {}
        self._rows: list[EngineRow] = []  # of the caches, some ended
        self._caches: Caches = []
        self._logits: mx.array | None = None  # of the rows' next tokens
        self._chosen: tuple[list[EngineRow], mx.array] | None = None  # submitted, not read
        self._logprobs: tuple[mx.array, mx.array, mx.array] | None = None  # of the tokens that were chosen
        self._tokens = self._steps = self._most_rows = self._next_id = 0
        self._last = time.perf_counter()

    @property
    def busy(self) -> bool:
        """Whether a request has no answer yet."""
        return bool(self._requests)

    @property
    def stats(self) -> EngineStats:
        """Counts since the start."""
        reader = self._reader
        return EngineStats(reader.computed, reader.reused, self._tokens, self._steps, self._most_rows)

    def submit(self, request: Request) -> int:
        """Queue a request; its events carry the number that is returned.

        Raises:
            DataError: an empty prompt.
            ModelError: a token of the prompt, or every token that ends an answer, is beyond the model's
                embedding.
            ConfigError: ``max_tokens`` below 1, or a negative temperature.
        """
        check_request(request, embedding_rows(self.model), self.tokenizer)
        number, self._next_id = self._next_id, self._next_id + 1
        if not self._requests:
            self._last = time.perf_counter()
        uniforms = None
        if request.temperature:
            seed = request.seed if isinstance(request.seed, tuple) else (request.seed,)
            uniforms = np.random.default_rng(seed).random(request.limit, dtype=np.float32)
        row = EngineRow(
            number,
            request,
            PromptRow(np.asarray(request.prompt, dtype=np.int32)),
            AnswerStart(self._channels, request.prompt),
            uniforms,
        )
        self._requests[number] = row.prompt.owner = row
        self._reader.waiting.append(row.prompt)
        return number

    def cancel(self, request_id: int) -> None:
        """Forget a request, which has no further events; nothing happens if it has ended."""
        row = self._requests.get(request_id)
        if row is not None:
            self._end(row)
            self._reader.drop(row)

    def step(self) -> list[Event]:
        """One step of decoding of all requests: the tokens that the step before submitted are read, and the
        next ones submitted.
        """
        events = self._read()
        if self._logits is not None:
            events += self._call_hooks(self._logits)
        inputs = self._join(None if self._logits is None else self._choose(self._logits, events))
        self._logits = None
        if inputs is not None:
            self._logits = self.model(inputs[:, None], cache=self._caches)[:, -1, :]
            self._steps += 1
            if self._steps % _STEPS_A_CLEARING == 0:
                mx.clear_cache()
        # One call's arrays all become readable at its end: the tokens have a call of their own.
        mx.async_eval([] if self._chosen is None else self._chosen[1], self._logprobs or ())
        mx.async_eval(self._logits)
        alive = sum(not row.leaves for row in self._rows)
        self._most_rows = max(self._most_rows, alive)
        self._reader.advance(self.batch_size - alive, decoding=alive > 0)
        self._share_time()
        return events

    def _read(self) -> list[Event]:
        """Read the tokens that were submitted, and end the requests that have their last one."""
        if self._chosen is None:
            return []
        (rows, tokens), self._chosen = self._chosen, None
        found, self._logprobs = self._logprobs, None
        table = None if found is None else [np.array(part) for part in found]
        events: list[Event] = []
        for place, (row, token) in enumerate(zip(rows, np.array(tokens).tolist(), strict=True)):
            if not row.ended:
                events += self._accept(row, token, row_logprobs(table, place, row.request.top_logprobs))
        return events

    def _accept(self, row: EngineRow, token: int, logprobs: TokenLogprobs | None) -> list[Event]:
        request = row.request
        self._tokens += 1
        if not row.tokens and not row.first_token_seconds:
            row.first_token_seconds = time.perf_counter() - row.began
        if token in request.stop and row.place.ends(token):
            return [self._finish(row, "stop")]
        row.tokens.append(token)
        row.place.accept(token)
        events: list[Event] = []
        if request.stream:
            thinking = row.place.start is None or len(row.tokens) <= row.place.start
            events.append(TokenEvent(row.id, token, thinking, logprobs))
        if row.full:
            return [*events, self._finish(row, "length")]
        if request.constraint is not None:
            try:
                request.constraint.accept(token)
            except Exception as error:
                events.append(self._fail(row, error))
        return events

    def _finish(self, row: EngineRow, finish: str) -> Finished:
        self._end(row)
        tokens, start = row.tokens, row.place.start
        start = len(tokens) if start is None else start
        answer = self.tokenizer.decode(tokens[start:]) if tokens[start:] else ""
        hook_output = None
        if row.hook_output is not None:
            output, at = row.hook_output
            hook_output = np.array(output[at])
        generation = Generation(
            answer.lstrip("\n") if start else answer,
            tuple(tokens),
            len(row.prompt.tokens),
            finish,
            row.seconds + self._elapsed() / max(1, len(self._rows)),
            hook_output,
            self.tokenizer.decode(tokens[:start]) if start else "",
            start,
            row.first_token_seconds,
        )
        return Finished(row.id, generation)

    def _fail(self, row: EngineRow, error: Exception) -> Failed:
        self._end(row)
        return Failed(row.id, error)

    def _end(self, row: EngineRow) -> None:
        row.ended = True
        self._requests.pop(row.id, None)

    def _call_hooks(self, logits: Float[mx.array, "b v"]) -> list[Event]:
        """Show each hook the logits of the rows that have reached its step."""
        at_hook: dict[int, list[int]] = {}
        for place, row in enumerate(self._rows):
            if not row.leaves and row.at_hook:
                at_hook.setdefault(id(row.request.logits_hook), []).append(place)
        events: list[Event] = []
        for places in at_hook.values():
            rows = [self._rows[place] for place in places]
            hook = rows[0].request.logits_hook
            assert hook is not None
            everyone = len(places) == len(self._rows)
            caches = self._caches if everyone else select(self._caches, places)
            try:
                output = hook.read(logits if everyone else logits[mx.array(places)], caches)
                mx.async_eval(output)
            except Exception as error:
                events += [self._fail(row, error) for row in rows]
            else:
                for at, row in enumerate(rows):
                    row.hook_output = output, at
        return events

    def _choose(self, logits: Float[mx.array, "b v"], events: list[Event]) -> Integer[mx.array, " _"] | None:
        """Choose the rows' next tokens, and keep the rows that go on: their inputs, None if there is none.
        Rows whose constraints fail are ended: they are added to the events.
        """
        rows = self._rows
        temperatures = [0.0 if row.leaves else row.request.temperature for row in rows]
        uniforms = [0.0] * len(rows)
        for place, row in enumerate(rows):
            if row.uniforms is not None and not row.leaves:
                uniforms[place] = float(row.uniforms[row.chosen])
        top_ps = [1.0 if row.leaves else row.request.top_p for row in rows]
        tokens = choose(self._allowed_only(logits, events), temperatures, uniforms, top_ps)
        asked = [row.request.top_logprobs for row in rows if not row.leaves]
        most = max((count for count in asked if count is not None), default=None)
        if most is not None:
            self._logprobs = token_logprobs(self._of_tokens(logits), tokens, max(1, most))
        for row in rows:
            row.chosen += 1
        self._chosen = list(rows), tokens
        keep = [place for place, row in enumerate(rows) if not row.leaves]
        if not keep:
            self._rows, self._caches = [], []
            return None
        if len(keep) > (_KEPT_WHEN_ENDED if not self._reader.has_ready else 1) * len(rows) - 1e-9:
            return tokens
        index = mx.array(keep)
        for layer in self._caches:
            layer.filter(index)
        self._rows = [rows[place] for place in keep]
        return tokens[index]

    def _allowed_only(self, logits: Float[mx.array, "b v"], events: list[Event]) -> Float[mx.array, "b v"]:
        """The logits with minus infinity where a token may not be chosen: in some rows, or in all."""
        width = logits.shape[-1]
        constraints = [None if row.leaves else row.request.constraint for row in self._rows]
        if any(constraint is not None for constraint in constraints):
            masks = np.full((len(constraints), -(-width // 32)), -1, dtype=np.int32)
            errors = self._fill_masks(constraints, masks)
            events += [self._fail(self._rows[place], error) for place, error in errors.items()]
            if self._used is not None:
                if self._used_words is None:
                    self._used_words = column_words(self._used, width)
                masks &= self._used_words
            return allow_tokens(logits, masks)
        if self._allowed is None and self._used is not None:
            self._allowed = mx.array(padded_columns(self._used, width))
            if self._used[:width].all() and len(self._used) >= width:
                self._used = self._allowed = None
        return logits if self._allowed is None else mx.where(self._allowed, logits, -mx.inf)

    def _of_tokens(self, logits: Float[mx.array, "b v"]) -> Float[mx.array, "b v"]:
        """The logits with minus infinity in columns that are no token."""
        if self._used is None:
            return logits
        return mx.where(mx.array(padded_columns(self._used, logits.shape[-1])), logits, -mx.inf)

    def _join(self, inputs: Integer[mx.array, " _"] | None) -> Integer[mx.array, " _"] | None:
        """Let the rows whose prompts have been read join, with the last tokens of their prompts."""
        for prompts, caches in self._reader.ready():
            keep = [place for place, prompt in enumerate(prompts) if not prompt.owner.ended]
            if not keep:
                continue
            if len(keep) < len(prompts):  # cancelled meanwhile
                caches = select(caches, keep)
            if self._kv:
                caches = quantize(caches, *self._kv)
            last = mx.array([int(prompts[place].tokens[-1]) for place in keep], dtype=mx.int32)
            joining = [prompts[place].owner for place in keep]
            if inputs is None:
                self._rows, self._caches, inputs = joining, caches, last
                continue
            for layer, other in zip(self._caches, caches, strict=True):
                layer.extend(other)
            self._rows = [*self._rows, *joining]
            inputs = mx.concatenate([inputs.astype(mx.int32), last])
        return inputs

    def _elapsed(self) -> float:
        return time.perf_counter() - self._last

    def _share_time(self) -> None:
        """Divide the time since the last step among the requests that were worked on."""
        active = [row for row in (*self._rows, *self._reader.owners()) if not row.ended]
        share = self._elapsed() / max(1, len(active))
        for row in active:
            row.seconds += share
        self._last = time.perf_counter()


def _fill_masks(constraints: Sequence[Any], masks: Int[np.ndarray, "b w"]) -> Mapping[int, Exception]:
    from mlx_distill.infer.constrained import fill_masks

    return fill_masks(constraints, masks)


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    batch_size: int = 16,
    stop: AbstractSet[int],
    temperature: float = 0.0,
    seed: int = 0,
    on_done: Callable[[int], None] | None = None,
    constraints: Sequence[Constraint | None] | None = None,
    logits_hook: LogitsHook | None = None,
    prefill_step_size: int = 1024,
    prefix_cache_tokens: int = 8192,
    kv_bits: int | None = None,
    keep_failed: bool = False,
) -> list[Generation]:
    """The model's answer to each prompt.

    The result does not depend on which prompts are answered at the same time, beyond rounding. A sampled
    answer depends only on the seed and the prompt's place in the list.

    Args:
        model: As for :class:`Engine`.
        tokenizer: As for :class:`Engine`.
        prompts: Token ids, one sequence a prompt, none empty.
        max_tokens: Tokens after which an answer is cut.
        batch_size: Prompts answered at the same time.
        stop: Token ids that end an answer.
        temperature: 0 for greedy decoding, else the logits are divided by it and a token is sampled.
        seed: Of the sampling.
        on_done: Called after each answer with the number of prompts answered so far.
        constraints: What each answer may consist of, each its own object; None for no constraint.
        logits_hook: Is called for the answers that reach its step.
        prefill_step_size: As for :class:`Engine`.
        prefix_cache_tokens: As for :class:`Engine`.
        kv_bits: As for :class:`Engine`.
        keep_failed: Answer the others where a constraint or the hook of one raises a ``DistillError``: its
            generation has it as ``error``. False raises it.

    Returns:
        One :class:`Generation` a prompt, in the prompts' order.

    Raises:
        DataError: an empty prompt.
        ModelError: a token of a prompt, or every token that ends an answer, is beyond the model's embedding.
        ConfigError: ``max_tokens`` or ``batch_size`` below 1, a negative temperature, or keys and values that
            cannot be quantized.
    """
    requests = [
        Request(
            prompt,
            max_tokens,
            frozenset(stop),
            temperature,
            (seed, number),
            None if constraints is None else constraints[number],
            logits_hook,
        )
        for number, prompt in enumerate(prompts)
    ]
    return generate_all(
        model,
        tokenizer,
        requests,
        on_done=on_done,
        keep_failed=keep_failed,
        batch_size=batch_size,
        prefill_step_size=prefill_step_size,
        prefix_cache_tokens=prefix_cache_tokens,
        kv_bits=kv_bits,
    )


def generate_all(
    model: Any,
    tokenizer: Any,
    requests: Sequence[Request],
    *,
    on_done: Callable[[int], None] | None = None,
    keep_failed: bool = False,
    **settings: Any,
) -> list[Generation]:
    """The answer to each request, in their order; see :func:`generate`.

    Args:
        model: As for :class:`Engine`.
        tokenizer: As for :class:`Engine`.
        requests: What is asked.
        on_done: As for :func:`generate`.
        keep_failed: As for :func:`generate`.
        **settings: The other arguments of :class:`Engine`.
    """
    engine = Engine(model, tokenizer, **settings)
    for number, request in enumerate(requests):
        check_request(request, embedding_rows(model), tokenizer, f"prompt {number}")
    # Prompts of similar length are read together.
    order = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt), reverse=True)
    places = {engine.submit(requests[i]): i for i in order}
    out: list[Generation | None] = [None] * len(requests)
    done = 0
    while engine.busy:
        for event in engine.step():
            if isinstance(event, TokenEvent):
                continue
            place = places[event.request_id]
            if isinstance(event, Finished):
                out[place] = event.generation
            elif keep_failed and isinstance(event.error, DistillError):
                out[place] = Generation("", (), len(requests[place].prompt), "error", 0.0, error=event.error)
            else:
                raise event.error
            done += 1
            if on_done is not None:
                on_done(done)
    return [generation for generation in out if generation is not None]
