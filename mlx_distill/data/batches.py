"""Encoded rows to batches: every row once an epoch, neighbours of one length together, an order that can be taken up anywhere."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_distill.data.packing import Piece, as_lines, lay_out
from mlx_distill.data.templates import Encoded, render
from mlx_distill.errors import DataError
from mlx_distill.records import Batch, Example

_WINDOW = 64  # batches whose rows are sorted by length together


@dataclass(frozen=True)
class EncodeReport:
    """What became of the rows.

    ``kept``: the number in the input of each encoded row; ``too_long`` and ``nothing_to_train``: ids of the rows left out, because they
    have more tokens than allowed, or because nothing of them is trained; ``longest``: tokens of the longest row, left out or not.
    """

    kept: tuple[int, ...]
    too_long: tuple[str, ...]
    nothing_to_train: tuple[str, ...]
    longest: int

    def __str__(self) -> str:
        parts = [f"{len(self.kept)} rows"]
        if self.too_long:
            parts.append(f"{len(self.too_long)} too long and left out (the longest has {self.longest} tokens)")
        if self.nothing_to_train:
            parts.append(f"{len(self.nothing_to_train)} with nothing to train and left out")
        return ", ".join(parts)


def encode_rows(
    rows: Iterable[Example], tokenizer: Any, max_length: int, loss_on: str = "last", *, where: str = "the rows"
) -> tuple[list[Encoded], EncodeReport]:
    """Render each row for a tokenizer; a row that is too long is left out whole, never cut: a cut answer teaches to stop in the middle.

    Args:
        rows: Prepared rows.
        tokenizer: With a chat template.
        max_length: Most tokens of a row.
        loss_on: ``last`` or ``all`` assistant turns.
        where: What the rows are, for the message of the error.

    Raises:
        DataError: no row is left.
    """
    encoded: list[Encoded] = []
    kept: list[int] = []
    too_long: list[str] = []
    nothing: list[str] = []
    longest = 0
    for number, row in enumerate(rows):
        item = render(tokenizer, row.messages, loss_on=loss_on, id=row.id)
        longest = max(longest, len(item))
        if len(item) > max_length:
            too_long.append(row.id)
        elif all(item.spans[turn][0] == item.spans[turn][1] for turn in item.trained):
            nothing.append(row.id)
        else:
            encoded.append(item)
            kept.append(number)
    if not encoded:
        raise DataError(
            f"{where}: none of {len(too_long) + len(nothing)} rows has an answer and at most {max_length} tokens (the longest: {longest})",
            fix=f"raise max_length, to {longest} for all of them",
        )
    return encoded, EncodeReport(tuple(kept), tuple(too_long), tuple(nothing), longest)


def plan_epoch(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[tuple[int, ...]]:
    """The batches of one epoch: every row exactly once, the tail included.

    Rows are shuffled, sorted by length inside windows of 64 batches (so that little is padded, and neighbours change each epoch), cut
    into batches, and the batches are shuffled. The same (seed, epoch) gives the same plan; no global random state is read or changed.

    Args:
        lengths: Tokens of each row.
        batch_size: Rows of a batch; the last one may have fewer.
        seed: Of the run.
        epoch: Counted from 0.

    >>> sorted(row for batch in plan_epoch([5, 9, 5, 9, 5], 2, seed=0, epoch=0) for row in batch)
    [0, 1, 2, 3, 4]
    """
    if batch_size < 1:
        raise DataError(f"batch_size: {batch_size} is below 1", fix="use 1 or more")
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(len(lengths))
    window = batch_size * _WINDOW
    # A stable sort keeps the shuffle among rows of one length.
    ordered: list[int] = []
    for start in range(0, len(order), window):
        ordered += sorted(order[start : start + window].tolist(), key=lengths.__getitem__)
    batches = [tuple(ordered[start : start + batch_size]) for start in range(0, len(ordered), batch_size)]
    return [batches[number] for number in generator.permutation(len(batches))]


def collate(encoded: Sequence[Encoded], rows: Sequence[int | Sequence[int]], pad_id: int, multiple: int = 16) -> Batch:
    """Pad some rows on the right into one batch, labels shifted; a pad is never trained.

    Args:
        encoded: All rows.
        rows: Which of them, ``b`` numbers; several in a tuple share a line.
        pad_id: Token to fill with.
        multiple: The width ``l`` is rounded up to a multiple of it, so that few shapes occur.

    Returns:
        ``inputs``, ``labels`` ``[b, l]`` int32 and ``mask`` ``[b, l]`` float32, where ``labels[i, t]`` is the token after ``inputs[i, t]``;
        ``segments`` as :func:`~mlx_distill.data.packing.lay_out` has it.
    """
    lines = as_lines(rows)
    pieces = [[Piece(encoded[row].tokens, encoded[row].mask[1:]) for row in line] for line in lines]
    return lay_out(pieces, pad_id, multiple, [row for line in lines for row in line])


@dataclass(frozen=True)
class Position:
    """The next batch: number ``index`` of ``epoch``. All that is needed to go on in exactly the same order."""

    epoch: int = 0
    index: int = 0


def walk(
    lengths: Sequence[int], batch_size: int, seed: int, position: Position | None = None
) -> Iterator[tuple[tuple[int, ...], Position]]:
    """Yield ``(row numbers, position after them)`` forever, epoch after epoch, from a saved position on.

    >>> steps = walk([3, 3, 3], 2, seed=1)
    >>> taken = [next(steps) for _ in range(3)]
    >>> next(walk([3, 3, 3], 2, seed=1, position=taken[1][1])) == taken[2]
    True
    """
    if not lengths:
        raise DataError("no rows to make batches of", fix="see the report of the rows left out")
    epoch, index = (position.epoch, position.index) if position else (0, 0)
    while True:
        plan = plan_epoch(lengths, batch_size, seed, epoch)
        for number in range(index, len(plan)):
            last = number + 1 == len(plan)
            yield plan[number], Position(epoch + 1, 0) if last else Position(epoch, number + 1)
        epoch, index = epoch + 1, 0


def batches(
    encoded: Sequence[Encoded], batch_size: int, seed: int, pad_id: int, position: Position | None = None, multiple: int = 16
) -> Iterator[tuple[Batch, Position]]:
    """Yield ``(batch, position after it)`` forever: :func:`walk`, collated."""
    for rows, after in walk([len(item) for item in encoded], batch_size, seed, position):
        yield collate(encoded, rows, pad_id, multiple), after


def batches_per_epoch(rows: int, batch_size: int) -> int:
    """Batches of an epoch, the short last one included.

    >>> batches_per_epoch(10, 4)
    3
    """
    return -(-rows // batch_size)
