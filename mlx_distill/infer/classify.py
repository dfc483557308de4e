"""Labels of items without generated answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mlx_distill.infer.analyze import iter_analysis
from mlx_distill.infer.label_scorer import LabelOptions
from mlx_distill.progress import Progress
from mlx_distill.records import Classification
from mlx_distill.tasks.task import Task


def classify(
    model: str | Path | tuple[Any, Any],
    task: str | Path | Task | None,
    items: Sequence[Mapping[str, Any] | str],
    *,
    normalize: str = "none",
    shuffle_options: int = 1,
    seed: int = 0,
    temperature: float | None = None,
    batch_size: int = 16,
    max_prompt_tokens: int | None = None,
    progress: Progress | None = None,
) -> list[Classification]:
    """The label of each item and the probabilities of all labels, without generating an answer.

    Each prompt is read once, up to where an answer has its label; what all prompts begin with, such as the
    system prompt, is read once for all.

    Args:
        model: A folder or Hub id for ``md.load``; the folder of a run, which means its newest usable model;
            or what ``md.load`` returned: ``(model, tokenizer)``.
        task: A packaged task's name, the path of a YAML file, a :class:`~mlx_distill.tasks.task.Task`, or
            None for the task that the model was trained on. Its label is the answer's first property.
        items: Rows of any format that ``prepare`` reads, with or without an answer; a plain text where the
            task's prompt names one field.
        normalize: What is compared: ``none``, the probability of the label; ``string``, that of all its
            tokens; ``tokens`` or ``bytes``, the mean log-probability of these a token or a byte. See
            :class:`~mlx_distill.infer.label_scorer.LabelScorer`.
        shuffle_options: In how many orders the prompt lists the labels, over which scores are averaged. Above
            1 the task's prompt has ``{label:options}``, with the name of its label, in place of the list.
        seed: Of the orders.
        temperature: By which scores are divided before the softmax; where None the one that was fitted to
            validation rows, if the model's folder has one for these scores, else 1.
        batch_size: Prompts a forward pass.
        max_prompt_tokens: Longer prompts are not read; the model's own length where None.
        progress: Where progress is shown; on standard error by default.

    Returns:
        One :class:`~mlx_distill.records.Classification` an item, in the items' order, with an ``error``
        instead of a label where an item cannot be asked.

    Raises:
        ConfigError: the task has no label, or it is not the answer's first property; an option that does not
            suit the task; no such task.
        DataError: none of the items can be asked.
        ModelError: no such model, or its tokenizer cannot write the labels.
    """
    options = LabelOptions(normalize, shuffle_options, seed, temperature)
    return list(
        iter_analysis(
            model,
            task,
            items,
            labels_only=True,
            label_options=asdict(options),
            batch_size=batch_size,
            max_prompt_tokens=max_prompt_tokens,
            progress=progress,
        )
    )
