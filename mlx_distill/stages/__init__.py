"""The stages: each reads its parents' folders, does one thing, and leaves its result in the folder that it is given.

A stage knows nothing of keys, skipping or renaming: :mod:`mlx_distill.pipeline` hands it a partial folder, empty or as a killed run left
it, and publishes that folder when the stage returns. What a stage returns is recorded in its manifest, for people.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import chain, islice
from pathlib import Path

from mlx_distill.config import to_mapping
from mlx_distill.runtime import peak_memory, reset_peak_memory
from mlx_distill.stages.context import Context as Context
from mlx_distill.stages.context import Facts, count_rows, held_out_rows, load_model, read_rows, stop_here, vocabulary_hash
from mlx_distill.stages.pairing import aligned_pairs
from mlx_distill.stages.scoring import score_shard
from mlx_distill.stages.training import check_training as check_training
from mlx_distill.stages.training import fine_tune, train_rows
from mlx_distill.storage import read_jsonl, scratch, write_jsonl


def prepare(context: Context, folder: Path) -> Facts:
    """Rows from everywhere to train, valid and test chats."""
    from mlx_distill.data import prepare as splits

    statistics = splits.prepare(context.recipe.data, context.task, context.recipe.base, folder, context.progress)
    return {"rows": statistics["rows"]} if "rows" in statistics else {}


def convert(context: Context, folder: Path, source: str, name: str) -> Facts:
    """A checkpoint of the Hub's layout to the run's model ``name``, numerically the same."""
    from mlx_distill.models.convert import convert_into

    settings = context.recipe.convert
    report = convert_into(
        source, folder, quantize=settings.quantize, dtype=settings.dtype, revision=settings.revision, progress=context.progress,
        name=f"convert {name}",
    )  # fmt: skip
    return {"source": source, **report.facts()}


def teach(context: Context, folder: Path) -> Facts:
    """Fine-tune the teacher on the labelled rows."""
    check_training(context, {"teach"})
    model, tokenizer = load_model(context, "teacher_base")
    return fine_tune(context, folder, "teach", model, tokenizer, "teacher_base", context.recipe.teach)


def targets(context: Context, folder: Path) -> Facts:
    """What the teacher says of the training and validation rows, written once."""
    from mlx_distill.distill.teacher_cache import TargetWriter

    settings = context.recipe.targets
    model, tokenizer = load_model(context, "teacher")
    taken = min(count_rows(context, "train"), settings.max_rows or sys.maxsize)
    writer = TargetWriter(folder)
    rows = islice(chain(islice(read_rows(context, "train"), taken), read_rows(context, "valid")), writer.done, None)
    shard = max(settings.batch_size * 8, 64)
    invalid = 0
    with context.progress.task("targets", total=taken + count_rows(context, "valid"), unit="row", start=writer.done) as bar:
        while some := list(islice(rows, shard)):
            stop_here(context)
            written, bad = score_shard(context, model, tokenizer, some)
            writer.write(written)
            invalid += bad
            bar.update(writer.done)
    if invalid:
        context.progress.note(f"targets: {invalid} answers of the teacher do not fit the task; these rows keep the data's own")
    writer.finish(labels=list(context.task.labels), teacher_tokenizer=vocabulary_hash(tokenizer), text=settings.text, top_k=settings.top_k)
    return {"rows": writer.done, "bytes": sum(p.stat().st_size for p in folder.glob("[rt]*-0*"))}


def distill(context: Context, folder: Path, control: str | None = None) -> Facts:
    """Train the student on the teacher's targets; ``control`` trains on one thing alone: ``labels`` or ``text``."""
    from mlx_distill.data.chat import pad_id
    from mlx_distill.distill.align import collate_pairs
    from mlx_distill.distill.objective import kd

    settings = context.recipe.distill
    check_training(context, {"distill"})
    model, tokenizer = load_model(context, "student_base")
    if control == "labels":
        return fine_tune(context, folder, "distill (labels alone)", model, tokenizer, "student_base", settings)
    if control == "text":
        settings = replace(settings, label_weight=0.0, token_weight=0.0, text_weight=1.0)
    train_pairs, valid_pairs, tokenizers = aligned_pairs(context, folder, tokenizer, settings)
    pad, classes = pad_id(tokenizer), len(context.task.labels) + 1  # everything else is one too
    return train_rows(
        context, folder, "distill" if control is None else "distill (text alone)", model, tokenizer, "student_base", settings,
        kd(settings, **tokenizers), train_pairs, valid_pairs,
        lambda pairs, rows, multiple: collate_pairs(pairs, rows, pad, classes, multiple),
    )  # fmt: skip


def quantize(context: Context, folder: Path) -> Facts:
    """Bring what is not MXFP4 already to few bits."""
    from mlx_distill.models.quantize import quantize_into

    settings = context.recipe.quantize
    return quantize_into(
        context.run / "student", folder, settings.mode, group_size=settings.group_size, adapter=settings.adapter, keep=settings.keep,
        progress=context.progress,
    ).facts()  # fmt: skip


def evaluate(context: Context, folder: Path, model_folder: str, name: str) -> Facts:
    """Held-out rows through one model, a chunk at a time, so that a killed evaluation goes on behind its last whole chunk."""
    from mlx_distill.data.predictions import write_predictions
    from mlx_distill.infer.analyze import predict
    from mlx_distill.records import Prediction

    settings = context.recipe.evaluate
    rows = held_out_rows(context)
    model, tokenizer = load_model(context, model_folder)
    reset_peak_memory()
    chunk = settings.batch_size * 4
    found: list[Prediction] = []
    with context.progress.task(f"evaluate {name}", total=len(rows), unit="row") as bar:
        for first in range(0, len(rows), chunk):
            path = scratch(folder) / f"predictions-{first:08d}.jsonl"
            if not path.is_file():
                stop_here(context)
                some = rows[first : first + chunk]
                tell = _from(bar.update, first)
                done = predict(model, tokenizer, context.task, some, batch_size=settings.batch_size, on_done=tell)
                write_jsonl(path, (asdict(prediction) for prediction in done))
            found += [Prediction(**row) for _, row in read_jsonl(path)]
            bar.update(len(found))
    write_predictions(folder / "predictions.jsonl", name, context.task, rows, found, settings=to_mapping(settings))
    return {"rows": len(rows), "peak_memory_bytes": peak_memory()}


def _from(update: Callable[[int], None], first: int) -> Callable[[int], None]:
    return lambda count: update(first + count)
