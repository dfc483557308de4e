"""How a tensor of the original layout becomes tensors of MLX's, and back: row by row, on raw bits.

Each transform goes both ways and can deliver any range of rows of any of its outputs, so that neither
direction ever needs a whole tensor. ``outputs`` says the types and shapes that come out, ``rows`` delivers
rows of the output numbered ``index``; ``inputs`` and ``undo_rows`` are the same for the way back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from mlx_distill.errors import ModelError
from mlx_distill.models.checkpoint.safetensors import Source

Infos = Sequence[Source]
Spec = tuple[str, tuple[int, ...]]  # safetensors type, shape


def _refuse(info: Source, needed: str) -> ModelError:
    return ModelError(
        f"{info.where} has the shape {list(info.shape)} where {needed} is needed",
        fix="check that config and weights belong together",
    )


@dataclass(frozen=True)
class Same:
    """The same bytes under the same or another name."""

    def outputs(self, infos: Infos) -> list[Spec]:
        """As they are."""
        return [(infos[0].dtype, infos[0].shape)]

    def rows(self, infos: Infos, index: int, start: int, stop: int) -> np.ndarray:
        """As they are."""
        return infos[0].read(start, stop)

    inputs = outputs
    undo_rows = rows


@dataclass(frozen=True)
class Packed:
    """MXFP4 blocks ``[e, r, groups, 16]`` of bytes to MLX's words ``[e, r, groups * 4]``; the bytes are the
    same ones.
    """

    def outputs(self, infos: Infos) -> list[Spec]:
        """Words."""
        shape = infos[0].shape
        if len(shape) != 4 or shape[-1] != 16 or infos[0].dtype != "U8":
            raise _refuse(infos[0], "U8 [experts, rows, groups, 16]")
        return [("U32", (*shape[:2], shape[2] * 4))]

    def rows(self, infos: Infos, index: int, start: int, stop: int) -> np.ndarray:
        """Rows of words."""
        return infos[0].read(start, stop, columns=prod(infos[0].shape[2:])).view(np.uint32)

    def inputs(self, infos: Infos) -> list[Spec]:
        """Blocks."""
        e, r, words = infos[0].shape
        return [("U8", (e, r, words // 4, 16))]

    def undo_rows(self, infos: Infos, index: int, start: int, stop: int) -> np.ndarray:
        """Rows of 16 bytes, four words a group."""
        return infos[0].read(start, stop, columns=4).view(np.uint8)


@dataclass(frozen=True)
class SplitRows:
    """Rows that alternate between gate and up ``[e, 2 r, ...]`` to two tensors ``[e, r, ...]``; ``packed``
    blocks become words too.
    """

    packed: bool = False

    def outputs(self, infos: Infos) -> list[Spec]:
        """Gate and up."""
        dtype, shape = Packed().outputs(infos)[0] if self.packed else (infos[0].dtype, infos[0].shape)
        if len(shape) != 3 or shape[1] % 2:
            raise _refuse(infos[0], "[experts, an even number of rows, columns]")
        return [(dtype, (shape[0], shape[1] // 2, shape[2]))] * 2

    def rows(self, infos: Infos, index: int, start: int, stop: int) -> np.ndarray:
        """Every second row."""
        columns = prod(infos[0].shape[2:])
        block = np.ascontiguousarray(infos[0].read(2 * start, 2 * stop, columns=columns)[index::2])
        return block.view(np.uint32) if self.packed else block

    def inputs(self, infos: Infos) -> list[Spec]:
        """One tensor with twice the rows."""
        e, r, c = infos[0].shape
        return [("U8", (e, 2 * r, c // 4, 16)) if self.packed else (infos[0].dtype, (e, 2 * r, c))]

    def undo_rows(self, infos: Infos, index: int, start: int, stop: int) -> np.ndarray:
        """Interleaved again: row ``2 i`` is gate's row ``i``."""
        if not self.packed:
            return _interleave(infos, start, stop)
        groups = infos[0].shape[2] // 4  # a row of the packed original is one group of 16 bytes
        first, last = start // groups, -(-stop // groups)
        block = _interleave(infos, first, last).view(np.uint8).reshape(-1, 16)
        return block[start - first * groups : stop - first * groups]


def _interleave(infos: Infos, start: int, stop: int) -> np.ndarray:
    first, last = start // 2, -(-stop // 2)
    gate, up = (info.read(first, last) for info in infos)
    both = np.stack([gate, up], axis=1).reshape(-1, gate.shape[1])
    return both[start - 2 * first : stop - 2 * first]


@dataclass(frozen=True)
class SplitColumns:
    """Columns that alternate between gate and up ``[e, 2 c]`` to two tensors ``[e, c]``: the experts' biases."""

    def outputs(self, infos: Infos) -> list[Spec]:
        """Gate and up."""
        if len(infos[0].shape) != 2 or infos[0].shape[1] % 2:
            raise _refuse(infos[0], "[experts, an even number of columns]")
        e, c = infos[0].shape
        return [(infos[0].dtype, (e, c // 2))] * 2

    def rows(self, infos: Infos, index: int, start: int, stop: int) -> np.ndarray:
        """Every second column."""
        return np.ascontiguousarray(infos[0].read(start, stop)[:, index::2])

    def inputs(self, infos: Infos) -> list[Spec]:
        """One tensor with twice the columns."""
        e, c = infos[0].shape
        return [(infos[0].dtype, (e, 2 * c))]

    def undo_rows(self, infos: Infos, index: int, start: int, stop: int) -> np.ndarray:
        """Interleaved again."""
        gate, up = (info.read(start, stop) for info in infos)
        return np.stack([gate, up], axis=-1).reshape(gate.shape[0], -1)


@dataclass(frozen=True)
class Transpose:
    """``[e, i, o]`` to ``[e, o, i]``; with ``split``, gate and up alternate in ``o`` and come out apart:
    gpt-oss without MXFP4.
    """

    split: bool = False

    def outputs(self, infos: Infos) -> list[Spec]:
        """Transposed; twice of them with ``split``."""
        ways = 2 if self.split else 1
        if len(infos[0].shape) != 3 or infos[0].shape[2] % ways:
            raise _refuse(infos[0], "[experts, inputs, outputs]")
        e, i, o = infos[0].shape
        return [(infos[0].dtype, (e, o // ways, i))] * ways

    def rows(self, infos: Infos, index: int, start: int, stop: int) -> np.ndarray:
        """Columns of the original."""
        _, i, o = infos[0].shape
        ways = 2 if self.split else 1
        parts = []
        for e, first, last in _by_expert(start, stop, o // ways):
            block = infos[0].read_block((e * i, e * i + i), (first * ways, last * ways))
            parts.append(block[:, index::ways].T)
        return np.ascontiguousarray(np.concatenate(parts))

    def inputs(self, infos: Infos) -> list[Spec]:
        """The original's shape."""
        e, o, i = infos[0].shape
        return [(infos[0].dtype, (e, i, o * len(infos)))]

    def undo_rows(self, infos: Infos, index: int, start: int, stop: int) -> np.ndarray:
        """Transposed back, and interleaved."""
        _, o, i = infos[0].shape
        parts = []
        for e, first, last in _by_expert(start, stop, i):
            blocks = [info.read_block((e * o, e * o + o), (first, last)).T for info in infos]
            parts.append(np.stack(blocks, axis=-1).reshape(last - first, -1))
        return np.concatenate(parts)


def _by_expert(start: int, stop: int, rows: int) -> list[tuple[int, int, int]]:
    """Cut flattened rows into (expert, first row, last row) pieces."""
    out = []
    while start < stop:
        e = start // rows
        end = min(stop, (e + 1) * rows)
        out.append((e, start - e * rows, end - e * rows))
        start = end
    return out


@dataclass(frozen=True)
class Stack:
    """One tensor ``[r, c]`` an expert to one ``[e, r, c]``: Qwen3-MoE."""

    def outputs(self, infos: Infos) -> list[Spec]:
        """All experts in one."""
        for info in infos:
            if info.shape != infos[0].shape or info.dtype != infos[0].dtype or len(info.shape) != 2:
                raise _refuse(info, f"{infos[0].dtype} {list(infos[0].shape)}, as of the first expert,")
        return [(infos[0].dtype, (len(infos), *infos[0].shape))]

    def rows(self, infos: Infos, index: int, start: int, stop: int) -> np.ndarray:
        """Rows of the experts, one after the other."""
        parts = [infos[e].read(first, last) for e, first, last in _by_expert(start, stop, infos[0].shape[0])]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def inputs(self, infos: Infos) -> list[Spec]:
        """One tensor an expert."""
        e, r, c = infos[0].shape
        return [(infos[0].dtype, (r, c))] * e

    def undo_rows(self, infos: Infos, index: int, start: int, stop: int) -> np.ndarray:
        """Rows of expert ``index``."""
        r = infos[0].shape[1]
        return infos[0].read(index * r + start, index * r + stop)


@dataclass(frozen=True)
class SplitBlocks:
    """Gate's rows before up's ``[e, 2 r, c]`` to two tensors ``[e, r, c]``: Qwen3-MoE as transformers 5 holds
    it in memory.
    """

    def outputs(self, infos: Infos) -> list[Spec]:
        """Gate and up."""
        if len(infos[0].shape) != 3 or infos[0].shape[1] % 2:
            raise _refuse(infos[0], "[experts, an even number of rows, columns]")
        e, r, c = infos[0].shape
        return [(infos[0].dtype, (e, r // 2, c))] * 2

    def rows(self, infos: Infos, index: int, start: int, stop: int) -> np.ndarray:
        """Rows of one half of each expert."""
        r = infos[0].shape[1] // 2
        parts = [
            infos[0].read((2 * e + index) * r + a, (2 * e + index) * r + b)
            for e, a, b in _by_expert(start, stop, r)
        ]
        return np.concatenate(parts)

    def inputs(self, infos: Infos) -> list[Spec]:
        """One tensor with twice the rows."""
        e, r, c = infos[0].shape
        return [(infos[0].dtype, (e, 2 * r, c))]

    def undo_rows(self, infos: Infos, index: int, start: int, stop: int) -> np.ndarray:
        """Gate's rows of an expert, then up's."""
        r = infos[0].shape[1]
        parts = [infos[e % 2].read(e // 2 * r + a, e // 2 * r + b) for e, a, b in _by_expert(start, stop, r)]
        return np.concatenate(parts)


Transform = Same | Packed | SplitRows | SplitColumns | SplitBlocks | Transpose | Stack
