"""Where micro-batches come from: a stream with a position that can be saved and set again."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

from mlx_distill.errors import DataError
from mlx_distill.records import Batch


@runtime_checkable
class BatchSource(Protocol):
    """An endless stream of micro-batches for one rank, epoch after epoch.

    ``len`` is the number of micro-batches an epoch, the same on every rank (a rank that has fewer rows gives batches whose mask
    is zero). ``state`` is a JSON value that is the same on every rank, and ``restore`` refuses one of other data.
    """

    def __len__(self) -> int: ...

    def __next__(self) -> Batch: ...

    def state(self) -> dict[str, Any]:
        """The position as JSON."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""


class ListBatches:
    """Batches that are in memory already, in a new order each epoch.

    Args:
        batches: The micro-batches of an epoch.
        seed: Of the order; None keeps the order of the list.
        rank, size: This rank takes batches ``rank, rank + size, ...`` of each epoch's order.

    >>> import mlx.core as mx
    >>> batch = Batch(mx.zeros((1, 2), mx.int32), mx.zeros((1, 2), mx.int32), mx.ones((1, 2)), rows=(0,))
    >>> source = ListBatches([batch, batch])
    >>> _ = next(source), next(source), next(source)
    >>> len(source), source.state()["position"]
    (2, 3)
    """

    def __init__(self, batches: Sequence[Batch], seed: int | None = 0, *, rank: int = 0, size: int = 1) -> None:
        if not batches:
            raise DataError("no batch to train on", fix="check max_length and the filters of prepare")
        self.batches, self.seed, self.rank, self.size = list(batches), seed, rank, size
        self.position = 0

    def __len__(self) -> int:
        return math.ceil(len(self.batches) / self.size)

    def __iter__(self) -> ListBatches:
        return self

    def __next__(self) -> Batch:
        epoch, index = divmod(self.position, len(self))
        order = list(range(len(self.batches)))
        if self.seed is not None:
            random.Random(f"{self.seed}/{epoch}").shuffle(order)
        self.position += 1
        place = index * self.size + self.rank
        if place < len(order):
            return self.batches[order[place]]
        spare = self.batches[order[0]]
        return replace(spare, mask=spare.mask * 0, rows=())

    def state(self) -> dict[str, Any]:
        """The position, and what it is a position in."""
        return {"position": self.position, "seed": self.seed, "batches": len(self.batches)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state` was taken.

        Raises:
            DataError: the state is of other data or of another seed.
        """
        if {**state, "position": 0} != {**self.state(), "position": 0}:
            raise DataError("the checkpoint is of other batches", fix="restore the data, or delete the checkpoints and start again")
        self.position = int(state["position"])
