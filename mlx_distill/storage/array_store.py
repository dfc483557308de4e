"""Rows of arrays in a folder: appended one by one, read one at a time; the folder is complete or absent.

It holds::

    rows.bin     the rows, and in each its arrays, each padded to 8 bytes
    counts.bin   [n, c + 1] int32: the lengths of each row's c arrays, and one further number a row
    index.json   the arrays (name, type, further dimensions), number of rows, key, hash of the content, facts

An open store takes 4c + 12 bytes of memory a row. A row is read into memory of its own when it is accessed:
the pages of a mapped file would count as memory of the process, which would grow with the rows of a training.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Generic, TypeVar, overload

import numpy as np
from jaxtyping import Int64

from mlx_distill.errors import FileError
from mlx_distill.storage import fsync_folder, os_errors, read_json, write_json

FORMAT = 1
ROWS, COUNTS, INDEX = "rows.bin", "counts.bin", "index.json"
_ALIGNMENT = 8  # bytes
_BUFFER = 1 << 20  # bytes that the writer collects
_FIX = "delete it and run the same command again"

Row = TypeVar("Row")


@dataclass(frozen=True)
class Column:
    """One array of every row: its first dimension differs between rows, ``shape`` are the others."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def width(self) -> int:
        """Bytes of one entry."""
        return np.dtype(self.dtype).itemsize * int(np.prod(self.shape))


def _padded(size: Any) -> Any:
    """A size in bytes, rounded up to the alignment."""
    return -(-size // _ALIGNMENT) * _ALIGNMENT


class StoreWriter:
    """Writes rows into a temporary folder, which becomes ``folder`` when the ``with`` block ends without an
    error and is removed otherwise.

    Args:
        folder: The store's folder; an older one is replaced.
        key: Names what the rows were made from; see :func:`is_stored`.

    Attributes:
        rows: How many were written.
        facts: JSON that is kept in the index.

    >>> from tempfile import mkdtemp
    >>> place = Path(mkdtemp()) / "numbers"
    >>> with StoreWriter(place, key="mine") as writer:
    ...     writer.append(tokens=np.arange(3), weight=np.ones(1))
    ...     writer.append(tokens=np.arange(5), weight=np.ones(1))
    >>> store = Store(place, dict)
    >>> store[1]["tokens"].tolist(), store.lengths.tolist()
    ([0, 1, 2, 3, 4], [3, 5])
    >>> is_stored(place, "mine"), is_stored(place, "other")
    (True, False)
    """

    def __init__(self, folder: Path, key: str = "") -> None:
        self.folder, self.key = folder, key
        self.rows = 0
        self.facts: dict[str, Any] = {}
        self._columns: list[Column] | None = None
        self._hash = hashlib.sha256()
        self._open = ExitStack()
        self._files: list[BinaryIO] = []

    @property
    def _temporary(self) -> Path:
        return self.folder.with_name(f".{self.folder.name}.tmp")

    def __enter__(self) -> StoreWriter:
        with os_errors(self.folder):
            shutil.rmtree(self._temporary, ignore_errors=True)
            self._temporary.mkdir(parents=True)
            paths = [self._temporary / name for name in (ROWS, COUNTS)]
            self._files = [self._open.enter_context(open(path, "wb", buffering=_BUFFER)) for path in paths]
        return self

    def append(self, counted: int = 0, /, **arrays: np.ndarray) -> None:
        """Write one row. All rows have the same arrays, of the same types; the length of a row is that of its
        first array.

        ``counted`` can be read back without reading the row: the number of its trained tokens.

        Raises:
            ValueError: other arrays than those of the first row.
            FileError: the row cannot be written.
        """
        columns = [Column(name, array.dtype.str, array.shape[1:]) for name, array in arrays.items()]
        if self._columns is None:
            self._columns = columns
        elif columns != self._columns:
            raise ValueError(f"row {self.rows}: {columns}, not {self._columns}")
        row = b"".join(
            array.tobytes() + bytes(_padded(array.nbytes) - array.nbytes) for array in arrays.values()
        )
        counts = np.array([*(len(array) for array in arrays.values()), counted], dtype=np.int32).tobytes()
        with os_errors(self.folder):
            for file, part in zip(self._files, (row, counts), strict=True):
                file.write(part)
                self._hash.update(part)
        self.rows += 1

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        try:
            with os_errors(self.folder), self._open:
                for file in self._files if error is None else ():
                    file.flush()
                    os.fsync(file.fileno())
            if error is None:
                with os_errors(self.folder):
                    self._publish()
        finally:
            shutil.rmtree(self._temporary, ignore_errors=True)

    def _publish(self) -> None:
        columns = [[column.name, column.dtype, list(column.shape)] for column in self._columns or []]
        self._hash.update(json.dumps(columns).encode())
        index = {
            "format": FORMAT,
            "arrays": columns,
            "rows": self.rows,
            "key": self.key,
            "content": self._hash.hexdigest(),
        }
        sizes = {name: (self._temporary / name).stat().st_size for name in (ROWS, COUNTS)}
        write_json(self._temporary / INDEX, {**index, "sizes": sizes, "facts": self.facts})
        if self.folder.exists():
            shutil.rmtree(self.folder)
        os.replace(self._temporary, self.folder)
        fsync_folder(self.folder.parent)


def is_stored(folder: Path, key: str) -> bool:
    """Whether ``folder`` holds a complete store of this version that was written with ``key``."""
    index = _read_index(folder)
    return index is not None and index["key"] == key


def _read_index(folder: Path) -> dict[str, Any] | None:
    """The index of a store whose files have their full sizes, else None."""
    if not (folder / INDEX).is_file():
        return None
    index: dict[str, Any] = read_json(folder / INDEX)
    if index.get("format") != FORMAT:
        return None
    complete = all(
        (folder / name).is_file() and (folder / name).stat().st_size == size
        for name, size in index["sizes"].items()
    )
    return index if complete else None


class Store(Sequence[Row], Generic[Row]):
    """The rows of a folder, each read from the disk when it is accessed; its arrays are read-only.

    Args:
        folder: The folder of a :class:`StoreWriter`.
        make: Makes a row from its arrays, which are its keyword arguments.

    Attributes:
        content: Hash of all rows, their arrays' types and their order.
        facts: Those of the writer.

    Raises:
        FileError: no store, a damaged one, or one of another version.
    """

    def __init__(self, folder: Path, make: Callable[..., Row]) -> None:
        index = _read_index(folder)
        if index is None:
            raise FileError(f"{folder}: not a complete store of rows of this version", fix=_FIX)
        self.content, self.facts, self._make = str(index["content"]), dict(index["facts"]), make
        self._columns = [Column(name, dtype, tuple(shape)) for name, dtype, shape in index["arrays"]]
        self._file = _File(folder / ROWS)
        with os_errors():
            counts = np.fromfile(folder / COUNTS, dtype=np.int32)
        self._counts = counts.reshape(int(index["rows"]), len(self._columns) + 1)
        self._ends = np.zeros(len(self._counts) + 1, dtype=np.int64)
        for number, column in enumerate(self._columns):
            self._ends[1:] += _padded(self._counts[:, number].astype(np.int64) * column.width)
        np.cumsum(self._ends, out=self._ends)

    def __len__(self) -> int:
        return len(self._counts)

    @property
    def lengths(self) -> Int64[np.ndarray, " n"]:
        """The length of each row's first array, without reading a row."""
        return self._counts[:, 0].astype(np.int64)

    @property
    def counted(self) -> Int64[np.ndarray, " n"]:
        """The number that was appended with each row (its trained tokens), without reading a row."""
        return self._counts[:, -1].astype(np.int64)

    @overload
    def __getitem__(self, row: int) -> Row: ...
    @overload
    def __getitem__(self, row: slice) -> list[Row]: ...
    def __getitem__(self, row: int | slice) -> Row | list[Row]:
        """One row, or a list of rows."""
        if isinstance(row, slice):
            return [self[number] for number in range(len(self))[row]]
        row = range(len(self))[row]
        start, arrays = 0, {}
        raw = self._file.read(int(self._ends[row]), int(self._ends[row + 1]))
        for column, count in zip(self._columns, self._counts[row, :-1].tolist(), strict=True):
            arrays[column.name] = np.ndarray((count, *column.shape), column.dtype, raw, start)
            start += _padded(count * column.width)
        return self._make(**arrays)


class _File:
    """A file that is read in pieces, and closed with its last reader."""

    def __init__(self, path: Path) -> None:
        with os_errors():
            self.path, self._handle = path, os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._handle)

    def read(self, start: int, end: int) -> bytes:
        with os_errors(self.path):
            raw = os.pread(self._handle, end - start, start)
        if len(raw) != end - start:
            raise FileError(f"{self.path}: ends at {start + len(raw)} bytes", fix=_FIX)
        return raw
