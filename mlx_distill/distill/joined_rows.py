"""The teacher's targets with the prepared rows that they belong to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mlx_distill.distill.teacher_cache import TargetReader, TeacherTargets
from mlx_distill.errors import DataError
from mlx_distill.storage import read_jsonl

# split, prepared row, the teacher's targets for it
JoinedRow = tuple[str, Mapping[str, Any], TeacherTargets]


def join_rows(rows_files: Mapping[str, Path], reader: TargetReader) -> Iterator[JoinedRow]:
    """Each target with its prepared row, which may have several of them; both are in the same order, so
    neither is held in memory.

    Args:
        rows_files: The prepared rows of each split, in the order of the targets.
        reader: The targets.

    Raises:
        DataError: targets without a row, or in another order than the rows.
    """
    rows = ((split, row) for split, path in rows_files.items() for _, row in read_jsonl(path))
    match: tuple[str, Mapping[str, Any]] | None = None
    for targets in reader:
        if match is None or match[1]["id"] != targets.id:  # a row may have several targets
            # Rows without targets are skipped.
            match = next(((split, row) for split, row in rows if row["id"] == targets.id), None)
        if match is None:
            folder = next(iter(rows_files.values())).parent
            raise DataError(
                f"{reader.folder}: row {targets.id!r} is not in {folder}, or not in its order",
                fix="run: mlx-distill targets",
            )
        yield *match, targets
