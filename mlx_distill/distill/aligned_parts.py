"""The parts of what a teacher wrote that two tokenizers have in common: its thinking, and its answer."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Int

from mlx_distill.data.chat import TokenizedRow
from mlx_distill.distill.teacher_cache import TeacherTargets
from mlx_distill.losses.byte_alignment import align_tokens, common_cut


def aligned_parts(
    chat: TokenizedRow, targets: TeacherTargets, student_tokenizer: Any, teacher_tokenizer: Any
) -> tuple[Int[np.ndarray, "m 4"], tuple[int, ...]]:
    """The spans of thinking and answer, from where both begin; and those among them at whose beginning the
    two models' distributions are over different texts.

    What marks the end of thinking is a matter of each chat template, so its tokens are in no span, and
    neither are those before it that hold white space of the template's too.

    Args:
        chat: The student's.
        targets: The teacher's.
        student_tokenizer: As in :func:`~mlx_distill.distill.align.aligner`.
        teacher_tokenizer: The same.

    Raises:
        DataError: texts that differ.
    """
    answer, end = chat.spans[-1]
    start, not_starts, parts = chat.start, [], []
    if targets.answer_start and chat.thinking is not None:
        ours = chat.tokens[slice(*chat.thinking)]
        theirs = targets.ids[: targets.thinking_tokens]
        length = len(targets.thinking.encode())
        cut = common_cut(ours, theirs, student_tokenizer, teacher_tokenizer, length)
        spans, same_start = align_tokens(
            ours[: cut[0]], theirs[: cut[1]], student_tokenizer, teacher_tokenizer
        )
        parts.append(spans)
        not_starts += [] if same_start else [0]
    spans, same_start = align_tokens(
        chat.tokens[answer:end], targets.ids[targets.answer_start : -1], student_tokenizer, teacher_tokenizer
    )
    not_starts += [] if same_start else [sum(map(len, parts))]
    shift = answer - start, targets.answer_start
    parts.append(spans + np.array([shift[0], shift[0], shift[1], shift[1]], dtype=np.int32))
    return np.concatenate(parts), tuple(not_starts)
