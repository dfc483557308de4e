"""What prepare knows of each row while it decides: rows and signatures wait in files, about 60 bytes a row in
memory.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import UInt32

from mlx_distill.data.dedup import PERMUTATIONS, hash64
from mlx_distill.data.rows import chat_digest, to_row
from mlx_distill.records import Example
from mlx_distill.storage import os_errors

_SLAB = 8192  # signatures that are read together


class SignatureFile:
    """Signatures one behind the other in a file, for :func:`~mlx_distill.data.dedup.near_duplicates`: read as
    an array ``[n, 128]`` is.

    Args:
        path: A new file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with os_errors(path):
            self._file = open(path, "w+b")
        self._bytes = 0

    def append(self, signature: UInt32[np.ndarray, " p"]) -> None:
        """One row more."""
        with os_errors(self.path):
            self._bytes += self._file.write(signature.tobytes())

    def __len__(self) -> int:
        return self._bytes // (4 * PERMUTATIONS)

    def __getitem__(self, place: int | tuple[slice, slice]) -> UInt32[np.ndarray, "*n"]:
        """The signature of a row, or ``[:, a:b]``: some entries of all signatures."""
        if not isinstance(place, tuple):
            return self._rows(place, place + 1)[0]
        starts = range(0, len(self), _SLAB)
        return np.concatenate(
            [self._rows(start, min(start + _SLAB, len(self)))[:, place[1]].copy() for start in starts]
        )

    def _rows(self, start: int, end: int) -> UInt32[np.ndarray, "n p"]:
        with os_errors(self.path):
            self._file.seek(start * 4 * PERMUTATIONS)
            raw = self._file.read((end - start) * 4 * PERMUTATIONS)
        return np.frombuffer(raw, dtype=np.uint32).reshape(-1, PERMUTATIONS)

    def remove(self) -> None:
        """Close the file and take it away."""
        _remove(self._file, self.path)


def _remove(file: BinaryIO, path: Path) -> None:
    with suppress(OSError):  # what is still to be written may not fit the disk, and nobody wants it
        file.close()
    path.unlink(missing_ok=True)


class RowBuffer:
    """Rows that are read and not yet dealt out, in the order in which they came; as a context manager it
    leaves nothing behind.

    Args:
        folder: An existing folder for its files.

    Attributes:
        text: Hash of each row's normalised user text; ``answer`` of its answer; ``order`` of its whole chat;
            ``names`` of its id.
        forced: The side that it wishes for; ``source``: the number of its source; ``strata``: what the split
            is balanced by.
        signatures: Of the rows, if they were given any.
    """

    def __init__(self, folder: Path) -> None:
        self.text, self.answer, self.order, self.names = array("Q"), array("Q"), array("Q"), array("Q")
        self.forced, self.source = array("b"), array("H")
        self.strata: list[tuple[str, ...]] = []
        self._known: dict[tuple[str, ...], tuple[str, ...]] = {}
        self._starts = array("Q")
        self._path = folder / "rows.jsonl"
        self.signatures = SignatureFile(folder / "signatures.bin")
        with os_errors(self._path):
            self._file = open(self._path, "w+b")
        self._end = 0

    def __len__(self) -> int:
        return len(self.text)

    def __enter__(self) -> RowBuffer:
        return self

    def __exit__(self, *_: object) -> None:
        self.signatures.remove()
        _remove(self._file, self._path)

    def append(
        self, where: str, text: str, example: Example, forced: int, source: int, stratum: tuple[str, ...]
    ) -> None:
        """One row more: ``where`` it stands, the normalised ``text``, and the rest as the attributes say."""
        self.text.append(hash64(text))
        self.answer.append(hash64(example.messages[-1].content))
        self.order.append(int(chat_digest(example.messages)[:16], 16))
        self.names.append(hash64(example.id))
        self.forced.append(forced)
        self.source.append(source)
        self.strata.append(self._known.setdefault(stratum, stratum))
        self._starts.append(self._end)
        line = json.dumps([where, to_row(example, "")], ensure_ascii=False) + "\n"
        with os_errors(self._path):
            self._end += self._file.write(line.encode())

    def where(self, row: int) -> str:
        """Where a row stands in its source."""
        with os_errors(self._path):
            self._file.seek(self._starts[row])
            return str(json.loads(self._file.readline())[0])

    def rows(self) -> Iterator[dict[str, Any]]:
        """All rows."""
        with os_errors(self._path):
            self._file.seek(0)
        for line in self._file:
            yield json.loads(line)[1]
