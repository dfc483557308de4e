"""Evenness: rows cut into batches of about one size, and batches in an order in which each few in a row are alike."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from functools import partial
from itertools import accumulate, chain

import numpy as np


def cut_evenly(lengths: Sequence[int], batches: int) -> list[int]:
    """How many rows each batch takes, the longest first, so that batches are about equally large, pads included.

    A batch takes as many rows as fit the least capacity with which the rows left fill no more than the batches left. So the largest batch
    is as small as any cut of the sorted rows makes it, and each has room for less than one more of its rows, measured by the largest
    of those after it.

    Args:
        lengths: Tokens of each row, falling.
        batches: How many to make; at least one row each.

    >>> cut_evenly([900, 500, 400, 300, 300, 200, 200, 100, 100, 100], 4)
    [1, 2, 3, 4]
    """
    widths = [max(length, 1) for length in lengths]
    rest = [0, *accumulate(reversed(widths))][::-1]
    sizes: list[int] = []
    start, capacity = 0, len(widths) * max(widths, default=1)
    for left in range(batches, 0, -1):
        least = max(widths[start], -(-rest[start] // left))
        fits = partial(_fit, widths, start, left)
        capacity = least + bisect_left(range(least, capacity), True, key=fits)
        sizes.append(min(capacity // widths[start], len(widths) - start))
        start += sizes[-1]
    return sizes


def _fit(widths: Sequence[int], start: int, batches: int, capacity: int) -> bool:
    """Whether the rows from ``start`` on fill no more than so many batches of that capacity."""
    while start < len(widths) and batches:
        start += capacity // widths[start]
        batches -= 1
    return start >= len(widths)


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
