"""Batched generation: prompts of similar length are decoded together, greedily or by sampling.

Two engines give the same tokens. ``columns`` (:mod:`mlx_distill.infer.kv_cache`) decodes a batch until its
last row is done, which suits answers of similar length, such as a JSON object of a given schema. ``mlx_lm``
is mlx-lm's ``BatchGenerator``: it serves architectures whose caches are not plain keys and values
(state-space layers, for instance), and the tests hold the two together.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from jaxtyping import Bool, Float, Integer

from mlx_distill.errors import ConfigError, DataError
from mlx_distill.infer.kv_cache import ColumnCache, ColumnLayout, column_caches, supports_column_cache
from mlx_distill.models.forward import embedding_rows
from mlx_distill.models.token_ids import check_token_ids, used_ids


class LogitsHook(NamedTuple):
    """Reads the logits of one decoding step: ``read(logits [b, v], layout, caches) -> [b, c]`` is called with
    the logits that token ``step`` of the answers is chosen from, and the cache at that step. It may write
    columns behind those of the cache, and must rewind the layout.
    """

    step: int
    read: Callable[[mx.array, ColumnLayout, Sequence[ColumnCache]], mx.array]


@dataclass(frozen=True)
class Generation:
    """One answer.

    ``text`` is decoded from ``tokens``, which are the answer without the stop token; ``prompt_tokens`` counts
    the prompt's; ``finish`` is ``stop`` (a stop token came) or ``length`` (``max_tokens`` were reached);
    ``seconds`` the wall time of its batch divided by the batch's size; ``hook_output`` what the logits hook
    returned for it, or None.
    """

    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    finish: str
    seconds: float
    hook_output: Float[np.ndarray, " c"] | None = None


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
    engine: str | None = None,
    logits_hook: LogitsHook | None = None,
    prefill_step_size: int = 1024,
    cache_growth: int = 64,
) -> list[Generation]:
    """The model's answer to each prompt.

    Batches are made of prompts of similar length; the result does not depend on them, beyond rounding. A
    sampled answer depends only on the seed and the prompt's place in the list.

    Args:
        model: An mlx-lm model: ``model(tokens [b, l], cache=...) -> logits [b, l, v]``.
        tokenizer: Any object with ``decode(ids)``; columns of the logits that are none of its tokens are
            never chosen.
        prompts: Token ids, one sequence a prompt, none empty.
        max_tokens: Tokens after which an answer is truncated.
        batch_size: Prompts decoded together.
        stop: Token ids that end an answer.
        temperature: 0 for greedy decoding, else the logits are divided by it and a token is sampled.
        seed: Of the sampling.
        on_done: Called after each batch with the number of prompts answered so far.
        engine: ``columns``, ``mlx_lm``, or None for the first where the model supports it.
        logits_hook: Is called for each answer that reaches its step. The engine ``mlx_lm`` does not call it.
        prefill_step_size: Prompt tokens of a row in a forward pass (engine ``columns``).
        cache_growth: Columns by which the key-value cache grows (engine ``columns``).

    Returns:
        One :class:`Generation` a prompt, in the prompts' order.

    Raises:
        DataError: an empty prompt.
        ModelError: a token of a prompt, or every token that ends an answer, is beyond the model's embedding.
        ConfigError: ``max_tokens`` or ``batch_size`` below 1, a negative temperature, an unknown engine.
    """
    _check(prompts, max_tokens, batch_size, temperature, engine)
    _check_ids(model, tokenizer, prompts, stop)
    columns = (engine or ("columns" if supports_column_cache(model) else "mlx_lm")) == "columns"
    used = used_ids(tokenizer)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    out: list[Generation | None] = [None] * len(prompts)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        began = time.perf_counter()
        sampler = Sampler(used, temperature, seed, rows, max_tokens)
        batch = [list(prompts[i]) for i in rows]
        hook_outputs: dict[int, np.ndarray] = {}
        if columns:
            layout = ColumnLayout([len(prompt) - 1 for prompt in batch])
            caches = column_caches(model, layout, cache_growth)
            _prefill(model, batch, layout, caches, prefill_step_size)
            written = _decode_columns(
                model, batch, layout, caches, max_tokens, stop, sampler, logits_hook, hook_outputs
            )
        else:
            written = _decode_mlx_lm(model, batch, max_tokens, stop, sampler)
        seconds = (time.perf_counter() - began) / len(rows)
        for row, i in enumerate(rows):
            tokens, finish = _without_stop(written[row], stop)
            hooked = logits_hook is not None and len(tokens) >= logits_hook.step
            out[i] = Generation(
                tokenizer.decode(tokens) if tokens else "",
                tuple(tokens),
                len(prompts[i]),
                finish,
                seconds,
                hook_outputs.get(row) if hooked else None,
            )
        if on_done is not None:
            on_done(start + len(rows))
    return [generation for generation in out if generation is not None]


def _check(
    prompts: Sequence[Sequence[int]], max_tokens: int, batch_size: int, temperature: float, engine: str | None
) -> None:
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise DataError(f"prompt {number} is empty", fix="give every prompt at least one token")
    if max_tokens < 1 or batch_size < 1:
        raise ConfigError(f"max_tokens {max_tokens}, batch_size {batch_size}: below 1", fix="give 1 or more")
    if temperature < 0:
        raise ConfigError(
            f"temperature {temperature} is negative",
            fix="0 for greedy answers, 1 for the model's own distribution",
        )
    if engine not in (None, "columns", "mlx_lm"):
        raise ConfigError(f"no engine {engine!r}", fix="columns or mlx_lm")


def _check_ids(model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], stop: AbstractSet[int]) -> None:
    """Refuse tokens that the model cannot read, and answers that it cannot end."""
    rows = embedding_rows(model)
    check_token_ids([max(prompt) for prompt in prompts], rows, tokenizer)
    check_token_ids([min(stop)] if stop else [], rows, tokenizer)


class Sampler:
    """Chooses the next tokens from logits: the most probable ones, or by inverse transform sampling with
    random numbers that depend on (seed, prompt, step) alone, so the composition of batches does not matter.

    Args:
        used: Whether an id is a token; other columns of the logits, and those beyond, are never chosen. None
            for all.
        temperature: 0 for the most probable token.
        seed: Of the random numbers.
        prompts: The prompt number of each row.
        max_tokens: Steps, at most.
    """

    def __init__(
        self,
        used: Bool[np.ndarray, " v"] | None,
        temperature: float,
        seed: int,
        prompts: Sequence[int],
        max_tokens: int,
    ) -> None:
        self.width = None if used is None else len(used)
        self.used = None if used is None or used.all() else mx.array(used)
        self.temperature = temperature
        if temperature:
            self.uniform = np.stack(
                [np.random.default_rng((seed, i)).random(max_tokens, dtype=np.float32) for i in prompts]
            )

    def __call__(
        self, logits: Float[mx.array, "b v"], step: int, rows: Integer[np.ndarray, " b"]
    ) -> Integer[mx.array, " b"]:
        """The tokens of step ``step`` of the given rows."""
        logits = logits[:, : self.width]
        if self.used is not None:
            logits = mx.where(self.used[: logits.shape[1]], logits, -mx.inf)
        if not self.temperature:
            return mx.argmax(logits, axis=-1)
        cumulative = mx.cumsum(mx.softmax(logits.astype(mx.float32) / self.temperature, axis=-1), axis=-1)
        target = mx.array(self.uniform[rows, step])[:, None] * cumulative[:, -1:]
        return mx.minimum((cumulative <= target).sum(axis=-1), logits.shape[-1] - 1)


def _prefill(
    model: Any,
    prompts: list[list[int]],
    layout: ColumnLayout,
    caches: list[ColumnCache],
    step_size: int,
) -> None:
    """Fill the caches with all but the last token of each prompt. The logits are never evaluated."""
    padded = np.zeros((len(prompts), layout.width), dtype=np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt) - 1] = prompt[:-1]
    for start in range(0, layout.width, step_size):
        columns = padded[:, start : start + step_size]
        model(mx.array(columns), cache=caches)
        layout.advance(columns.shape[1])
        mx.eval([(cache.keys, cache.values) for cache in caches])


def _decode_columns(
    model: Any,
    prompts: list[list[int]],
    layout: ColumnLayout,
    caches: list[ColumnCache],
    max_tokens: int,
    stop: AbstractSet[int],
    sampler: Sampler,
    logits_hook: LogitsHook | None,
    hook_outputs: dict[int, np.ndarray],
) -> list[list[int]]:
    """The tokens of each answer with its stop token; ``hook_outputs`` is filled by row."""

    def forward(inputs: Integer[mx.array, " b"], step: int, rows: np.ndarray) -> Integer[mx.array, " b"]:
        logits = model(inputs[:, None], cache=caches)[:, -1, :]
        layout.advance(1)
        if logits_hook is not None and step == logits_hook.step:
            hooked.append((rows, logits_hook.read(logits, layout, caches)))
        out = sampler(logits, step, rows)
        mx.async_eval(out)
        return out

    hooked: list[tuple[np.ndarray, mx.array]] = []
    rows = np.arange(len(prompts))  # the prompt of each row of the batch; finished rows are removed
    alive = np.ones(len(prompts), dtype=bool)
    stops = np.array(sorted(stop), dtype=np.int64)
    written = np.full((len(prompts), max_tokens), -1, dtype=np.int64)
    tokens = forward(mx.array([prompt[-1] for prompt in prompts]), 0, rows)
    for step in range(max_tokens):
        # The next step is submitted before this one's tokens are read; a row that has just stopped computes
        # one # token too many.
        following = forward(tokens, step + 1, rows) if step + 1 < max_tokens else None
        values = np.array(tokens).astype(np.int64)  # signed: -1 marks what is not written
        written[rows, step] = np.where(alive, values, -1)
        alive &= ~np.isin(values, stops)
        if following is None or not alive.any():
            break
        tokens = following
        if alive.sum() <= 0.75 * len(alive):
            kept = np.flatnonzero(alive)
            index = mx.array(kept)
            layout.keep(kept.tolist())
            for cache in caches:
                cache.keep(index)
            rows, alive, tokens = rows[kept], alive[kept], tokens[index]
    for hooked_rows, output in hooked:
        hook_outputs.update(zip(hooked_rows.tolist(), np.array(output), strict=True))
    return [row[row >= 0].tolist() for row in written]


def _decode_mlx_lm(
    model: Any, prompts: list[list[int]], max_tokens: int, stop: AbstractSet[int], sampler: Sampler
) -> list[list[int]]:
    """The tokens of each answer with its stop token."""
    from mlx_lm.generate import BatchGenerator

    class RowSampler:
        def __init__(self, row: int) -> None:
            self.row, self.step = row, 0

        def __call__(self, logprobs: Float[mx.array, "1 v"]) -> Integer[mx.array, " 1"]:
            self.step += 1  # mlx-lm computes one token beyond the last
            return sampler(logprobs, min(self.step, max_tokens) - 1, np.array([self.row]))

    n = len(prompts)
    engine = BatchGenerator(
        model, stop_tokens=[[token] for token in stop], completion_batch_size=n, prefill_batch_size=n
    )
    try:
        ids = engine.insert(prompts, [max_tokens] * n, samplers=[RowSampler(row) for row in range(n)])
        written: dict[int, list[int]] = {i: [] for i in ids}
        while responses := engine.next_generated():
            for response in responses:
                written[response.uid].append(response.token)
    finally:
        engine.close()
    return [written[i] for i in ids]


def _without_stop(tokens: list[int], stop: AbstractSet[int]) -> tuple[list[int], str]:
    """The answer's tokens and why it ended."""
    return (tokens[:-1], "stop") if tokens and tokens[-1] in stop else (tokens, "length")
