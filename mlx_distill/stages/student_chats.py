"""The chats that a run's student answers: the prepared rows, or what it learned to think and to answer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from mlx_distill.stages.context import Context, count_rows, read_rows, rows_file

if TYPE_CHECKING:
    from mlx_distill.distill.joined_rows import JoinedRow

_SPLITS = ("train", "valid")


def student_chats(context: Context, split: str) -> Iterator[dict[str, Any]]:
    """The rows of a split with the answers that the student is quantized for, one at a time.

    A student that thinks writes its thinking before every answer, so its rows are those of the targets, with
    the teacher's thinking and answer, as it was trained on them; rows without targets are left out. Another
    student's are the prepared ones, with the data's own answers.

    Args:
        context: Of the run.
        split: ``train`` or ``valid``.

    Raises:
        FileError, DataError: a student that thinks, and targets that are missing, damaged or of other rows.
    """
    from mlx_distill.distill.align import with_answer

    if not context.recipe.student_thinking:
        yield from read_rows(context, split)
        return
    for own, row, targets in _joined(context):
        if own == split:
            yield {**row, "messages": with_answer(row, targets)}


def count_chats(context: Context, split: str) -> int:
    """The number of :func:`student_chats`."""
    if not context.recipe.student_thinking:
        return count_rows(context, split)
    return sum(own == split for own, _, _ in _joined(context))


def _joined(context: Context) -> Iterator[JoinedRow]:
    from mlx_distill.distill.joined_rows import join_rows
    from mlx_distill.distill.teacher_cache import TargetReader

    reader = TargetReader(context.run / "targets")
    return join_rows({split: rows_file(context, split) for split in _SPLITS}, reader)
