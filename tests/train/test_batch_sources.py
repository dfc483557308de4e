"""Sources of micro-batches: what every one of them guarantees."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice

import pytest
from helpers.list_batches import ListBatches
from helpers.tiny_model import collate, make_batches, make_rows

from mlx_distill.errors import DataError
from mlx_distill.train import BatchSource, RowBatches

ROWS = make_rows(10)


def rows(seed: int = 0, rank: int = 0, size: int = 1, count: int = 10) -> RowBatches:
    lengths = [len(mask) for _, mask in ROWS[:count]]
    return RowBatches(lengths, lambda chosen: collate(ROWS, list(chosen)), 3, seed, rank=rank, size=size)


def batches(seed: int = 0, rank: int = 0, size: int = 1, count: int = 10) -> ListBatches:
    return ListBatches(make_batches(ROWS[:count], 3), seed, rank=rank, size=size)


Make = Callable[..., BatchSource]
ALL = pytest.mark.parametrize("make", [rows, batches])


def take(source: BatchSource, count: int) -> list[tuple[int, ...]]:
    return [batch.rows for batch in islice(iter(source), count)]


@ALL
def test_every_row_comes_once_an_epoch_in_another_order_each(make: Make) -> None:
    source = make()
    assert isinstance(source, BatchSource) and len(source) == 4
    first, second = take(source, 4), take(source, 4)
    assert sorted(sum(first, ())) == sorted(sum(second, ())) == list(range(10))
    assert first != second
    assert take(make(), 8) == first + second and take(make(seed=1), 4) != first


@ALL
@pytest.mark.parametrize("done", [0, 1, 3, 4, 9])
def test_a_source_can_be_restored_at_any_position(make: Make, done: int) -> None:
    source, later = make(), make()
    take(source, done)
    later.restore(source.state())
    assert take(later, 7) == take(source, 7)


@ALL
def test_the_state_of_other_data_is_refused(make: Make) -> None:
    for other in (make(seed=1), make(count=6)):
        with pytest.raises(DataError) as caught:
            other.restore(make().state())
        assert caught.value.fix


@ALL
@pytest.mark.parametrize("size", [2, 3])
def test_ranks_share_the_rows_and_have_equally_many_batches(make: Make, size: int) -> None:
    sources = [make(rank=rank, size=size) for rank in range(size)]
    counts = {len(source) for source in sources}
    assert len(counts) == 1
    seen = [batch for source in sources for batch in islice(iter(source), len(source))]
    assert sorted(sum((batch.rows for batch in seen), ())) == list(range(10))
    assert all(batch.mask.sum().item() == 0 for batch in seen if not batch.rows)
    assert len({str(sorted(source.state().items())) for source in sources}) == 1


def test_an_empty_source_is_an_error_with_a_fix() -> None:
    for make in (
        lambda: ListBatches([]),
        lambda: RowBatches([], lambda chosen: collate(ROWS, list(chosen)), 3, 0),
    ):
        with pytest.raises(DataError) as caught:
            make()
        assert caught.value.fix
