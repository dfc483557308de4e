"""Which side each row goes to: whole clusters, balanced by stratum, the same for any order of the rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int8, Int64, UInt64

from mlx_distill.data.dedup import hash64

SPLITS = ("train", "valid", "test")
FREE, TRAIN, VALID, TEST = -1, 0, 1, 2
DROPPED = -2


def settle_forced(roots: Int64[np.ndarray, " n"], forced: Int8[np.ndarray, " n"]) -> Int8[np.ndarray, " n"]:
    """The sides that follow from rows which name their own: held-out rows win.

    A cluster with a test row goes to test, one with a validation row and no test row to validation, one with
    a training row alone to train. Rows without a wish follow their cluster; a row that wished for a lower
    side is dropped, for a model that trains on it would be measured on what it has seen.

    Args:
        roots: The cluster of each row.
        forced: ``FREE``, ``TRAIN``, ``VALID`` or ``TEST`` for each row.

    Returns:
        A side for each row, ``DROPPED``, or ``FREE`` where nothing in the cluster has a wish.

    >>> settle_forced(np.array([0, 0, 2, 2, 4]), np.array([0, 2, -1, 0, -1], dtype=np.int8)).tolist()
    [-2, 2, 0, 0, -1]
    """
    best = np.full(len(roots), FREE, dtype=np.int8)
    np.maximum.at(best, roots, forced)
    side = best[roots]
    return np.where((forced != FREE) & (forced < side), np.int8(DROPPED), side).astype(np.int8)


def draw(
    roots: Int64[np.ndarray, " n"],
    side: Int8[np.ndarray, " n"],
    order: UInt64[np.ndarray, " n"],
    strata: Sequence[tuple[str, ...]],
    *,
    valid_fraction: float,
    test_fraction: float,
    seed: int,
) -> Int8[np.ndarray, " n"]:
    """Draw a side for every cluster that is still free.

    Inside a stratum clusters are taken in the order of a hash of (seed, content), so that neither the order
    of the rows nor other strata matter. What rounding leaves over in one stratum is carried into the next:
    the totals are met to within half a cluster.

    Args:
        roots: The cluster of each row.
        side: From :func:`settle_forced`.
        order: A hash of each row's content.
        strata: (label, further fields) of each row; a cluster counts as the stratum of its first row in hash
            order.
        valid_fraction, test_fraction: Shares of the free rows.
        seed: Of the draw.
    """
    free = np.flatnonzero(side == FREE)
    _, member = np.unique(roots[free], return_inverse=True)
    sizes = np.bincount(member)
    # The first row of each cluster in hash order stands for it.
    by = np.lexsort((order[free], member))
    first = free[by[np.flatnonzero(np.diff(member[by], prepend=-1))]]
    drawn = np.fromiter(
        (hash64(f"{seed}:{int(order[row])}") for row in first), dtype=np.uint64, count=len(first)
    )
    queues: dict[tuple[str, ...], list[int]] = {}
    for cluster in np.argsort(drawn, kind="stable").tolist():
        queues.setdefault(strata[first[cluster]], []).append(cluster)
    chosen = np.full(len(first), FREE, dtype=np.int8)
    for target, fraction in ((TEST, test_fraction), (VALID, valid_fraction)):
        wanted, taken = 0.0, 0
        for stratum in sorted(queues):
            wanted += fraction * int(sizes[queues[stratum]].sum())
            for cluster in queues[stratum]:
                if chosen[cluster] == FREE and wanted - taken >= sizes[cluster] / 2:
                    chosen[cluster] = target
                    taken += int(sizes[cluster])
    chosen[chosen == FREE] = TRAIN
    out = side.copy()
    out[free] = chosen[member]
    return out
