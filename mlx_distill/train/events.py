"""metrics.jsonl: a line a step, cut back to the checkpoint when a run goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from mlx_distill.storage import os_errors


class MetricsLog:
    """Appends rows; ``bytes`` is what a checkpoint remembers.

    Args:
        path: The file; None writes nothing (the ranks but the first).
        start: Bytes that belong to the run so far; what a killed run wrote after its last checkpoint is cut
            off.
    """

    def __init__(self, path: Path | None, start: int = 0) -> None:
        self.file: BinaryIO | None = None
        self.path = path
        if path is None:
            return
        with os_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(path, "ab+")
            self.file.truncate(
                min(start, os.fstat(self.file.fileno()).st_size)
            )  # longer than it is would fill it with zeros

    def write(self, row: Mapping[str, Any]) -> None:
        """One line, handed to the system at once so that a watcher sees it."""
        if self.file is None:
            return
        with os_errors(self.path):
            self.file.write((json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode())
            self.file.flush()

    def bytes(self) -> int:
        """The length of the file, with everything up to it on the disk."""
        if self.file is None:
            return 0
        with os_errors(self.path):
            self.file.flush()
            os.fsync(self.file.fileno())
            return os.fstat(self.file.fileno()).st_size

    def close(self) -> None:
        """Give the file back."""
        if self.file is not None:
            with os_errors(self.path):  # what a full disk did not take is tried once more
                self.file.close()


Hook = Callable[[dict[str, Any]], None]
