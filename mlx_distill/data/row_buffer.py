"""The rows that prepare has read and not yet assigned to a split: lines and signatures wait in files, and
about 60 bytes a row are in memory.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from jaxtyping import UInt32

from mlx_distill.data.dedup import PERMUTATIONS, hash64
from mlx_distill.data.rows import chat_digest, to_row
from mlx_distill.data.statistics import RowFigures
from mlx_distill.records import Example
from mlx_distill.storage import os_errors

_NO_SET = b'""}\n'  # the end of a buffered line, whose set is not known yet


class SignatureFile:
    """MinHash signatures in a file, for :func:`~mlx_distill.data.dedup.near_duplicates`; it is indexed like
    an array ``[n, 128]``.

    Args:
        path: A new file.
        rows_per_read: Signatures that are read together where some entries of all of them are wanted.
    """

    def __init__(self, path: Path, rows_per_read: int = 8192) -> None:
        self.path, self.rows_per_read = path, rows_per_read
        with os_errors(path):
            self._file = open(path, "w+b")
        self._bytes = 0

    def append(self, signature: UInt32[np.ndarray, " p"]) -> None:
        """Add the signature of one row."""
        with os_errors(self.path):
            self._bytes += self._file.write(signature.tobytes())

    def __len__(self) -> int:
        return self._bytes // (4 * PERMUTATIONS)

    def __getitem__(self, index: int | tuple[slice, slice]) -> UInt32[np.ndarray, "*n"]:
        """The signature of one row, or with ``[:, a:b]`` entries a to b of all signatures."""
        if not isinstance(index, tuple):
            return self._rows(index, index + 1)[0]
        starts = range(0, len(self), self.rows_per_read)
        return np.concatenate(
            [
                self._rows(start, min(start + self.rows_per_read, len(self)))[:, index[1]].copy()
                for start in starts
            ]
        )

    def _rows(self, start: int, end: int) -> UInt32[np.ndarray, "n p"]:
        with os_errors(self.path):
            self._file.seek(start * 4 * PERMUTATIONS)
            raw = self._file.read((end - start) * 4 * PERMUTATIONS)
        return np.frombuffer(raw, dtype=np.uint32).reshape(-1, PERMUTATIONS)

    def remove(self) -> None:
        """Close and delete the file."""
        _remove(self._file, self.path)


def _remove(file: BinaryIO, path: Path) -> None:
    with suppress(OSError):  # what is still to be flushed may not fit the disk, and is not needed
        file.close()
    path.unlink(missing_ok=True)


class BufferedRow(NamedTuple):
    """One row read back: its id, its figures for the statistics, and its line of the prepared file without
    the set.
    """

    id: str
    figures: RowFigures
    line: bytes

    def final_line(self, id: str, set_name: str) -> bytes:
        """The line of the prepared file, under an id and with the name of its set."""
        line = self.line
        if id != self.id:
            line = _id_prefix(id) + line.removeprefix(_id_prefix(self.id))
        return line.removesuffix(_NO_SET) + json.dumps(set_name, ensure_ascii=False).encode() + b"}\n"


def _id_prefix(id: str) -> bytes:
    return b'{"id": ' + json.dumps(id, ensure_ascii=False).encode()


class RowBuffer:
    """Rows that are read and not yet assigned to a split, in the order in which they came; used as a context
    manager, it deletes its files at the end.

    Args:
        folder: An existing folder for its files.

    Attributes:
        text_hash: Hash of each row's normalised user text; ``answer_hash`` of its answer; ``chat_hash`` of
            its whole chat; ``id_hash`` of its id.
        requested: The split that each row asks for, or ``UNASSIGNED``.
        source: The number of its source.
        strata: The values that the splits are balanced by.
        cluster_names: The value of the task's ``cluster`` field, or None.
        signatures: MinHash signatures of the rows, if near duplicates are looked for.
    """

    def __init__(self, folder: Path) -> None:
        self.text_hash, self.answer_hash = array("Q"), array("Q")
        self.chat_hash, self.id_hash = array("Q"), array("Q")
        self.requested, self.source = array("b"), array("H")
        self.strata: list[tuple[str, ...]] = []
        self.cluster_names: list[str | None] = []
        self._known_strata: dict[tuple[str, ...], tuple[str, ...]] = {}  # one tuple for all equal ones
        self._starts = array("Q")
        self._path = folder / "rows.jsonl"
        self.signatures = SignatureFile(folder / "signatures.bin")
        with os_errors(self._path):
            self._file = open(self._path, "w+b")
        self._end = 0

    def __len__(self) -> int:
        return len(self.text_hash)

    def __enter__(self) -> RowBuffer:
        return self

    def __exit__(self, *_: object) -> None:
        self.signatures.remove()
        _remove(self._file, self._path)

    def append(
        self,
        where: str,
        text: str,
        example: Example,
        requested: int,
        source: int,
        stratum: tuple[str, ...],
        figures: RowFigures,
    ) -> None:
        """Add one row: ``where`` it is in its source, its normalised user ``text``, its figures for the
        statistics, and the values of the attributes of the same names.
        """
        self.text_hash.append(hash64(text))
        self.answer_hash.append(hash64(example.messages[-1].content))
        self.chat_hash.append(int(chat_digest(example.messages)[:16], 16))
        self.id_hash.append(hash64(example.id))
        self.requested.append(requested)
        self.source.append(source)
        self.strata.append(self._known_strata.setdefault(stratum, stratum))
        self._starts.append(self._end)
        known = json.dumps([where, example.id, figures], ensure_ascii=False)
        line = json.dumps(to_row(example, ""), ensure_ascii=False)
        with os_errors(self._path):
            self._end += self._file.write(f"{known}\n{line}\n".encode())

    def where(self, row: int) -> str:
        """The file and line of a row in its source."""
        with os_errors(self._path):
            self._file.seek(self._starts[row])
            return str(json.loads(self._file.readline())[0])

    def rows(self) -> Iterator[BufferedRow]:
        """All rows in their order."""
        with os_errors(self._path):
            self._file.seek(0)
        for known in self._file:
            _, id, figures = json.loads(known)
            yield BufferedRow(id, RowFigures(*figures), self._file.readline())
