"""Answer many prompts: batches of similar length, greedy or sampled, in the prompts' order.

Two engines give the same tokens. The plain one (:mod:`mlx_distill.infer.kv_cache`) decodes a batch until its
last row is done, which suits answers of like length, such as a JSON object of a given schema; mlx-lm's
``BatchGenerator`` serves the architectures whose caches are not plain keys and values (state-space layers,
for instance), and is the plain one's twin in the tests.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from jaxtyping import Float, Integer

from mlx_distill.errors import ConfigError, DataError
from mlx_distill.infer.kv_cache import ColumnCache, Layout, can_column, column_caches

PREFILL = 1024  # columns of prompt a forward pass

Look = Callable[[mx.array], mx.array]


@dataclass(frozen=True)
class Generation:
    """One answer.

    ``text`` is decoded from ``tokens``, which are the answer without the stop token; ``prompt_tokens`` counts
    the prompt's; ``finish`` is ``stop`` (a stop token came) or ``length`` (``max_tokens`` did); ``seconds``
    the wall time of its batch divided by the batch's size; ``seen`` what ``look`` read of the logits on the
    way, or None.
    """

    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    finish: str
    seconds: float
    seen: Float[np.ndarray, " c"] | None = None


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
    look: tuple[int, Look] | None = None,
) -> list[Generation]:
    """The model's answer to each prompt.

    Batches are made of prompts of similar length; the result does not depend on them, beyond rounding. A
    sampled answer depends on the seed and the prompt's place in the list alone.

    Args:
        model: An mlx-lm model: ``model(tokens [b, l], cache=...) -> logits [b, l, v]``.
        tokenizer: Whatever has ``decode(ids)``; columns of the head beyond its vocabulary are never chosen.
        prompts: Token ids, one sequence a prompt, none empty.
        max_tokens: Tokens after which an answer is cut.
        batch_size: Prompts decoded together.
        stop: Token ids that end an answer.
        temperature: 0 for greedy, else the logits are divided by it and a token is drawn.
        seed: Of the drawing.
        on_done: Called after each batch with the number of prompts answered so far.
        engine: ``columns``, ``mlx_lm``, or None for the first where it can.
        look: ``(step, read)``: ``read(logits [b, v]) -> [b, c]`` of the logits that the answer's token
            ``step`` is chosen from, for each answer that gets there. The engine ``mlx_lm`` keeps its logits
            to itself: nothing is seen.

    Returns:
        One :class:`Generation` a prompt, in the prompts' order.

    Raises:
        DataError: an empty prompt.
        ConfigError: ``max_tokens`` or ``batch_size`` below 1, a negative temperature, an unknown engine.
    """
    _check(prompts, max_tokens, batch_size, temperature, engine)
    columns = (engine or ("columns" if can_column(model) else "mlx_lm")) == "columns"
    vocabulary = vocabulary_size(tokenizer)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    out: list[Generation | None] = [None] * len(prompts)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        began = time.perf_counter()
        sampler = _Sampler(vocabulary, temperature, seed, rows, max_tokens)
        chosen, seen = [list(prompts[i]) for i in rows], dict[int, np.ndarray]()
        if columns:
            answers = _decode_columns(model, chosen, max_tokens, frozenset(stop), sampler, look, seen)
        else:
            answers = _decode_mlx_lm(model, chosen, max_tokens, frozenset(stop), sampler)
        seconds = (time.perf_counter() - began) / len(rows)
        for row, (i, (tokens, finish)) in enumerate(zip(rows, answers, strict=True)):
            text = tokenizer.decode(tokens) if tokens else ""
            out[i] = Generation(
                text,
                tuple(tokens),
                len(prompts[i]),
                finish,
                seconds,
                seen.get(row) if look and len(tokens) >= look[0] else None,
            )
        if on_done is not None:
            on_done(start + len(rows))
    return [generation for generation in out if generation is not None]


def vocabulary_size(tokenizer: Any) -> int | None:
    """One more than the highest token id that the tokenizer can spell, or None where it does not tell.

    >>> class Toy:
    ...     def get_vocab(self): return {"a": 0, "b": 7}
    >>> vocabulary_size(Toy())
    8
    """
    get_vocab = getattr(tokenizer, "get_vocab", None)
    return max(get_vocab().values()) + 1 if callable(get_vocab) else None


def _check(
    prompts: Sequence[Sequence[int]], max_tokens: int, batch_size: int, temperature: float, engine: str | None
) -> None:
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise DataError(f"prompt {number} is empty", fix="every prompt needs a token at least")
    if max_tokens < 1 or batch_size < 1:
        raise ConfigError(f"max_tokens {max_tokens}, batch_size {batch_size}: below 1", fix="give 1 or more")
    if temperature < 0:
        raise ConfigError(
            f"temperature {temperature} is negative",
            fix="0 for greedy answers, 1 for the model's own distribution",
        )
    if engine not in (None, "columns", "mlx_lm"):
        raise ConfigError(f"no engine {engine!r}", fix="columns or mlx_lm")


class _Sampler:
    """Next tokens from logits. Drawn by inverse distribution from numbers that belong to (seed, prompt,
    step), so batches do not matter.
    """

    def __init__(
        self, vocabulary: int | None, temperature: float, seed: int, prompts: Sequence[int], max_tokens: int
    ) -> None:
        self.vocabulary = vocabulary
        self.temperature = temperature
        if temperature:
            self.draws = np.stack(
                [np.random.default_rng((seed, i)).random(max_tokens, dtype=np.float32) for i in prompts]
            )

    def __call__(
        self, logits: Float[mx.array, "b v"], step: int, rows: Integer[np.ndarray, " b"]
    ) -> Integer[mx.array, " b"]:
        logits = logits[:, : self.vocabulary]
        if not self.temperature:
            return mx.argmax(logits, axis=-1)
        heights = mx.cumsum(mx.softmax(logits.astype(mx.float32) / self.temperature, axis=-1), axis=-1)
        target = mx.array(self.draws[rows, step])[:, None] * heights[:, -1:]
        return mx.minimum((heights <= target).sum(axis=-1), logits.shape[-1] - 1)


_Answers = list[tuple[list[int], str]]


def _decode_columns(
    model: Any,
    prompts: list[list[int]],
    max_tokens: int,
    stop: frozenset[int],
    sampler: _Sampler,
    look: tuple[int, Look] | None,
    seen: dict[int, np.ndarray],
) -> _Answers:
    layout = Layout([len(prompt) - 1 for prompt in prompts])
    caches = column_caches(model, layout)
    _read_prompts(model, prompts, layout, caches)

    def forward(inputs: Integer[mx.array, " b"], step: int, rows: np.ndarray) -> Integer[mx.array, " b"]:
        logits = model(inputs[:, None], cache=caches)[:, -1, :]
        layout.advance(1)
        if look is not None and step == look[0]:
            looked.append((rows, look[1](logits)))
        out = sampler(logits, step, rows)
        mx.async_eval(out)
        return out

    looked: list[tuple[np.ndarray, mx.array]] = []
    rows = np.arange(len(prompts))  # which prompt each row of the batch is; finished ones leave
    alive = np.ones(len(prompts), dtype=bool)
    stops = np.array(sorted(stop), dtype=np.int64)
    written = np.full((len(prompts), max_tokens), -1, dtype=np.int64)
    tokens = forward(mx.array([prompt[-1] for prompt in prompts]), 0, rows)
    for step in range(max_tokens):
        # The next step is under way before this one's tokens are looked at; a row that stopped computes one
        # token for nothing.
        ahead = forward(tokens, step + 1, rows) if step + 1 < max_tokens else None
        values = np.array(tokens).astype(np.int64)  # unsigned as it comes, and -1 marks what is not written
        written[rows, step] = np.where(alive, values, -1)
        alive &= ~np.isin(values, stops)
        if ahead is None or not alive.any():
            break
        tokens = ahead
        if alive.sum() <= 0.75 * len(alive):
            kept = np.flatnonzero(alive)
            index = mx.array(kept)
            layout.keep(kept.tolist())
            for cache in caches:
                cache.keep(index)
            rows, alive, tokens = rows[kept], alive[kept], tokens[index]
    for kept, values in looked:
        seen.update(zip(kept.tolist(), np.array(values), strict=True))
    return [_cut(row[row >= 0].tolist(), stop) for row in written]


def _read_prompts(model: Any, prompts: list[list[int]], layout: Layout, caches: list[ColumnCache]) -> None:
    """Fill the caches with all but the last token of each prompt. The logits are never evaluated."""
    padded = np.zeros((len(prompts), layout.width), dtype=np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt) - 1] = prompt[:-1]
    for start in range(0, layout.width, PREFILL):
        columns = padded[:, start : start + PREFILL]
        model(mx.array(columns), cache=caches)
        layout.advance(columns.shape[1])
        mx.eval([(cache.keys, cache.values) for cache in caches])


def _decode_mlx_lm(
    model: Any, prompts: list[list[int]], max_tokens: int, stop: frozenset[int], sampler: _Sampler
) -> _Answers:
    from mlx_lm.generate import BatchGenerator

    class RowSampler:
        def __init__(self, row: int) -> None:
            self.row, self.step = row, 0

        def __call__(self, logprobs: Float[mx.array, "1 v"]) -> Integer[mx.array, " 1"]:
            self.step += 1  # one token is computed ahead, beyond the last
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
    return [_cut(written[i], stop) for i in ids]


def _cut(tokens: list[int], stop: frozenset[int]) -> tuple[list[int], str]:
    return (tokens[:-1], "stop") if tokens and tokens[-1] in stop else (tokens, "length")
