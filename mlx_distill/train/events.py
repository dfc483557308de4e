"""What a training reports after each step: a line of metrics.jsonl, and a call of each hook."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from mlx_distill.storage import os_errors


class MetricsLog:
    """Appends rows to metrics.jsonl; a checkpoint stores its length, :meth:`bytes`.

    Args:
        path: The file; None writes nothing (all ranks except the first).
        start: Length of the file at the checkpoint from which the run is resumed; the lines after it, which a
            killed run wrote, are removed.
    """

    def __init__(self, path: Path | None, start: int = 0) -> None:
        self.file: BinaryIO | None = None
        self.path = path
        if path is None:
            return
        with os_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(path, "ab+")
            # Not to more than its size, which would append zeros.
            self.file.truncate(min(start, os.fstat(self.file.fileno()).st_size))

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one line, flushed so that other processes see it at once."""
        if self.file is None:
            return
        with os_errors(self.path):
            self.file.write((json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode())
            self.file.flush()

    def bytes(self) -> int:
        """The length of the file, after an fsync."""
        if self.file is None:
            return 0
        with os_errors(self.path):
            self.file.flush()
            os.fsync(self.file.fileno())
            return os.fstat(self.file.fileno()).st_size

    def close(self) -> None:
        """Close the file."""
        if self.file is not None:
            with os_errors(self.path):  # closing flushes, which may fail on a full disk
                self.file.close()


# Called after each step with its row of metrics.jsonl and ``steps``, ``terms``, ``eta_s`` and ``timing``. A
# hook gets a dictionary of its own; an exception that it raises ends the run.
Hook = Callable[[dict[str, Any]], None]
