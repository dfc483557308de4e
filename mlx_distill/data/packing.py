"""Sequence packing: several rows side by side in one sequence of a batch, so that little is padded whatever
the rows' lengths are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_distill.data.chat import TokenizedRow
from mlx_distill.errors import DataError
from mlx_distill.records import Batch

_WINDOW = 1024  # rows that are packed together
_WIDTHS = 8  # different widths of packed batches, at most


def pack_rows(lengths: Sequence[int], capacity: int, seed: int) -> list[tuple[int, ...]]:
    """Distribute rows over sequences, each row once: first fit, longest first, inside windows of 1,024 rows
    of a shuffled order.

    Rows are packed once a run, so that every epoch has the same number of sequences and a learning-rate
    schedule knows its length; the order of the sequences changes with the epoch. The same seed gives the same
    sequences; no global random state is read or changed. Method: first fit decreasing (Johnson, Near-optimal
    bin packing algorithms, MIT 1973).

    Args:
        lengths: Tokens that each row takes in a sequence.
        capacity: Tokens of a sequence.
        seed: Of the run.

    Returns:
        The row numbers of each sequence.

    Raises:
        DataError: a row is longer than a sequence.

    >>> sorted(map(sorted, pack_rows([6, 3, 4, 7], 10, seed=0)))
    [[0, 2], [1, 3]]
    """
    if lengths and max(lengths) > capacity:
        raise DataError(
            f"a row of {max(lengths)} tokens does not fit a sequence of {capacity}", fix="raise max_length"
        )
    # A random stream of its own, independent of the one that orders an epoch.
    order = np.random.default_rng([seed, 0x7AC4]).permutation(len(lengths)).tolist()
    sequences: list[tuple[int, ...]] = []
    for start in range(0, len(order), _WINDOW):
        # A stable sort keeps the shuffle among rows of one length.
        window = sorted(order[start : start + _WINDOW], key=lambda row: -lengths[row])
        sequences += _first_fit(window, lengths, capacity)
    return sequences


def _first_fit(rows: Sequence[int], lengths: Sequence[int], capacity: int) -> list[tuple[int, ...]]:
    """Put each row into the first sequence that has room for it."""
    free = np.full(len(rows), capacity)
    sequences: list[list[int]] = []
    for row in rows:
        number = int(np.argmax(free >= lengths[row]))
        if number == len(sequences):
            sequences.append([])
        sequences[number].append(row)
        free[number] -= lengths[row]
    return [tuple(sequence) for sequence in sequences]


@dataclass(frozen=True)
class SequencePlan:
    """The rows of each sequence of a training: several where they are packed, else one.

    ``rows[i]`` are the numbers of the rows of sequence i; ``lengths[i]`` its tokens; ``multiple`` what the
    width of a batch is rounded up to.
    """

    rows: Sequence[tuple[int, ...]]
    lengths: Sequence[int]
    multiple: int

    def rows_of(self, sequences: Sequence[int]) -> list[tuple[int, ...]]:
        """The row numbers of the given sequences, one tuple a sequence."""
        return [self.rows[sequence] for sequence in sequences]

    def sum_rows(self, values: Sequence[int]) -> list[int]:
        """A value of each row (such as its trained tokens) summed over the rows of each sequence."""
        return [sum(values[row] for row in sequence) for sequence in self.rows]

    def fill_ratio(self, capacity: int) -> float:
        """The share of the tokens of all sequences, at ``capacity`` tokens each, that holds rows."""
        return sum(self.lengths) / (capacity * max(len(self.lengths), 1))


def plan_sequences(
    lengths: Sequence[int], capacity: int, seed: int, packing: bool, *, few_widths: bool = False
) -> SequencePlan:
    """Sequences of packed rows, or of one row each.

    Args:
        lengths: Tokens of each row. In a sequence it takes one less, because its last token is only a label.
        capacity: Tokens of a sequence, where rows are packed.
        seed: Of the packing.
        packing: Whether rows share sequences; batches have few different widths then.
        few_widths: Whether batches have few different widths without packing too, because each width of a
            compiled step costs a trace.
    """
    inputs = [length - 1 for length in lengths]
    rows = pack_rows(inputs, capacity, seed) if packing else [(row,) for row in range(len(lengths))]
    multiple = -(-capacity // (16 * _WIDTHS)) * 16 if packing or few_widths else 16
    return SequencePlan(rows, [sum(inputs[row] for row in sequence) for sequence in rows], multiple)


def as_sequences(rows: Sequence[int | Sequence[int]]) -> list[tuple[int, ...]]:
    """Row numbers, or tuples of those that share a sequence, as one tuple a sequence.

    >>> as_sequences([4, (1, 2)])
    [(4,), (1, 2)]
    """
    return [tuple(map(int, row)) if isinstance(row, Sequence) else (int(row),) for row in rows]


def build_batch(
    sequences: Sequence[Sequence[TokenizedRow]], pad_id: int, multiple: int = 16, rows: Sequence[int] = ()
) -> Batch:
    """Concatenate the rows of each sequence and pad on the right, with the labels shifted inside each row;
    padding is never trained.

    Args:
        sequences: The rows of each of the ``b`` sequences.
        pad_id: Token to pad with.
        multiple: The width ``l`` is rounded up to a multiple of it, so that few shapes occur.
        rows: The rows' numbers in the data set, in the same order.

    Returns:
        ``inputs``, ``labels``, ``mask`` ``[b, l]``, and ``segments`` where some sequence holds several rows:
        1, 2, ... in a sequence, 0 for padding.
    """
    width = max(sum(len(row.trained) for row in sequence) for sequence in sequences)
    shape = (len(sequences), max(-(-width // multiple) * multiple, 1))
    inputs, labels = np.full(shape, pad_id, dtype=np.int32), np.full(shape, pad_id, dtype=np.int32)
    mask, segments = np.zeros(shape, dtype=np.float32), np.zeros(shape, dtype=np.int32)
    for i, sequence in enumerate(sequences):
        start = 0
        for number, row in enumerate(sequence, 1):
            columns = slice(start, start + len(row.trained))
            inputs[i, columns], labels[i, columns] = row.tokens[:-1], row.tokens[1:]
            mask[i, columns], segments[i, columns] = row.trained, number
            start = columns.stop
    packed = mx.array(segments) if any(len(sequence) > 1 for sequence in sequences) else None
    return Batch(mx.array(inputs), mx.array(labels), mx.array(mask), tuple(rows), segments=packed)
