"""Batches of an epoch: every row once, rows of similar length together, in an order that can be resumed at
any batch.

An epoch is planned from the rows' lengths alone, in four steps: :func:`length_buckets`,
:func:`balanced_batch_sizes`, :func:`cap_padding`, :func:`stratified_order`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice, pairwise
from typing import overload

import numpy as np

from mlx_distill.data.chat import TokenizedRow
from mlx_distill.data.packing import as_sequences, build_batch
from mlx_distill.errors import DataError
from mlx_distill.records import Batch


def plan_epoch(
    lengths: Sequence[int],
    batch_size: int,
    seed: int,
    epoch: int,
    weights: Sequence[float] | None = None,
    *,
    bucket_batches: int = 64,
    max_padded_tokens: int | None = None,
) -> list[tuple[int, ...]]:
    """The batches of one epoch: every row exactly once, the short last batch included.

    There are as many batches as if each had ``batch_size`` rows, and each has about the same weight: its
    trained tokens. A step of few trained tokens moves the weights as far as one of many, so batches of equal
    counts cost loss where answers are as long as their chats, and batches of equal tokens where all answers
    are of one length. The same (seed, epoch) gives the same plan; no global random state is read or changed.

    Args:
        lengths: Tokens of each row.
        batch_size: Rows of a batch on average, at most.
        seed: Of the run.
        epoch: Counted from 0.
        weights: Trained tokens of each row; by default its length.
        bucket_batches: Batches whose rows are sorted by length together, at most.
        max_padded_tokens: Most tokens of a batch with its padding; by default those of ``2 * batch_size`` of
            the longest rows. The memory of a step grows with them.

    Returns:
        The row numbers of each batch.

    Raises:
        DataError: ``batch_size`` below 1.

    >>> plan = plan_epoch([5, 9, 5, 9, 5, 20], 2, seed=0, epoch=0)
    >>> sorted(row for batch in plan for row in batch), sorted(map(len, plan))
    ([0, 1, 2, 3, 4, 5], [1, 2, 3])
    """
    if batch_size < 1:
        raise DataError(f"batch_size: {batch_size} is below 1", fix="use 1 or more")
    if not len(lengths):
        return []
    generator = np.random.default_rng([seed, epoch])
    shares = _row_shares(lengths, lengths if weights is None else weights)
    if max_padded_tokens is None:
        max_padded_tokens = 2 * batch_size * max(max(lengths), 1)
    batches: list[tuple[int, ...]] = []
    for rows, count in length_buckets(lengths, batch_size, generator, bucket_batches):
        sizes = balanced_batch_sizes([shares[row] for row in rows], count)
        sizes = cap_padding(sizes, [lengths[row] for row in rows], max_padded_tokens)
        remaining = iter(rows)
        batches += [tuple(islice(remaining, size)) for size in sizes]
    batches.sort(key=lambda rows: -lengths[rows[0]])
    return [batches[number] for number in stratified_order(len(batches), generator)]


def _row_shares(lengths: Sequence[int], weights: Sequence[float]) -> list[float]:
    """The weight of each row in the balance of batches: its share of all trained tokens, but at least its
    tokens' share of ``len(lengths)`` longest rows, so that few batches hold many long prompts with short
    answers.
    """
    trained, tokens = np.asarray(weights, dtype=np.float64), np.asarray(lengths, dtype=np.float64)
    of_trained = trained / max(trained.sum(), 1.0)
    of_longest = tokens / max(tokens.max() * len(tokens), 1.0)
    return [float(share) for share in np.maximum(of_trained, of_longest)]


def length_buckets(
    lengths: Sequence[int], batch_size: int, generator: np.random.Generator, bucket_batches: int
) -> Iterator[tuple[list[int], int]]:
    """Step 1: shuffle the rows, divide them into buckets, and sort each bucket by length.

    Sorting puts rows of similar length into one batch, so little is padded. Sorting the whole epoch would
    give the same batches every epoch; inside buckets of up to 64 batches of shuffled rows the neighbours
    change. Buckets hold equal numbers of batches and of rows, so that none is a small remainder.

    Args:
        lengths: Tokens of each row.
        batch_size: Rows of a batch on average, at most.
        generator: Shuffles the rows.
        bucket_batches: Batches of a bucket, at most.

    Yields:
        The rows of a bucket, the longest first, and the number of batches to make of them.
    """
    order = generator.permutation(len(lengths)).tolist()
    batches = batches_per_epoch(len(order), batch_size)
    buckets = batches_per_epoch(batches, bucket_batches)
    for first, end in pairwise(batches * bucket // buckets for bucket in range(buckets + 1)):
        rows = order[len(order) * first // batches : len(order) * end // batches]
        # A stable sort keeps the shuffle among rows of one length.
        rows.sort(key=lambda row: -lengths[row])
        yield rows, end - first


def balanced_batch_sizes(weights: Sequence[float], batches: int) -> list[int]:
    """Step 2: how many consecutive rows each batch takes, so that all batches weigh about the same.

    The rows are laid end to end, each as long as its weight, and the total is divided into equal intervals; a
    row belongs to the interval that holds its middle. Where that leaves a batch empty, it takes one row from
    its neighbours.

    Args:
        weights: Of the rows, none negative.
        batches: How many to make, at least one row each.

    >>> balanced_batch_sizes([9, 5, 4, 3, 3, 2, 2, 1, 1], 4), balanced_batch_sizes([1, 1, 1, 1], 2)
    ([1, 1, 2, 5], [2, 2])
    >>> balanced_batch_sizes([0, 0, 0], 2)
    [1, 2]
    """
    # Rows without weight are divided by their number: each counts a little.
    positive = np.maximum(np.asarray(weights, dtype=np.float64), 1e-9)
    middles = np.cumsum(positive) - positive / 2
    boundaries = positive.sum() * np.arange(1, batches) / batches
    ends = [*np.searchsorted(middles, boundaries).tolist(), len(positive)]
    for number, end in enumerate(ends[:-1]):
        previous = ends[number - 1] if number else 0
        # At least one row for this batch, and one for each batch behind it.
        ends[number] = min(max(end, previous + 1), len(positive) - batches + number + 1)
    return [end - start for start, end in pairwise([0, *ends])]


def cap_padding(sizes: Sequence[int], lengths: Sequence[int], max_padded_tokens: int) -> list[int]:
    """Step 3: move rows between neighbouring batches until no batch is larger than ``max_padded_tokens``: its
    rows times the length of its longest.

    Where lengths have a gap, one batch may hold a few long rows and many short ones, all padded to the
    longest. Such a batch hands its longest rows to the batch before it, as few as will do; where that makes
    the first batch too large, its shortest rows go to those behind it. Sizes within the limit are not
    changed.

    The limit can be met whenever it is at least ``ceil(rows / batches)`` times the longest length.

    Args:
        sizes: Rows of each batch, in the order of ``lengths``; at least one each.
        lengths: Tokens of the rows, the longest first.
        max_padded_tokens: Most tokens of a batch with its padding; at least the longest length, and 1.

    >>> cap_padding([2, 2, 8], [9, 9, 9, 9, 9, 1, 1, 1, 1, 1, 1, 1], 36)
    [2, 3, 7]
    >>> cap_padding([3, 1], [9, 1, 1, 1], 18)
    [2, 2]
    """
    # Where a batch that begins with each row must end at the latest.
    latest_end = np.arange(len(lengths)) + max_padded_tokens // np.maximum(np.asarray(lengths), 1)
    ends = np.cumsum(sizes).tolist()
    # From the last batch to the second: each begins late enough to be within the limit.
    for number in range(len(ends) - 1, 0, -1):
        ends[number - 1] = max(ends[number - 1], int(np.searchsorted(latest_end, ends[number])))
    # From the first batch on: each ends early enough.
    for number, end in enumerate(ends[:-1]):
        ends[number] = min(end, int(latest_end[ends[number - 1] if number else 0]))
    return [end - start for start, end in pairwise([0, *ends])]


def stratified_order(count: int, generator: np.random.Generator) -> list[int]:
    """Step 4: the numbers below ``count`` in a random order in which neighbours differ.

    Each pair of neighbours holds one number of each half, each four one of each quarter, and so on, up to
    rounding: of batches sorted by length, an accumulated optimizer step gets some of every length. Method: a
    random (0, 1)-net in base 2 (Owen, Randomly permuted (t, m, s)-nets and (t, s)-sequences, 1995).

    >>> order = stratified_order(8, np.random.default_rng(0))
    >>> [sorted(number // 4 for number in order[i : i + 2]) for i in (0, 2, 4, 6)]
    [[0, 1], [0, 1], [0, 1], [0, 1]]
    """

    def order(first: int, end: int) -> list[int]:
        if end - first < 2:
            return list(range(first, end))
        middle = (first + end + random_bit()) // 2
        low, high = order(first, middle), order(middle, end)
        unpaired = max(low, high, key=len)[min(len(low), len(high)) :]
        pairs = (pair[::-1] if random_bit() else pair for pair in zip(low, high, strict=False))
        return [*chain.from_iterable(pairs), *unpaired]

    random_bit = iter(generator.integers(0, 2, count * max(count.bit_length(), 1)).tolist()).__next__
    return order(0, count)


def batches_per_epoch(rows: int, batch_size: int) -> int:
    """Batches of an epoch, the short last one included.

    >>> batches_per_epoch(10, 4)
    3
    """
    return -(-rows // batch_size)


def collate(
    dataset: Sequence[TokenizedRow], rows: Sequence[int | Sequence[int]], pad_id: int, multiple: int = 16
) -> Batch:
    """Pad some rows of a data set into one batch, labels shifted; padding is never trained.

    Args:
        dataset: All rows, in a list or in a :class:`~mlx_distill.storage.array_store.Store`.
        rows: The ``b`` row numbers of the batch; those in a tuple share a sequence.
        pad_id: Token to pad with.
        multiple: The width ``l`` is rounded up to a multiple of it, so that few shapes occur.

    Returns:
        ``inputs``, ``labels`` ``[b, l]`` int32 and ``mask`` ``[b, l]`` float32, where ``labels[i, t]`` is the
        token after ``inputs[i, t]``; ``segments`` as :func:`~mlx_distill.data.packing.build_batch` makes it.
    """
    sequences = as_sequences(rows)
    numbers = [row for sequence in sequences for row in sequence]
    return build_batch(
        [[dataset[row] for row in sequence] for sequence in sequences], pad_id, multiple, numbers
    )


class BatchList(Sequence[Batch]):
    """A fixed list of batches that takes no memory: each is collated when it is accessed.

    Args:
        batches: The row numbers of each sequence of each batch.
        collate: Makes a batch of such row numbers.
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
        """One batch, or a shorter list without collating any."""
        if isinstance(number, slice):
            return BatchList(self.batches[number], self.collate)
        return self.collate(self.batches[number])
