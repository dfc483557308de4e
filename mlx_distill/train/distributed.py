"""Collective operations of the ranks of ``mlx.launch``; with one rank they return what they get."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx

from mlx_distill.errors import DistillError, FileError
from mlx_distill.runtime import rank_and_size

_MESSAGE_SIZE = 1 << 24  # numbers in one message of sum_arrays
_UNSIGNED = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}  # by bytes

_Method = TypeVar("_Method", bound=Callable[..., Any])


def _rank_errors(method: _Method) -> _Method:
    """Decorate a collective operation with :meth:`Ranks.errors`."""

    @wraps(method)
    def checked(ranks: Ranks, *arguments: Any) -> Any:
        with ranks.errors():
            return method(ranks, *arguments)

    return checked  # type: ignore[return-value]


@dataclass(frozen=True)
class Ranks:
    """This process among the ranks of its launch.

    Every method is collective: all ranks call it. It raises a DistillError where another rank was lost.
    """

    rank: int = 0
    size: int = 1

    @_rank_errors
    def sum(self, values: Sequence[float]) -> list[float]:
        """Each number added over the ranks."""
        if self.size == 1 or not values:
            return [float(v) for v in values]
        # Two float32 hold a sum of token counts or losses to 48 bits; one would lose single tokens above
        # 2**24.
        high = mx.array(list(values), mx.float32)
        low = mx.array([v - h for v, h in zip(values, high.tolist(), strict=True)], mx.float32)
        rows = mx.distributed.all_gather(mx.stack([high, low])[None]).tolist()
        return [sum(row[0][i] for row in rows) + sum(row[1][i] for row in rows) for i in range(len(values))]

    @_rank_errors
    def max(self, value: float) -> float:
        """The largest value over the ranks."""
        if self.size == 1:
            return float(value)
        return float(mx.distributed.all_max(mx.array([float(value)])).item())

    @_rank_errors
    def gather(self, values: Sequence[int]) -> list[list[int]]:
        """Every rank's integers (0 to 2**32 - 1), by rank."""
        if self.size == 1:
            return [[int(v) for v in values]]
        gathered = mx.distributed.all_gather(mx.array([list(values)], mx.uint32))
        return [[int(v) for v in row] for row in gathered.tolist()]

    @_rank_errors
    def sum_arrays(self, arrays: dict[str, mx.array]) -> None:
        """Each array added over the ranks, in place, joined into few messages.

        Afterwards the dictionary has the same order on all ranks, whatever it had before: the caller may do
        one collective operation for each array in turn, as GaLore does for its bases.
        """
        if self.size == 1:
            return
        group: list[str] = []
        for path in sorted(arrays):
            group.append(path)
            if sum(arrays[path].size for path in group) >= _MESSAGE_SIZE:
                _sum_group(arrays, group)
                group = []
        if group:
            _sum_group(arrays, group)

    def broadcast_text(self, text: str) -> str:
        """Rank 0's text, on every rank."""
        if self.size == 1:
            return text
        raw = text.encode() if self.rank == 0 else b""
        count = int(self.max(len(raw)))
        padded = mx.array(list(raw.ljust(count, b" ")) or [0], mx.uint8)
        return bytes(self.broadcast({"text": padded})["text"].tolist())[:count].decode()

    @_rank_errors
    def broadcast(self, arrays: dict[str, mx.array]) -> dict[str, mx.array]:
        """Rank 0's arrays, bit for bit, on every rank; the other ranks give arrays of the same names, shapes
        and types.
        """
        if self.size == 1:
            return arrays
        out = {}
        for path in sorted(arrays):
            array = arrays[path]
            # As integers: a sum of floats with zeros would lose the sign of a zero.
            bits = mx.view(array.reshape(-1), _UNSIGNED[array.itemsize])
            total = mx.distributed.all_sum(bits if self.rank == 0 else mx.zeros_like(bits))
            out[path] = mx.view(total, array.dtype).reshape(array.shape)
            mx.eval(out[path])
        return out

    @_rank_errors
    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            mx.eval(mx.distributed.all_sum(mx.array(1.0)))

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Inside, an error of MLX's communication becomes a DistillError that says that a rank was lost."""
        try:
            yield
        except RuntimeError as error:
            backends = ("[ring]", "[mpi]", "[jaccl]", "[nccl]")
            if self.size == 1 or not any(backend in str(error) for backend in backends):
                raise
            fix = (
                "see the errors of the other ranks; "
                "launched again, the same command goes on from the last checkpoint"
            )
            raise DistillError(f"rank {self.rank}: another rank was lost ({error})", fix=fix) from error


def _sum_group(arrays: dict[str, mx.array], group: list[str]) -> None:
    joined = mx.distributed.all_sum(mx.concatenate([arrays[path].reshape(-1) for path in group]))
    start = 0
    for path in group:
        size, shape = arrays[path].size, arrays.pop(path).shape
        arrays[path] = joined[start : start + size].reshape(shape)
        start += size
    mx.eval([arrays[path] for path in group])


def current_ranks() -> Ranks:
    """The ranks of this process's launch."""
    return Ranks(*rank_and_size())


def agree_on_key(
    out: Path, key: str, own_key: Callable[[], str] | None = None, ranks: Ranks | None = None
) -> bool:
    """Whether a training starts, as rank 0 decides; every other rank checks that it has the same rows and
    base model. With one rank, whether ``key`` is given.

    Args:
        out: The run's folder.
        key: Of the stage, from rank 0; empty where there is nothing to do.
        own_key: The stage's key computed from this rank's own folder.
        ranks: By default those of this process's launch.

    Raises:
        FileError: a rank has other rows or another base model.
        DistillError: another rank was lost.
    """
    ranks = ranks or current_ranks()
    key = ranks.broadcast_text(key)
    if ranks.max(float(bool(key) and own_key is not None and own_key() != key)):
        raise FileError(
            f"{out}: not the same rows and base model for every rank",
            fix="share the folder, or copy rank 0's to the same path on all machines, then launch again",
        )
    return bool(key)
