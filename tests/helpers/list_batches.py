"""A source of micro-batches that are in memory."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

from mlx_distill.errors import DataError
from mlx_distill.records import Batch
from mlx_distill.train.batches import without_trained_tokens


class ListBatches:
    """A :class:`~mlx_distill.train.batches.BatchSource` over batches in memory, in a new order each epoch.

    Args:
        batches: The micro-batches of an epoch.
        seed: Of the order; None keeps the order of the list.
        rank, size: This rank gets batches ``rank, rank + size, ...`` of each epoch's order.
    """

    def __init__(
        self, batches: Sequence[Batch], seed: int | None = 0, *, rank: int = 0, size: int = 1
    ) -> None:
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
        number = index * self.size + self.rank
        if number < len(order):
            return self.batches[order[number]]
        return without_trained_tokens(self.batches[order[0]])

    def state(self) -> dict[str, Any]:
        """The position, and the identity of the batches."""
        return {"position": self.position, "seed": self.seed, "batches": len(self.batches)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from where :meth:`state` was called.

        Raises:
            DataError: the state is of other data or of another seed.
        """
        if {**state, "position": 0} != {**self.state(), "position": 0}:
            raise DataError(
                "the checkpoint is of other batches",
                fix="restore the data, or delete the checkpoints and start again",
            )
        self.position = int(state["position"])
