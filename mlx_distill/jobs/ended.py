"""How a job's command ended, and a small file of it in the job's folder.

The file is there because the ledger may refuse the end: a full disk, or another program that keeps it locked.
It is made at its full size before the process starts, so that its content later needs no more room (where the
file system overwrites in place). The next :func:`~mlx_distill.jobs.queue.dispatch` reads it.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlx_distill.jobs.process import Process

END_FILE = "end.json"
_SIZE = 4096
_TEXT = 1000  # characters of a message or a fix


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        exit_code: Its exit code.
        code: A word for the error, None without one.
        message: What was wrong.
        fix: How to mend it.
        at: When, in Unix seconds; None: now.
    """

    exit_code: int
    code: str | None = None
    message: str | None = None
    fix: str | None = None
    at: float | None = None

    def state(self, requested: str | None) -> str:
        """The state of the job.

        >>> Ended(0).state("pause"), Ended(130).state("pause"), Ended(130).state("discard")
        ('succeeded', 'paused', 'cancelled')
        """
        if self.exit_code == 0:
            return "succeeded"
        if self.exit_code == 130:
            return "cancelled" if requested in ("cancel", "discard") else "paused"
        return "failed"

    @property
    def error(self) -> dict[str, Any] | None:
        """Code, message and fix of a failed one."""
        if self.exit_code in (0, 130):
            return None
        return {"code": self.code or "failed", "message": self.message or "", "fix": self.fix}


def reserve_end(folder: Path) -> None:
    """Make the file, empty and at its full size, in place of that of an earlier start."""
    _write(folder / END_FILE, b" " * _SIZE)


def write_end(folder: Path, process: Process, ended: Ended) -> None:
    """Write into the file how the command of a process ended.

    Raises:
        OSError: it cannot be written.
    """
    values = asdict(ended) | {"at": ended.at or time.time(), "pid": process.pid, "started": process.started}
    for name in ("message", "fix"):
        values[name] = values[name] and values[name][:_TEXT]
    # Its size must stay what it was, and no value may be longer in bytes than that leaves room for.
    text = json.dumps(values | {"pid_space": process.pid_space})
    if len(text) > _SIZE:
        text = json.dumps(values | {"pid_space": process.pid_space, "message": ended.code, "fix": None})
    _write(folder / END_FILE, text.encode().ljust(_SIZE))


def read_end(folder: Path, process: Process | None) -> Ended | None:
    """How the command of a process ended, None where it has not written so."""
    try:
        values = json.loads((folder / END_FILE).read_bytes())
        same = Process(values["pid"], values["started"], pid_space=values["pid_space"]) == process
        return Ended(**{name: values[name] for name in Ended.__dataclass_fields__}) if same else None
    except (OSError, ValueError, KeyError, TypeError):  # none, or not written to its end
        return None


def _write(path: Path, data: bytes) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        os.write(file, data)
        os.ftruncate(file, len(data))
        os.fsync(file)
    finally:
        os.close(file)
