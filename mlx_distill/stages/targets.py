"""The targets stage: the teacher's answers and distributions."""

from __future__ import annotations

import sys
from itertools import chain, islice
from pathlib import Path

from mlx_distill.stages.context import (
    Context,
    Facts,
    check_stop,
    count_rows,
    load_model,
    read_rows,
    vocabulary_hash,
)
from mlx_distill.storage import read_json, scratch, write_json


def targets(context: Context, folder: Path) -> Facts:
    """Write the teacher's targets of the training and validation rows."""
    from mlx_distill.distill.answer_check import FACT, joined
    from mlx_distill.distill.teacher import score_answers
    from mlx_distill.distill.teacher_cache import TargetWriter
    from mlx_distill.infer.label_scoring import find_label_trie

    settings = context.recipe.targets
    model, tokenizer = load_model(context, "teacher")
    labels = find_label_trie(tokenizer, context.task, context.recipe.distill.label_weight)
    train_rows = min(count_rows(context, "train"), settings.max_rows or sys.maxsize)
    writer = TargetWriter(folder)
    train = (
        (row, n) for row in islice(read_rows(context, "train"), train_rows) for n in range(settings.samples)
    )
    rows = islice(chain(train, ((row, 0) for row in read_rows(context, "valid"))), writer.done, None)
    shard = max(settings.batch_size * 8, 64)
    with context.progress.task(
        "targets",
        total=train_rows * settings.samples + count_rows(context, "valid"),
        unit="row",
        start=writer.done,
    ) as bar:
        while chunk := list(islice(rows, shard)):
            check_stop(context)
            asked, samples = zip(*chunk, strict=True)
            scored, check = score_answers(model, tokenizer, asked, context.task, settings, labels, samples)
            write_json(_check_file(folder, len(writer.shards)), check.to_dict())
            writer.write(scored)
            bar.update(writer.done)
    paths = [_check_file(folder, shard) for shard in range(len(writer.shards))]
    answers = joined([read_json(path) for path in paths if path.is_file()])
    if invalid := answers["rows"] - answers["valid"]:
        context.progress.note(
            f"targets: {invalid} answers of the teacher do not fit the task; these rows keep the data's own"
        )
    writer.finish(
        labels=list(context.task.labels),
        teacher_tokenizer=vocabulary_hash(tokenizer),
        text=settings.text,
        top_k=settings.top_k,
    )
    size = sum(p.stat().st_size for p in folder.glob("[rt]*-0*"))
    return {"rows": writer.done, "bytes": size, **({FACT: answers} if answers["rows"] else {})}


def _check_file(folder: Path, shard: int) -> Path:
    """Where the counts of a shard's answers wait for the end of the stage, which may be in another run."""
    return scratch(folder) / f"answers-{shard:05d}.json"
