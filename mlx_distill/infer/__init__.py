"""Models answer: batched generation, label scoring, predictions on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_distill.records import Prediction
from mlx_distill.tasks.task import Task, load_task


def analyze(
    model: str | Path | tuple[Any, Any],
    task: str | Path | Task,
    items: Sequence[Mapping[str, Any] | str],
    *,
    batch_size: int = 16,
    max_tokens: int | None = None,
    label_probs: bool = True,
) -> list[Prediction]:
    """Let a model answer a task for each item, greedily.

    Args:
        model: A folder or Hub id for ``md.load``, or what that returned: ``(model, tokenizer)``.
        task: A packaged task's name, the path of a YAML file, or a :class:`~mlx_distill.tasks.task.Task`.
        items: Mappings with the fields that the task's prompt names; a plain text where it names one field.
        batch_size: Items decoded together.
        max_tokens: Longest answer; the task's own where None.
        label_probs: Give the model's distribution over the labels too.

    Returns:
        One :class:`~mlx_distill.records.Prediction` an item, in the items' order; ``answer`` is None and ``error`` says why where the
        text does not fit the task's schema.

    Raises:
        DataError: an item that lacks a field.
        ConfigError: no such task.
        ModelError: no such model.
    """
    from mlx_distill.errors import DataError
    from mlx_distill.infer.analyze import predict, prepare_item

    if isinstance(items, (str, Mapping)):
        raise DataError("items: one item alone", fix="give a list: [item]")
    task = task if isinstance(task, Task) else load_task(str(task))
    for number, item in enumerate(items, 1):  # before a model is loaded
        prepare_item(item, task, number)
    if not isinstance(model, tuple):
        from mlx_distill.models.load import load

        model = load(model)
    return predict(*model, task, items, batch_size=batch_size, max_tokens=max_tokens, label_probs=label_probs)
