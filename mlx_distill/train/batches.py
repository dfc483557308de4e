"""Micro-batches from encoded rows, epoch after epoch, in an order that a checkpoint can name in two numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mlx_distill.data.batching import batches_per_epoch, plan_epoch
from mlx_distill.errors import DataError
from mlx_distill.records import Batch


class RowBatches:
    """A :class:`~mlx_distill.train.source.BatchSource` over rows of known lengths.

    Args:
        lengths: Tokens of each row, or of each line of packed rows.
        collate: Some numbers of them to a batch.
        batch_size: How many make a micro-batch on average.
        seed: Of the order; each epoch has its own.
        identity: A hash of the rows; a checkpoint of other rows is refused.
        weights: Trained tokens of each, of which all batches get about as many; by default the lengths.
        rank, size: This rank takes batches ``rank, rank + size, ...`` of each epoch's plan.
    """

    def __init__(
        self, lengths: Sequence[int], collate: Callable[[Sequence[int]], Batch], batch_size: int, seed: int, *, identity: str = "",
        weights: Sequence[int] | None = None, rank: int = 0, size: int = 1,
    ) -> None:  # fmt: skip
        if not lengths:
            raise DataError("no rows to train on", fix="check max_length and the filters of prepare")
        self.lengths, self.collate, self.batch_size, self.seed = list(lengths), collate, batch_size, seed
        self.identity, self.weights, self.rank, self.size = identity, weights, rank, size
        self.epoch = self.index = 0
        self._plan: tuple[int, list[tuple[int, ...]]] | None = None

    def __len__(self) -> int:
        return -(-batches_per_epoch(len(self.lengths), self.batch_size) // self.size)

    def __iter__(self) -> RowBatches:
        return self

    def __next__(self) -> Batch:
        if self._plan is None or self._plan[0] != self.epoch:
            self._plan = (self.epoch, plan_epoch(self.lengths, self.batch_size, self.seed, self.epoch, self.weights))
        plan = self._plan[1]
        place = self.index * self.size + self.rank
        self.index += 1
        if self.index == len(self):
            self.epoch, self.index = self.epoch + 1, 0
        if place < len(plan):
            return self.collate(plan[place])
        spare = self.collate(plan[0])  # a rank without rows of its own still takes part in every sum
        return replace(spare, mask=spare.mask * 0, rows=())

    def state(self) -> dict[str, Any]:
        """The position, and what it is a position in."""
        return {"epoch": self.epoch, "index": self.index, "seed": self.seed, "rows": len(self.lengths), "identity": self.identity}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state` was taken.

        Raises:
            DataError: the state is of other rows or of another seed.
        """
        mine = self.state()
        if any(state.get(name) != mine[name] for name in ("seed", "rows", "identity")):
            raise DataError("the checkpoint is of other rows", fix="restore the data, or delete the checkpoints and start again")
        self.epoch, self.index = int(state["epoch"]), int(state["index"])
