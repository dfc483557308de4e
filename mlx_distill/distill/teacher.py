"""The teacher's targets for given answers: token by token, and for the label as a whole.

The teacher runs once over each row, prompt and answer together. Only the positions that predict the answer
are projected to the vocabulary, a few hundred at a time, so ``[rows, length, vocabulary]`` never exists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from zlib import crc32

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_distill.data.chat import answer_ids, prompt_ids, render, stop_ids
from mlx_distill.distill.answer_check import AnswerCheck
from mlx_distill.distill.teacher_cache import TeacherTargets
from mlx_distill.distill.token_distributions import Distributions, Kept, distributions, each, joined
from mlx_distill.errors import DataError, ModelError
from mlx_distill.infer.channels import channels_of
from mlx_distill.infer.engine import Generation, generate_all
from mlx_distill.infer.kv_cache import Caches, forward, has_plain_caches, merge, pad_right, row_cache, select
from mlx_distill.infer.label_scoring import (
    Project,
    continued_label_logprobs,
    label_place,
    prompt_label_logprobs,
)
from mlx_distill.infer.requests import Request
from mlx_distill.infer.text_stream import thinking_text
from mlx_distill.losses.labels import LabelTrie, label_logprobs
from mlx_distill.losses.token_bytes import vocabulary
from mlx_distill.models.forward import embedding_rows, head_columns, hidden_states
from mlx_distill.models.token_ids import check_token_ids, token_logits, used_ids
from mlx_distill.recipe import TargetsConfig
from mlx_distill.tasks.answer import label_prefix, parse_answer
from mlx_distill.tasks.task import Task
from mlx_distill.thinking import thinking_budget

SAMPLES = 4
"""Sampled answers that a teacher is asked for until one fits the task."""


@dataclass(frozen=True)
class TokenizedAnswer:
    """A rendered chat whose answer is scored.

    Args:
        tokens: Token ids of prompt, answer and stop token.
        start: Where the answer begins; the distribution of token ``j`` is read at position ``j - 1``.
        label_start: The position of the first token behind the root of the labels, or None where they cannot
            be scored.
        id: The row's.
        text: The answer.
        thinking: What stands before it, where the model thought first.
        thinking_tokens: Of the tokens from ``start`` on those of the thinking, where it is scored too.
        answer_start: The first of them that is the answer's.
    """

    tokens: Sequence[int]
    start: int
    label_start: int | None = None
    id: str = ""
    text: str = ""
    thinking: str = ""
    thinking_tokens: int = 0
    answer_start: int = 0


def score_answers(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Mapping[str, Any]],
    task: Task,
    settings: TargetsConfig,
    labels: LabelTrie | None = None,
    samples: Sequence[int] | None = None,
    temperatures: Sequence[float] = (),
) -> tuple[list[TeacherTargets], AnswerCheck]:
    """The teacher's targets of prepared rows, for its own answers or the data's.

    Args:
        model: The teacher.
        tokenizer: The teacher's.
        rows: Prepared rows: ``id`` and ``messages``, the answer last.
        task: Its schema and labels.
        settings: ``text``: ``greedy`` or ``sampled`` for the teacher's own answers, else the data's;
            ``seed`` of the samples; ``top_k``; ``batch_size``.
        labels: The labels in the teacher's tokens, or None for no label distribution.
        samples: Of each row the number of its sampled answer: another number gives another answer. None: 0.
        temperatures: Those at which the mass outside of the top k is found too.

    Returns:
        The targets, and the counts of the teacher's own answers. Of a sampled answer that does not fit the
        task others are drawn, up to :data:`SAMPLES` in all, so that the one that is kept is drawn from the
        answers that fit. Rows without one keep the data's. Where the teacher thinks (``settings.thinking``)
        they have no targets and are counted, as are those whose thinking did not end: the data's answer would
        not follow from what it thought.
    """
    texts = [row["messages"][-1]["content"] for row in rows]
    thoughts = [row["messages"][-1].get("reasoning_content", "") for row in rows]
    thinks, unusable = settings.thinking != "none", set[int]()
    check = AnswerCheck()
    if settings.text != "data":
        own = _own_answers(model, tokenizer, rows, task, settings, samples or [0] * len(rows), check)
        for i, answer in own.items():
            texts[i], thoughts[i] = answer.text, answer.thinking
        if thinks:
            unusable = set(range(len(rows))) - own.keys()
            check.left_out += len(unusable)
    answers_in_tokens = []
    for i, row in enumerate(rows):
        if i in unusable:
            continue
        try:
            thought = thoughts[i] if thinks else None
            answers_in_tokens.append(_in_tokens(row, texts[i], thought, tokenizer, task, settings, labels))
        except DataError as error:
            if not thinks:
                raise
            check.leave_out(row["id"], texts[i], error.message)
    scored = score(
        model,
        answers_in_tokens,
        top_k=settings.top_k,
        temperatures=temperatures,
        draws=settings.draws,
        seed=settings.seed,
        labels=labels,
        tokenizer=tokenizer,
        batch_size=settings.batch_size,
    )
    return list(scored), check


def _own_answers(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Mapping[str, Any]],
    task: Task,
    settings: TargetsConfig,
    numbers: Sequence[int],
    check: AnswerCheck,
) -> dict[int, Generation]:
    """The teacher's own answers that fit the task, by the row's number; the first ones are counted."""
    out: dict[int, Generation] = {}
    asked = list(range(len(rows)))
    is_sampled = settings.text == "sampled"
    for attempt in range(SAMPLES if is_sampled else 1):
        if not asked:
            break
        # The first sample has the seed that it would have alone.
        again = (attempt,) if attempt else ()
        ids = [(settings.seed, numbers[i], crc32(rows[i]["id"].encode()), *again) for i in asked]
        prompts = [rows[i]["messages"][:-1] for i in asked]
        seeds, limits = ids if is_sampled else None, (task.max_answer_tokens, settings.batch_size)
        for i, answer in zip(asked, generate_answers(model, tokenizer, prompts, *limits, seeds), strict=True):
            if attempt:
                fits = check.add_again(answer, task.schema)
            else:
                text = rows[i]["messages"][-1]["content"]
                data_tokens = len(answer_ids(tokenizer, text)) if answer.finish == "length" else None
                fits = check.add(rows[i]["id"], answer, task.schema, data_tokens)
            if fits:
                out[i] = answer
        asked = [i for i in asked if i not in out]
    return out


def _in_tokens(
    row: Mapping[str, Any],
    text: str,
    thought: str | None,
    tokenizer: Any,
    task: Task,
    settings: TargetsConfig,
    labels: LabelTrie | None,
) -> TokenizedAnswer:
    """A row's chat with an answer and, where the teacher thinks, with what it thought.

    Raises:
        DataError: there is no thinking, which the student has to learn, or which the row should have.
    """
    thought = None if thought is None else thought.strip()
    kept = settings.thinking in ("keep", "map")
    if not thought and (kept or (thought is not None and settings.text == "data")):
        raise DataError("no thinking before the answer", fix="give the row reasoning_content")
    last = {"role": "assistant", "content": text, **({"reasoning_content": thought} if thought else {})}
    chat = render(tokenizer, [*row["messages"][:-1], last])
    tokens, answer = chat.tokens.tolist(), chat.spans[-1][0]
    place = answer_label_place(tokens, answer, text, task, partial(answer_ids, tokenizer), labels)
    at = place and place[0]
    if not kept or chat.thinking is None:
        return TokenizedAnswer(tokens, answer, at, row["id"], text, thought or "")
    start, end = chat.thinking
    return TokenizedAnswer(tokens, start, at, row["id"], text, thought or "", end - start, answer - start)


def answer_label_place(
    tokens: Sequence[int],
    start: int,
    text: str,
    task: Task,
    encode: Callable[[str], list[int]],
    labels: LabelTrie | None,
) -> tuple[int, int] | None:
    """Where the labels' root stands in a rendered answer, and the last node that the answer reaches, or None:
    see :func:`~mlx_distill.infer.label_scoring.label_place`.

    Args:
        tokens: The chat's token ids.
        start: Where the answer begins.
        text: The answer.
        task: Its schema and label.
        encode: From the beginning of an answer to its token ids.
        labels: The labels in the same tokens; without them there is no place.
    """
    if labels is None or task.label is None:
        return None
    answer, _ = parse_answer(text, task.schema)
    return label_place(tokens, start, encode(label_prefix(task.schema, task.label, answer)), labels)


def generate_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[Mapping[str, Any]]],
    max_tokens: int,
    batch_size: int,
    seeds: Sequence[tuple[int, ...]] | None = None,
) -> list[Generation]:
    """The teacher's answers to some prompts (lists of messages), each with the text of its thinking alone.

    Args:
        model: The teacher.
        tokenizer: The teacher's.
        prompts: Messages before the answer.
        max_tokens: Tokens after which an answer is cut.
        batch_size: Prompts answered at the same time.
        seeds: One a prompt: each answer is sampled at temperature 1 with its own seed, so that it does not
            depend on the other prompts. None for greedy answers.
    """
    stop = frozenset(stop_ids(tokenizer))
    requests = [
        Request(
            prompt_ids(tokenizer, messages),
            max_tokens,
            stop,
            temperature=0.0 if seeds is None else 1.0,
            seed=0 if seeds is None else seeds[number],
            max_thinking=thinking_budget(tokenizer),
        )
        for number, messages in enumerate(prompts)
    ]
    answers = generate_all(model, tokenizer, requests, batch_size=batch_size)
    channels = channels_of(tokenizer)
    return [
        replace(answer, thinking=thinking_text(tokenizer, channels, request.prompt, answer))
        for answer, request in zip(answers, requests, strict=True)
    ]


def score(
    model: nn.Module,
    answers: Sequence[TokenizedAnswer],
    *,
    top_k: int,
    temperatures: Sequence[float] = (),
    draws: int = 0,
    seed: int = 0,
    labels: LabelTrie | None = None,
    tokenizer: Any = None,
    batch_size: int = 16,
    multiple: int = 16,
    tile_rows: int = 512,
) -> Iterator[TeacherTargets]:
    """The targets of some answers, in their order.

    Args:
        model: The teacher.
        answers: Rendered chats.
        top_k: Tokens kept of each distribution.
        temperatures: Those at which the mass outside of the top k is found too.
        draws: Samples of each distribution that are kept instead of the top k; 0: none.
        seed: Of these samples.
        labels: The labels in the teacher's tokens, or None for no label distribution.
        tokenizer: The teacher's: the columns of the head that are none of its tokens take no part in any
            distribution. None for all columns.
        batch_size: Rows per forward pass.
        multiple: Rows are padded to a multiple of this many tokens, so that few shapes occur.
        tile_rows: Positions projected at a time.

    Raises:
        ModelError: an answer or its prompt has a token beyond the model's embedding.
    """
    model.eval()
    check_token_ids([max(answer.tokens) for answer in answers], embedding_rows(model), tokenizer)
    used = used_ids(tokenizer, head_columns(model))
    kept = Kept(top_k if used is None else min(top_k, int(used.sum())), tuple(temperatures), draws, seed)
    lengths = None if tokenizer is None else byte_lengths(tokenizer)
    project = partial(token_logits, model, used=None if used is None or used.all() else mx.array(used))
    for first in range(0, len(answers), batch_size):
        batch = answers[first : first + batch_size]
        inputs = pad_right([answer.tokens for answer in batch], multiple)
        caches = _label_caches(model, len(batch), labels)
        if caches is None:
            hidden = hidden_states(model, mx.array(inputs))
        else:  # to a continuation with a label, a row ends where its label begins
            roots = [answer.label_start or answer.start for answer in batch]
            hidden = forward(partial(hidden_states, model), caches, inputs, roots)
        whole = _answer_distributions(project, hidden, batch, kept, tile_rows)
        by_row = {} if labels is None else _label_logprobs(model, project, hidden, batch, labels, caches)
        counts = [len(answer.tokens) - answer.start for answer in batch]
        for i, (answer, part) in enumerate(zip(batch, each(whole, counts), strict=True)):
            ids = np.array(answer.tokens[answer.start :], dtype=np.int32)
            yield TeacherTargets(
                id=answer.id,
                text=answer.text,
                label_logprobs=by_row.get(i),
                ids=ids,
                logprobs=part.logprobs,
                topk_ids=part.topk_ids,
                topk_logprobs=part.topk_logprobs,
                tail_logprobs=part.tail_logprobs,
                ends=None if lengths is None else np.cumsum(lengths[ids]),
                tempered_tails=part.tempered_tails,
                thinking=answer.thinking,
                thinking_tokens=answer.thinking_tokens,
                answer_start=answer.answer_start,
            )


def _answer_distributions(
    project: Project,
    hidden: mx.array,
    batch: Sequence[TokenizedAnswer],
    kept: Kept,
    tile_rows: int,
) -> Distributions:
    """What is kept at all tokens of all answers, one after the other."""
    positions = [(i, j) for i, answer in enumerate(batch) for j in range(answer.start, len(answer.tokens))]
    tokens = np.array([batch[i].tokens[j] for i, j in positions], dtype=np.int32)
    rows, columns = np.array(positions, dtype=np.int32).reshape(-1, 2).T
    uniform = np.concatenate([_uniform(answer, kept) for answer in batch]) if kept.draws else None
    parts = []
    for first in range(0, len(positions), tile_rows):
        at = slice(first, first + tile_rows)
        z = project(hidden[mx.array(rows[at]), mx.array(columns[at] - 1)])
        parts.append(distributions(z, tokens[at], kept, None if uniform is None else uniform[at]))
    return joined(parts)


def _uniform(answer: TokenizedAnswer, kept: Kept) -> np.ndarray:
    """The random numbers of an answer's samples, which depend on nothing else."""
    own = crc32(f"{answer.id} {answer.text}".encode())
    random = np.random.default_rng([kept.seed, own])
    return random.random((len(answer.tokens) - answer.start, kept.draws))


def byte_lengths(tokenizer: Any) -> np.ndarray | None:
    """The bytes of every token by id; None where the tokenizer's tokens do not name their bytes."""
    try:
        return vocabulary(tokenizer).lengths
    except ModelError:
        return None


def _label_caches(model: nn.Module, rows: int, labels: LabelTrie | None) -> Caches | None:
    """Caches for labels that share tokens, so that each row is read once."""
    if labels is None or len(labels.nodes) == 1 or not has_plain_caches(model):
        return None
    return merge([row_cache(model)] * rows)


def _label_logprobs(
    model: nn.Module,
    project: Project,
    hidden: mx.array,
    batch: Sequence[TokenizedAnswer],
    labels: LabelTrie,
    caches: Caches | None,
) -> dict[int, np.ndarray]:
    """The distribution over the labels and everything else, by row, of the rows that have a label."""
    starts = {i: answer.label_start for i, answer in enumerate(batch) if answer.label_start is not None}
    if not starts:
        return {}
    rows = mx.array(list(starts))
    at_root = project(hidden[rows, mx.array([start - 1 for start in starts.values()])])
    if len(labels.nodes) == 1:
        values = label_logprobs(at_root, labels.nodes[0], rest=True)
    elif caches is None:
        prompts = [batch[i].tokens[:start] for i, start in starts.items()]
        values = prompt_label_logprobs(model, prompts, labels, rest=True, project=project)
    else:
        caches = select(caches, list(starts))
        values = continued_label_logprobs(model, labels, at_root, caches, rest=True, project=project)
    return dict(zip(starts, np.array(values), strict=True))
