"""Encoded rows to batches: every row once an epoch, neighbours of one length together, an order that can be
taken up anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice, pairwise
from typing import Any, overload

import numpy as np

from mlx_distill.data.chat import Encoded, render_many
from mlx_distill.data.packing import Piece, as_lines, lay_out
from mlx_distill.errors import DataError
from mlx_distill.records import Batch, Example

_WINDOW = 64  # batches whose rows are sorted by length together, at most
_CHUNK = 256  # rows that are rendered together


@dataclass
class EncodeReport:
    """What became of the rows, counted while they are encoded.

    ``kept``: rows that are left; ``too_long`` and ``nothing_to_train``: rows left out, because they have more
    tokens than allowed, or because nothing of them is trained; ``longest``: tokens of the longest row, left
    out or not.
    """

    kept: int = 0
    too_long: int = 0
    nothing_to_train: int = 0
    longest: int = 0

    @property
    def left_out(self) -> int:
        """Rows that are not trained on."""
        return self.too_long + self.nothing_to_train

    def __str__(self) -> str:
        parts = [f"{self.kept} rows"]
        if self.too_long:
            parts.append(f"{self.too_long} too long and left out (the longest has {self.longest} tokens)")
        if self.nothing_to_train:
            parts.append(f"{self.nothing_to_train} with nothing to train and left out")
        return ", ".join(parts)


def encode_rows(
    rows: Iterable[Example],
    tokenizer: Any,
    max_length: int,
    loss_on: str,
    report: EncodeReport,
    *,
    where: str = "the rows",
) -> Iterator[Encoded]:
    """Render each row for a tokenizer; a row that is too long is left out whole, never cut: a cut answer
    teaches to stop in the middle.

    Args:
        rows: Prepared rows; 256 of them are in memory at a time.
        tokenizer: With a chat template.
        max_length: Most tokens of a row.
        loss_on: ``last`` or ``all`` assistant turns.
        report: Is filled in.
        where: What the rows are, for the message of the error.

    Raises:
        DataError: at the end, where no row was left.
    """
    rows = iter(rows)
    while some := list(islice(rows, _CHUNK)):
        chats, ids = [row.messages for row in some], [row.id for row in some]
        for item in render_many(tokenizer, chats, loss_on=loss_on, ids=ids):
            report.longest = max(report.longest, len(item))
            if len(item) > max_length:
                report.too_long += 1
            elif all(item.spans[turn][0] == item.spans[turn][1] for turn in item.trained):
                report.nothing_to_train += 1
            else:
                report.kept += 1
                yield item
    if not report.kept:
        raise DataError(
            f"{where}: none of {report.left_out} rows has an answer and at most {max_length} tokens (the longest: {report.longest})",
            fix=f"raise max_length, to {report.longest} for all of them",
        )


def plan_epoch(
    lengths: Sequence[int], batch_size: int, seed: int, epoch: int, weights: Sequence[float] | None = None
) -> list[tuple[int, ...]]:
    """The batches of one epoch: every row exactly once, the tail included.

    Rows are shuffled, sorted by length inside windows of up to 64 batches (so that little is padded, and
    neighbours change each epoch), cut into batches of about one weight
    (:func:`~mlx_distill.data.batching.balanced_batch_sizes`), and these put in an order
    (:func:`~mlx_distill.data.batching.spread`). There are as many as if each had ``batch_size`` rows. The
    weight that counts is that of the tokens that are trained: a step of few of them moves the weights as far
    as one of many, so batches of equal counts cost loss where answers are as long as their chats, and batches
    of equal tokens where they are all of one length. A row weighs at least what its length is of
    ``len(lengths)`` longest rows, so that few batches hold many long prompts with short answers. No batch
    takes more places, rows times the length of its longest, than twice what ``batch_size`` longest rows do
    (:func:`~mlx_distill.data.batching.cap_padding`): the memory of a step goes with them. The same (seed,
    epoch) gives the same plan; no global random state is read or changed.

    Args:
        lengths: Tokens of each row.
        batch_size: Rows of a batch on average, at most.
        seed: Of the run.
        epoch: Counted from 0.
        weights: Trained tokens of each row; by default its length.

    >>> plan = plan_epoch([5, 9, 5, 9, 5, 20], 2, seed=0, epoch=0)
    >>> sorted(row for batch in plan for row in batch), sorted(map(len, plan))
    ([0, 1, 2, 3, 4, 5], [1, 2, 3])
    """
    if batch_size < 1:
        raise DataError(f"batch_size: {batch_size} is below 1", fix="use 1 or more")
    if not len(lengths):
        return []
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(len(lengths)).tolist()
    count = batches_per_epoch(len(order), batch_size)
    batches: list[tuple[int, ...]] = []
    heavy = _weigh(lengths, lengths if weights is None else weights)
    most = 2 * batch_size * max(max(lengths), 1)
    # Windows of as many batches and rows as each other, so that none is a small rest.
    windows = batches_per_epoch(count, _WINDOW)
    for first, end in pairwise(count * window // windows for window in range(windows + 1)):
        rows = order[len(order) * first // count : len(order) * end // count]
        # A stable sort keeps the shuffle among rows of one length.
        rows.sort(key=lambda row: -lengths[row])
        left, even = iter(rows), balanced_batch_sizes([heavy[row] for row in rows], end - first)
        batches += [
            tuple(islice(left, size)) for size in cap_padding(even, [lengths[row] for row in rows], most)
        ]
    batches.sort(key=lambda rows: -lengths[rows[0]])
    return [batches[number] for number in spread(len(batches), generator)]


def _weigh(lengths: Sequence[int], weights: Sequence[float]) -> list[float]:
    """What each row counts for in a batch: its share of what is trained, or of as many of the longest rows."""
    trained, tokens = np.asarray(weights, dtype=np.float64), np.asarray(lengths, dtype=np.float64)
    shares = trained / max(trained.sum(), 1.0), tokens / max(tokens.max() * len(tokens), 1.0)
    return [float(share) for share in np.maximum(*shares)]


def collate(
    pieces: Sequence[Piece], rows: Sequence[int | Sequence[int]], pad_id: int, multiple: int = 16
) -> Batch:
    """Pad some rows on the right into one batch, labels shifted; a pad is never trained.

    Args:
        pieces: All rows, in a list or in a :class:`~mlx_distill.storage.array_store.Store`.
        rows: Which of them, ``b`` numbers; several in a tuple share a line.
        pad_id: Token to fill with.
        multiple: The width ``l`` is rounded up to a multiple of it, so that few shapes occur.

    Returns:
        ``inputs``, ``labels`` ``[b, l]`` int32 and ``mask`` ``[b, l]`` float32, where ``labels[i, t]`` is the
        token after ``inputs[i, t]``; ``segments`` as :func:`~mlx_distill.data.packing.lay_out` has it.
    """
    lines = as_lines(rows)
    return lay_out(
        [[pieces[row] for row in line] for line in lines],
        pad_id,
        multiple,
        [row for line in lines for row in line],
    )


def batches_per_epoch(rows: int, batch_size: int) -> int:
    """Batches of an epoch, the short last one included.

    >>> batches_per_epoch(10, 4)
    3
    """
    return -(-rows // batch_size)


class BatchList(Sequence[Batch]):
    """Batches that are collated each time they are asked for: a fixed set of them takes no memory.

    Args:
        batches: The lines of each batch.
        collate: Makes a batch of such lines.
    """

    def __init__(
        self, batches: Sequence[Sequence[Sequence[int]]], collate: Callable[[Sequence[Sequence[int]]], Batch]
    ) -> None:
        self.batches, self.collate = batches, collate

    def __len__(self) -> int:
        return len(self.batches)

    @overload
    def __getitem__(self, number: int) -> Batch: ...
    @overload
    def __getitem__(self, number: slice) -> BatchList: ...
    def __getitem__(self, number: int | slice) -> Batch | BatchList:
        """One batch, or some without making them."""
        if isinstance(number, slice):
            return BatchList(self.batches[number], self.collate)
        return self.collate(self.batches[number])


def balanced_batch_sizes(weights: Sequence[float], batches: int) -> list[int]:
    """How many rows in a row each batch takes, so that all weigh about as much: a row goes where its middle
    falls.

    Args:
        weights: Of the rows, none negative.
        batches: How many to make; at least one row each.

    >>> balanced_batch_sizes([9, 5, 4, 3, 3, 2, 2, 1, 1], 4), balanced_batch_sizes([1, 1, 1, 1], 2), balanced_batch_sizes([0, 0, 0], 2)
    ([1, 1, 2, 5], [2, 2], [1, 2])
    """
    heavy = np.maximum(np.asarray(weights, dtype=np.float64), 1e-9)  # what weighs nothing is spread too
    middles = np.cumsum(heavy) - heavy / 2
    shares = heavy.sum() * np.arange(1, batches) / batches
    ends = [*np.searchsorted(middles, shares).tolist(), len(heavy)]
    for number, end in enumerate(ends[:-1]):
        before = ends[number - 1] if number else 0
        ends[number] = min(max(end, before + 1), len(heavy) - batches + number + 1)
    return [end - start for start, end in pairwise([0, *ends])]


def cap_padding(sizes: Sequence[int], lengths: Sequence[int], most: int) -> list[int]:
    """How many rows in a row each batch takes, so that none takes more than ``most`` places: its rows times
    the length of its longest.

    Where lengths have a gap, a batch that reaches across it holds a few long rows and many short ones, all
    padded to the long. Its longest rows go to the batch before, as few as will do; where that makes the first
    one too large, its shortest go to those after it. A cut that is within the bound is not changed. The bound
    holds wherever it can with so many batches, and it can where ``most`` is at least ``ceil(rows / batches)``
    times the longest length.

    Args:
        sizes: Rows of each batch, in the order of ``lengths``; at least one each.
        lengths: Of the rows in tokens, the longest first.
        most: Places of a batch, at least the longest length, and 1.

    >>> cap_padding([2, 2, 8], [9, 9, 9, 9, 9, 1, 1, 1, 1, 1, 1, 1], 36), cap_padding([3, 1], [9, 1, 1, 1], 18)
    ([2, 3, 7], [2, 2])
    """
    reach = np.arange(len(lengths)) + most // np.maximum(
        np.asarray(lengths), 1
    )  # where a batch from each row on ends at the latest
    ends = np.cumsum(sizes).tolist()
    for number in range(
        len(ends) - 1, 0, -1
    ):  # from the last to the first: each begins where it is within the bound
        ends[number - 1] = max(ends[number - 1], int(np.searchsorted(reach, ends[number])))
    for number, end in enumerate(ends[:-1]):  # and, for the first, ends there
        ends[number] = min(end, int(reach[ends[number - 1] if number else 0]))
    return [end - start for start, end in pairwise([0, *ends])]


def spread(count: int, generator: np.random.Generator) -> list[int]:
    """The numbers below ``count`` in a random order in which neighbours differ: the first two hold one of
    each half, and so do the next two; the first four hold one of each quarter, and so on, up to rounding.

    Of batches from long rows to short ones, an optimizer step gets some of each kind so. Method: a random (0,
    1)-net in base 2 (Owen, Randomly permuted (t, m, s)-nets and (t, s)-sequences, 1995).

    >>> order = spread(8, np.random.default_rng(0))
    >>> [sorted(number // 4 for number in order[i : i + 2]) for i in (0, 2, 4, 6)]
    [[0, 1], [0, 1], [0, 1], [0, 1]]
    """

    def order(first: int, end: int) -> list[int]:
        if end - first < 2:
            return list(range(first, end))
        middle = (first + end + coins()) // 2
        low, high = order(first, middle), order(middle, end)
        rest = max(low, high, key=len)[min(len(low), len(high)) :]
        pairs = (pair[::-1] if coins() else pair for pair in zip(low, high, strict=False))
        return [*chain.from_iterable(pairs), *rest]

    coins = iter(generator.integers(0, 2, count * max(count.bit_length(), 1)).tolist()).__next__
    return order(0, count)
