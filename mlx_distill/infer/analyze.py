"""Rows to predictions: prompt, generation, strict parsing, and the distribution over the labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_distill.data.chat import prompt_ids, stop_ids
from mlx_distill.data.rows import Item, to_item
from mlx_distill.errors import ConfigError, DataError, ModelError
from mlx_distill.infer.engine import Generation, LogitsHook, generate
from mlx_distill.infer.kv_cache import ColumnCache, ColumnLayout
from mlx_distill.infer.label_scoring import (
    LabelPrefix,
    continued_label_logprobs,
    label_prefix_tokens,
    label_probabilities,
)
from mlx_distill.models.trained_on import (
    TrainedOn,
    is_run,
    newest_model,
    prompt_notes,
    read_trained_on,
)
from mlx_distill.progress import Progress, make_progress
from mlx_distill.records import Message, Prediction
from mlx_distill.tasks.answer import parse_answer
from mlx_distill.tasks.task import Task, load_task, task_names

Row = Mapping[str, Any]

_BATCHES_IN_MEMORY = 16  # whose answers iter_analysis generates before it yields them


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
    max_prompt_tokens: int | None = None,
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
        max_prompt_tokens: Longer prompts are not read: their prediction is an error that says so; the
            model's own length where None.
        on_done: Called with the number of rows answered so far.

    Returns:
        One prediction a row, in the rows' order.

    Raises:
        DataError: a row that lacks a field of the prompt, or is neither a mapping nor a text; the message has
            its number.
    """
    items = [to_item(row, task, number) for number, row in enumerate(rows, 1)]
    # prompt_ids leaves out a last turn of the assistant: the empty one here, never one of the prompt.
    all_prompts = [prompt_ids(tokenizer, [*item.messages, Message("assistant", "")]) for item in items]
    limit = max_prompt_tokens or context_length(model)
    fitting = [i for i, prompt in enumerate(all_prompts) if limit is None or len(prompt) <= limit]
    prompts = [all_prompts[i] for i in fitting]
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
        logits_hook=label_hook(model, prefix) if prefix else None,
    )
    distributions: Sequence[dict[str, float] | None] = [None] * len(prompts)
    if prefix is not None:
        distributions = label_distributions(model, prompts, generations, prefix, batch_size=batch_size)
    answered = dict(zip(fitting, zip(generations, distributions, strict=True), strict=True))
    return [
        to_prediction(item, *answered[i], task) if i in answered else _unread(item, len(prompt), limit)
        for i, (item, prompt) in enumerate(zip(items, all_prompts, strict=True))
    ]


def context_length(model: Any) -> int | None:
    """The number of tokens that a model was made for, or None where its config does not say."""
    length = getattr(getattr(model, "args", None), "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None


def _unread(item: Item, length: int, limit: int | None) -> Prediction:
    """The prediction of an item whose prompt is longer than the model can read."""
    error = f"the prompt has {length:,} tokens, and at most {limit:,} are read"
    return Prediction(item.id, "", None, None, None, error=error, prompt_tokens=length, fields=item.fields)


def label_hook(model: Any, prefix: LabelPrefix) -> LogitsHook:
    """A hook that reads the labels' log-probabilities where an answer that begins with ``prefix`` has its
    label. The prompt is not read again: labels that share tokens are continued from the generation's cache.
    """

    def read(logits: mx.array, layout: ColumnLayout, caches: Sequence[ColumnCache]) -> mx.array:
        return continued_label_logprobs(model, prefix[1], logits, layout, caches)

    return LogitsHook(len(prefix[0]), read)


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


def read_answer(
    generation: Generation, schema: Mapping[str, Any]
) -> tuple[dict[str, Any] | None, str | None]:
    """A generated answer, parsed strictly: the answer and None, or None and the reason in one line."""
    answer, error = parse_answer(generation.text, schema)
    if error and generation.finish == "length":
        error = f"cut after {len(generation.tokens)} tokens: {error}"
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
        latency_s=generation.seconds,
        prompt_tokens=generation.prompt_tokens,
        tokens=len(generation.tokens),
        fields=item.fields,
    )


def analyze(
    model: str | Path | tuple[Any, Any],
    task: str | Path | Task | None,
    items: Sequence[Mapping[str, Any] | str],
    *,
    batch_size: int = 16,
    max_tokens: int | None = None,
    label_probs: bool = True,
    max_prompt_tokens: int | None = None,
    progress: Progress | None = None,
) -> list[Prediction]:
    """Generate the model's answer for each item, greedily.

    Args:
        model: A folder or Hub id for ``md.load``; the folder of a run, which means its newest usable model;
            or what ``md.load`` returned: ``(model, tokenizer)``.
        task: A packaged task's name, the path of a YAML file, a :class:`~mlx_distill.tasks.task.Task`, or
            None for the task that the model was trained on.
        items: Rows of any format that ``prepare`` reads, with or without an answer; a plain text where the
            task's prompt names one field.
        batch_size: Items decoded together.
        max_tokens: Longest answer; the task's own where None.
        label_probs: Return the model's distribution over the labels too.
        max_prompt_tokens: Longer prompts are not read; the model's own length where None.
        progress: Where progress is shown; on standard error by default. It is told too where task or prompt
            are others than those that the model was trained on.

    Returns:
        One :class:`~mlx_distill.records.Prediction` an item, in the items' order; ``answer`` is None and
        ``error`` says why where the text does not fit the task's schema, or where the prompt is longer than
        what is read.

    Raises:
        DataError: an item that lacks a field, or no items.
        ConfigError: no such task, or none given and the model does not say what it was trained on.
        ModelError: no such model.
    """
    if isinstance(items, (str, Mapping)):
        raise DataError("items: one item alone", fix="give a list: [item]")
    return list(
        iter_analysis(
            model,
            task,
            items,
            batch_size=batch_size,
            max_tokens=max_tokens,
            label_probs=label_probs,
            max_prompt_tokens=max_prompt_tokens,
            progress=progress,
        )
    )


def iter_analysis(
    model: str | Path | tuple[Any, Any],
    task: str | Path | Task | None,
    items: Sequence[Mapping[str, Any] | str],
    *,
    batch_size: int = 16,
    max_tokens: int | None = None,
    label_probs: bool = True,
    max_prompt_tokens: int | None = None,
    progress: Progress | None = None,
) -> Iterator[Prediction]:
    """Yield the predictions of :func:`analyze` in the items' order, some batches at a time.

    The arguments are those of :func:`analyze`. The items are checked before the model is loaded.
    """
    progress = progress or make_progress()
    folder = None if isinstance(model, tuple) else _model_folder(model, progress)
    trained_on = read_trained_on(folder) if folder is not None else None
    task = _task_of(task, trained_on, folder)
    checked = [to_item(item, task, number) for number, item in enumerate(items, 1)]
    systems = ["".join(m.content for m in item.messages[:1] if m.role == "system") for item in checked]
    for text in prompt_notes(trained_on, task, systems, len(checked)):
        progress.note(f"note: {text}")
    loaded, tokenizer = model if isinstance(model, tuple) else _load(folder or model)
    label_probs = label_probs and label_prefix_tokens(tokenizer, task, progress.note) is not None
    chunk = batch_size * _BATCHES_IN_MEMORY
    with progress.task("analyze", total=len(items), unit="item") as bar:
        for start in range(0, len(items), chunk):
            yield from predict(
                loaded,
                tokenizer,
                task,
                items[start : start + chunk],
                batch_size=batch_size,
                max_tokens=max_tokens,
                label_probs=label_probs,
                max_prompt_tokens=max_prompt_tokens,
                on_done=lambda done, start=start: bar.update(start + done),  # type: ignore[misc]
            )
        bar.update(len(items))


def _load(folder: str | Path) -> tuple[Any, Any]:
    from mlx_distill.models.load import load

    return load(folder)


def _model_folder(model: str | Path, progress: Progress) -> str | Path:
    """The folder or the Hub id of the model to ask; of a run its newest usable model."""
    return newest_model(model, progress.note) if is_run(model) else model


def _task_of(task: str | Path | Task | None, trained_on: TrainedOn | None, folder: str | Path | None) -> Task:
    if isinstance(task, Task):
        return task
    if task is not None:
        return load_task(str(task))
    if folder is not None and not Path(folder).expanduser().is_dir():
        raise ModelError(
            f"{folder}: no such folder", fix="check the path; for a Hub model name the task: --task TASK"
        )
    if trained_on is None:
        where = "a loaded model" if folder is None else str(folder)
        raise ConfigError(
            f"{where}: no record of the task that the model was trained on",
            fix=f"name it: --task TASK; packaged: {', '.join(task_names())}; or a YAML file",
        )
    return trained_on.task
