"""The student's side of the teacher's targets: each row rendered for the student, and the two tokenizations
aligned by bytes.

The alignment of a row does not depend on the batch it is in, so all rows are aligned once, before training,
and kept on disk.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import mlx.core as mx
import numpy as np
from jaxtyping import Float, Int

from mlx_distill.data.chat import TokenizedRow, answer_ids, render_many
from mlx_distill.data.packing import as_sequences, build_batch
from mlx_distill.distill.aligned_parts import aligned_parts
from mlx_distill.distill.joined_rows import JoinedRow
from mlx_distill.distill.mapped_mass import MappedMass
from mlx_distill.distill.mid_token_rows import (
    collate_mid_tokens,
    mid_token_arrays,
    mid_token_targets,
    without_mid_tokens,
)
from mlx_distill.distill.teacher import answer_label_place
from mlx_distill.distill.teacher_cache import TeacherTargets
from mlx_distill.errors import DataError
from mlx_distill.losses.labels import LabelTrie
from mlx_distill.losses.mid_token import MidTokens, MidTokenTargets
from mlx_distill.losses.numerics import LOWEST
from mlx_distill.losses.topk import within_columns
from mlx_distill.models.token_ids import check_token_ids
from mlx_distill.progress import Progress
from mlx_distill.records import Batch
from mlx_distill.storage.array_store import StoreWriter
from mlx_distill.tasks.task import Task

_CHUNK = 64  # rows that are rendered together
Chat: TypeAlias = Sequence[Mapping[str, Any]]
# the student's chat in tokens, its messages, the teacher's targets for it
Aligner: TypeAlias = "Callable[[TokenizedRow, Chat, TeacherTargets], AlignedRow]"


@dataclass(frozen=True)
class AlignedRow:
    """One row for the student, with the teacher's targets at the student's positions.

    Args:
        tokens: ``[l]`` the student's chat, its stop token last.
        start: Where its answer begins, or its thinking where it learns that too.
        label_start: The position of the first token behind the root of the labels, or None.
        label_logprobs: ``[c]`` the teacher's distribution over the labels and everything else, or None.
        starts: ``[n]`` positions of student tokens that begin where a teacher token begins.
        topk_ids: ``[n, k]`` the teacher's most probable tokens there.
        topk_logprobs: ``[n, k]`` their log-probabilities.
        spans: ``[m, 2]`` start and end (exclusive) of the student tokens of each common span.
        span_logprobs: ``[m]`` the teacher's log-probability of the span's bytes.
        label_node: The last node of the student's labels that its answer reaches: of the nodes behind the
            root, the row has the logits of those on the path to it.
        temperature: Of the distributions in ``topk_logprobs``.
        teacher_starts: ``[n]`` the teacher's tokens at ``starts``: positions in ``teacher_tokens``, or in the
            answer where there are none.
        teacher_tokens: The teacher's chat, for a live teacher.
        mid_token: The teacher's targets in the middle of tokens, numbered from ``start``; None: not asked
            for.
    """

    tokens: Int[np.ndarray, " l"]
    start: int
    label_start: int | None
    label_logprobs: Float[np.ndarray, " c"] | None
    starts: Int[np.ndarray, " n"]
    topk_ids: Int[np.ndarray, "n k"]
    topk_logprobs: Float[np.ndarray, "n k"]
    spans: Int[np.ndarray, "m 2"]
    span_logprobs: Float[np.ndarray, " m"]
    label_node: int = 0
    temperature: float = 1.0
    teacher_starts: Int[np.ndarray, " n"] | None = None
    teacher_tokens: Int[np.ndarray, " t"] | None = None
    mid_token: MidTokenTargets | None = None


def write_aligned_rows(
    folders: Mapping[str, Path],
    key: str,
    joined: Iterator[JoinedRow],
    align: Aligner,
    student_tokenizer: Any,
    *,
    token_rows: int,
    max_length: int,
    total: int,
    progress: Progress,
    check_stop: Callable[[], None],
    mapped: MappedMass | None = None,
    mid_tokens: MidTokens | None = None,
) -> None:
    """Align all rows and write them as one array store per split.

    Args:
        folders: Where the store of ``train`` and that of ``valid`` are written.
        key: Of both stores.
        joined: From :func:`~mlx_distill.distill.joined_rows.join_rows`.
        align: Aligns a row: :func:`aligner`.
        student_tokenizer: With a chat template.
        token_rows: Rows of the student's embedding; 0 for any number.
        max_length: Rows of more student tokens are left out.
        total: The number of rows, for the progress bar.
        progress: Where progress is shown.
        check_stop: Called between chunks of rows; raises to stop.
        mapped: Counts the training rows; None: they are not measured.
        mid_tokens: Of the aligner, for its counts.

    The facts of ``train`` say how many rows of both splits were left out: ``too_long``, and ``not_aligned``
    with an ``example``, because one of the tokenizers changes their text; and what ``mapped`` measured.

    Raises:
        DataError: no row is left to train on.
        ModelError: a token that the student's embedding has no row for, or a tokenizer without bytes.
    """
    counts: Counter[str] = Counter(too_long=0, not_aligned=0, labelled=0)
    done, example = 0, ""
    with (
        StoreWriter(folders["train"], key) as train,
        StoreWriter(folders["valid"], key) as valid,
        progress.task("align", total=total, unit="row") as bar,
    ):
        while chunk := list(islice(joined, _CHUNK)):
            check_stop()
            chats = [with_answer(row, targets) for _, row, targets in chunk]
            rendered = render_many(student_tokenizer, chats)
            for chat, messages, (split, _, targets) in zip(rendered, chats, chunk, strict=True):
                if len(chat) > max_length:
                    counts["too_long"] += 1
                    continue
                check_token_ids(chat.tokens, token_rows, student_tokenizer)
                try:
                    row = align(chat, messages, targets)
                except DataError as error:
                    counts["not_aligned"] += 1
                    example = example or f"{targets.id}: {error}"
                    continue
                counts["labelled"] += split == "train" and row.label_start is not None
                if mapped is not None and split == "train":
                    mapped.add(row.tokens[chat.spans[-1][0] :], targets.answer_alone())
                _append(train if split == "train" else valid, row)
            done += len(chunk)
            bar.update(done)
        measured = {"mapped": mapped, "mid_token": mid_tokens}
        train.facts = {
            **counts,
            "example": example,
            **{name: value.facts() for name, value in measured.items() if value is not None},
        }
        if not train.rows:
            raise _nothing_left(counts["too_long"], max_length, counts["not_aligned"], example)


def _append(store: StoreWriter, row: AlignedRow) -> None:
    store.append(len(row.tokens) - row.start, **aligned_row_arrays(row))


def aligner(
    task: Task,
    student_tokenizer: Any,
    teacher_tokenizer: Any,
    labels: LabelTrie | None,
    *,
    same_tokenizer: bool,
    columns: int = 0,
    temperature: float = 1.0,
    mid_tokens: MidTokens | None = None,
    finish: Callable[[AlignedRow, Chat, TeacherTargets], AlignedRow] = lambda row, *_: row,
) -> Aligner:
    """The function that aligns the rows of two models: :func:`align_answer` with what is the same for all.

    Args:
        task: Its schema and label.
        student_tokenizer: Its tokens name their bytes, or it is the teacher's.
        teacher_tokenizer: The same.
        labels: The labels in the student's tokens, or None for no label loss.
        same_tokenizer: Whether both have the same tokens by id.
        columns: Rows of the student's embedding; 0 for any number.
        temperature: Of the rows' ``topk_logprobs``; one of those of the targets.
        mid_tokens: Makes the targets in the middle of tokens; None: there are none.
        finish: Adds to a row what a live teacher needs.
    """
    # The text before the label is often the same in every answer.
    encode = lru_cache(maxsize=256)(partial(answer_ids, student_tokenizer))

    def align(chat: TokenizedRow, messages: Chat, targets: TeacherTargets) -> AlignedRow:
        row = align_answer(
            chat,
            targets,
            task,
            student_tokenizer,
            teacher_tokenizer,
            encode,
            labels,
            same_tokenizer=same_tokenizer,
            columns=columns,
            temperature=temperature,
            mid_tokens=mid_tokens,
        )
        return finish(row, messages, targets)

    return align


def with_answer(row: Mapping[str, Any], targets: TeacherTargets) -> list[Mapping[str, Any]]:
    """A row's chat with the teacher's answer, and with its thinking where the student learns it."""
    thought = {"reasoning_content": targets.thinking} if targets.answer_start else {}
    return [*row["messages"][:-1], {"role": "assistant", "content": targets.text, **thought}]


def _nothing_left(too_long: int, max_length: int, not_aligned: int, example: str) -> DataError:
    parts = [f"{too_long} have more than {max_length} tokens"] if too_long else []
    parts += [f"of {not_aligned} a tokenizer changes the text ({example})"] if not_aligned else []
    return DataError(
        f"no row to train on: {', and '.join(parts) or 'there are no targets'}",
        fix="raise distill.max_length, or use a student whose tokenizer keeps the text as it is",
    )


def align_answer(
    chat: TokenizedRow,
    targets: TeacherTargets,
    task: Task,
    student_tokenizer: Any,
    teacher_tokenizer: Any,
    encode: Callable[[str], list[int]],
    labels: LabelTrie | None,
    *,
    same_tokenizer: bool = False,
    columns: int = 0,
    temperature: float = 1.0,
    mid_tokens: MidTokens | None = None,
) -> AlignedRow:
    """Align the teacher's targets with a chat that is rendered for the student.

    Args:
        chat: The student's chat; its answer is ``targets.text``.
        targets: The teacher's.
        task: Its schema and label.
        student_tokenizer: As in :func:`aligner`.
        teacher_tokenizer: The same.
        encode: From the beginning of an answer to the student's token ids.
        labels: The labels in the student's tokens, or None for no label loss.
        same_tokenizer: Whether both tokenizers have the same tokens by id. Then equal tokens are aligned one
            by one, whatever bytes they have, and the top k is limited to the student's columns.
        columns: The student's; 0 for any number.
        temperature: Of the row's ``topk_logprobs``.
        mid_tokens: As in :func:`aligner`.

    Raises:
        DataError: the two texts differ.
        ModelError: a tokenizer whose tokens' bytes are not known.
    """
    start = chat.start
    student_ids, teacher_ids = chat.tokens[start : chat.spans[-1][1]], targets.ids[:-1]
    others: tuple[int, ...] = ()
    if same_tokenizer and np.array_equal(student_ids, teacher_ids):
        each = np.arange(len(student_ids))
        spans = np.stack([each, each + 1, each, each + 1], axis=1)
    else:
        spans, others = aligned_parts(chat, targets, student_tokenizer, teacher_tokenizer)
    topk_ids, topk_logprobs = targets.topk_ids, at_temperature(targets, temperature)
    if same_tokenizer and columns:
        topk_ids, topk_logprobs = within_columns(topk_ids, topk_logprobs, columns)
    tokens = chat.tokens.tolist()
    place = answer_label_place(tokens, chat.spans[-1][0], targets.text, task, encode, labels)
    label_start, label_node = place or (None, 0)
    row = align_row(
        chat.tokens,
        start,
        spans,
        teacher_logprobs=targets.logprobs,
        topk_ids=topk_ids,
        topk_logprobs=topk_logprobs,
        label_start=label_start,
        label_logprobs=targets.label_logprobs,
        not_starts=others,
        label_node=label_node,
        temperature=temperature,
    )
    if mid_tokens is None:
        return row
    begun = np.delete(spans, list(others), axis=0)
    middle = mid_tokens.targets(student_ids, teacher_ids, begun, targets.topk_ids, targets.topk_logprobs)
    kept = np.append(~mid_tokens.in_other_groups(student_ids, teacher_ids, begun), True)  # and the end
    at_starts = ("starts", "topk_ids", "topk_logprobs", "teacher_starts")
    return replace(row, mid_token=middle, **{name: getattr(row, name)[kept] for name in at_starts})


def at_temperature(targets: TeacherTargets, temperature: float) -> Float[np.ndarray, "n k"]:
    """The log-probabilities of the top k at a temperature, over the whole vocabulary: those of p^(1/T), with
    the mass that is not outside of the top k at T.

    Args:
        targets: With one column of ``tempered_tails``, which is that of the temperature.
        temperature: T; 1 needs no such mass.

    Raises:
        DataError: there is none.
    """
    if temperature == 1:
        return targets.topk_logprobs
    if targets.tempered_tails is None or targets.tempered_tails.shape[1] != 1:
        raise DataError(
            f"{targets.id}: targets without the mass outside of the top k at temperature {temperature}",
            fix="run: mlx-distill targets",
        )
    logs = targets.topk_logprobs.astype(np.float64) / temperature
    kept = np.log1p(-np.exp(targets.tempered_tails.astype(np.float64)))
    logs += kept - np.logaddexp.reduce(logs, axis=1, keepdims=True)
    return np.where(targets.topk_logprobs <= LOWEST / 2, LOWEST, logs).astype(np.float32)


def align_row(
    tokens: np.ndarray,
    start: int,
    spans: np.ndarray,
    *,
    teacher_logprobs: np.ndarray,
    topk_ids: np.ndarray,
    topk_logprobs: np.ndarray,
    label_start: int | None,
    label_logprobs: Sequence[float] | np.ndarray | None,
    not_starts: Sequence[int] = (),
    label_node: int = 0,
    temperature: float = 1.0,
) -> AlignedRow:
    """Gather the teacher's targets at the common boundaries of two tokenizations.

    Args:
        tokens: The student's chat, its stop token last.
        start: Where the answer begins.
        spans: ``align_bytes`` of the two answers without their stop tokens: ``[m, 4]``, relative to the
            beginnings of the answers.
        teacher_logprobs, topk_ids, topk_logprobs: The teacher's targets, its stop token last.
        label_start: The position in ``tokens`` of the first one behind the root of the student's labels.
        label_logprobs: The teacher's distribution over the labels and everything else.
        not_starts: The spans at whose beginning the two models' distributions are over different texts.
        label_node: The last node of the student's labels that its answer reaches.
        temperature: Of ``topk_logprobs``.
    """
    student_stop, teacher_stop = len(tokens) - start - 1, len(teacher_logprobs) - 1
    # Both models end their answer at the same place: one more common span.
    stop = np.array([[student_stop, student_stop + 1, teacher_stop, teacher_stop + 1]])
    spans = np.concatenate([np.asarray(spans).reshape(-1, 4), stop])
    sums = np.concatenate([[0.0], np.cumsum(teacher_logprobs, dtype=np.float64)])
    begins = np.delete(spans, list(not_starts), axis=0)
    return AlignedRow(
        tokens=np.asarray(tokens, dtype=np.int32),
        start=start,
        label_start=label_start if label_logprobs is not None else None,
        label_logprobs=np.array(label_logprobs, dtype=np.float32) if label_logprobs is not None else None,
        starts=(begins[:, 0] + start).astype(np.int32),
        topk_ids=topk_ids[begins[:, 2]],
        topk_logprobs=topk_logprobs[begins[:, 2]].astype(np.float32),
        spans=(spans[:, :2] + start).astype(np.int32),
        span_logprobs=(sums[spans[:, 3]] - sums[spans[:, 2]]).astype(np.float32),
        label_node=label_node,
        temperature=temperature,
        teacher_starts=begins[:, 2].astype(np.int32),
    )


def aligned_row_arrays(row: AlignedRow) -> dict[str, np.ndarray]:
    """A row as named arrays for an array store, in which a row's arrays may differ in one dimension.

    :func:`aligned_row_from_arrays` is the inverse.
    """
    label_at = [] if row.label_start is None else [row.label_start]
    if label_at and row.label_node:  # the root is not written
        label_at.append(row.label_node)
    no_label = np.zeros(0, dtype=np.float32)
    live = {} if row.teacher_tokens is None else {"teacher_tokens": row.teacher_tokens}
    if live and row.teacher_starts is not None:
        live["teacher_starts"] = row.teacher_starts
    return {
        "tokens": row.tokens,
        "start": np.array([row.start], dtype=np.int32),
        # The names are those of the files on disk.
        "label_at": np.array(label_at, dtype=np.int32),
        "label_logprobs": no_label if row.label_logprobs is None else row.label_logprobs,
        "starts": row.starts,
        "topk_ids": row.topk_ids,
        "topk_logprobs": row.topk_logprobs,
        "spans": row.spans,
        "span_logprobs": row.span_logprobs,
        "temperature": np.array([row.temperature], dtype=np.float32),
        **{
            name: array
            for name, array in live.items()
            if array is not None and row.teacher_tokens is not None
        },
        **mid_token_arrays(row.mid_token),
    }


def aligned_row_from_arrays(
    *,
    start: np.ndarray,
    label_at: np.ndarray,
    label_logprobs: np.ndarray,
    temperature: np.ndarray | None = None,
    **arrays: np.ndarray,
) -> AlignedRow:
    """The row of the arrays of :func:`aligned_row_arrays`."""
    return AlignedRow(
        start=int(start[0]),
        label_start=int(label_at[0]) if len(label_at) else None,
        label_logprobs=label_logprobs if len(label_logprobs) else None,
        label_node=int(label_at[1]) if len(label_at) > 1 else 0,
        temperature=1.0 if temperature is None else float(temperature[0]),
        mid_token=mid_token_targets(arrays),
        **without_mid_tokens(arrays),
    )


def collate_aligned_rows(
    rows: Sequence[AlignedRow],
    chosen: Sequence[int | Sequence[int]],
    pad: int,
    classes: int,
    multiple: int = 16,
) -> Batch:
    """One right-padded micro-batch; token ``j`` of a row is predicted at its input ``j - 1``.

    ``extra``: ``positions [a]`` of the trained labels in the flattened ``[b * l]`` inputs, row by row; and,
    as indices into those ``a``: ``label_index [r]`` (of the labels' root) with ``label_logprobs [r, c]`` and
    ``label_node [r]``; ``start_index [n]`` with ``topk_ids`` and ``topk_logprobs`` ``[n, k]``; ``spans
    [m, 2]`` (start, end) with ``span_logprobs [m]``; ``temperature [rows]`` of ``topk_logprobs``; and those
    of :func:`~mlx_distill.distill.mid_token_rows.collate_mid_tokens`.

    Args:
        rows: All rows.
        chosen: The batch's row numbers; rows in a tuple are packed into one sequence.
        pad: The padding token.
        classes: Columns of ``label_logprobs``: the task's labels and one for everything else.
        multiple: Sequences are padded to a multiple of this many tokens.
    """
    sequences = as_sequences(chosen)
    numbers = [number for sequence in sequences for number in sequence]
    tokenized = [[_tokenized(rows[number]) for number in sequence] for sequence in sequences]
    batch = build_batch(tokenized, pad, multiple, numbers)
    members = [rows[number] for number in numbers]
    # From a row's token numbers to its place among the trained positions: the trained positions of the rows
    # before it, minus the start of its own answer.
    before = np.cumsum([0, *(len(row.tokens) - row.start for row in members)])[:-1]
    offsets = before - np.array([row.start for row in members])
    labelled = [
        (offset + row.label_start, row.label_logprobs, row.label_node)
        for offset, row in zip(offsets, members, strict=True)
        if row.label_start is not None and row.label_logprobs is not None
    ]
    starts = [row.starts + offset for offset, row in zip(offsets, members, strict=True)]
    spans = [row.spans + offset for offset, row in zip(offsets, members, strict=True)]
    extra = {
        "positions": np.flatnonzero(np.array(batch.mask)).astype(np.int32),
        "label_index": np.array([index for index, _, _ in labelled], dtype=np.int32),
        "label_logprobs": np.array([logprobs for _, logprobs, _ in labelled], dtype=np.float32).reshape(
            len(labelled), classes
        ),
        "label_node": np.array([node for _, _, node in labelled], dtype=np.int32),
        "start_index": np.concatenate(starts).astype(np.int32),
        "topk_ids": np.concatenate([row.topk_ids for row in members]),
        "topk_logprobs": np.concatenate([row.topk_logprobs for row in members]),
        "spans": np.concatenate(spans).astype(np.int32),
        "span_logprobs": np.concatenate([row.span_logprobs for row in members]),
        "temperature": np.array([row.temperature for row in members], dtype=np.float32),
        **collate_mid_tokens([row.mid_token for row in members], before.tolist()),
    }
    return replace(batch, extra={name: mx.array(value) for name, value in extra.items()})


def _tokenized(row: AlignedRow) -> TokenizedRow:
    return TokenizedRow(row.tokens, np.arange(1, len(row.tokens)) >= row.start)
