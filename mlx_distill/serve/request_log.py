"""The log of requests: one JSON object a line, without texts, in a few files of bounded size."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

log = logging.getLogger("mlx_distill.serve")

MAX_BYTES = 10 << 20
"""Of a file, after which another one is begun."""
FILES = 5
"""The most files: ``requests.jsonl`` and ``requests.1.jsonl`` to ``requests.4.jsonl``, the newest first."""


class RequestLog:
    """Appends lines. Several servers of one root may write to it.

    A line that cannot be written is lost, as on a full disk: no request fails for it. What a killed process
    or a full disk left of a line stands on a line of its own, which :func:`read_requests` leaves out.

    Args:
        path: The newest file.
        max_bytes: Of a file.
        files: The most files.
        on_lost: Is called for each line that could not be written.
    """

    def __init__(
        self,
        path: Path,
        max_bytes: int = MAX_BYTES,
        files: int = FILES,
        on_lost: Callable[[], None] = lambda: None,
    ) -> None:
        self.path, self._max_bytes, self._files, self._on_lost = path, max_bytes, files, on_lost
        self._lock = threading.Lock()
        self._may_be_torn = True
        self._problem: str | None = None

    def write(self, facts: Mapping[str, Any]) -> None:
        """Append a line; nothing is raised."""
        # ASCII alone: half surrogate pairs cannot be written otherwise.
        line = json.dumps(facts, separators=(",", ":")).encode() + b"\n"
        with self._lock:
            try:
                self._append(line)
                self._problem = None
            except OSError as error:
                self._may_be_torn = True
                self._on_lost()
                if error.strerror != self._problem:  # said once
                    log.error("%s: %s; requests are answered and not logged", self.path, error.strerror)
                self._problem = error.strerror

    def _append(self, line: bytes) -> None:
        file = self._open()
        try:
            size = os.fstat(file).st_size
            if size and size + len(line) > self._max_bytes and self._rotate(file):
                os.close(file)
                file = self._open()
                size = 0
            if self._may_be_torn and size and os.pread(file, 1, size - 1) != b"\n":
                line = b"\n" + line
            written = os.write(file, line)
            if written < len(line):
                raise OSError(0, f"{written} of {len(line)} bytes were written")
            self._may_be_torn = False
        finally:
            os.close(file)

    def _open(self) -> int:
        # Item ids are the user's, so nobody else reads them.
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        try:
            return os.open(self.path, flags, 0o600)
        except FileNotFoundError:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            return os.open(self.path, flags, 0o600)

    def _rotate(self, file: int) -> bool:
        """Give each file the next number and drop the last; False where another process does."""
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until it is closed
            if not os.path.samestat(os.fstat(file), os.stat(self.path)):
                return True  # it was done meanwhile
            for number in range(self._files - 1, 0, -1):
                with suppress(FileNotFoundError):
                    os.replace(_numbered(self.path, number - 1), _numbered(self.path, number))
            if self._files < 2:
                self.path.unlink()
            return True
        return False


def _numbered(path: Path, number: int) -> Path:
    """The file of a number, 0 for the newest.

    >>> _numbered(Path("requests.jsonl"), 2).name
    'requests.2.jsonl'
    """
    return path.with_name(f"{path.stem}.{number}{path.suffix}") if number else path


def read_requests(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of all files, the oldest first. What was written half is left out.

    Args:
        path: The newest file; it and the others may be missing.
    """
    number = 0
    while _numbered(path, number + 1).is_file():
        number += 1
    for one in range(number, -1, -1):
        with suppress(FileNotFoundError), open(_numbered(path, one), "rb") as file:
            for line in file:
                with suppress(ValueError, RecursionError):
                    facts = json.loads(line)
                    if isinstance(facts, dict):
                        yield facts
