"""One-hot targets for controls that train as the student does, with the same terms and weights: what such a
control lacks is the teacher's probabilities alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
from jaxtyping import Float

from mlx_distill.distill.teacher_cache import TeacherTargets
from mlx_distill.losses.numerics import LOWEST
from mlx_distill.recipe import DistillConfig
from mlx_distill.records import Batch
from mlx_distill.tasks.task import Task


def hard_settings(settings: DistillConfig) -> DistillConfig:
    """The settings of a control with one-hot targets: a token-level loss against a token alone, and the
    likelihood of a certain span, are cross-entropy, so their weights go to the text.

    >>> hard = hard_settings(DistillConfig(label_weight=1.0, text_weight=0.3, token_weight=10.0))
    >>> hard.label_weight, hard.text_weight, hard.token_weight
    (1.0, 10.3, 0.0)
    """
    token_weight = 0.0 if settings.token_loss == "none" else settings.token_weight
    text_weight = settings.text_weight + token_weight + settings.span_weight
    return replace(settings, text_weight=text_weight, token_weight=0.0, span_weight=0.0)


def hard_labels(logprobs: Float[mx.array, "r c"]) -> Float[mx.array, "r c"]:
    """The most probable label of each row with probability 1; the last column, everything else, is none.

    >>> hard_labels(mx.log(mx.array([[0.3, 0.4, 0.3]])))[0, 1].item()
    0.0
    """
    columns = mx.arange(logprobs.shape[1])[None]
    if not logprobs.shape[0]:
        return logprobs
    return mx.where(columns == mx.argmax(logprobs[:, :-1], axis=1)[:, None], 0.0, LOWEST)


def with_hard_labels(collate: Callable[..., Batch]) -> Callable[..., Batch]:
    """A collate function whose batches have the teacher's most probable label in place of its distribution.

    Args:
        collate: Makes batches with ``label_logprobs`` in ``extra``.
    """

    def collate_hard(rows: Sequence[Any], chosen: Sequence[Any], multiple: int) -> Batch:
        batch = collate(rows, chosen, multiple)
        return replace(
            batch, extra={**batch.extra, "label_logprobs": hard_labels(batch.extra["label_logprobs"])}
        )

    return collate_hard


def own_answer_targets(row: Mapping[str, Any], tokens: Sequence[int], task: Task) -> TeacherTargets:
    """A row's own answer as targets: its tokens, each with probability 1, and its label one-hot.

    Args:
        row: A prepared row.
        tokens: The student's tokens of the answer, the stop token last.
        task: Its label and classes.
    """
    ids = np.asarray(tokens, dtype=np.int32)
    label = None
    if task.label is not None:
        label = np.full(len(task.labels) + 1, LOWEST, dtype=np.float32)
        label[task.labels.index(row["answer"][task.label])] = 0.0
    certain = np.zeros(len(ids), dtype=np.float32)
    return TeacherTargets(
        id=row["id"],
        text=row["messages"][-1]["content"],
        label_logprobs=label,
        ids=ids,
        logprobs=certain,
        topk_ids=ids[:, None],
        topk_logprobs=certain[:, None],
    )
