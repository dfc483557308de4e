"""The student's side of the teacher's targets: each row rendered for the student, and the two tokenizations
aligned by bytes.

Nothing of a row depends on the batch it comes in, so the alignment is done once, before training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np
from jaxtyping import Float, Int

from mlx_distill.data.chat import TokenizedRow
from mlx_distill.data.packing import as_sequences, build_batch
from mlx_distill.records import Batch


@dataclass(frozen=True)
class AlignedRow:
    """One row for the student, with what the teacher says of it.

    ``tokens [l]`` the student's chat; ``start`` where its answer begins; ``label_at`` the position of the
    label's first token or None, ``label_logprobs [c]``; ``starts [n]`` positions of student tokens that begin
    at a common byte boundary, with the teacher's ``topk_ids`` and ``topk_logprobs`` ``[n, k]`` there;
    ``spans [m, 2]`` student tokens from and to of each common span, with ``span_logprobs [m]`` the teacher's
    log-probability of its bytes.
    """

    tokens: Int[np.ndarray, " l"]
    start: int
    label_at: int | None
    label_logprobs: Float[np.ndarray, " c"] | None
    starts: Int[np.ndarray, " n"]
    topk_ids: Int[np.ndarray, "n k"]
    topk_logprobs: Float[np.ndarray, "n k"]
    spans: Int[np.ndarray, "m 2"]
    span_logprobs: Float[np.ndarray, " m"]


def align_row(
    tokens: np.ndarray,
    start: int,
    spans: np.ndarray,
    *,
    teacher_logprobs: np.ndarray,
    topk_ids: np.ndarray,
    topk_logprobs: np.ndarray,
    label_at: int | None,
    label_logprobs: Sequence[float] | None,
) -> AlignedRow:
    """Join a student's row and a teacher's targets.

    Args:
        tokens: The student's chat, its stop token last.
        start: Where the answer begins.
        spans: ``align_bytes`` of the two answers without their stop tokens: ``[m, 4]``, counted from the
            answers' beginnings.
        teacher_logprobs, topk_ids, topk_logprobs: The teacher's targets, its stop token last.
        label_at, label_logprobs: Position of the label in ``tokens``, and the teacher's distribution over the
            labels.
    """
    answer, theirs = len(tokens) - start - 1, len(teacher_logprobs) - 1
    stop = np.array(
        [[answer, answer + 1, theirs, theirs + 1]]
    )  # both end their answer here: a common event too
    spans = np.concatenate([np.asarray(spans).reshape(-1, 4), stop])
    sums = np.concatenate([[0.0], np.cumsum(teacher_logprobs, dtype=np.float64)])
    return AlignedRow(
        tokens=np.asarray(tokens, dtype=np.int32),
        start=start,
        label_at=label_at if label_logprobs is not None else None,
        label_logprobs=np.array(label_logprobs, dtype=np.float32) if label_logprobs is not None else None,
        starts=(spans[:, 0] + start).astype(np.int32),
        topk_ids=topk_ids[spans[:, 2]],
        topk_logprobs=topk_logprobs[spans[:, 2]].astype(np.float32),
        spans=(spans[:, :2] + start).astype(np.int32),
        span_logprobs=(sums[spans[:, 3]] - sums[spans[:, 2]]).astype(np.float32),
    )


def aligned_row_arrays(pair: AlignedRow) -> dict[str, np.ndarray]:
    """A pair as named arrays, each with one dimension that differs from pair to pair; :func:`aligned_row_of` is the
    inverse.
    """
    return {
        "tokens": pair.tokens,
        "start": np.array([pair.start], dtype=np.int32),
        "label_at": np.array([] if pair.label_at is None else [pair.label_at], dtype=np.int32),
        "label_logprobs": np.zeros(0, dtype=np.float32)
        if pair.label_logprobs is None
        else pair.label_logprobs,
        **{
            name: getattr(pair, name)
            for name in ("starts", "topk_ids", "topk_logprobs", "spans", "span_logprobs")
        },
    }


def aligned_row_of(
    *, start: np.ndarray, label_at: np.ndarray, label_logprobs: np.ndarray, **arrays: np.ndarray
) -> AlignedRow:
    """The pair of some arrays of :func:`aligned_row_arrays`."""
    place = int(label_at[0]) if len(label_at) else None
    return AlignedRow(
        start=int(start[0]),
        label_at=place,
        label_logprobs=label_logprobs if len(label_logprobs) else None,
        **arrays,
    )


def collate_aligned_rows(
    pairs: Sequence[AlignedRow],
    rows: Sequence[int | Sequence[int]],
    pad: int,
    classes: int,
    multiple: int = 16,
) -> Batch:
    """One micro-batch of pairs, right-padded, rows in a tuple sharing a line; token ``j`` of a row is
    predicted at its input ``j - 1``.

    ``extra``: ``positions [a]`` of the trained labels in the flattened ``[b * l]`` inputs, row by row; and,
    as indices into those ``a``: ``label_index [r]`` with ``label_logprobs [r, c]``; ``start_index [n]`` with
    ``topk_ids`` and ``topk_logprobs`` ``[n, k]``; ``spans [m, 2]`` (from, to) with ``span_logprobs [m]``.
    """
    lines = as_sequences(rows)
    numbers = [row for line in lines for row in line]
    chosen = [pairs[row] for row in numbers]
    batch = build_batch([[_piece(pairs[row]) for row in line] for line in lines], pad, multiple, numbers)
    # Where each row's answer begins among the trained positions, as an offset to its token numbers.
    begins = np.cumsum([0, *(len(p.tokens) - p.start for p in chosen)])[:-1] - np.array(
        [p.start for p in chosen]
    )
    judged = [
        (begin, p)
        for begin, p in zip(begins, chosen, strict=True)
        if p.label_at is not None and p.label_logprobs is not None
    ]
    extra = {
        "positions": np.flatnonzero(np.array(batch.mask)).astype(np.int32),
        "label_index": np.array([begin + (p.label_at or 0) for begin, p in judged], dtype=np.int32),
        "label_logprobs": np.array([p.label_logprobs for _, p in judged], dtype=np.float32).reshape(
            len(judged), classes
        ),
        "start_index": np.concatenate(
            [p.starts + begin for begin, p in zip(begins, chosen, strict=True)]
        ).astype(np.int32),
        "topk_ids": np.concatenate([p.topk_ids for p in chosen]),
        "topk_logprobs": np.concatenate([p.topk_logprobs for p in chosen]),
        "spans": np.concatenate([p.spans + begin for begin, p in zip(begins, chosen, strict=True)]).astype(
            np.int32
        ),
        "span_logprobs": np.concatenate([p.span_logprobs for p in chosen]),
    }
    return replace(batch, extra={name: mx.array(value) for name, value in extra.items()})


def _piece(pair: AlignedRow) -> TokenizedRow:
    return TokenizedRow(pair.tokens, np.arange(1, len(pair.tokens)) >= pair.start)
