"""A JSONL file that takes long to write: lines are appended durably to a partial file beside it, which takes
its name when it is whole. A killed writer is continued behind its last whole group of lines.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from mlx_distill.errors import FileError
from mlx_distill.storage.atomic import fsync_folder, os_errors, sha256, write_json

Key = Mapping[str, Any]


def finished_lines(path: str | Path, key: Key) -> dict[str, Any] | None:
    """The facts of a file that :class:`LineFile` finished with this key and that has not changed since, or
    None.
    """
    path = Path(path).resolve()
    recorded = _read(_finished(path))
    if (
        recorded.get("key") != json.loads(json.dumps(key))
        or not path.is_file()
        or recorded.get("sha256") != sha256(path)
    ):
        return None
    return dict(recorded.get("facts") or {})


class LineFile:
    """The partial file of a JSONL file; a context manager.

    ``.<name>.partial`` holds the lines, ``.<name>.partial.json`` the key of what is written. Lines of the
    same key are kept; after :meth:`finish` the key is in ``.<name>.json``.

    Args:
        path: The file, which is not touched before :meth:`finish`.
        key: All that the lines depend on, by name, as JSON values; None for lines that cannot be written
            again, which are not kept.
        group: Lines are kept in multiples of this number.

    Attributes:
        kept: The number of lines that are kept from an earlier writer.
        other: The names of the parts of the key in which the lines of an earlier writer differed, which are
            dropped; empty where there are none.

    Raises:
        FileError: another process is writing the same file, or the disk refuses.
    """

    def __init__(self, path: str | Path, key: Key | None, group: int = 1) -> None:
        self.path = Path(path).resolve()
        self.key = None if key is None else _plain(key)
        self.partial = self.path.with_name(f".{self.path.name}.partial")
        self.kept, self.other = 0, list[str]()
        with os_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.is_dir():
                raise FileError(f"{self.path}: a folder, not a file", fix="choose another name for the file")
            self._file = _open_locked(self.partial, self.path)
            try:
                self._resume(group)
            except BaseException:
                self._file.close()
                raise

    def _resume(self, group: int) -> None:
        size = os.fstat(self._file.fileno()).st_size
        written = _read(_key_file(self.partial)).get("key")
        if self.key is not None and written == self.key:
            self.kept, size = _whole_groups(self._file, group)
        elif size and isinstance(written, Mapping):
            self.other = [name for name in self.key or {} if written.get(name) != (self.key or {})[name]]
        end = size if self.kept else 0
        self._file.truncate(end)
        self._file.seek(end)
        os.fsync(self._file.fileno())
        if self.key is None:
            _key_file(self.partial).unlink(missing_ok=True)
        elif written != self.key:
            write_json(_key_file(self.partial), {"key": self.key})

    def rows(self) -> Iterator[dict[str, Any]]:
        """The kept lines, parsed."""
        with os_errors(self.path), open(self.partial, "rb") as file:
            for _ in range(self.kept):
                yield json.loads(file.readline())

    def append(self, lines: Iterable[str]) -> None:
        """Write lines, each one JSON object, behind the others. They are on the disk when this returns."""
        with os_errors(self.path):
            self._file.write("".join(f"{line}\n" for line in lines).encode())
            self._file.flush()
            os.fsync(self._file.fileno())

    def finish(self, facts: Mapping[str, Any] | None = None) -> None:
        """Give the file its name; ``facts`` are what :func:`finished_lines` returns of it."""
        with os_errors(self.path):
            # First: a kill in between leaves a whole partial file, and this, which then fits no file.
            if self.key is None:
                _finished(self.path).unlink(missing_ok=True)
            else:
                hashed = sha256(self.partial)
                write_json(_finished(self.path), {"key": self.key, "sha256": hashed, "facts": facts or {}})
            os.replace(self.partial, self.path)
            fsync_folder(self.path.parent)
            _key_file(self.partial).unlink(missing_ok=True)

    def __enter__(self) -> LineFile:
        return self

    def __exit__(self, *_: object) -> None:
        if self.key is None:  # after finish() there is none
            self.partial.unlink(missing_ok=True)
        with suppress(OSError):  # what is still to be flushed may not fit the disk
            self._file.close()


def _plain(key: Key) -> Any:
    """The key as it is read back."""
    return json.loads(json.dumps(key))


def _key_file(partial: Path) -> Path:
    return partial.with_name(f"{partial.name}.json")


def _finished(path: Path) -> Path:
    return path.with_name(f".{path.name}.json")


def _read(path: Path) -> dict[str, Any]:
    """A JSON object, empty where the file is absent or damaged."""
    with suppress(OSError, ValueError, RecursionError):
        value = json.loads(path.read_bytes())
        return value if isinstance(value, dict) else {}
    return {}


def _open_locked(partial: Path, path: Path) -> IO[bytes]:
    """Open the partial file and lock it; the lock ends with the process, also with a killed one."""
    while True:
        file = os.fdopen(os.open(partial, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.close()
            raise FileError(
                f"{path}: another process is writing this file", fix="wait for it, or choose another name"
            ) from error
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(partial)):
                return file
        file.close()  # its writer has just finished: the file that was opened has its final name


def _whole_groups(file: IO[bytes], group: int) -> tuple[int, int]:
    """The number of lines in whole groups before the first line that is torn, and where they end."""
    file.seek(0)
    position, kept = 0, (0, 0)
    for lines, line in enumerate(file, 1):
        position += len(line)
        if not line.endswith(b"\n") or not _is_object(line):
            break
        if lines % group == 0:
            kept = (lines, position)
    return kept


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False
