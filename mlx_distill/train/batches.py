"""Sources of micro-batches: rows on disk, epoch after epoch, with a position that a checkpoint can store."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

from mlx_distill.data.batching import BatchList, batches_per_epoch, plan_epoch
from mlx_distill.data.packing import SequencePlan, plan_sequences
from mlx_distill.errors import DataError
from mlx_distill.recipe import TrainConfig
from mlx_distill.records import Batch
from mlx_distill.storage.array_store import Store

# (rows, numbers of those in each sequence of a batch, what the width is rounded up to) -> batch
Collate = Callable[[Sequence[Any], Sequence[Sequence[int]], int], Batch]


@runtime_checkable
class BatchSource(Protocol):
    """An endless stream of micro-batches for one rank, epoch after epoch.

    ``len`` is the number of micro-batches of an epoch, the same on every rank (a rank with fewer rows gets
    batches whose mask is zero). ``state`` is a JSON value that is the same on every rank; ``restore`` refuses
    the state of other data.
    """

    def __len__(self) -> int: ...

    def __next__(self) -> Batch: ...

    def state(self) -> dict[str, Any]:
        """The position as JSON."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from that position."""


class RowBatches:
    """A :class:`~mlx_distill.train.batches.BatchSource` over rows of known lengths.

    Args:
        lengths: Tokens of each row, or of each sequence of packed rows.
        collate: Makes a batch of the rows (or sequences) with the given numbers.
        batch_size: Rows (or sequences) of a micro-batch, on average.
        seed: Of the order, which differs from epoch to epoch.
        identity: A hash of the rows; a checkpoint of other rows is refused.
        weights: Trained tokens of each row (or sequence), balanced over the batches; by default the lengths.
        rank, size: This rank gets batches ``rank, rank + size, ...`` of each epoch's plan.
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
            plan = plan_epoch(self.lengths, self.batch_size, self.seed, self.epoch, self.weights)
            self._plan = (self.epoch, plan)
        plan = self._plan[1]
        number = self.index * self.size + self.rank
        self.index += 1
        if self.index == len(self):
            self.epoch, self.index = self.epoch + 1, 0
        if number < len(plan):
            return self.collate(plan[number])
        # A rank that has no rows left still joins the sums over the ranks.
        return without_trained_tokens(self.collate(plan[0]))

    def state(self) -> dict[str, Any]:
        """The position, and the identity of the rows."""
        return {
            "epoch": self.epoch,
            "index": self.index,
            "seed": self.seed,
            "rows": len(self.lengths),
            "identity": self.identity,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from where :meth:`state` was called.

        Raises:
            DataError: the state is of other rows or of another seed.
        """
        own = self.state()
        if any(state.get(name) != own[name] for name in ("seed", "rows", "identity")):
            raise DataError(
                "the checkpoint is of other rows",
                fix="restore the data, or delete the checkpoints and start again",
            )
        self.epoch, self.index = int(state["epoch"]), int(state["index"])


def without_trained_tokens(batch: Batch) -> Batch:
    """The batch with a mask of zeros and no rows."""
    return replace(batch, mask=batch.mask * 0, rows=())


@dataclass(frozen=True)
class RowDataset:
    """Stored rows, how they are arranged in sequences, and how a batch is made of them.

    Args:
        store: The rows.
        plan: The rows of each sequence: one, or several where they are packed.
        collate: Makes a batch of some sequences.
    """

    store: Store[Any]
    plan: SequencePlan
    collate: Collate

    def batch(self, sequences: Sequence[Sequence[int]]) -> Batch:
        """A batch of sequences that are given by their row numbers."""
        return self.collate(self.store, sequences, self.plan.multiple)

    def train_batches(self, batch_size: int, seed: int, *, rank: int = 0, size: int = 1) -> RowBatches:
        """The stream of training batches of one rank."""
        return RowBatches(
            self.plan.lengths,
            lambda chosen: self.batch(self.plan.rows_of(chosen)),
            batch_size,
            seed,
            weights=self._trained_tokens(),
            identity=self.store.content,
            rank=rank,
            size=size,
        )

    def fixed_batches(self, batch_size: int, seed: int) -> BatchList:
        """The fixed list of validation batches; each is made when it is accessed."""
        epoch = plan_epoch(self.plan.lengths, batch_size, seed, 0, self._trained_tokens())
        return BatchList([self.plan.rows_of(chosen) for chosen in epoch], self.batch)

    def _trained_tokens(self) -> list[int]:
        """Of each sequence."""
        return self.plan.sum_rows(self.store.counted.tolist())


def make_dataset(store: Store[Any], collate: Collate, settings: TrainConfig) -> RowDataset:
    """A data set whose rows are packed as the settings say."""
    plan = plan_sequences(
        store.lengths.tolist(),
        settings.max_length,
        settings.seed,
        settings.packing,
        few_widths=settings.compile,
    )
    return RowDataset(store, plan, collate)


def total_steps(settings: TrainConfig, batches_per_epoch: int) -> int:
    """Optimizer steps of a run: ``steps``, or those of ``epochs`` passes over the micro-batches, the
    incomplete last step included.

    >>> total_steps(TrainConfig(accumulate=4, epochs=1.0), 10)
    3
    """
    if settings.steps:
        return settings.steps
    return max(math.ceil(epoch_batches(settings, batches_per_epoch) / settings.accumulate), 1)


def epoch_batches(settings: TrainConfig, batches_per_epoch: int) -> int:
    """Micro-batches of a run by epochs; a fraction of an epoch is rounded.

    >>> epoch_batches(TrainConfig(epochs=1.5), 10)
    15
    """
    return max(round(settings.epochs * batches_per_epoch), 1)
