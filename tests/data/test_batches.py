from __future__ import annotations

import itertools
import random
from typing import Any

import numpy as np
import pytest

from mlx_distill.data.batches import Position, batches, batches_per_epoch, collate, encode_rows, plan_epoch, walk
from mlx_distill.data.templates import Encoded
from mlx_distill.errors import DataError
from mlx_distill.records import Example, Message


def example(name: str, user: str, answer: str = '{"verdict": "yes"}') -> Example:
    return Example(name, (Message("user", user), Message("assistant", answer)))


def fake(length: int, trained: int, start: int = 0) -> Encoded:
    mask = np.zeros(length, dtype=bool)
    mask[length - trained :] = True
    return Encoded(np.arange(start, start + length, dtype=np.int32), mask, ((length - trained, length - 1),), (0,), f"r{length}")


@pytest.mark.parametrize(("rows", "size"), [(1, 1), (1, 8), (7, 2), (64, 8), (1000, 3), (999, 16)])
def test_every_row_comes_exactly_once_an_epoch(rows: int, size: int) -> None:
    lengths = np.random.default_rng(rows).integers(1, 400, rows).tolist()
    plan = plan_epoch(lengths, size, seed=1, epoch=2)
    assert sorted(itertools.chain(*plan)) == list(range(rows))
    assert len(plan) == batches_per_epoch(rows, size)
    assert sorted(map(len, plan))[1:] == [size] * (len(plan) - 1)


def test_a_plan_depends_on_seed_and_epoch_and_on_nothing_else() -> None:
    lengths = list(range(50))
    plan = plan_epoch(lengths, 4, seed=1, epoch=0)
    np.random.seed(99)
    random.seed(99)
    state = np.random.get_state()[1].copy()  # type: ignore[index,union-attr]
    assert plan_epoch(lengths, 4, seed=1, epoch=0) == plan
    assert np.array_equal(np.random.get_state()[1], state)  # type: ignore[index]
    assert plan_epoch(lengths, 4, seed=1, epoch=1) != plan != plan_epoch(lengths, 4, seed=2, epoch=0)


def test_neighbours_are_of_one_length_so_little_is_padded() -> None:
    lengths = np.random.default_rng(0).integers(10, 500, 2000).tolist()

    def padded(plan: list[tuple[int, ...]]) -> float:
        width = sum(max(lengths[r] for r in rows) * len(rows) for rows in plan)
        return width / sum(lengths) - 1

    order = np.random.default_rng(0).permutation(2000)
    naive = [tuple(order[i : i + 8].tolist()) for i in range(0, 2000, 8)]
    plan = plan_epoch(lengths, 8, seed=0, epoch=0)
    assert padded(plan) < 0.05 < 0.5 < padded(naive)
    firsts = [lengths[rows[0]] for rows in plan]
    assert np.corrcoef(firsts, np.arange(len(firsts)))[0, 1] < 0.2  # the batches themselves are in no order of length


def test_collate_shifts_pads_and_never_trains_a_pad() -> None:
    encoded = [fake(5, 2, start=10), fake(20, 3, start=100), fake(8, 8, start=50)]
    batch = collate(encoded, (2, 0), pad_id=7, multiple=16)
    inputs, labels, mask = (np.array(x) for x in (batch.inputs, batch.labels, batch.mask))
    assert inputs.shape == labels.shape == mask.shape == (2, 16) and batch.rows == (2, 0)
    for place, item in enumerate((encoded[2], encoded[0])):
        n = len(item) - 1
        assert inputs[place, :n].tolist() == item.tokens[:-1].tolist() and labels[place, :n].tolist() == item.tokens[1:].tolist()
        assert mask[place, :n].tolist() == item.mask[1:].tolist()
        assert (inputs[place, n:] == 7).all() and (labels[place, n:] == 7).all() and (mask[place, n:] == 0).all()
    assert labels[1][mask[1] > 0].tolist() == [13, 14]
    assert collate(encoded, (1,), pad_id=0).inputs.shape == (1, 32)
    assert collate(encoded, (1,), pad_id=0, multiple=1).inputs.shape == (1, 19)


def test_padding_changes_no_trained_label() -> None:
    rng = np.random.default_rng(0)
    encoded = [fake(int(n), int(rng.integers(1, n))) for n in rng.integers(2, 60, 40)]
    for rows in plan_epoch([len(e) for e in encoded], 8, seed=0, epoch=0):
        batch = collate(encoded, rows, pad_id=0)
        trained = np.array(batch.labels)[np.array(batch.mask) > 0].tolist()
        assert trained == [token for row in rows for token in encoded[row].tokens[1:][encoded[row].mask[1:]].tolist()]


@pytest.mark.parametrize("stop", [0, 1, 3, 4, 5, 8, 11])
def test_a_walk_goes_on_exactly_where_it_stopped(stop: int) -> None:
    lengths = list(range(10, 27))
    whole = list(itertools.islice(walk(lengths, 4, seed=5), 14))
    position = whole[stop - 1][1] if stop else Position()
    assert list(itertools.islice(walk(lengths, 4, seed=5, position=position), 14 - stop)) == whole[stop:]
    assert [after.epoch for _, after in whole] == [0] * 4 + [1] * 5 + [2] * 5


def test_batches_are_the_walk_collated() -> None:
    encoded = [fake(n, 2) for n in (5, 9, 7)]
    for (batch, after), (rows, expected) in itertools.islice(
        zip(batches(encoded, 2, seed=3, pad_id=0), walk([5, 9, 7], 2, seed=3), strict=False), 5
    ):
        assert batch.rows == rows and after == expected
        assert np.array_equal(np.array(batch.inputs), np.array(collate(encoded, rows, 0).inputs))


def test_rows_that_are_too_long_are_reported_and_left_out(tokenizer: Any) -> None:
    rows = [example("a", "rain"), example("b", "rain " * 300), example("c", "river"), example("d", "x", answer="")]
    encoded, report = encode_rows(rows, tokenizer, max_length=150)
    assert [item.id for item in encoded] == ["a", "c"] and report.kept == (0, 2)
    assert report.too_long == ("b",) and report.nothing_to_train == ("d",) and report.longest > 150
    assert str(report).startswith("2 rows, 1 too long and left out")
    assert all(len(item) <= 150 and item.mask.any() for item in encoded)
    with pytest.raises(DataError, match="none of 1 rows") as caught:
        encode_rows(rows[:1], tokenizer, max_length=5, where="train.jsonl")
    assert "raise max_length" in (caught.value.fix or "")


def test_nothing_to_batch_is_an_error() -> None:
    with pytest.raises(DataError, match="no rows"):
        next(walk([], 4, seed=0))
    with pytest.raises(DataError, match="batch_size"):
        plan_epoch([1], 0, seed=0, epoch=0)
