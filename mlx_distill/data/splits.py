"""Assign rows to train, valid and test, or to the folds of a cross-validation: whole clusters of near
duplicates, balanced by stratum, the same for any order of the rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int8, Int64, UInt64

from mlx_distill.data.dedup import Clusters, hash64
from mlx_distill.errors import DataError

SPLITS = ("train", "valid", "test")
DROPPED, UNASSIGNED, TRAIN, VALID, TEST = -2, -1, 0, 1, 2


def assign_requested(
    roots: Int64[np.ndarray, " n"], requested: Int8[np.ndarray, " n"]
) -> Int8[np.ndarray, " n"]:
    """The splits that follow from rows which name their own: held-out rows win.

    A cluster with a test row goes to test, one with a validation row and no test row to validation, one with
    only training rows to train. Rows that name no split follow their cluster. A row that asked for a split
    which its cluster does not go to is dropped: a model that trains on it would be measured on what it has
    seen.

    Args:
        roots: The cluster of each row.
        requested: ``UNASSIGNED``, ``TRAIN``, ``VALID`` or ``TEST`` for each row.

    Returns:
        A split for each row, ``DROPPED``, or ``UNASSIGNED`` where no row of the cluster names one.

    >>> assign_requested(np.array([0, 0, 2, 2, 4]), np.array([0, 2, -1, 0, -1], dtype=np.int8)).tolist()
    [-2, 2, 0, 0, -1]
    """
    highest = np.full(len(roots), UNASSIGNED, dtype=np.int8)
    np.maximum.at(highest, roots, requested)
    split = highest[roots]
    dropped = (requested != UNASSIGNED) & (requested < split)
    return np.where(dropped, np.int8(DROPPED), split).astype(np.int8)


def draw_splits(
    roots: Int64[np.ndarray, " n"],
    splits: Int8[np.ndarray, " n"],
    order: UInt64[np.ndarray, " n"],
    strata: Sequence[tuple[str, ...]],
    *,
    valid_fraction: float,
    test_fraction: float,
    seed: int,
) -> Int8[np.ndarray, " n"]:
    """Draw a split for every cluster that has none yet.

    Inside a stratum clusters are drawn in the order of a hash of (seed, content), so that neither the order
    of the rows nor other strata matter. What rounding leaves over in one stratum is carried into the next, so
    the totals are right to within half a cluster.

    Args:
        roots: The cluster of each row.
        splits: From :func:`assign_requested`.
        order: A hash of each row's content.
        strata: (label, further fields) of each row; a cluster counts as the stratum of its first row in hash
            order.
        valid_fraction, test_fraction: Shares of the unassigned rows.
        seed: Of the draw.
    """
    unassigned = np.flatnonzero(splits == UNASSIGNED)
    _, cluster_of = np.unique(roots[unassigned], return_inverse=True)
    sizes = np.bincount(cluster_of)
    # The first row of each cluster in hash order represents it.
    by_cluster = np.lexsort((order[unassigned], cluster_of))
    starts = np.flatnonzero(np.diff(cluster_of[by_cluster], prepend=-1))
    first = unassigned[by_cluster[starts]]
    ranks = np.fromiter(
        (hash64(f"{seed}:{int(order[row])}") for row in first), dtype=np.uint64, count=len(first)
    )
    queues: dict[tuple[str, ...], list[int]] = {}
    for cluster in np.argsort(ranks, kind="stable").tolist():
        queues.setdefault(strata[first[cluster]], []).append(cluster)
    drawn = np.full(len(first), UNASSIGNED, dtype=np.int8)
    for split, fraction in ((TEST, test_fraction), (VALID, valid_fraction)):
        wanted, count = 0.0, 0
        for stratum in sorted(queues):
            wanted += fraction * int(sizes[queues[stratum]].sum())
            for cluster in queues[stratum]:
                if drawn[cluster] == UNASSIGNED and wanted - count >= sizes[cluster] / 2:
                    drawn[cluster] = split
                    count += int(sizes[cluster])
    drawn[drawn == UNASSIGNED] = TRAIN
    out = splits.copy()
    out[unassigned] = drawn[cluster_of]
    return out


def merge_clusters(roots: Int64[np.ndarray, " n"], names: Sequence[str | None]) -> Int64[np.ndarray, " n"]:
    """Clusters joined where their rows have a name in common, such as an artist; a row without a name joins
    none.

    Args:
        roots: The cluster of each row.
        names: Of each row.

    >>> merge_clusters(np.array([0, 1, 1, 3, 4]), ["a", None, "b", "a", "b"]).tolist()
    [0, 1, 1, 0, 1]
    """
    number = {root: i for i, root in enumerate(dict.fromkeys(roots.tolist()))}
    joined = Clusters(len(number))
    first: dict[str, int] = {}
    for root, name in zip(roots.tolist(), names, strict=True):
        if name is not None:
            joined.union(first.setdefault(name, number[root]), number[root])
    of_root = dict(zip(number, joined.roots().tolist(), strict=True))
    return np.array([of_root[root] for root in roots.tolist()], dtype=np.int64)


def draw_folds(
    roots: Int64[np.ndarray, " n"],
    order: UInt64[np.ndarray, " n"],
    strata: Sequence[tuple[str, ...]],
    *,
    folds: int,
    seed: int,
) -> Int64[np.ndarray, " n"]:
    r"""The fold of each row, from 0: whole clusters, every stratum spread evenly, the same for any order of
    the rows.

    Clusters are taken by falling size, equal ones stratum by stratum in the order of a hash of (seed,
    content), and each goes to the fold where it adds least to :math:`\sum_s \sum_f (n_{sf} / n_s)^2`, with
    the rows :math:`n_{sf}` of stratum s in fold f: with clusters of one row the folds of a stratum differ by
    one row at most. Of equal folds the one with fewest rows is taken.

    Args:
        roots: The cluster of each row.
        order: A hash of each row's content.
        strata: (label, further fields) of each row.
        folds: How many; 2 or more.
        seed: Of the draw.

    Raises:
        DataError: fewer clusters than folds.
    """
    _, cluster_of = np.unique(roots, return_inverse=True)
    sizes = np.bincount(cluster_of)
    if len(sizes) < folds:
        raise DataError(
            f"{len(roots)} rows in {len(sizes)} groups that stay together, and {folds} folds",
            fix="fewer folds, or more rows",
        )
    by_cluster = np.lexsort((order, cluster_of))
    starts = np.flatnonzero(np.diff(cluster_of[by_cluster], prepend=-1))
    ranks = [hash64(f"{seed}:{int(order[by_cluster[start]])}") for start in starts]
    names = {stratum: i for i, stratum in enumerate(sorted(set(strata)))}
    stratum_of = np.array([names[stratum] for stratum in strata], dtype=np.int64)
    totals = np.bincount(stratum_of).astype(np.float64)
    counts, rows = np.zeros((len(names), folds)), np.zeros(folds)
    fold_of = np.zeros(len(sizes), dtype=np.int64)
    first = stratum_of[by_cluster[starts]]
    for cluster in sorted(range(len(sizes)), key=lambda c: (-sizes[c], first[c], ranks[c])):
        members = by_cluster[starts[cluster] : starts[cluster] + sizes[cluster]]
        present, added = np.unique(stratum_of[members], return_counts=True)
        # The common term of all folds, that of the cluster alone, is left out.
        cost = (added / totals[present] ** 2) @ counts[present]
        fold = int(np.lexsort((rows, np.round(cost, 12)))[0])
        fold_of[cluster] = fold
        counts[present, fold] += added
        rows[fold] += sizes[cluster]
    return fold_of[cluster_of]


def take_share(
    roots: Int64[np.ndarray, " n"],
    order: UInt64[np.ndarray, " n"],
    strata: Sequence[tuple[str, ...]],
    *,
    share: float,
    seed: int,
) -> Bool[np.ndarray, " n"]:
    """Which rows belong to a share of all: whole clusters, stratified, and those of a smaller share are among
    those of a larger one.

    Inside a stratum clusters are taken in the order of a hash of (seed, content), each while the rows before
    it are fewer than the share.

    Args:
        roots: The cluster of each row.
        order: A hash of each row's content.
        strata: (label, further fields) of each row; a cluster counts as the stratum of its first row in hash
            order.
        share: Above 0, at most 1.
        seed: Of the draw.

    >>> order = np.arange(8, dtype=np.uint64)
    >>> take_share(np.arange(8), order, [("a",)] * 8, share=0.5, seed=0).sum()
    np.int64(4)
    """
    _, cluster_of = np.unique(roots, return_inverse=True)
    sizes = np.bincount(cluster_of)
    by_cluster = np.lexsort((order, cluster_of))
    first = by_cluster[np.flatnonzero(np.diff(cluster_of[by_cluster], prepend=-1))]
    ranks = [hash64(f"{seed}:share:{int(order[row])}") for row in first]
    queues: dict[tuple[str, ...], list[int]] = {}
    for cluster in sorted(range(len(sizes)), key=ranks.__getitem__):
        queues.setdefault(strata[first[cluster]], []).append(cluster)
    taken = np.zeros(len(sizes), dtype=bool)
    for queue in queues.values():
        before = np.cumsum([0, *sizes[queue][:-1]])
        taken[queue] = before + 0.5 <= share * sizes[queue].sum() + 1e-9
    return taken[cluster_of]
