"""Rows to predictions: prompt, generation, strict parsing, and the distribution over the labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mlx_distill.data.chat import prompt_ids, stop_ids
from mlx_distill.data.rows import Item, to_item
from mlx_distill.errors import DataError
from mlx_distill.infer.engine import Generation, LogitsHook, generate
from mlx_distill.infer.label_scoring import LabelPrefix, label_prefix_tokens, label_probabilities
from mlx_distill.losses.labels import label_logprobs
from mlx_distill.records import Message, Prediction
from mlx_distill.tasks.answer import parse_answer
from mlx_distill.tasks.task import Task, load_task

Row = Mapping[str, Any]


def predict(
    model: Any,
    tokenizer: Any,
    task: Task,
    rows: Sequence[Row | str],
    *,
    batch_size: int = 16,
    max_tokens: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    label_probs: bool = True,
    on_done: Callable[[int], None] | None = None,
) -> list[Prediction]:
    """Generate an answer for each row. Answers are not repaired: one that does not fit the schema is an error
    of the model.

    Args:
        model: An mlx-lm model.
        tokenizer: Its tokenizer, with a chat template.
        task: Prompt, schema, label and score.
        rows: Prepared rows (whose last assistant turn is not shown to the model), rows with the fields that
            the task's prompt names, or plain texts where it names one.
        batch_size: Rows decoded together.
        max_tokens: Longest answer; the task's ``max_answer_tokens`` where None.
        temperature: 0 for greedy decoding.
        seed: Of sampled answers.
        label_probs: Return the distribution over the labels too. It is read from the logits of the generation
            where the answer begins as the schema has it, and costs one more pass over the prompt where it
            does not.
        on_done: Called with the number of rows answered so far.

    Returns:
        One prediction a row, in the rows' order.

    Raises:
        DataError: a row that lacks a field of the prompt, or is neither a mapping nor a text; the message has
            its number.
    """
    items = [to_item(row, task, number) for number, row in enumerate(rows, 1)]
    # prompt_ids leaves out a last turn of the assistant: the empty one here, never one of the prompt.
    prompts = [prompt_ids(tokenizer, [*item.messages, Message("assistant", "")]) for item in items]
    prefix = label_prefix_tokens(tokenizer, task) if label_probs else None
    generations = generate(
        model,
        tokenizer,
        prompts,
        max_tokens=max_tokens or task.max_answer_tokens,
        batch_size=batch_size,
        stop=set(stop_ids(tokenizer)),
        temperature=temperature,
        seed=seed,
        on_done=on_done,
        logits_hook=label_hook(prefix) if prefix else None,
    )
    distributions: Sequence[dict[str, float] | None] = [None] * len(items)
    if prefix is not None:
        distributions = label_distributions(model, prompts, generations, prefix, batch_size=batch_size)
    return [
        to_prediction(item, generation, distribution, task)
        for item, generation, distribution in zip(items, generations, distributions, strict=True)
    ]


def label_hook(prefix: LabelPrefix) -> LogitsHook:
    """A hook that reads the labels' log-probabilities where an answer that begins with ``prefix`` has its
    label.
    """
    return LogitsHook(len(prefix[0]), partial(label_logprobs, tokens=prefix[1]))


def label_distributions(
    model: Any,
    prompts: Sequence[Sequence[int]],
    generations: Sequence[Generation],
    prefix: LabelPrefix,
    *,
    batch_size: int = 16,
) -> list[dict[str, float]]:
    """Each row's distribution over the labels: from :func:`label_hook` where the answer begins with the
    prefix, else from one more forward pass over prompt and prefix.

    Args:
        model: An mlx-lm model.
        prompts: Token ids of the prompts.
        generations: Their answers, generated with the hook.
        prefix: From :func:`~mlx_distill.infer.label_scoring.label_prefix_tokens`.
        batch_size: Prompts a forward pass.
    """
    ids, labels = prefix
    table = np.zeros((len(prompts), len(labels.labels)), dtype=np.float32)
    others = []
    for i, generation in enumerate(generations):
        if generation.hook_output is not None and list(generation.tokens[: len(ids)]) == ids:
            table[i] = np.exp(generation.hook_output)
        else:
            others.append(i)
    if others:
        table[others] = label_probabilities(
            model, [[*prompts[i], *ids] for i in others], labels, batch_size=batch_size
        )
    return [dict(zip(labels.labels, map(float, line), strict=True)) for line in table]


def to_prediction(
    item: Item, generation: Generation, label_probs: Mapping[str, float] | None, task: Task
) -> Prediction:
    """The prediction of an item: its generated answer, parsed strictly under the task's schema."""
    answer, error = parse_answer(generation.text, task.schema)
    if error and generation.finish == "length":
        error = f"cut after {len(generation.tokens)} tokens: {error}"
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
        latency_s=generation.seconds,
        prompt_tokens=generation.prompt_tokens,
        tokens=len(generation.tokens),
        fields=item.fields,
    )


def analyze(
    model: str | Path | tuple[Any, Any],
    task: str | Path | Task,
    items: Sequence[Mapping[str, Any] | str],
    *,
    batch_size: int = 16,
    max_tokens: int | None = None,
    label_probs: bool = True,
) -> list[Prediction]:
    """Generate the model's answer for each item, greedily.

    Args:
        model: A folder or Hub id for ``md.load``, or what that returned: ``(model, tokenizer)``.
        task: A packaged task's name, the path of a YAML file, or a :class:`~mlx_distill.tasks.task.Task`.
        items: Mappings with the fields that the task's prompt names; a plain text where it names one field.
        batch_size: Items decoded together.
        max_tokens: Longest answer; the task's own where None.
        label_probs: Return the model's distribution over the labels too.

    Returns:
        One :class:`~mlx_distill.records.Prediction` an item, in the items' order; ``answer`` is None and
        ``error`` says why where the text does not fit the task's schema.

    Raises:
        DataError: an item that lacks a field.
        ConfigError: no such task.
        ModelError: no such model.
    """

    if isinstance(items, (str, Mapping)):
        raise DataError("items: one item alone", fix="give a list: [item]")
    task = task if isinstance(task, Task) else load_task(str(task))
    for number, item in enumerate(items, 1):  # before a model is loaded
        to_item(item, task, number)
    if not isinstance(model, tuple):
        from mlx_distill.models.load import load

        model = load(model)
    return predict(*model, task, items, batch_size=batch_size, max_tokens=max_tokens, label_probs=label_probs)
