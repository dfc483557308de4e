from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from mlx_distill.data.dedup import hash64
from mlx_distill.data.splits import DROPPED, FREE, TEST, TRAIN, VALID, draw, settle_forced


def random_rows(
    seed: int, count: int = 600, clustered: float = 0.2
) -> tuple[np.ndarray, np.ndarray, list[tuple[str, ...]]]:
    rng = np.random.default_rng(seed)
    roots = np.arange(count)
    for row in range(1, count):
        if rng.random() < clustered:
            roots[row] = roots[rng.integers(0, row)]
    order = rng.integers(0, 2**64, count, dtype=np.uint64)
    strata = [
        (
            str(rng.choice(["yes", "no", "rare"], p=[0.6, 0.35, 0.05])),
            str(rng.choice(["folk", "pop", "jazz"])),
        )
        for _ in range(count)
    ]
    return roots, order, strata


def free(count: int) -> np.ndarray:
    return np.full(count, FREE, dtype=np.int8)


@pytest.mark.parametrize("seed", range(5))
def test_clusters_stay_together_and_the_shares_are_met(seed: int) -> None:
    roots, order, strata = random_rows(seed)
    side = draw(roots, free(600), order, strata, valid_fraction=0.1, test_fraction=0.2, seed=seed)
    assert (side == side[roots]).all()
    largest = np.bincount(roots).max()
    assert abs((side == TEST).sum() - 120) <= largest and abs((side == VALID).sum() - 60) <= largest


def test_each_stratum_gives_its_share() -> None:
    roots, order, strata = random_rows(0, clustered=0)
    side = draw(roots, free(600), order, strata, valid_fraction=0.1, test_fraction=0.2, seed=0)
    total, test, valid = (
        Counter(s for s, x in zip(strata, side, strict=True) if x in which)
        for which in ([0, 1, 2], [TEST], [VALID])
    )
    for stratum, count in total.items():
        assert abs(test[stratum] - 0.2 * count) <= 1 and abs(valid[stratum] - 0.1 * count) <= 1
    assert sum(test.values()) == 120 and sum(valid.values()) == 60


def test_strata_too_small_for_a_row_of_their_own_still_give_the_total() -> None:
    strata = [(f"label{i % 2}", f"genre{i}") for i in range(100)]
    order = np.random.default_rng(0).integers(0, 2**64, 100, dtype=np.uint64)
    side = draw(np.arange(100), free(100), order, strata, valid_fraction=0.05, test_fraction=0.2, seed=0)
    assert (side == TEST).sum() == 20 and (side == VALID).sum() == 5
    assert sum(side[i] == TEST for i in range(0, 100, 2)) == 10


def test_the_draw_does_not_depend_on_the_order_of_the_rows() -> None:
    roots, order, strata = random_rows(3)
    settings = {"valid_fraction": 0.1, "test_fraction": 0.2, "seed": 7}
    side = draw(roots, free(600), order, strata, **settings)
    shuffle = np.random.default_rng(0).permutation(600)
    place = np.argsort(shuffle)
    moved = place[roots[shuffle]]
    again = draw(moved, free(600), order[shuffle], [strata[i] for i in shuffle], **settings)
    assert np.array_equal(again, side[shuffle])
    other = draw(roots, free(600), order, strata, **{**settings, "seed": 8})
    assert not np.array_equal(other, side)


def test_held_out_wins_and_the_free_follow_their_cluster() -> None:
    roots = np.array([0, 0, 0, 3, 3, 3, 6, 6, 8])
    forced = np.array([TRAIN, TEST, FREE, VALID, TRAIN, FREE, TRAIN, FREE, FREE], dtype=np.int8)
    assert settle_forced(roots, forced).tolist() == [
        DROPPED,
        TEST,
        TEST,
        VALID,
        DROPPED,
        VALID,
        TRAIN,
        TRAIN,
        FREE,
    ]


def test_a_validation_row_gives_way_to_a_test_row() -> None:
    assert settle_forced(np.array([0, 0]), np.array([VALID, TEST], dtype=np.int8)).tolist() == [DROPPED, TEST]


def test_settled_rows_do_not_count_in_the_shares() -> None:
    side = np.array([TEST] * 50 + [FREE] * 50, dtype=np.int8)
    order = np.random.default_rng(0).integers(0, 2**64, 100, dtype=np.uint64)
    out = draw(np.arange(100), side, order, [("a",)] * 100, valid_fraction=0.2, test_fraction=0.0, seed=0)
    assert (out[:50] == TEST).all() and (out[50:] == VALID).sum() == 10 and (out[50:] == TRAIN).sum() == 40


def plain_draw(roots: np.ndarray, order: np.ndarray, strata: list[tuple[str, ...]], seed: int) -> np.ndarray:
    """One cluster after the other, as it is said."""
    queues: dict[tuple[str, ...], list[tuple[int, list[int]]]] = {}
    for root in sorted(set(roots.tolist())):
        rows = np.flatnonzero(roots == root).tolist()
        first = min(rows, key=lambda row: int(order[row]))
        queues.setdefault(strata[first], []).append((hash64(f"{seed}:{int(order[first])}"), rows))
    out = free(len(roots))
    for target, fraction in ((TEST, 0.2), (VALID, 0.1)):
        wanted, taken = 0.0, 0
        for stratum in sorted(queues):
            wanted += fraction * sum(len(rows) for _, rows in queues[stratum])
            for _, rows in sorted(queues[stratum], key=lambda entry: entry[0]):
                if out[rows[0]] == FREE and wanted - taken >= len(rows) / 2:
                    out[rows] = target
                    taken += len(rows)
    out[out == FREE] = TRAIN
    return out


@pytest.mark.parametrize("seed", range(4))
def test_the_draw_is_the_plain_one(seed: int) -> None:
    roots, order, strata = random_rows(seed, clustered=0.5)
    for row in range(1, len(roots)):  # a root is its cluster's first row
        roots[row] = roots[roots[row]]
    drawn = draw(roots, free(600), order, strata, valid_fraction=0.1, test_fraction=0.2, seed=seed)
    assert np.array_equal(drawn, plain_draw(roots, order, strata, seed))
    settled = free(600)
    settled[roots == 0] = TEST
    rest = roots != 0
    found = draw(roots, settled, order, strata, valid_fraction=0.1, test_fraction=0.2, seed=seed)
    assert (found[~rest] == TEST).all()
    _, renumbered = np.unique(roots[rest], return_inverse=True)
    first = np.array([np.flatnonzero(renumbered == number)[0] for number in range(renumbered.max() + 1)])
    strata = [stratum for stratum, kept in zip(strata, rest, strict=True) if kept]
    assert np.array_equal(found[rest], plain_draw(first[renumbered], order[rest], strata, seed))
