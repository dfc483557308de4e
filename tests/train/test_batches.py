"""Micro-batches from rows: every row once an epoch, shared among ranks without gap or double, restored
exactly.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import pytest

from mlx_distill.errors import DataError
from mlx_distill.records import Batch
from mlx_distill.train.batches import BatchSource, RowBatches

LENGTHS = [5 + (7 * i) % 23 for i in range(37)]


def collate(rows: Sequence[int]) -> Batch:
    shape = (len(rows), max(LENGTHS[r] for r in rows))
    return Batch(mx.zeros(shape, mx.int32), mx.zeros(shape, mx.int32), mx.ones(shape), tuple(rows))


def source(rows: int = 4, seed: int = 0, **more: int | str) -> RowBatches:
    return RowBatches(LENGTHS, collate, rows, seed, **more)  # type: ignore[arg-type]


def epoch(batches: RowBatches) -> list[tuple[int, ...]]:
    return [next(batches).rows for _ in range(len(batches))]


@pytest.mark.parametrize("size", [1, 4, 37, 50])
def test_every_row_once_an_epoch_in_another_order_each_time(size: int) -> None:
    batches = source(size)
    assert isinstance(batches, BatchSource) and iter(batches) is batches
    epochs = [epoch(batches) for _ in range(3)]
    for found in epochs:
        assert sorted(row for rows in found for row in rows) == list(range(37))
        assert len(found) == len(batches) == -(-37 // size)
    if size < 37:
        assert epochs[0] != epochs[1] != epochs[2]


def test_the_seed_determines_the_order() -> None:
    assert epoch(source(seed=3)) == epoch(source(seed=3)) != epoch(source(seed=4))


@pytest.mark.parametrize("size", [2, 3, 7])
def test_ranks_share_an_epoch_and_all_have_a_batch_at_every_step(size: int) -> None:
    ranks = [source(rank=rank, size=size) for rank in range(size)]
    alone = source()
    for _ in range(2):
        found = [[next(rank) for _ in range(len(rank))] for rank in ranks]
        assert len({len(part) for part in found}) == 1
        real = [batch.rows for step in zip(*found, strict=True) for batch in step if batch.rows]
        assert real == epoch(alone)  # step by step the same rows as one rank alone
        for batch in (b for part in found for b in part):
            assert bool(batch.rows) == bool(mx.any(batch.mask > 0).item()) and batch.inputs.size > 0
    assert len({str(rank.state()) for rank in ranks}) == 1


@pytest.mark.parametrize("stop", [0, 3, 9, 10, 11, 25])
def test_a_restored_source_continues_with_the_next_batch(stop: int) -> None:
    batches = source(rank=1, size=2)
    for _ in range(stop):
        next(batches)
    other = source(rank=1, size=2)
    other.restore(batches.state())
    assert other.state() == batches.state()
    assert [next(other).rows for _ in range(12)] == [next(batches).rows for _ in range(12)]


@pytest.mark.parametrize("change", [{"seed": 1}, {"identity": "other"}])
def test_the_state_of_other_rows_is_refused(change: dict) -> None:
    with pytest.raises(DataError, match="other rows") as caught:
        source(**change).restore(source().state())
    assert caught.value.fix
    with pytest.raises(DataError, match="other rows"):
        source().restore({**source().state(), "rows": 36})


def test_no_rows_is_an_error_with_a_fix() -> None:
    with pytest.raises(DataError, match="no rows") as caught:
        RowBatches([], collate, 4, 0)
    assert "max_length" in (caught.value.fix or "")
