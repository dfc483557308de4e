"""Rows to lines: several rows side by side in one line of a batch, so that little is padded whatever the
lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from jaxtyping import Bool, Int

from mlx_distill.errors import DataError
from mlx_distill.records import Batch

_WINDOW = 1024  # rows that are packed together
_WIDTHS = 8  # widths of packed batches, at most


def pack_rows(sizes: Sequence[int], capacity: int, seed: int) -> list[tuple[int, ...]]:
    """Lines that hold every row exactly once: first fit, longest first, inside windows of 1,024 rows of a
    shuffled order.

    Packed once a run, so that each epoch has as many lines and a schedule knows its length; the lines' order
    is new each epoch. The same seed gives the same lines; no global random state is read or changed. Method:
    first fit decreasing (Johnson, Near-optimal bin packing algorithms, MIT 1973).

    Args:
        sizes: Places that each row takes in a line.
        capacity: Places of a line.
        seed: Of the run.

    Raises:
        DataError: a row is larger than a line.

    >>> sorted(map(sorted, pack_rows([6, 3, 4, 7], 10, seed=0)))
    [[0, 2], [1, 3]]
    """
    if sizes and max(sizes) > capacity:
        raise DataError(
            f"a row of {max(sizes)} places does not fit a line of {capacity}", fix="raise max_length"
        )
    # A stream of its own, apart from those of the epochs' orders.
    order = np.random.default_rng([seed, 0x7AC4]).permutation(len(sizes))
    lines: list[tuple[int, ...]] = []
    for start in range(0, len(order), _WINDOW):
        # A stable sort keeps the shuffle among rows of one length.
        lines += _first_fit(
            sorted(order[start : start + _WINDOW].tolist(), key=lambda row: -sizes[row]), sizes, capacity
        )
    return lines


def _first_fit(rows: Sequence[int], sizes: Sequence[int], capacity: int) -> list[tuple[int, ...]]:
    free = np.full(len(rows), capacity)
    taken: list[list[int]] = []
    for row in rows:
        place = int(np.argmax(free >= sizes[row]))
        if place == len(taken):
            taken.append([])
        taken[place].append(row)
        free[place] -= sizes[row]
    return [tuple(line) for line in taken]


@dataclass(frozen=True)
class PackPlan:
    """How the rows of a training stand in lines.

    ``rows[i]`` are the numbers of the rows of line i; ``sizes[i]`` its tokens; ``multiple`` what the width of
    a batch is rounded up to.
    """

    rows: Sequence[tuple[int, ...]]
    sizes: Sequence[int]
    multiple: int

    def batch(self, lines: Sequence[int]) -> list[tuple[int, ...]]:
        """The rows of some lines, line by line."""
        return [self.rows[line] for line in lines]

    def weigh(self, weights: Sequence[int]) -> list[int]:
        """What each line weighs, of what its rows do."""
        return [sum(weights[row] for row in line) for line in self.rows]

    def fill(self, capacity: int) -> float:
        """Which share of all lines' places is taken."""
        return sum(self.sizes) / (capacity * max(len(self.sizes), 1))


def make_lines(
    lengths: Sequence[int], capacity: int, seed: int, packing: bool, *, few_widths: bool = False
) -> PackPlan:
    """Lines of packed rows, or of one row each.

    Args:
        lengths: Tokens of each row; it takes one place less, since its last token is only predicted.
        capacity: Places of a line, where rows are packed.
        seed: Of the packing.
        packing: Whether rows share lines; the widths are few then.
        few_widths: Whether they are few also where each row has a line of its own, because each costs a
            trace.
    """
    sizes = [length - 1 for length in lengths]
    rows = pack_rows(sizes, capacity, seed) if packing else [(row,) for row in range(len(lengths))]
    multiple = -(-capacity // (16 * _WIDTHS)) * 16 if packing or few_widths else 16
    return PackPlan(rows, [sum(sizes[row] for row in line) for line in rows], multiple)


@dataclass(frozen=True)
class Piece:
    """One row as it enters a batch: ``tokens [n]``, and for each token but the first whether it is trained,
    ``trained [n - 1]``.
    """

    tokens: Int[np.ndarray, " n"]
    trained: Bool[np.ndarray, " m"]


def as_lines(rows: Sequence[int | Sequence[int]]) -> list[tuple[int, ...]]:
    """Row numbers, each alone or several that share a line, as lines.

    >>> as_lines([4, (1, 2)])
    [(4,), (1, 2)]
    """
    return [tuple(map(int, row)) if isinstance(row, Sequence) else (int(row),) for row in rows]


def lay_out(
    lines: Sequence[Sequence[Piece]], pad_id: int, multiple: int = 16, rows: Sequence[int] = ()
) -> Batch:
    """Pieces side by side in lines, padded on the right, labels shifted inside each piece; a pad is never
    trained.

    Args:
        lines: ``b`` lines of pieces.
        pad_id: Token to fill with.
        multiple: The width ``l`` is rounded up to a multiple of it, so that few shapes occur.
        rows: The pieces' numbers in the data, in the order of the lines.

    Returns:
        ``inputs``, ``labels``, ``mask`` ``[b, l]``, and ``segments`` where some line holds two pieces: 1, 2,
        ... in a line, 0 the padding.
    """
    width = max(sum(len(piece.trained) for piece in line) for line in lines)
    shape = (len(lines), max(-(-width // multiple) * multiple, 1))
    inputs, labels = np.full(shape, pad_id, dtype=np.int32), np.full(shape, pad_id, dtype=np.int32)
    mask, segments = np.zeros(shape, dtype=np.float32), np.zeros(shape, dtype=np.int32)
    for i, line in enumerate(lines):
        start = 0
        for number, piece in enumerate(line, 1):
            here = slice(start, start + len(piece.trained))
            inputs[i, here], labels[i, here] = piece.tokens[:-1], piece.tokens[1:]
            mask[i, here], segments[i, here] = piece.trained, number
            start = here.stop
    packed = mx.array(segments) if any(len(line) > 1 for line in lines) else None
    return Batch(mx.array(inputs), mx.array(labels), mx.array(mask), tuple(rows), segments=packed)
