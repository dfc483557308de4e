"""The student's rows beside the teacher's targets, aligned once a training and kept on the disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_distill.errors import DataError
from mlx_distill.recipe import DistillConfig
from mlx_distill.stages.context import Context, check_stop, content_of, read_rows, rows_file, vocabulary_hash
from mlx_distill.storage import digest, scratch, sha256
from mlx_distill.tasks.task import Task

if TYPE_CHECKING:
    from mlx_distill.distill.align import AlignedRow
    from mlx_distill.distill.teacher_cache import TargetReader, TargetRow
    from mlx_distill.storage.array_store import Store

_CHUNK = 64  # rows that are rendered together
Joined = tuple[str, Mapping[str, Any], "TargetRow"]  # split, prepared row, what the teacher says of it


def aligned_rows(
    context: Context, folder: Path, tokenizer: Any, settings: DistillConfig
) -> tuple[Store[AlignedRow], Store[AlignedRow], dict[str, Any]]:
    """Training and validation pairs, and what the objective needs of the two tokenizers.

    Args:
        context: Of the run.
        folder: Where the stage works; the pairs lie in its scratch.
        tokenizer: The student's.
        settings: ``max_length``.

    Raises:
        DataError: the targets are of another tokenizer, or of other rows.
        Interrupted: stopped on request.
    """
    from mlx_distill.data.chat import stop_ids
    from mlx_distill.distill.align import aligned_row_of
    from mlx_distill.distill.teacher_cache import TargetReader
    from mlx_distill.losses.cross_tokenizer import build_token_groups
    from mlx_distill.losses.labels import label_tokens
    from mlx_distill.models.load import load_tokenizer
    from mlx_distill.storage.array_store import Store, is_stored

    reader = TargetReader(context.run / "targets")
    teacher_tokenizer = load_tokenizer(context.run / "teacher")
    ours, theirs = vocabulary_hash(tokenizer), vocabulary_hash(teacher_tokenizer)
    if reader.index["teacher_tokenizer"] != theirs:
        raise DataError(
            f"{reader.folder}: targets of another tokenizer than {context.run / 'teacher'}",
            fix="run: mlx-distill targets",
        )
    key = digest(
        {
            "rows": [sha256(rows_file(context, split)) for split in ("train", "valid")],
            "targets": content_of(reader.folder),
            "model": content_of(context.run / "student_base"),
            "teacher_tokenizer": theirs,
            "max_length": settings.max_length,
            "answer": [dict(context.task.schema), context.task.label],
        }
    )
    places = [scratch(folder) / "pairs" / split for split in ("train", "valid")]
    if not all(is_stored(place, key) for place in places):
        _align(context, places, key, reader, tokenizer, teacher_tokenizer, settings.max_length)
    train, valid = (Store(place, aligned_row_of) for place in places)
    if too_long := train.facts["too_long"]:
        context.progress.note(
            f"distill: {too_long} rows are longer than {settings.max_length} tokens for the student and are left out"
        )
    inputs = {
        "labels": label_tokens(tokenizer, context.task.labels),
        "groups": build_token_groups(
            tokenizer,
            teacher_tokenizer,
            student_stop=stop_ids(tokenizer)[0],
            teacher_stop=stop_ids(teacher_tokenizer)[0],
        ),
        "same_tokenizer": ours == theirs,
    }
    return train, valid, inputs


def _align(
    context: Context,
    places: Sequence[Path],
    key: str,
    reader: TargetReader,
    tokenizer: Any,
    teacher_tokenizer: Any,
    max_length: int,
) -> None:
    from mlx_distill.data.chat import answer_ids, render_many
    from mlx_distill.distill.align import aligned_row_arrays
    from mlx_distill.storage.array_store import StoreWriter

    # What stands before the label is often the same in every answer.
    encode = lru_cache(maxsize=256)(partial(answer_ids, tokenizer))
    too_long = done = 0
    joined = _joined(context, reader)
    with (
        StoreWriter(places[0], key) as train,
        StoreWriter(places[1], key) as valid,
        context.progress.task("align", total=len(reader), unit="row") as bar,
    ):
        while some := list(islice(joined, _CHUNK)):
            check_stop(context)
            answers = [{"role": "assistant", "content": target.text} for _, _, target in some]
            chats = [
                [*row["messages"][:-1], answer] for (_, row, _), answer in zip(some, answers, strict=True)
            ]
            for chat, (split, _, target) in zip(render_many(tokenizer, chats), some, strict=True):
                if len(chat) > max_length:
                    too_long += 1
                    continue
                pair = _pair(context.task, chat, target, tokenizer, teacher_tokenizer, encode)
                (train if split == "train" else valid).append(
                    len(pair.tokens) - pair.start, **aligned_row_arrays(pair)
                )
            done += len(some)
            bar.update(done)
        train.facts = {"too_long": too_long}


def _joined(context: Context, reader: TargetReader) -> Iterator[Joined]:
    """Each target with its row; both stand in one order, so neither is held in memory."""
    rows = ((split, row) for split in ("train", "valid") for row in read_rows(context, split))
    for target in reader:
        found = next(((split, row) for split, row in rows if row["id"] == target.id), None)
        if found is None:
            raise DataError(
                f"{reader.folder}: row {target.id!r} is not in {context.run / 'data'}, or not in its order",
                fix="run: mlx-distill targets",
            )
        yield *found, target


def _pair(
    task: Task,
    chat: Any,
    target: TargetRow,
    tokenizer: Any,
    teacher_tokenizer: Any,
    encode: Callable[[str], list[int]],
) -> AlignedRow:
    from mlx_distill.distill.align import align_row
    from mlx_distill.distill.teacher import label_position
    from mlx_distill.losses.byte_alignment import align_bytes
    from mlx_distill.tasks.answer import label_prefix, parse_answer

    start, end = chat.spans[-1]
    answer, _ = parse_answer(target.text, task.schema)
    prefix = encode(label_prefix(task.schema, task.label, answer))
    spans = align_bytes(chat.tokens[start:end], target.ids[:-1], tokenizer, teacher_tokenizer)
    return align_row(
        chat.tokens,
        start,
        spans,
        teacher_logprobs=target.logprobs,
        topk_ids=target.topk_ids,
        topk_logprobs=target.topk_logprobs,
        label_at=label_position(chat.tokens.tolist(), start, prefix),
        label_logprobs=target.label_logprobs,
    )
