"""The distribution over a task's labels from one forward pass, and where the label starts in an answer's
tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from jaxtyping import Float

from mlx_distill.data.chat import answer_ids
from mlx_distill.errors import ConfigError, ModelError
from mlx_distill.losses.labels import LabelTokens, label_logprobs, label_tokens
from mlx_distill.models.forward import embedding_rows, hidden_states, logits
from mlx_distill.models.token_ids import check_token_ids
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
        labels: From :func:`label_prefix_tokens`, or ``label_tokens`` with this model's tokenizer.
        batch_size: Prompts a forward pass.

    Returns:
        Probabilities that sum to 1 in each row, in the order of ``labels.labels``.

    Raises:
        ModelError: a token of a prompt is beyond the model's embedding.
    """
    check_token_ids([max(prompt) for prompt in prompts], embedding_rows(model))
    out = np.zeros((len(prompts), len(labels.labels)), dtype=np.float32)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        lengths = np.array([len(prompts[i]) for i in rows])
        tokens = np.zeros((len(rows), int(lengths.max())), dtype=np.int32)
        for line, i in zip(tokens, rows, strict=True):
            line[: len(prompts[i])] = prompts[i]
        # Padding follows the prompts, where the causal mask hides it; the head sees one position a row.
        hidden = hidden_states(model, mx.array(tokens))[mx.arange(len(rows)), mx.array(lengths - 1)]
        out[rows] = np.array(mx.exp(label_logprobs(logits(model, hidden), labels)))
    return out


def label_start(tokens: Sequence[int], start: int, prefix: Sequence[int]) -> int | None:
    """The position of the first token of the label's value, or None where the answer does not begin with the
    tokens of ``prefix``.

    None too where the tokenizer merges the label's first letters with what precedes them.

    Args:
        tokens: A chat's token ids.
        start: Where the answer begins.
        prefix: The tokens of :func:`~mlx_distill.tasks.answer.label_prefix`.

    >>> label_start([9, 9, 1, 2, 7, 8], 2, [1, 2])
    4
    """
    end = start + len(prefix)
    return end if list(tokens[start:end]) == list(prefix) and end < len(tokens) else None


LabelPrefix = tuple[list[int], LabelTokens]


def label_prefix_tokens(tokenizer: Any, task: Task) -> LabelPrefix | None:
    """The tokens that every answer begins with up to the label's value, and the tokens that decide for each
    label there.

    None for a task without a label, and where one pass cannot tell: the label is not the answer's first
    property, two labels begin with the same byte, or the tokenizer merges the beginning of a label with what
    precedes it.
    """
    properties = list(task.schema["properties"])
    if task.label is None or properties[0] != task.label:
        return None
    prefix = label_prefix(task.schema, task.label)
    ids = answer_ids(tokenizer, prefix)
    if any(label_start(answer_ids(tokenizer, f'{prefix}{label}"'), 0, ids) is None for label in task.labels):
        return None
    try:
        return ids, label_tokens(tokenizer, task.labels)
    except (ConfigError, ModelError):
        return None
