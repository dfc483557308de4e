"""Micro-batches from encoded rows, epoch after epoch, in an order that a checkpoint can name in two numbers."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

from mlx_distill.data.batching import batches_per_epoch, plan_epoch
from mlx_distill.errors import DataError
from mlx_distill.recipe import TrainConfig
from mlx_distill.records import Batch


@runtime_checkable
class BatchSource(Protocol):
    """An endless stream of micro-batches for one rank, epoch after epoch.

    ``len`` is the number of micro-batches an epoch, the same on every rank (a rank that has fewer rows gives
    batches whose mask is zero). ``state`` is a JSON value that is the same on every rank, and ``restore``
    refuses one of other data.
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
            raise DataError(
                "the checkpoint is of other batches",
                fix="restore the data, or delete the checkpoints and start again",
            )
        self.position = int(state["position"])


class RowBatches:
    """A :class:`~mlx_distill.train.batches.BatchSource` over rows of known lengths.

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
        self,
        lengths: Sequence[int],
        collate: Callable[[Sequence[int]], Batch],
        batch_size: int,
        seed: int,
        *,
        identity: str = "",
        weights: Sequence[int] | None = None,
        rank: int = 0,
        size: int = 1,
    ) -> None:
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
            self._plan = (
                self.epoch,
                plan_epoch(self.lengths, self.batch_size, self.seed, self.epoch, self.weights),
            )
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
        return {
            "epoch": self.epoch,
            "index": self.index,
            "seed": self.seed,
            "rows": len(self.lengths),
            "identity": self.identity,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state` was taken.

        Raises:
            DataError: the state is of other rows or of another seed.
        """
        mine = self.state()
        if any(state.get(name) != mine[name] for name in ("seed", "rows", "identity")):
            raise DataError(
                "the checkpoint is of other rows",
                fix="restore the data, or delete the checkpoints and start again",
            )
        self.epoch, self.index = int(state["epoch"]), int(state["index"])


def total_steps(settings: TrainConfig, batches_per_epoch: int) -> int:
    """Optimizer steps of a run: ``steps``, or what ``epochs`` passes over the micro-batches come to; the tail
    is a step too.

    >>> total_steps(TrainConfig(accumulate=4, epochs=1.0), 10)
    3
    """
    if settings.steps:
        return settings.steps
    return max(math.ceil(epoch_batches(settings, batches_per_epoch) / settings.accumulate), 1)


def epoch_batches(settings: TrainConfig, batches_per_epoch: int) -> int:
    """Micro-batches of a run by epochs; a share of an epoch is rounded.

    >>> epoch_batches(TrainConfig(epochs=1.5), 10)
    15
    """
    return max(round(settings.epochs * batches_per_epoch), 1)
