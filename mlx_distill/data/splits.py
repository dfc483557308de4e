"""Assign rows to train, valid and test: whole clusters of near duplicates, balanced by stratum, the same for
any order of the rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int8, Int64, UInt64

from mlx_distill.data.dedup import hash64

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
