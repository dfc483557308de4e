"""Sums over the ranks of ``mlx.launch``; alone, the identity."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx

from mlx_distill.errors import DistillError, FileError
from mlx_distill.runtime import rank_and_size

_CHUNK = 1 << 24
_BITS = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}  # by bytes

_Method = TypeVar("_Method", bound=Callable[..., Any])


def _rank_errors(method: _Method) -> _Method:
    """Decorate a collective operation: a backend error that means a lost rank becomes a DistillError."""

    @wraps(method)
    def checked(ranks: Ranks, *arguments: Any) -> Any:
        try:
            return method(ranks, *arguments)
        except RuntimeError as error:
            if lost := ranks.lost(error):
                raise lost from error
            raise

    return checked  # type: ignore[return-value]


@dataclass(frozen=True)
class Ranks:
    """This process among its peers. Whatever they do together, a DistillError tells that one of them is gone."""

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
        total = mx.distributed.all_gather(mx.stack([high, low])[None])
        rows = total.tolist()
        return [sum(row[0][i] for row in rows) + sum(row[1][i] for row in rows) for i in range(len(values))]

    @_rank_errors
    def max(self, value: float) -> float:
        """The largest over the ranks."""
        if self.size == 1:
            return float(value)
        return float(mx.distributed.all_max(mx.array([float(value)])).item())

    @_rank_errors
    def gather(self, values: Sequence[int]) -> list[list[int]]:
        """Every rank's whole numbers (below 2**32), by rank."""
        if self.size == 1:
            return [[int(v) for v in values]]
        return [
            [int(v) for v in row]
            for row in mx.distributed.all_gather(mx.array([list(values)], mx.uint32)).tolist()
        ]

    @_rank_errors
    def sum_arrays(self, arrays: dict[str, mx.array]) -> None:
        """Each array added over the ranks, in place, joined into few messages.

        The dictionary has one order on all ranks then: who sends something for each array in turn (GaLore its
        bases) must not do it in another order than the others, and a rank without rows of its own made its
        arrays in another.
        """
        if self.size == 1:
            return
        group: list[str] = []
        for path in sorted(arrays):
            group.append(path)
            if sum(arrays[path].size for path in group) >= _CHUNK:
                _sum_group(arrays, group)
                group = []
        if group:
            _sum_group(arrays, group)

    def broadcast_text(self, text: str) -> str:
        """Rank 0's text, on every rank; the others' is not looked at."""
        if self.size == 1:
            return text
        raw = text.encode() if self.rank == 0 else b""
        count = int(self.max(len(raw)))
        told = self.broadcast({"text": mx.array(list(raw.ljust(count, b" ")) or [0], mx.uint8)})["text"]
        return bytes(told.tolist())[:count].decode()

    @_rank_errors
    def broadcast(self, arrays: dict[str, mx.array]) -> dict[str, mx.array]:
        """Rank 0's arrays, bit for bit, on every rank; the others give arrays of the same names, shapes and
        types.
        """
        if self.size == 1:
            return arrays
        out = {}
        for path in sorted(arrays):
            array = arrays[path]
            # As whole numbers: a sum with zeros would lose the sign of a float's zero.
            bits = mx.view(array.reshape(-1), _BITS[array.itemsize])
            total = mx.distributed.all_sum(bits if self.rank == 0 else mx.zeros_like(bits))
            out[path] = mx.view(total, array.dtype).reshape(array.shape)
            mx.eval(out[path])
        return out

    def lost(self, error: RuntimeError) -> DistillError | None:
        """What to tell where an error means that another rank is gone; None where it means something else."""
        if self.size == 1 or not any(word in str(error) for word in ("[ring]", "[mpi]", "[jaccl]", "[nccl]")):
            return None
        cure = (
            "see what the other ranks said; launched again, the same command goes on from the last checkpoint"
        )
        return DistillError(f"rank {self.rank}: another rank was lost ({error})", fix=cure)

    @_rank_errors
    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            mx.eval(mx.distributed.all_sum(mx.array(1.0)))


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


def agree_on_key(out: Path, key: str, here: Callable[[], str] | None = None) -> bool:
    """Whether a training begins: rank 0 says so by its key, and the others look whether it is theirs too.
    Alone, only what was said.

    Args:
        out: The run's folder.
        key: Of the stage, from rank 0; empty where nothing is to do.
        here: The key by what stands in another rank's own folder.

    Raises:
        FileError: a rank has other rows or another base model.
        DistillError: another rank was lost.
    """

    ranks = current_ranks()
    told = ranks.broadcast_text(key)
    if ranks.max(float(bool(told) and here is not None and here() != told)):
        cure = "share the folder, or copy rank 0's to the same place on the other machines, then launch again"
        raise FileError(f"{out}: not the same rows and base model for every rank", fix=cure)
    return bool(told)
