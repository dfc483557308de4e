"""What a teacher says of given answers: token by token, and of the label as a whole.

The teacher is run once over each row, prompt and answer together; only the positions that predict the answer
are projected to the vocabulary, a tile of rows at a time, so ``[rows, length, vocabulary]`` never exists.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from jaxtyping import Float, Int

from mlx_distill.losses.labels import LabelTokens, label_logprobs
from mlx_distill.losses.output_head import project
from mlx_distill.models.forward import head, hidden_states

_TILE = 512  # positions projected at a time


@dataclass(frozen=True)
class Scored:
    """One row's score: the answer's ``ids`` and ``logprobs``, the top k, and the distribution over the labels
    and the rest, or None.
    """

    ids: Int[np.ndarray, " n"]
    logprobs: Float[np.ndarray, " n"]
    topk_ids: Int[np.ndarray, "n k"]
    topk_logprobs: Float[np.ndarray, "n k"]
    label_logprobs: Float[np.ndarray, " c"] | None


def score(
    model: nn.Module,
    tokens: Sequence[Sequence[int]],
    starts: Sequence[int],
    *,
    top_k: int,
    labels: LabelTokens | None = None,
    label_at: Sequence[int | None] = (),
    batch_size: int = 16,
    multiple: int = 16,
) -> Iterator[Scored]:
    """Score rows in their order.

    Args:
        model: The teacher.
        tokens: Rows of token ids, prompt, answer and stop token.
        starts: Where each row's answer begins; the distribution of token ``j`` is read at position ``j - 1``.
        top_k: Tokens kept of each distribution.
        labels: The label's tokens, or None for no label distribution.
        label_at: For each row the position of the label's first token, or None where it has none.
        batch_size: Rows at a time.
        multiple: Rows are padded to a multiple of this many tokens, so that few shapes occur.
    """
    model.eval()
    for first in range(0, len(tokens), batch_size):
        rows = range(first, min(first + batch_size, len(tokens)))
        length = max(len(tokens[r]) for r in rows)
        length = -(-length // multiple) * multiple
        inputs = np.zeros((len(rows), length), dtype=np.int32)
        for i, r in enumerate(rows):
            inputs[i, : len(tokens[r])] = tokens[r]
        hidden = hidden_states(model, mx.array(inputs))
        where = [(i, j - 1) for i, r in enumerate(rows) for j in range(starts[r], len(tokens[r]))]
        realised = np.array(
            [tokens[r][j] for r in rows for j in range(starts[r], len(tokens[r]))], dtype=np.int32
        )
        top, top_logprobs, logprobs = _read(model, hidden, where, realised, top_k)
        places = [label_at[r] if labels is not None and label_at else None for r in rows]
        label_rows = [i for i, place in enumerate(places) if place is not None]
        found: dict[int, np.ndarray] = {}
        if labels is not None and label_rows:
            at = mx.array([int(places[i] or 0) - 1 for i in label_rows])
            values = label_logprobs(
                project(head(model), hidden[mx.array(label_rows), at]).astype(mx.float32), labels, rest=True
            )
            found = dict(zip(label_rows, np.array(values), strict=True))
        begin = 0
        for i, r in enumerate(rows):
            end = begin + len(tokens[r]) - starts[r]
            yield Scored(
                realised[begin:end],
                logprobs[begin:end],
                top[begin:end],
                top_logprobs[begin:end],
                found.get(i),
            )
            begin = end


def _read(
    model: nn.Module, hidden: mx.array, where: Sequence[tuple[int, int]], realised: np.ndarray, top_k: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Top k ids and log-probabilities, and the realised tokens' own, at the given (row, position) pairs."""
    ids, tops, own = [], [], []
    rows, positions = np.array(where, dtype=np.int32).reshape(-1, 2).T
    for first in range(0, len(where), _TILE):
        part = slice(first, first + _TILE)
        logits = project(head(model), hidden[mx.array(rows[part]), mx.array(positions[part])]).astype(
            mx.float32
        )
        k = min(top_k, logits.shape[-1])
        total = mx.logsumexp(logits, axis=-1, keepdims=True)
        best = mx.argpartition(-logits, kth=k - 1, axis=-1)[:, :k].astype(mx.int32)
        values = mx.take_along_axis(logits, best, axis=-1)
        order = mx.argsort(-values, axis=-1)
        ids.append(mx.take_along_axis(best, order, axis=-1))
        tops.append(mx.take_along_axis(values, order, axis=-1) - total)
        own.append((mx.take_along_axis(logits, mx.array(realised[part])[:, None], axis=-1) - total)[:, 0])
        mx.eval(ids[-1], tops[-1], own[-1])
    return tuple(np.concatenate([np.array(a) for a in parts]) for parts in (ids, tops, own))  # type: ignore[return-value]


def label_position(tokens: Sequence[int], start: int, prefix: Sequence[int]) -> int | None:
    """Where the label's first token stands, or None where the answer does not begin with the tokens of
    ``prefix``.

    A tokenizer that merges the label's first letters with what stands before them has no such place.

    >>> label_position([9, 9, 1, 2, 7, 8], 2, [1, 2])
    4
    """
    end = start + len(prefix)
    return end if list(tokens[start:end]) == list(prefix) and end < len(tokens) else None
