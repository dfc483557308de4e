from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from mlx_distill.data.batching import plan_epoch
from mlx_distill.data.chat import TokenizedRow
from mlx_distill.data.packing import build_batch, pack_rows, plan_sequences
from mlx_distill.errors import DataError


def log_normal(rows: int, longest: int = 1024, seed: int = 0) -> list[int]:
    """Lengths of chats: median 180 tokens, 95th percentile 700."""
    lengths = np.exp(np.random.default_rng(seed).normal(np.log(180), np.log(700 / 180) / 1.645, rows))
    return np.clip(lengths, 8, longest).astype(int).tolist()


@pytest.mark.parametrize(("rows", "capacity"), [(1, 64), (7, 64), (64, 300), (1500, 64), (3000, 512)])
def test_every_row_is_in_exactly_one_sequence_and_no_sequence_is_too_long(rows: int, capacity: int) -> None:
    sizes = np.random.default_rng(rows).integers(1, capacity + 1, rows).tolist()
    packed = pack_rows(sizes, capacity, seed=1)
    assert sorted(itertools.chain(*packed)) == list(range(rows))
    assert all(sequence and sum(sizes[row] for row in sequence) <= capacity for sequence in packed)


def test_packing_equals_a_plain_first_fit_decreasing() -> None:
    random_ = np.random.default_rng(3)
    for _ in range(20):
        sizes = random_.integers(1, 30, 60).tolist()
        plain: list[int] = []
        for size in sorted(sizes, reverse=True):
            place = next((i for i, used in enumerate(plain) if used + size <= 40), None)
            if place is None:
                plain.append(size)
            else:
                plain[place] += size
        assert sorted(
            sum(sizes[row] for row in sequence) for sequence in pack_rows(sizes, 40, seed=5)
        ) == sorted(plain)


def test_sequences_depend_on_the_seed_and_on_nothing_else() -> None:
    sizes = log_normal(300)
    packed = pack_rows(sizes, 1024, seed=1)
    np.random.seed(99)
    random.seed(99)
    assert pack_rows(sizes, 1024, seed=1) == packed != pack_rows(sizes, 1024, seed=2)


def test_sequences_are_full_and_the_rows_that_share_one_are_random() -> None:
    lengths = log_normal(8000)
    plan = plan_sequences(lengths, 1024, 0, True)
    assert plan.fill_ratio(1024) > 0.97
    assert sum(plan.lengths) == sum(lengths) - len(lengths)
    other = {row: sequence for sequence in plan_sequences(lengths, 1024, 1, True).rows for row in sequence}
    shared = [len({*sequence} & {*other[row]}) > 1 for sequence in plan.rows for row in sequence]
    assert np.mean(shared) < 0.25
    # Rows that share a sequence are not neighbours in the data.
    assert np.corrcoef(*np.array([sequence[:2] for sequence in plan.rows if len(sequence) > 1]).T)[0, 1] < 0.1


def test_few_widths_and_little_padding() -> None:
    lengths = log_normal(3000, longest=1000)
    widths, padded = set(), 0
    plan = plan_sequences(lengths, 1000, 0, True)
    tokenized = [TokenizedRow(np.zeros(n, np.int32), np.ones(n - 1, bool)) for n in lengths]
    for chosen in plan_epoch(plan.lengths, 4, seed=0, epoch=0):
        batch = build_batch(
            [[tokenized[row] for row in sequence] for sequence in plan.rows_of(chosen)], 0, plan.multiple
        )
        widths.add(batch.inputs.shape[1])
        padded += batch.inputs.size
    assert len(widths) <= 8 and max(widths) <= 1024
    assert padded < 1.05 * sum(plan.lengths)


def test_without_packing_each_row_is_a_sequence() -> None:
    plan = plan_sequences([5, 9, 2], 100, 0, False)
    assert plan.rows == [(0,), (1,), (2,)] and plan.lengths == [4, 8, 1] and plan.multiple == 16
    assert plan.rows_of([2, 0]) == [(2,), (0,)]


def test_a_row_longer_than_a_sequence_is_an_error() -> None:
    with pytest.raises(DataError, match="a row of 12 tokens") as caught:
        pack_rows([3, 12], 10, seed=0)
    assert caught.value.fix
    assert pack_rows([], 10, seed=0) == []


def test_packed_rows_have_labels_and_segments_of_their_own() -> None:
    tokenized = [
        TokenizedRow(np.arange(10 * i, 10 * i + n, dtype=np.int32), np.arange(n - 1) % 2 == 1)
        for i, n in enumerate([4, 2, 6])
    ]
    batch = build_batch([[tokenized[2], tokenized[0]], [tokenized[1]]], pad_id=99, multiple=4, rows=[2, 0, 1])
    inputs, labels, mask, segments = (
        np.array(a) for a in (batch.inputs, batch.labels, batch.mask, batch.segments)
    )
    assert batch.rows == (2, 0, 1)
    assert inputs.tolist() == [[20, 21, 22, 23, 24, 0, 1, 2], [10] + [99] * 7]
    assert labels.tolist() == [[21, 22, 23, 24, 25, 1, 2, 3], [11] + [99] * 7]
    assert mask.tolist() == [[0, 1, 0, 1, 0, 0, 1, 0], [0] * 8]
    assert segments.tolist() == [[1, 1, 1, 1, 1, 2, 2, 2], [1] + [0] * 7]
    assert build_batch([[tokenized[2]], [tokenized[1]]], 99).segments is None  # the plain mask does
