"""A reader of safetensors checkpoints: headers, shards, and ranges of rows of a tensor.

The format (https://github.com/huggingface/safetensors) is eight bytes with the length of the header, a JSON
header, and the bytes of the tensors without gaps. It is not read with the safetensors library because numpy
has no bfloat16, and so that a conversion reads ranges of rows and every error names the file and the tensor.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from mlx_distill.errors import ModelError
from mlx_distill.storage import os_errors

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPE_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
}
FLOATS = ("F32", "F16", "BF16")
_RAW = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_MAX_HEADER = 100_000_000  # the format's own limit
_DOWNLOAD = "download or copy the checkpoint again"


@runtime_checkable
class Source(Protocol):
    """A tensor whose rows can be read: :class:`TensorInfo` from a file, ``TensorPlan`` computed on demand."""

    @property
    def name(self) -> str:
        """Name in its layout."""

    @property
    def dtype(self) -> str:
        """Safetensors type."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape."""

    @property
    def file(self) -> Path:
        """The file that it is read from."""

    @property
    def where(self) -> str:
        """``file: tensor 'name'``, for messages."""

    def read(self, start: int = 0, stop: int | None = None, *, columns: int | None = None) -> np.ndarray:
        """Rows of the tensor seen as a matrix with ``columns`` columns (default: the last dimension), as raw
        unsigned integers.
        """

    def read_block(self, rows: tuple[int, int], columns: tuple[int, int]) -> np.ndarray:
        """A block of rows and columns of the tensor seen as a matrix over its last dimension."""


@dataclass(frozen=True)
class TensorInfo:
    """A tensor in a file, ``offset`` bytes from its start, row-major, little-endian."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return prod(self.shape) * DTYPE_BYTES[self.dtype]

    @property
    def where(self) -> str:
        """``file: tensor 'name'``, for messages."""
        return f"{self.file}: tensor {self.name!r}"

    def read(self, start: int = 0, stop: int | None = None, *, columns: int | None = None) -> np.ndarray:
        """Rows ``start`` to ``stop`` of the tensor seen as a matrix with ``columns`` columns.

        Returns:
            The bits as unsigned integers ``[n, columns]``; ``columns`` defaults to the last dimension.
        """
        raw = np.dtype(_RAW[DTYPE_BYTES[self.dtype]])
        columns = columns or (self.shape[-1] if self.shape else 1)
        stop = prod(self.shape) // columns if stop is None else stop
        out = np.empty((stop - start, columns), raw)
        with os_errors(), open(self.file, "rb", buffering=0) as file:
            _fill(file.fileno(), out, self.offset + start * columns * raw.itemsize, self)
        return out

    def read_block(self, rows: tuple[int, int], columns: tuple[int, int]) -> np.ndarray:
        """The block ``rows x columns`` of the tensor seen as a matrix over its last dimension; only its bytes
        are read.
        """
        raw = np.dtype(_RAW[DTYPE_BYTES[self.dtype]])
        width = self.shape[-1]
        if columns == (0, width):
            return self.read(*rows)
        out = np.empty((rows[1] - rows[0], columns[1] - columns[0]), raw)
        with os_errors(), open(self.file, "rb", buffering=0) as file:
            for i in range(out.shape[0]):
                first = (rows[0] + i) * width + columns[0]
                _fill(file.fileno(), out[i], self.offset + first * raw.itemsize, self)
        return out


def _fill(handle: int, out: np.ndarray, offset: int, info: TensorInfo) -> None:
    """Read the bytes of ``out`` from the file."""
    view = memoryview(out).cast("B") if out.size else memoryview(b"")
    done = 0
    while done < len(view):
        count = os.preadv(handle, [view[done : done + (1 << 30)]], offset + done)
        if count == 0:
            raise ModelError(f"{info.where}: the file ends in the middle of it", fix=_DOWNLOAD)
        done += count


def read_header(path: str | Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors of one safetensors file and its metadata, checked against the size of the file.

    Raises:
        ModelError: a truncated file, not safetensors, overlapping tensors, an unknown type: with file and
            tensor.
    """
    path = Path(path)
    with os_errors():
        size = path.stat().st_size
        with open(path, "rb") as file:
            head = file.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else -1
            if length < 0 or length > min(size - 8, _MAX_HEADER):
                raise ModelError(
                    f"{path}: truncated, or not a safetensors file ({size} bytes)", fix=_DOWNLOAD
                )
            raw = file.read(length)
    try:
        header = json.loads(raw)
        metadata = header.pop("__metadata__", None) or {}  # MLX writes null
        metadata = {str(key): str(value) for key, value in metadata.items()}
        tensors = {name: _tensor(path, name, entry, 8 + length) for name, entry in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ModelError(f"{path}: damaged header: {error}", fix=_DOWNLOAD) from error
    _check_layout(path, tensors, 8 + length, size)
    return tensors, metadata


def _tensor(path: Path, name: str, entry: Mapping[str, Any], base: int) -> TensorInfo:
    dtype, shape, (begin, end) = entry["dtype"], tuple(int(n) for n in entry["shape"]), entry["data_offsets"]
    if dtype not in DTYPE_BYTES:
        raise ModelError(
            f"{path}: tensor {name!r} has the unknown type {dtype}",
            fix="convert it to a known type with another tool first",
        )
    info = TensorInfo(name, path, dtype, shape, base + int(begin))
    if end - begin != info.nbytes or any(n < 0 for n in shape):
        raise ModelError(
            f"{info.where}: {end - begin} bytes do not hold {dtype} {list(shape)}", fix=_DOWNLOAD
        )
    return info


def _check_layout(path: Path, tensors: Mapping[str, TensorInfo], base: int, size: int) -> None:
    position = base
    for info in sorted(tensors.values(), key=lambda t: (t.offset, t.nbytes)):
        if info.offset != position:
            raise ModelError(f"{info.where}: a gap or an overlap before it", fix=_DOWNLOAD)
        position += info.nbytes
        if position > size:
            raise ModelError(
                f"{info.where}: the file is truncated ({size} bytes, {position} or more needed)",
                fix=_DOWNLOAD,
            )
    if position != size:
        raise ModelError(f"{path}: {size - position} bytes after the last tensor", fix=_DOWNLOAD)


@dataclass(frozen=True)
class Checkpoint:
    """All tensors of a model folder by name, and its shards.

    ``listing`` is the file that lists the tensors: the index, or the only shard. ``note`` says which files of
    the folder are not read, if there are any.
    """

    folder: Path
    tensors: Mapping[str, TensorInfo]
    files: tuple[Path, ...]
    listing: Path
    note: str | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """Read the index and the header of every shard.

    A ``model.safetensors`` that the index does not name is read instead of the index and its shards, as
    transformers does: it was saved into a folder that held another checkpoint. Other files that the index
    does not name are not read. Either is said in ``note``.

    Raises:
        ModelError: no safetensors, a missing shard, or an index that disagrees with the shards: with file and
            tensor.
    """
    folder = Path(folder)
    index = folder / INDEX
    files = sorted(folder.glob("model*.safetensors"))
    if not index.is_file():
        return _open_files(folder, files)
    weight_map = _read_index(index)
    unnamed = [file.name for file in files if file.name not in weight_map.values()]
    if SINGLE in unnamed:
        return _open_single(folder, [INDEX, *(file.name for file in files)])
    tensors, shards = _open_indexed(folder, index, weight_map, unnamed)
    note = f"{index} does not name {_few(unnamed)}: not read" if unnamed else None
    return Checkpoint(folder, tensors, shards, index, note)


def _open_files(folder: Path, files: Sequence[Path]) -> Checkpoint:
    """The tensors of all files of a folder without an index."""
    if not files:
        raise _no_weights(folder)
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        for name, info in read_header(file)[0].items():
            if name not in tensors:
                tensors[name] = info
                continue
            if folder / SINGLE in files:
                return _open_single(folder, [file.name for file in files])
            raise ModelError(
                f"{info.where} is also in {tensors[name].file.name}", fix="remove the stale shard"
            )
    return Checkpoint(folder, tensors, tuple(files), files[0] if len(files) == 1 else folder)


def _no_weights(folder: Path) -> ModelError:
    """The error for a folder without ``model*.safetensors``, by what it has instead."""
    patterns = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
    if pickled := sorted(path.name for pattern in patterns for path in folder.glob(pattern)):
        return ModelError(
            f"{folder / pickled[0]}: pickled weights are never opened, since they can run code",
            fix="use a safetensors version of the checkpoint",
        )
    missing = f"{folder}: no model*.safetensors"
    if others := sorted(
        path.name for end in ("safetensors", "gguf", "npz", "h5") for path in folder.glob(f"*.{end}")
    ):
        return ModelError(
            f"{missing}, only {_few(others)}",
            fix="take the checkpoint in the layout of transformers (model.safetensors or its shards)",
        )
    return ModelError(missing, fix="check the path, or download the weights")


def _open_single(folder: Path, names: Sequence[str]) -> Checkpoint:
    """The tensors of ``model.safetensors`` alone, in a folder that holds these files."""
    single = folder / SINGLE
    ignored = _few([name for name in names if name != SINGLE])
    note = f"{single} is read, as transformers does; not read: {ignored}"
    return Checkpoint(folder, read_header(single)[0], (single,), single, note)


def _read_index(index: Path) -> dict[str, str]:
    """The shard of each tensor."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted({str(shard) for shard in weight_map.values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{index}: not an index of shards: {error}", fix=_DOWNLOAD) from error
    for shard in shards:
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise ModelError(
                f"{index}: {shard!r} is not the name of a safetensors file in the same folder", fix=_DOWNLOAD
            )
    return {name: str(shard) for name, shard in weight_map.items()}


def _open_indexed(
    folder: Path, index: Path, weight_map: Mapping[str, str], unnamed: Sequence[str]
) -> tuple[dict[str, TensorInfo], tuple[Path, ...]]:
    shards = sorted(set(weight_map.values()))
    tensors: dict[str, TensorInfo] = {}
    for shard in shards:
        if not (folder / shard).is_file():
            first = next(name for name, file in weight_map.items() if file == shard)
            fix = "download that shard"
            if unnamed:
                fix += f", or remove {INDEX} if the weights are those in {_few(unnamed)}"
            raise ModelError(f"{folder / shard} is missing (it holds {first!r})", fix=fix)
        for name, info in read_header(folder / shard)[0].items():
            if weight_map.get(name) != shard:
                raise ModelError(
                    f"{info.where} is not in {INDEX} under this file",
                    fix="the index and the shards do not belong together; " + _DOWNLOAD,
                )
            tensors[name] = info
    for name, shard in weight_map.items():
        if name not in tensors:
            raise ModelError(
                f"{folder / shard}: tensor {name!r} is in {INDEX} but not in the file", fix=_DOWNLOAD
            )
    return tensors, tuple(folder / shard for shard in shards)


def _few(names: Sequence[str]) -> str:
    """At most three names, and how many more there are."""
    more = len(names) - 3
    return ", ".join(names[:3]) + (f" and {more} more" if more > 0 else "")
