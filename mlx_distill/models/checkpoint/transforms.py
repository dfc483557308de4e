"""How tensors of the original layout become tensors of mlx-lm's layout, and back, by rows, on raw bits.

A transform computes any range of rows of any of its outputs, in both directions, so that no conversion holds
a whole tensor. ``outputs`` gives types and shapes in mlx-lm's layout and ``rows`` the rows of output
``index``; ``inputs`` and ``undo_rows`` are the same for the original layout. Rows are those of a tensor seen
as a matrix over its last dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import numpy as np

from mlx_distill.errors import ModelError
from mlx_distill.models.checkpoint.safetensors import Source

Sources = Sequence[Source]
TypeAndShape = tuple[str, tuple[int, ...]]  # safetensors type, shape


def _shape_error(source: Source, expected: str) -> ModelError:
    return ModelError(
        f"{source.where} has the shape {list(source.shape)} where {expected} is needed",
        fix="check that config and weights belong together",
    )


@dataclass(frozen=True)
class Same:
    """The same bytes under the same or another name."""

    name: ClassVar = "same"

    def outputs(self, sources: Sources) -> list[TypeAndShape]:
        """The source's."""
        return [(sources[0].dtype, sources[0].shape)]

    def rows(self, sources: Sources, index: int, start: int, stop: int) -> np.ndarray:
        """The source's."""
        return sources[0].read(start, stop)

    inputs = outputs
    undo_rows = rows


@dataclass(frozen=True)
class Mxfp4Words:
    """MXFP4 blocks of bytes ``[e, r, groups, 16]`` to MLX's 32-bit words ``[e, r, groups * 4]``, the same
    bytes.
    """

    name: ClassVar = "packed"  # in tensors.json since its first version

    def outputs(self, sources: Sources) -> list[TypeAndShape]:
        """Words."""
        shape = sources[0].shape
        if len(shape) != 4 or shape[-1] != 16 or sources[0].dtype != "U8":
            raise _shape_error(sources[0], "U8 [experts, rows, groups, 16]")
        return [("U32", (*shape[:2], shape[2] * 4))]

    def rows(self, sources: Sources, index: int, start: int, stop: int) -> np.ndarray:
        """Rows of words."""
        return sources[0].read(start, stop, columns=prod(sources[0].shape[2:])).view(np.uint32)

    def inputs(self, sources: Sources) -> list[TypeAndShape]:
        """Blocks of bytes."""
        e, r, words = sources[0].shape
        return [("U8", (e, r, words // 4, 16))]

    def undo_rows(self, sources: Sources, index: int, start: int, stop: int) -> np.ndarray:
        """Rows of 16 bytes, which are the four words of a group."""
        return sources[0].read(start, stop, columns=4).view(np.uint8)


@dataclass(frozen=True)
class SplitRows:
    """Alternating rows of gate and up ``[e, 2 r, ...]`` to two tensors ``[e, r, ...]``.

    With ``mxfp4``, blocks of bytes also become words.
    """

    mxfp4: bool = False
    name: ClassVar = "splitrows"

    def outputs(self, sources: Sources) -> list[TypeAndShape]:
        """Gate and up."""
        dtype, shape = (
            Mxfp4Words().outputs(sources)[0] if self.mxfp4 else (sources[0].dtype, sources[0].shape)
        )
        if len(shape) != 3 or shape[1] % 2:
            raise _shape_error(sources[0], "[experts, an even number of rows, columns]")
        return [(dtype, (shape[0], shape[1] // 2, shape[2]))] * 2

    def rows(self, sources: Sources, index: int, start: int, stop: int) -> np.ndarray:
        """Every second row."""
        columns = prod(sources[0].shape[2:])
        values = np.ascontiguousarray(sources[0].read(2 * start, 2 * stop, columns=columns)[index::2])
        return values.view(np.uint32) if self.mxfp4 else values

    def inputs(self, sources: Sources) -> list[TypeAndShape]:
        """One tensor with twice the rows."""
        e, r, c = sources[0].shape
        return [("U8", (e, 2 * r, c // 4, 16)) if self.mxfp4 else (sources[0].dtype, (e, 2 * r, c))]

    def undo_rows(self, sources: Sources, index: int, start: int, stop: int) -> np.ndarray:
        """Interleaved rows: row ``2 i`` is row ``i`` of gate, row ``2 i + 1`` is row ``i`` of up."""
        if not self.mxfp4:
            return _interleave_rows(sources, start, stop)
        groups = sources[0].shape[2] // 4  # a row of the original is one group of 16 bytes
        first, last = start // groups, -(-stop // groups)
        values = _interleave_rows(sources, first, last).view(np.uint8).reshape(-1, 16)
        return values[start - first * groups : stop - first * groups]


def _interleave_rows(sources: Sources, start: int, stop: int) -> np.ndarray:
    first, last = start // 2, -(-stop // 2)
    gate, up = (source.read(first, last) for source in sources)
    values = np.stack([gate, up], axis=1).reshape(-1, gate.shape[1])
    return values[start - 2 * first : stop - 2 * first]


@dataclass(frozen=True)
class SplitColumns:
    """Alternating columns of gate and up ``[e, 2 c]`` to two tensors ``[e, c]``: the experts' biases."""

    name: ClassVar = "splitcolumns"

    def outputs(self, sources: Sources) -> list[TypeAndShape]:
        """Gate and up."""
        if len(sources[0].shape) != 2 or sources[0].shape[1] % 2:
            raise _shape_error(sources[0], "[experts, an even number of columns]")
        e, c = sources[0].shape
        return [(sources[0].dtype, (e, c // 2))] * 2

    def rows(self, sources: Sources, index: int, start: int, stop: int) -> np.ndarray:
        """Every second column."""
        return np.ascontiguousarray(sources[0].read(start, stop)[:, index::2])

    def inputs(self, sources: Sources) -> list[TypeAndShape]:
        """One tensor with twice the columns."""
        e, c = sources[0].shape
        return [(sources[0].dtype, (e, 2 * c))]

    def undo_rows(self, sources: Sources, index: int, start: int, stop: int) -> np.ndarray:
        """Interleaved columns."""
        gate, up = (source.read(start, stop) for source in sources)
        return np.stack([gate, up], axis=-1).reshape(gate.shape[0], -1)


@dataclass(frozen=True)
class Transpose:
    """``[e, i, o]`` to ``[e, o, i]``: gpt-oss without MXFP4.

    With ``split``, gate and up alternate in ``o`` and become two tensors.
    """

    split: bool = False
    name: ClassVar = "transpose"

    def outputs(self, sources: Sources) -> list[TypeAndShape]:
        """The transposed tensor, or gate and up."""
        count = 2 if self.split else 1
        if len(sources[0].shape) != 3 or sources[0].shape[2] % count:
            raise _shape_error(sources[0], "[experts, inputs, outputs]")
        e, i, o = sources[0].shape
        return [(sources[0].dtype, (e, o // count, i))] * count

    def rows(self, sources: Sources, index: int, start: int, stop: int) -> np.ndarray:
        """Columns of the original."""
        _, i, o = sources[0].shape
        count = 2 if self.split else 1
        parts = []
        for e, first, last in _by_expert(start, stop, o // count):
            values = sources[0].read_block((e * i, e * i + i), (first * count, last * count))
            parts.append(values[:, index::count].T)
        return np.ascontiguousarray(np.concatenate(parts))

    def inputs(self, sources: Sources) -> list[TypeAndShape]:
        """The original's."""
        e, o, i = sources[0].shape
        return [(sources[0].dtype, (e, i, o * len(sources)))]

    def undo_rows(self, sources: Sources, index: int, start: int, stop: int) -> np.ndarray:
        """Transposed, and interleaved where there are two."""
        _, o, i = sources[0].shape
        parts = []
        for e, first, last in _by_expert(start, stop, i):
            columns = [source.read_block((e * o, e * o + o), (first, last)).T for source in sources]
            parts.append(np.stack(columns, axis=-1).reshape(last - first, -1))
        return np.concatenate(parts)


def _by_expert(start: int, stop: int, rows: int) -> list[tuple[int, int, int]]:
    """Split a range over all experts' rows into (expert, first row, last row)."""
    out = []
    while start < stop:
        e = start // rows
        end = min(stop, (e + 1) * rows)
        out.append((e, start - e * rows, end - e * rows))
        start = end
    return out


@dataclass(frozen=True)
class Stack:
    """One tensor ``[r, c]`` for each expert to one tensor ``[e, r, c]``: Qwen3-MoE."""

    name: ClassVar = "stack"

    def outputs(self, sources: Sources) -> list[TypeAndShape]:
        """All experts."""
        dtype, shape = sources[0].dtype, sources[0].shape
        for source in sources:
            if source.shape != shape or source.dtype != dtype or len(source.shape) != 2:
                raise _shape_error(source, f"{dtype} {list(shape)}, as of the first expert,")
        return [(dtype, (len(sources), *shape))]

    def rows(self, sources: Sources, index: int, start: int, stop: int) -> np.ndarray:
        """Rows of the experts in order."""
        height = sources[0].shape[0]
        parts = [sources[e].read(first, last) for e, first, last in _by_expert(start, stop, height)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def inputs(self, sources: Sources) -> list[TypeAndShape]:
        """One tensor for each expert."""
        e, r, c = sources[0].shape
        return [(sources[0].dtype, (r, c))] * e

    def undo_rows(self, sources: Sources, index: int, start: int, stop: int) -> np.ndarray:
        """Rows of expert ``index``."""
        r = sources[0].shape[1]
        return sources[0].read(index * r + start, index * r + stop)


@dataclass(frozen=True)
class SplitBlocks:
    """``[e, 2 r, c]``, gate's rows before up's, to two tensors ``[e, r, c]``.

    transformers 5 holds the experts of Qwen3-MoE in memory like this.
    """

    name: ClassVar = "splitblocks"

    def outputs(self, sources: Sources) -> list[TypeAndShape]:
        """Gate and up."""
        if len(sources[0].shape) != 3 or sources[0].shape[1] % 2:
            raise _shape_error(sources[0], "[experts, an even number of rows, columns]")
        e, r, c = sources[0].shape
        return [(sources[0].dtype, (e, r // 2, c))] * 2

    def rows(self, sources: Sources, index: int, start: int, stop: int) -> np.ndarray:
        """Rows of one half of each expert."""
        r = sources[0].shape[1] // 2
        parts = []
        for e, first, last in _by_expert(start, stop, r):
            offset = (2 * e + index) * r
            parts.append(sources[0].read(offset + first, offset + last))
        return np.concatenate(parts)

    def inputs(self, sources: Sources) -> list[TypeAndShape]:
        """One tensor with twice the rows."""
        e, r, c = sources[0].shape
        return [(sources[0].dtype, (e, 2 * r, c))]

    def undo_rows(self, sources: Sources, index: int, start: int, stop: int) -> np.ndarray:
        """For each expert gate's rows, then up's."""
        r = sources[0].shape[1]
        parts = []
        for half, first, last in _by_expert(start, stop, r):
            source, offset = sources[half % 2], half // 2 * r
            parts.append(source.read(offset + first, offset + last))
        return np.concatenate(parts)


Transform = Same | Mxfp4Words | SplitRows | SplitColumns | SplitBlocks | Transpose | Stack
