"""Rows to predictions: prompt, generation, strict parsing, and the distribution over the labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np

from mlx_distill.data.chat import prompt_ids, stop_ids
from mlx_distill.data.rows import Item, to_item
from mlx_distill.errors import ConfigError
from mlx_distill.infer.constrained import task_grammar
from mlx_distill.infer.engine import Generation, LogitsHook, generate_all
from mlx_distill.infer.kv_cache import Caches
from mlx_distill.infer.label_scoring import (
    LabelPrefix,
    continued_label_logprobs,
    label_prefix_tokens,
    label_probabilities,
)
from mlx_distill.infer.requests import Request
from mlx_distill.records import Message, Prediction
from mlx_distill.tasks.answer import THINKING, error_kind, parse_answer
from mlx_distill.tasks.task import Task
from mlx_distill.thinking import thinking_budget

Row = Mapping[str, Any]
Answer = TypeVar("Answer")

# Why an item has no answer.
BAD_ROW = "bad row"
LONG_PROMPT = "prompt too long"


def predict(
    model: Any,
    tokenizer: Any,
    task: Task,
    rows: Sequence[Row | str],
    *,
    max_prompt_tokens: int | None = None,
    **settings: Any,
) -> list[Prediction]:
    """Generate an answer for each row. Answers are not repaired: one that does not fit the schema is an error
    of the model.

    Args:
        model: An mlx-lm model.
        tokenizer: Its tokenizer, with a chat template.
        task: Prompt, schema, label and score.
        rows: Prepared rows (whose last assistant turn is not shown to the model), rows with the fields that
            the task's prompt names, or plain texts where it names one.
        max_prompt_tokens: Longer prompts are not read: their prediction is an error that says so; the
            model's own length where None.
        **settings: The other arguments of :func:`answer_prompts`.

    Returns:
        One prediction a row, in the rows' order.

    Raises:
        DataError: a row that lacks a field of the prompt, or is neither a mapping nor a text; the message has
            its number.
        ConfigError: ``constrain``, and a schema that a grammar cannot enforce.
    """

    def answer(items: Sequence[Item], prompts: Sequence[Sequence[int]]) -> list[Prediction]:
        return answer_prompts(model, tokenizer, task, items, prompts, **settings)

    return _answer_rows(
        model, tokenizer, task, rows, max_prompt_tokens, answer, lambda prediction: prediction
    )


def predict_both(
    model: Any,
    tokenizer: Any,
    task: Task,
    rows: Sequence[Row | str],
    *,
    max_prompt_tokens: int | None = None,
    constrain: bool = True,
    **settings: Any,
) -> list[tuple[Prediction, Prediction | None]]:
    """Each row's free answer, and its answer under the grammar of the task; None for the latter where it is
    the same.

    A greedy answer all of whose tokens the grammar allows is the answer under the grammar too: each of its
    tokens has the largest logit of all, so also of those that are allowed. Only the others are generated
    again.

    Args:
        model: An mlx-lm model; this and the following are those of :func:`predict`.
        tokenizer: Its tokenizer.
        task: Prompt, schema, label and score.
        rows: What is asked.
        max_prompt_tokens: Longer prompts are not read.
        constrain: False generates free answers alone.
        **settings: The other arguments of :func:`answer_prompts`.

    Raises:
        DataError, ConfigError: as :func:`predict`.
        ConfigError: ``constrain`` and a temperature: a sampled answer is none under the grammar.
    """
    if constrain and settings.get("temperature"):
        raise ConfigError(
            f"temperature {settings['temperature']}: free and constrained answers are compared greedily",
            fix="leave out temperature, or constrain=False",
        )

    def answer(
        items: Sequence[Item], prompts: Sequence[Sequence[int]]
    ) -> list[tuple[Prediction, Prediction | None]]:
        generations = generate_answers(model, tokenizer, task, prompts, **settings)
        free = to_predictions(model, tokenizer, task, items, prompts, generations, **settings)
        others: list[Prediction | None] = [None] * len(items)
        if constrain:
            grammar = task_grammar(model, tokenizer, task)
            again = [
                i
                for i, generation in enumerate(generations)
                if not grammar.allows(generation.tokens, prompts[i], whole=generation.finish == "stop")
            ]
            written = answer_prompts(
                model,
                tokenizer,
                task,
                [items[i] for i in again],
                [prompts[i] for i in again],
                **{**settings, "constrain": True, "label_probs": False, "on_done": None},
            )
            for i, prediction in zip(again, written, strict=True):
                others[i] = prediction
        return list(zip(free, others, strict=True))

    return _answer_rows(
        model, tokenizer, task, rows, max_prompt_tokens, answer, lambda prediction: (prediction, None)
    )


def _answer_rows(
    model: Any,
    tokenizer: Any,
    task: Task,
    rows: Sequence[Row | str],
    max_prompt_tokens: int | None,
    answer: Callable[[Sequence[Item], Sequence[Sequence[int]]], Sequence[Answer]],
    refused: Callable[[Prediction], Answer],
) -> list[Answer]:
    """``answer`` of the rows whose prompts are short enough, ``refused`` of the others."""
    items = [to_item(row, task, number) for number, row in enumerate(rows, 1)]
    prompts = [item_prompt(tokenizer, item) for item in items]
    limit = max_prompt_tokens or context_length(model)
    fitting = [i for i, prompt in enumerate(prompts) if limit is None or len(prompt) <= limit]
    answers = iter(answer([items[i] for i in fitting], [prompts[i] for i in fitting]) if fitting else ())
    read = set(fitting)
    return [
        next(answers) if i in read else refused(unread(item, len(prompts[i]), limit))
        for i, item in enumerate(items)
    ]


def answer_prompts(
    model: Any,
    tokenizer: Any,
    task: Task,
    items: Sequence[Item],
    prompts: Sequence[Sequence[int]],
    **settings: Any,
) -> list[Prediction]:
    """The predictions of items whose prompts are tokenized and short enough.

    Args:
        model: An mlx-lm model.
        tokenizer: Its tokenizer.
        task: Schema, label and score.
        items: What is asked.
        prompts: Their tokens, from :func:`item_prompt`.
        **settings: Those of :func:`generate_answers`.
    """
    generations = generate_answers(model, tokenizer, task, prompts, **settings)
    return to_predictions(model, tokenizer, task, items, prompts, generations, **settings)


def generate_answers(
    model: Any,
    tokenizer: Any,
    task: Task,
    prompts: Sequence[Sequence[int]],
    *,
    batch_size: int = 16,
    max_tokens: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    label_probs: bool = True,
    constrain: bool = False,
    on_done: Callable[[int], None] | None = None,
) -> list[Generation]:
    """The answers to prompts.

    Args:
        model: An mlx-lm model.
        tokenizer: Its tokenizer.
        task: Schema, label and score.
        prompts: Token ids, from :func:`item_prompt`.
        batch_size: Items decoded together.
        max_tokens: Longest answer; the task's ``max_answer_tokens`` where None.
        temperature: 0 for greedy decoding.
        seed: Of sampled answers.
        label_probs: Read the distribution over the labels too, from the logits of the generation where the
            answer begins as the schema has it.
        constrain: Let the model write only what fits the task's schema. An answer whose grammar fails has an
            error instead, and the others are answered.
        on_done: Called with the number of items answered so far.
    """
    if not prompts:
        return []
    asked = AnswerRequests(model, tokenizer, task, label_probs=label_probs, constrain=constrain)
    requests = [
        asked.request(prompt, max_tokens, temperature=temperature, seed=(seed, number))
        for number, prompt in enumerate(prompts)
    ]
    return generate_all(model, tokenizer, requests, batch_size=batch_size, on_done=on_done, keep_failed=True)


class AnswerRequests:
    """From prompts to the requests of an engine for answers of a task.

    Requests that one object made share the hook of the labels, so their labels are read together.

    Args:
        model: An mlx-lm model.
        tokenizer: Its tokenizer.
        task: Schema, label and score.
        label_probs: Read the distribution over the labels too, where there is one.
        constrain: Let the model write only what fits the task's schema.

    Raises:
        ConfigError: ``constrain``, and a schema that a grammar cannot enforce.
    """

    def __init__(
        self, model: Any, tokenizer: Any, task: Task, *, label_probs: bool = True, constrain: bool = True
    ) -> None:
        self.task = task
        self.prefix = label_prefix_tokens(tokenizer, task) if label_probs else None
        self._grammar = task_grammar(model, tokenizer, task) if constrain else None
        self._hook = label_hook(model, self.prefix) if self.prefix else None
        self._stop = frozenset(stop_ids(tokenizer))
        self._max_thinking = thinking_budget(tokenizer)

    def request(
        self,
        prompt: Sequence[int],
        max_tokens: int | None = None,
        *,
        temperature: float = 0.0,
        seed: tuple[int, ...] | int = 0,
    ) -> Request:
        """The request for one answer; the arguments are those of :func:`generate_answers`."""
        return Request(
            prompt,
            max_tokens or self.task.max_answer_tokens,
            self._stop,
            temperature,
            seed,
            None if self._grammar is None else self._grammar.constraint(prompt),
            self._hook,
            max_thinking=self._max_thinking,
        )


def to_predictions(
    model: Any,
    tokenizer: Any,
    task: Task,
    items: Sequence[Item],
    prompts: Sequence[Sequence[int]],
    generations: Sequence[Generation],
    *,
    batch_size: int = 16,
    label_probs: bool = True,
    **settings: Any,
) -> list[Prediction]:
    """The predictions of :func:`generate_answers`, with the distributions over the labels: one more pass over
    the prompt where an answer does not begin as the schema has it.
    """
    prefix = label_prefix_tokens(tokenizer, task) if label_probs else None
    distributions: Sequence[dict[str, float] | None] = [None] * len(prompts)
    if prefix is not None:
        thinks = thinking_budget(tokenizer) > 0
        distributions = label_distributions(
            model, prompts, generations, prefix, batch_size=batch_size, thinks=thinks
        )
    return [
        to_prediction(item, generation, distribution, task)
        for item, generation, distribution in zip(items, generations, distributions, strict=True)
    ]


def item_prompt(tokenizer: Any, item: Item) -> list[int]:
    """The tokens that a model reads of an item, up to where its answer begins."""
    # prompt_ids leaves out a last turn of the assistant: the empty one here, never one of the prompt.
    return prompt_ids(tokenizer, [*item.messages, Message("assistant", "")])


def context_length(model: Any) -> int | None:
    """The number of tokens that a model was made for, or None where its config does not say."""
    length = getattr(getattr(model, "args", None), "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None


def shortest(*lengths: int | None) -> int | None:
    """The smallest of some limits, of which None is none.

    >>> shortest(None, 512, 4096), shortest(None)
    (512, None)
    """
    return min((length for length in lengths if length is not None), default=None)


def unread(item: Item, length: int, limit: int | None) -> Prediction:
    """The prediction of an item whose prompt is longer than the model can read."""
    error = f"the prompt has {length:,} tokens, and at most {limit:,} are read"
    return Prediction(
        item.id,
        "",
        None,
        None,
        None,
        error=error,
        error_kind=LONG_PROMPT,
        prompt_tokens=length,
        fields=item.fields,
    )


def label_hook(model: Any, prefix: LabelPrefix) -> LogitsHook:
    """A hook that reads the labels' log-probabilities where an answer that begins with ``prefix`` has its
    label. The prompt is not read again: labels that share tokens are continued from the generation's cache.
    """

    def read(logits: mx.array, caches: Caches) -> mx.array:
        return continued_label_logprobs(model, prefix[1], logits, caches)

    return LogitsHook(len(prefix[0]), read)


def label_distributions(
    model: Any,
    prompts: Sequence[Sequence[int]],
    generations: Sequence[Generation],
    prefix: LabelPrefix,
    *,
    batch_size: int = 16,
    thinks: bool = False,
) -> list[dict[str, float] | None]:
    """Each row's distribution over the labels: from :func:`label_hook` where the answer begins with the
    prefix, else from one more forward pass over prompt and prefix. None of a row that was cut while its model
    was thinking: its answer has no beginning.

    Args:
        model: An mlx-lm model.
        prompts: Token ids of the prompts.
        generations: Their answers, generated with the hook.
        prefix: From :func:`~mlx_distill.infer.label_scoring.label_prefix_tokens`.
        batch_size: Prompts a forward pass.
        thinks: Whether the prompts leave thinking to the model: the answer is read behind it.
    """
    ids, labels = prefix
    table = np.zeros((len(prompts), len(labels.labels)), dtype=np.float32)
    others: list[int] = []
    cut: set[int] = set()
    for i, generation in enumerate(generations):
        if generation.hook_output is not None and begins_with_label(generation, ids):
            table[i] = np.exp(generation.hook_output)
        elif thinks and (generation.still_thinking or generation.error is not None):
            cut.add(i)
        else:
            others.append(i)
    if others:
        ends = [generations[i].answer_start if thinks else 0 for i in others]
        asked = [
            [*prompts[i], *generations[i].tokens[:end], *ids] for i, end in zip(others, ends, strict=True)
        ]
        table[others] = label_probabilities(model, asked, labels, batch_size=batch_size)
    return [
        None if i in cut else dict(zip(labels.labels, map(float, line), strict=True))
        for i, line in enumerate(table)
    ]


def begins_with_label(generation: Generation, ids: Sequence[int]) -> bool:
    """Whether the label's distribution was read while the answer was generated: it begins as the schema has
    it.
    """
    answer = generation.tokens[generation.answer_start :]
    return generation.hook_output is not None and list(answer[: len(ids)]) == list(ids)


def read_answer(
    generation: Generation, schema: Mapping[str, Any]
) -> tuple[dict[str, Any] | None, str | None]:
    """A generated answer, parsed strictly: the answer and None, or None and the reason in one line."""
    if generation.error is not None:
        return None, str(generation.error)
    if generation.still_thinking:
        return None, f"cut after {len(generation.tokens)} tokens: {THINKING}"
    answer, error = parse_answer(generation.text, schema)
    if error and generation.finish == "length":
        error = f"cut after {generation.answer_tokens} tokens: {error}"
    return answer, error


def to_prediction(
    item: Item, generation: Generation, label_probs: Mapping[str, float] | None, task: Task
) -> Prediction:
    """The prediction of an item: its generated answer, parsed strictly under the task's schema."""
    answer, error = read_answer(generation, task.schema)
    label = answer.get(task.label) if answer and task.label else None
    score = answer.get(task.score) if answer and task.score else None
    return Prediction(
        id=item.id,
        text=generation.text,
        answer=answer,
        label=label if isinstance(label, str) else None,
        score=float(score) if isinstance(score, (int, float)) and not isinstance(score, bool) else None,
        label_probs=label_probs,
        error=error,
        error_kind=error_kind(generation.finish, error) if error else None,
        latency_s=generation.seconds,
        prompt_tokens=generation.prompt_tokens,
        tokens=len(generation.tokens),
        fields=item.fields,
    )
