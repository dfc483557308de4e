"""The targets stage: the teacher's answers and distributions, written once."""

from __future__ import annotations

import sys
from itertools import chain, islice
from pathlib import Path

from mlx_distill.stages.context import Context as Context
from mlx_distill.stages.context import Facts, check_stop, count_rows, load_model, read_rows, vocabulary_hash
from mlx_distill.stages.scoring import score_shard
from mlx_distill.stages.training import check_training as check_training


def targets(context: Context, folder: Path) -> Facts:
    """What the teacher says of the training and validation rows, written once."""
    from mlx_distill.distill.teacher_cache import TargetWriter

    settings = context.recipe.targets
    model, tokenizer = load_model(context, "teacher")
    taken = min(count_rows(context, "train"), settings.max_rows or sys.maxsize)
    writer = TargetWriter(folder)
    rows = islice(
        chain(islice(read_rows(context, "train"), taken), read_rows(context, "valid")), writer.done, None
    )
    shard = max(settings.batch_size * 8, 64)
    invalid = 0
    with context.progress.task(
        "targets", total=taken + count_rows(context, "valid"), unit="row", start=writer.done
    ) as bar:
        while some := list(islice(rows, shard)):
            check_stop(context)
            written, bad = score_shard(context, model, tokenizer, some)
            writer.write(written)
            invalid += bad
            bar.update(writer.done)
    if invalid:
        context.progress.note(
            f"targets: {invalid} answers of the teacher do not fit the task; these rows keep the data's own"
        )
    writer.finish(
        labels=list(context.task.labels),
        teacher_tokenizer=vocabulary_hash(tokenizer),
        text=settings.text,
        top_k=settings.top_k,
    )
    return {"rows": writer.done, "bytes": sum(p.stat().st_size for p in folder.glob("[rt]*-0*"))}
