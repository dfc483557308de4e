from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, strategies

from mlx_distill.data.batching import (
    BatchList,
    balanced_batch_sizes,
    batches_per_epoch,
    cap_padding,
    collate,
    plan_epoch,
    stratified_order,
)
from mlx_distill.data.chat import TokenizedRow
from mlx_distill.errors import DataError
from mlx_distill.records import Batch


def fake(length: int, trained: int, start: int = 0) -> TokenizedRow:
    return TokenizedRow(
        np.arange(start, start + length, dtype=np.int32), np.arange(1, length) >= length - trained
    )


CHATS = {
    rows: np.clip(np.random.default_rng(rows).lognormal(5.2, 0.83, rows), 8, 1024).astype(int).tolist()
    for rows in (65, 2000)
}
ALIKE = [*range(97, 101)] * 16


@pytest.mark.slow
@given(
    lengths=strategies.lists(strategies.integers(0, 1024), max_size=200),
    size=strategies.integers(1, 40),
    seed=strategies.integers(0, 9),
    window=strategies.sampled_from([1, 3, 64]),
)
def test_every_row_comes_exactly_once_an_epoch(lengths: list[int], size: int, seed: int, window: int) -> None:
    plan = plan_epoch(lengths, size, seed, epoch=2, bucket_batches=window)
    assert plan == plan_epoch(lengths, size, seed, epoch=2, bucket_batches=window)
    assert sorted(itertools.chain(*plan)) == list(range(len(lengths)))
    assert len(plan) == batches_per_epoch(len(lengths), size) and all(plan)
    # A batch with its padding has at most twice the tokens of ``size`` of the longest rows.
    assert all(padded(lengths, rows) <= 2 * size * max(lengths) for rows in plan)


def padded(lengths: list[int], rows: tuple[int, ...]) -> int:
    return len(rows) * max(lengths[row] for row in rows)


@given(
    weights=strategies.lists(strategies.integers(0, 60), min_size=1, max_size=40),
    share=strategies.floats(0, 1),
)
def test_balanced_sizes_keep_all_rows_and_no_batch_is_heavier_than_its_share_and_one_row(
    weights: list[int], share: float
) -> None:
    count = 1 + int(share * (len(weights) - 1))
    sizes = balanced_batch_sizes(weights, count)
    assert len(sizes) == count and min(sizes) > 0 and sum(sizes) == len(weights)
    starts = [0, *itertools.accumulate(sizes)]
    for start, end in itertools.pairwise(starts):
        # No batch is heavier than its share and one row, unless it has only one.
        assert (
            end - start == 1
            or sum(weights[start:end]) <= sum(weights) / count + max(weights) + 1e-6
            or count == len(weights)
        )


def test_batches_have_equal_numbers_of_trained_tokens() -> None:
    """Answers of one length make batches of equal counts, whatever the prompts; answers as long as their
    chats equal tokens.
    """
    lengths = CHATS[2000]
    assert {len(rows) for rows in plan_epoch(lengths, 8, 0, 0, [30] * 2000)} == {8}
    few = [1] * 1990 + [1000] * 10  # nearly all that is trained is in ten rows
    assert max(padded(lengths, rows) for rows in plan_epoch(lengths, 8, 0, 0, few)) <= 2 * 8 * max(lengths)
    trained = [length // 3 for length in lengths]
    sums = [sum(trained[row] for row in rows) for rows in plan_epoch(lengths, 8, 0, 0, trained)]
    assert np.std(sums) / np.mean(sums) < 0.15


def unbounded(
    lengths: list[int], size: int, seed: int, weights: Sequence[float] | None = None
) -> list[tuple[int, ...]]:
    """The plan without a limit of the tokens of a batch."""
    return plan_epoch(lengths, size, seed, 0, weights, max_padded_tokens=10**9)


@pytest.mark.slow
@given(
    kinds=strategies.lists(
        strategies.tuples(strategies.integers(1, 1024), strategies.integers(1, 150)), min_size=1, max_size=4
    ),
    size=strategies.integers(1, 16),
    seed=strategies.integers(0, 9),
    trained=strategies.sampled_from(
        [lambda n: n, lambda n: n // 3 + 1, lambda n: 2000 // n, lambda n: 1 + (n % 7 == 0) * 500]
    ),
)
def test_gaps_between_lengths_make_no_batch_large(
    kinds: list[tuple[int, int]], size: int, seed: int, trained: Callable[[int], int]
) -> None:
    """A mixture of a few groups of rows, each of about one length, with several shares of trained tokens."""
    lengths = [length + row % 5 for length, count in kinds for row in range(count)]
    weights = [trained(length) for length in lengths]
    plan, free = plan_epoch(lengths, size, seed, 0, weights), unbounded(lengths, size, seed, weights)
    assert sorted(itertools.chain(*plan)) == list(range(len(lengths)))
    assert len(plan) == len(free) == batches_per_epoch(len(lengths), size) and all(plan)
    most = 2 * size * max(lengths)
    assert all(padded(lengths, rows) <= most for rows in plan)
    assert plan == free or max(padded(lengths, rows) for rows in free) > most


@given(
    lengths=strategies.lists(
        strategies.sampled_from([0, 1, 2, 3, 20, 21, 300, 500]), min_size=1, max_size=60
    ),
    share=strategies.floats(0, 1),
    spare=strategies.integers(0, 1000),
    splits=strategies.randoms(use_true_random=False),
)
def test_the_limit_holds_for_any_sizes_and_changes_none_within_it(
    lengths: list[int], share: float, spare: int, splits: random.Random
) -> None:
    lengths, count = sorted(lengths, reverse=True), 1 + int(share * (len(lengths) - 1))
    ends = [0, *sorted(splits.sample(range(1, len(lengths)), count - 1)), len(lengths)]
    sizes = [end - start for start, end in itertools.pairwise(ends)]
    most = batches_per_epoch(len(lengths), count) * max(lengths[0], 1) + spare

    def padded_tokens(sizes: list[int]) -> list[int]:
        return [
            rows * lengths[start]
            for rows, start in zip(sizes, [0, *itertools.accumulate(sizes)], strict=False)
        ]

    capped = cap_padding(sizes, lengths, most)
    assert len(capped) == count and min(capped) > 0 and sum(capped) == len(lengths)
    assert max(padded_tokens(capped)) <= most
    assert capped == sizes or max(padded_tokens(sizes)) > most


@pytest.mark.parametrize("share", [1, 0.3])
def test_a_mixture_of_long_and_short_rows_makes_no_large_batch(share: float) -> None:
    """Half 500 tokens, half 20: eight long rows are 4,000 tokens; without a limit one batch has 25,000 and
    more, and the epoch is padded by 15 %.
    """
    lengths = [500, 20] * 500
    weights = [length * share for length in lengths]
    plan, free = plan_epoch(lengths, 8, 0, 0, weights), unbounded(lengths, 8, 0, weights)
    largest, largest_free = (max(padded(lengths, rows) for rows in batches) for batches in (plan, free))
    assert largest <= 4000 < 6 * 4000 < largest_free
    share_padded, share_free = (
        sum(padded(lengths, rows) for rows in batches) / sum(lengths) for batches in (plan, free)
    )
    assert share_padded < 1.01 < 1.1 < share_free
    sums = [sum(weights[row] for row in rows) for rows in plan]
    assert np.std(sums) / np.mean(sums) < 0.2


@pytest.mark.slow
@pytest.mark.parametrize(
    "lengths", [*CHATS.values(), ALIKE, np.random.default_rng(1).normal(300, 60, 999).astype(int).tolist()]
)
def test_lengths_without_gaps_are_planned_as_without_a_limit(lengths: list[int]) -> None:
    for size, weights in itertools.product(
        (1, 2, 8), (lengths, [30] * len(lengths), [length // 3 for length in lengths])
    ):
        assert plan_epoch(lengths, size, 0, 0, weights) == unbounded(lengths, size, 0, weights)


@pytest.mark.parametrize("rows", CHATS)
def test_batches_have_about_equal_numbers_of_tokens(rows: int) -> None:
    lengths = CHATS[rows]
    tokens = [sum(lengths[row] for row in batch) for batch in plan_epoch(lengths, 8, seed=0, epoch=0)]
    by_count = sorted(lengths)
    uneven = [sum(by_count[i : i + 8]) for i in range(0, rows, 8)]
    assert np.std(tokens) / np.mean(tokens) < 0.15 < 0.6 < np.std(uneven) / np.mean(uneven)
    assert max(padded(lengths, batch) for batch in plan_epoch(lengths, 8, seed=0, epoch=0)) < 0.5 * 8 * max(
        lengths
    )


@pytest.mark.parametrize("count", [0, 1, 2, 3, 37, 64, 100])
def test_neighbours_of_a_stratified_order_come_from_different_parts(count: int) -> None:
    orders = [stratified_order(count, np.random.default_rng(seed)) for seed in range(3)]
    assert all(sorted(order) == list(range(count)) for order in orders)
    assert count < 4 or len(set(map(tuple, orders))) == 3
    for order, size in itertools.product(orders, (2, 4, 8)):
        for start in range(0, count - size + 1, size):
            group = sorted(order[start : start + size])
            # One of each part; the parts differ by rounding.
            assert all(
                abs(number - (i + 0.5) * count / size) <= 0.5 * count / size + 1
                for i, number in enumerate(group)
            )


@pytest.mark.parametrize("size", [1, 8])
def test_steps_of_several_batches_have_about_equal_tokens_and_rows(size: int) -> None:
    lengths = CHATS[2000]
    plan = plan_epoch(lengths, size, seed=0, epoch=0)
    steps = [list(itertools.chain(*plan[start : start + 8])) for start in range(0, len(plan) - 7, 8)]
    tokens = [sum(lengths[row] for row in step) for step in steps]
    assert np.std(tokens) / np.mean(tokens) < 0.15
    assert np.std(list(map(len, steps))) / np.mean(list(map(len, steps))) < 0.2


@pytest.mark.parametrize(
    ("lengths", "size"), [([7] * 64, 8), ([7] * 1000, 4), ([7] * 10, 4), (CHATS[65], 1), (ALIKE, 8), ([9], 8)]
)
def test_rows_of_one_length_make_batches_of_equal_counts(lengths: list[int], size: int) -> None:
    counts = [len(rows) for rows in plan_epoch(lengths, size, seed=3, epoch=1)]
    assert max(counts) - min(counts) == (1 if len(lengths) % size and len(counts) > 1 else 0)


def test_a_plan_depends_on_seed_and_epoch_and_on_nothing_else() -> None:
    lengths = list(range(50))
    plan = plan_epoch(lengths, 4, seed=1, epoch=0)
    np.random.seed(99)
    random.seed(99)
    state = np.random.get_state()[1].copy()  # type: ignore[index,union-attr]
    assert plan_epoch(lengths, 4, seed=1, epoch=0) == plan
    assert np.array_equal(np.random.get_state()[1], state)  # type: ignore[index]
    assert plan_epoch(lengths, 4, seed=1, epoch=1) != plan != plan_epoch(lengths, 4, seed=2, epoch=0)


def test_batches_hold_rows_of_similar_length_so_little_is_padded() -> None:
    lengths = np.random.default_rng(0).integers(10, 500, 2000).tolist()

    def pads(plan: list[tuple[int, ...]]) -> float:
        return sum(padded(lengths, rows) for rows in plan) / sum(lengths) - 1

    order = np.random.default_rng(0).permutation(2000)
    naive = [tuple(order[i : i + 8].tolist()) for i in range(0, 2000, 8)]
    plan = plan_epoch(lengths, 8, seed=0, epoch=0)
    assert pads(plan) < 0.05 < 0.5 < pads(naive)
    firsts = [lengths[rows[0]] for rows in plan]
    assert (
        np.corrcoef(firsts, np.arange(len(firsts)))[0, 1] < 0.2
    )  # the batches themselves are in no order of length


def test_collate_shifts_labels_and_never_trains_padding() -> None:
    tokenized = [fake(5, 2, start=10), fake(20, 3, start=100), fake(8, 8, start=50)]
    batch = collate(tokenized, (2, 0), pad_id=7, multiple=16)
    inputs, labels, mask = (np.array(x) for x in (batch.inputs, batch.labels, batch.mask))
    assert inputs.shape == labels.shape == mask.shape == (2, 16) and batch.rows == (2, 0)
    for line, item in enumerate((tokenized[2], tokenized[0])):
        n = len(item.tokens) - 1
        assert (
            inputs[line, :n].tolist() == item.tokens[:-1].tolist()
            and labels[line, :n].tolist() == item.tokens[1:].tolist()
        )
        assert mask[line, :n].tolist() == item.trained.tolist()
        assert (inputs[line, n:] == 7).all() and (labels[line, n:] == 7).all() and (mask[line, n:] == 0).all()
    assert labels[1][mask[1] > 0].tolist() == [13, 14]
    assert collate(tokenized, (1,), pad_id=0).inputs.shape == (1, 32)
    assert collate(tokenized, (1,), pad_id=0, multiple=1).inputs.shape == (1, 19)


def test_padding_changes_no_trained_label() -> None:
    rng = np.random.default_rng(0)
    tokenized = [fake(int(n), int(rng.integers(1, n))) for n in rng.integers(2, 60, 40)]
    for rows in plan_epoch([len(piece.tokens) for piece in tokenized], 8, seed=0, epoch=0):
        batch = collate(tokenized, rows, pad_id=0)
        trained = np.array(batch.labels)[np.array(batch.mask) > 0].tolist()
        assert trained == [
            token for row in rows for token in tokenized[row].tokens[1:][tokenized[row].trained].tolist()
        ]


def test_a_list_of_batches_collates_each_when_it_is_accessed() -> None:
    rows, made = [fake(n, 2) for n in (5, 9, 7, 6, 8)], []

    def make(sequences: Sequence[Sequence[int]]) -> Batch:
        made.append(sequences)
        return collate(rows, sequences, 0)

    batches = BatchList([[(0,), (1,)], [(2, 3)], [(4,)]], make)
    assert len(batches) == 3 and len(batches[1::2]) == 1 and not made
    assert [batch.rows for batch in batches] == [(0, 1), (2, 3), (4,)] and [
        batch.rows for batch in batches[1::2]
    ] == [(2, 3)]
    assert batches[-1].rows == (4,) and len(made) == 5


def test_nothing_to_batch_is_an_error() -> None:
    assert plan_epoch([], 4, seed=0, epoch=0) == []
    with pytest.raises(DataError, match="batch_size"):
        plan_epoch([1], 0, seed=0, epoch=0)
