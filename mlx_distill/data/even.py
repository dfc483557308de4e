"""Evenness: rows cut into batches of about one weight and bounded width, in an order in which each few in a row are alike."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, pairwise

import numpy as np


def cut_evenly(weights: Sequence[float], batches: int) -> list[int]:
    """How many rows in a row each batch takes, so that all weigh about as much: a row goes where its middle falls.

    Args:
        weights: Of the rows, none negative.
        batches: How many to make; at least one row each.

    >>> cut_evenly([9, 5, 4, 3, 3, 2, 2, 1, 1], 4), cut_evenly([1, 1, 1, 1], 2), cut_evenly([0, 0, 0], 2)
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


def bound_places(sizes: Sequence[int], lengths: Sequence[int], most: int) -> list[int]:
    """How many rows in a row each batch takes, so that none takes more than ``most`` places: its rows times the length of its longest.

    Where lengths have a gap, a batch that reaches across it holds a few long rows and many short ones, all padded to the long. Its longest
    rows go to the batch before, as few as will do; where that makes the first one too large, its shortest go to those after it. A cut
    that is within the bound is not changed. The bound holds wherever it can with so many batches, and it can where ``most`` is at least
    ``ceil(rows / batches)`` times the longest length.

    Args:
        sizes: Rows of each batch, in the order of ``lengths``; at least one each.
        lengths: Of the rows in tokens, the longest first.
        most: Places of a batch, at least the longest length, and 1.

    >>> bound_places([2, 2, 8], [9, 9, 9, 9, 9, 1, 1, 1, 1, 1, 1, 1], 36), bound_places([3, 1], [9, 1, 1, 1], 18)
    ([2, 3, 7], [2, 2])
    """
    reach = np.arange(len(lengths)) + most // np.maximum(np.asarray(lengths), 1)  # where a batch from each row on ends at the latest
    ends = np.cumsum(sizes).tolist()
    for number in range(len(ends) - 1, 0, -1):  # from the last to the first: each begins where it is within the bound
        ends[number - 1] = max(ends[number - 1], int(np.searchsorted(reach, ends[number])))
    for number, end in enumerate(ends[:-1]):  # and, for the first, ends there
        ends[number] = min(end, int(reach[ends[number - 1] if number else 0]))
    return [end - start for start, end in pairwise([0, *ends])]


def spread(count: int, generator: np.random.Generator) -> list[int]:
    """The numbers below ``count`` in a random order in which neighbours differ: the first two hold one of each half, and so do the next
    two; the first four hold one of each quarter, and so on, up to rounding.

    Of batches from long rows to short ones, an optimizer step gets some of each kind so. Method: a random (0, 1)-net in base 2 (Owen,
    Randomly permuted (t, m, s)-nets and (t, s)-sequences, 1995).

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
