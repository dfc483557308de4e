"""Finished targets written again, with what a test changes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from helpers.small_chain import make_context
from mlx_distill.distill.teacher_cache import TargetReader, TargetWriter, TeacherTargets
from mlx_distill.models.load import load_tokenizer
from mlx_distill.stages.targets import fingerprints


def rewrite_targets(
    run: Path, change: Callable[[int, TeacherTargets], TeacherTargets] = lambda _, row: row, **other: str
) -> None:
    """Write a run's targets again.

    Args:
        run: The run.
        change: Each row's targets, by number in the shard.
        other: Fingerprints that are not those of what the run's folder has now.
    """
    folder, fresh = run / "targets", run / "targets.again"
    reader = TargetReader(folder)
    made_from = fingerprints(make_context(run=run), load_tokenizer(run / "teacher"))
    writer = TargetWriter(fresh, reader.layout, {**made_from, **other})
    start = 0
    for shard in reader.index["shards"]:
        writer.write([change(i, row) for i, row in enumerate(reader[start : start + shard["rows"]])])
        start += shard["rows"]
    writer.finish(labels=reader.index["labels"], text=reader.index["text"])
    for path in fresh.iterdir():
        path.replace(folder / path.name)
    shutil.rmtree(fresh)
