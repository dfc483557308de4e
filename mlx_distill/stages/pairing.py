"""The student's rows beside the teacher's targets."""

from __future__ import annotations

from typing import Any

from mlx_distill.errors import DataError
from mlx_distill.recipe import DistillConfig
from mlx_distill.stages.context import Context, read_rows, vocabulary_hash


def aligned_pairs(context: Context, tokenizer: Any, settings: DistillConfig) -> tuple[list[Any], list[Any], dict[str, Any]]:
    """Training and validation pairs, and what the objective needs of the two tokenizers."""
    from mlx_distill.data.templates import answer_ids, render, stop_ids
    from mlx_distill.losses.alignment import align_bytes
    from mlx_distill.losses.cross_tokenizer import cell_map
    from mlx_distill.losses.labels import label_tokens
    from mlx_distill.models.load import load_tokenizer
    from mlx_distill.schema import label_prefix, parse_answer
    from mlx_distill.targets import TargetReader
    from mlx_distill.teacher import label_position
    from mlx_distill.train.pairs import make_pair

    task = context.task
    reader = TargetReader(context.run / "targets")
    teacher_tokenizer = load_tokenizer(context.run / "teacher")
    if reader.index["teacher_tokenizer"] != vocabulary_hash(teacher_tokenizer):
        raise DataError(f"{reader.folder}: targets of another tokenizer than {context.run / 'teacher'}", fix="run: mlx-distill targets")
    prompts = {row["id"]: (row["messages"][:-1], split) for split in ("train", "valid") for row in read_rows(context, split)}
    out: dict[str, list[Any]] = {"train": [], "valid": []}
    too_long = 0
    with context.progress.task("align", total=len(reader), unit="row") as bar:
        for number, target in enumerate(reader, 1):
            if target.id not in prompts:
                raise DataError(f"{reader.folder}: row {target.id!r} is not in {context.run / 'data'}", fix="run: mlx-distill targets")
            messages, split = prompts[target.id]
            chat = render(tokenizer, [*messages, {"role": "assistant", "content": target.text}])
            if len(chat) > settings.max_length:
                too_long += 1
                continue
            start, end = chat.spans[-1]
            answer, _ = parse_answer(target.text, task.schema)
            prefix = answer_ids(tokenizer, label_prefix(task.schema, task.label, answer))
            spans = align_bytes(chat.tokens[start:end], target.ids[:-1], tokenizer, teacher_tokenizer)
            out[split].append(
                make_pair(
                    chat.tokens, start, spans, teacher_logprobs=target.logprobs, topk_ids=target.topk_ids,
                    topk_logprobs=target.topk_logprobs, label_at=label_position(chat.tokens.tolist(), start, prefix),
                    label_logprobs=target.label_logprobs,
                )
            )  # fmt: skip
            bar.update(number)
    if too_long:
        context.progress.note(f"distill: {too_long} rows are longer than {settings.max_length} tokens for the student and are left out")
    inputs = {
        "labels": label_tokens(tokenizer, task.labels),
        "cells": cell_map(tokenizer, teacher_tokenizer, student_stop=stop_ids(tokenizer)[0], teacher_stop=stop_ids(teacher_tokenizer)[0]),
        "same_tokenizer": vocabulary_hash(tokenizer) == vocabulary_hash(teacher_tokenizer),
    }
    return out["train"], out["valid"], inputs
