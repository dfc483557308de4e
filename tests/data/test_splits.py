from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from mlx_distill.data.dedup import hash64
from mlx_distill.data.splits import (
    DROPPED,
    TEST,
    TRAIN,
    UNASSIGNED,
    VALID,
    assign_requested,
    draw_folds,
    draw_splits,
    merge_clusters,
    take_share,
)
from mlx_distill.errors import DataError


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


def unassigned(count: int) -> np.ndarray:
    return np.full(count, UNASSIGNED, dtype=np.int8)


@pytest.mark.parametrize("seed", range(5))
def test_clusters_stay_together_and_the_shares_are_met(seed: int) -> None:
    roots, order, strata = random_rows(seed)
    splits = draw_splits(
        roots, unassigned(600), order, strata, valid_fraction=0.1, test_fraction=0.2, seed=seed
    )
    assert (splits == splits[roots]).all()
    largest = np.bincount(roots).max()
    assert abs((splits == TEST).sum() - 120) <= largest and abs((splits == VALID).sum() - 60) <= largest


def test_each_stratum_gives_its_share() -> None:
    roots, order, strata = random_rows(0, clustered=0)
    splits = draw_splits(roots, unassigned(600), order, strata, valid_fraction=0.1, test_fraction=0.2, seed=0)
    total, test, valid = (
        Counter(s for s, x in zip(strata, splits, strict=True) if x in which)
        for which in ([0, 1, 2], [TEST], [VALID])
    )
    for stratum, count in total.items():
        assert abs(test[stratum] - 0.2 * count) <= 1 and abs(valid[stratum] - 0.1 * count) <= 1
    assert sum(test.values()) == 120 and sum(valid.values()) == 60


def test_strata_too_small_for_a_test_row_still_add_up_to_the_total() -> None:
    strata = [(f"label{i % 2}", f"genre{i}") for i in range(100)]
    order = np.random.default_rng(0).integers(0, 2**64, 100, dtype=np.uint64)
    splits = draw_splits(
        np.arange(100), unassigned(100), order, strata, valid_fraction=0.05, test_fraction=0.2, seed=0
    )
    assert (splits == TEST).sum() == 20 and (splits == VALID).sum() == 5
    assert sum(splits[i] == TEST for i in range(0, 100, 2)) == 10


def test_the_draw_does_not_depend_on_the_order_of_the_rows() -> None:
    roots, order, strata = random_rows(3)
    settings = {"valid_fraction": 0.1, "test_fraction": 0.2, "seed": 7}
    splits = draw_splits(roots, unassigned(600), order, strata, **settings)
    shuffle = np.random.default_rng(0).permutation(600)
    positions = np.argsort(shuffle)
    moved = positions[roots[shuffle]]
    again = draw_splits(moved, unassigned(600), order[shuffle], [strata[i] for i in shuffle], **settings)
    assert np.array_equal(again, splits[shuffle])
    other = draw_splits(roots, unassigned(600), order, strata, **{**settings, "seed": 8})
    assert not np.array_equal(other, splits)


def test_held_out_rows_win_and_unassigned_rows_follow_their_cluster() -> None:
    roots = np.array([0, 0, 0, 3, 3, 3, 6, 6, 8])
    requested = np.array(
        [TRAIN, TEST, UNASSIGNED, VALID, TRAIN, UNASSIGNED, TRAIN, UNASSIGNED, UNASSIGNED], dtype=np.int8
    )
    assert assign_requested(roots, requested).tolist() == [
        DROPPED,
        TEST,
        TEST,
        VALID,
        DROPPED,
        VALID,
        TRAIN,
        TRAIN,
        UNASSIGNED,
    ]


def test_a_validation_row_is_dropped_beside_a_test_row() -> None:
    assert assign_requested(np.array([0, 0]), np.array([VALID, TEST], dtype=np.int8)).tolist() == [
        DROPPED,
        TEST,
    ]


def test_assigned_rows_do_not_count_in_the_shares() -> None:
    splits = np.array([TEST] * 50 + [UNASSIGNED] * 50, dtype=np.int8)
    order = np.random.default_rng(0).integers(0, 2**64, 100, dtype=np.uint64)
    out = draw_splits(
        np.arange(100), splits, order, [("a",)] * 100, valid_fraction=0.2, test_fraction=0.0, seed=0
    )
    assert (out[:50] == TEST).all() and (out[50:] == VALID).sum() == 10 and (out[50:] == TRAIN).sum() == 40


def plain_draw_splits(
    roots: np.ndarray, order: np.ndarray, strata: list[tuple[str, ...]], seed: int
) -> np.ndarray:
    """A plain implementation: one cluster after the other."""
    queues: dict[tuple[str, ...], list[tuple[int, list[int]]]] = {}
    for root in sorted(set(roots.tolist())):
        rows = np.flatnonzero(roots == root).tolist()
        first = min(rows, key=lambda row: int(order[row]))
        queues.setdefault(strata[first], []).append((hash64(f"{seed}:{int(order[first])}"), rows))
    out = unassigned(len(roots))
    for target, fraction in ((TEST, 0.2), (VALID, 0.1)):
        wanted, count = 0.0, 0
        for stratum in sorted(queues):
            wanted += fraction * sum(len(rows) for _, rows in queues[stratum])
            for _, rows in sorted(queues[stratum], key=lambda entry: entry[0]):
                if out[rows[0]] == UNASSIGNED and wanted - count >= len(rows) / 2:
                    out[rows] = target
                    count += len(rows)
    out[out == UNASSIGNED] = TRAIN
    return out


@pytest.mark.parametrize("seed", range(4))
def test_the_draw_equals_the_plain_implementation(seed: int) -> None:
    roots, order, strata = random_rows(seed, clustered=0.5)
    for row in range(1, len(roots)):  # a root is its cluster's first row
        roots[row] = roots[roots[row]]
    drawn = draw_splits(
        roots, unassigned(600), order, strata, valid_fraction=0.1, test_fraction=0.2, seed=seed
    )
    assert np.array_equal(drawn, plain_draw_splits(roots, order, strata, seed))
    assigned = unassigned(600)
    assigned[roots == 0] = TEST
    others = roots != 0
    drawn = draw_splits(roots, assigned, order, strata, valid_fraction=0.1, test_fraction=0.2, seed=seed)
    assert (drawn[~others] == TEST).all()
    _, renumbered = np.unique(roots[others], return_inverse=True)
    first = np.array([np.flatnonzero(renumbered == number)[0] for number in range(renumbered.max() + 1)])
    strata = [stratum for stratum, kept in zip(strata, others, strict=True) if kept]
    assert np.array_equal(drawn[others], plain_draw_splits(first[renumbered], order[others], strata, seed))


@pytest.mark.parametrize("folds", [2, 5])
def test_folds_are_balanced_in_every_stratum_and_keep_clusters_whole(folds: int) -> None:
    roots, order, strata = random_rows(1, clustered=0)
    fold_of = draw_folds(roots, order, strata, folds=folds, seed=3)
    assert np.ptp(np.bincount(fold_of)) <= 1
    for stratum in set(strata):
        counts = np.bincount(
            [f for f, s in zip(fold_of, strata, strict=True) if s == stratum], minlength=folds
        )
        assert np.ptp(counts) <= 1
    roots, order, strata = random_rows(1)
    fold_of = draw_folds(roots, order, strata, folds=folds, seed=3)
    assert (fold_of == fold_of[roots]).all()
    assert np.ptp(np.bincount(fold_of)) <= np.bincount(roots).max()


def test_folds_do_not_depend_on_the_order_of_rows_and_do_on_the_seed() -> None:
    roots, order, strata = random_rows(2)
    shuffled = np.random.default_rng(0).permutation(len(roots))
    position = np.argsort(shuffled)
    plain = draw_folds(roots, order, strata, folds=4, seed=0)
    moved = draw_folds(
        position[roots[shuffled]], order[shuffled], [strata[i] for i in shuffled], folds=4, seed=0
    )
    assert (moved == plain[shuffled]).all()
    assert (draw_folds(roots, order, strata, folds=4, seed=1) != plain).any()


def test_fewer_clusters_than_folds_are_refused() -> None:
    with pytest.raises(DataError, match="6 rows in 2 groups that stay together, and 3 folds"):
        draw_folds(np.array([0, 0, 0, 3, 3, 3]), np.arange(6, dtype=np.uint64), [("a",)] * 6, folds=3, seed=0)


def test_clusters_with_a_name_in_common_are_one() -> None:
    roots = np.array([0, 0, 2, 3, 4, 5])
    joined = merge_clusters(roots, ["x", None, "y", "x", None, "y"])
    assert joined[0] == joined[1] == joined[3] and joined[2] == joined[5] and len(set(joined.tolist())) == 3


def test_a_smaller_share_is_part_of_a_larger_one() -> None:
    roots, order, strata = random_rows(3)
    before = np.zeros(len(roots), dtype=bool)
    for share in (0.25, 0.5, 0.75, 1.0):
        taken = take_share(roots, order, strata, share=share, seed=0)
        assert (taken == taken[roots]).all() and (taken | ~before).all()
        assert abs(taken.mean() - share) < 0.03
        before = taken
    assert before.all()
