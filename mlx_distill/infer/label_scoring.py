"""What a model thinks of each label before it writes one: a distribution from one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from jaxtyping import Float

from mlx_distill.data.chat import answer_ids
from mlx_distill.errors import ConfigError, ModelError
from mlx_distill.losses.labels import LabelTokens, label_logprobs, label_tokens
from mlx_distill.losses.output_head import project
from mlx_distill.models.forward import head, hidden_states
from mlx_distill.tasks.answer import label_prefix
from mlx_distill.tasks.task import Task


def label_probabilities(
    model: Any, prompts: Sequence[Sequence[int]], labels: LabelTokens, *, batch_size: int = 16
) -> Float[np.ndarray, "n c"]:
    """The distribution over the labels behind each prompt.

    ``p(L) = Σ_{t in L} exp z_t / Σ_{all labels' t} exp z_t`` at the last token, as
    :func:`mlx_distill.losses.labels.label_logprobs` has it.

    Args:
        model: An mlx-lm model with trunk ``model.model``.
        prompts: Token ids that end where the label's value starts.
        labels: From :func:`label_place`, or ``label_tokens`` with this model's tokenizer.
        batch_size: Prompts a forward pass.

    Returns:
        Probabilities that sum to 1 in each row, in the order of ``labels.labels``.
    """
    out = np.zeros((len(prompts), len(labels.labels)), dtype=np.float32)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        lengths = np.array([len(prompts[i]) for i in rows])
        tokens = np.zeros((len(rows), int(lengths.max())), dtype=np.int32)
        for line, i in zip(tokens, rows, strict=True):
            line[: len(prompts[i])] = prompts[i]
        # Padding stands behind the prompts, where the causal mask hides it; the head sees one position a row.
        hidden = hidden_states(model, mx.array(tokens))[mx.arange(len(rows)), mx.array(lengths - 1)]
        out[rows] = np.array(mx.exp(label_logprobs(project(head(model), hidden).astype(mx.float32), labels)))
    return out


LabelPlace = tuple[list[int], LabelTokens]


def label_place(tokenizer: Any, task: Task) -> LabelPlace | None:
    """The tokens that every answer begins with up to the label's value, and the tokens that decide there.

    None where one pass cannot tell: the label is not the answer's first property, two labels begin alike, or
    the tokenizer merges the beginning of a label with what stands before it.
    """
    properties = list(task.schema["properties"])
    if properties[0] != task.label:
        return None
    prefix = label_prefix(task.schema, task.label)
    ids = answer_ids(tokenizer, prefix)
    if any(answer_ids(tokenizer, prefix + label + '"')[: len(ids)] != ids for label in task.labels):
        return None
    try:
        return ids, label_tokens(tokenizer, task.labels)
    except (ConfigError, ModelError):
        return None
