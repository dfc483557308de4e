"""How far a job has come, for those who watch it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_distill.jobs.recorder import PROGRESS_FILE
from mlx_distill.jobs.store import Job
from mlx_distill.ledger.database import Ledger
from mlx_distill.storage import partial_folder

TRAINED = ("teacher", "student")
_SHOWN = ("step", "loss", "valid_loss", "learning_rate", "tokens_per_second", "peak_memory_bytes", "seconds")


@dataclass(frozen=True)
class JobProgress:
    """How far a job has come.

    Attributes:
        stage: The stage that is being made, or was made last.
        command: Its command.
        task: What it does there, for people.
        unit: What is counted: ``step``, ``row``.
        step: How many are done.
        steps: Of how many.
        eta_s: Seconds until this task is done, from the speed of the last half minute of this start; None
            where it is not known, or the job does not run.
        tokens_per_second: Of the last step of a training.
        memory_gb: Peak memory of MLX's arrays in this stage, in GB.
        info: The figures beside the progress, for people.
        updated: When this was written, in Unix seconds.
        rows: The rows of metrics of the stage, if it trains: ``step``, ``loss`` of the training rows,
            ``valid_loss`` where it was measured, ``tokens_per_second`` ...
    """

    stage: str | None = None
    command: str | None = None
    task: str | None = None
    unit: str | None = None
    step: float | None = None
    steps: float | None = None
    eta_s: float | None = None
    tokens_per_second: float | None = None
    memory_gb: float | None = None
    info: str = ""
    updated: float | None = None
    rows: Sequence[dict[str, Any]] = ()


class MetricsReader:
    """Reads what is new in a ``metrics.jsonl`` that a training appends to. A line that is half written is
    read when it is whole; where a resumed training has cut the file, it is read again from the beginning.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offset = 0
        self.last_line = b""
        self.rows: list[dict[str, Any]] = []

    def read(self) -> list[dict[str, Any]]:
        """All rows so far."""
        try:
            with open(self.path, "rb") as file:
                start = self.offset - len(self.last_line)
                file.seek(start)
                data = file.read()
        except FileNotFoundError:
            self._forget()
            return self.rows
        if not data.startswith(self.last_line):  # cut, and perhaps longer than before
            self._forget()
            return self.read()
        data = data[len(self.last_line) :]
        whole, newline, _ = data.rpartition(b"\n")
        for line in whole.splitlines() if newline else ():
            self.rows.append(json.loads(line))
        if newline:
            self.offset += len(whole) + 1
            self.last_line = whole.rpartition(b"\n")[2] + b"\n"
        return self.rows

    def _forget(self) -> None:
        self.offset, self.last_line, self.rows = 0, b"", []


def progress(
    ledger: Ledger,
    job: Job,
    *,
    stage: str | None = None,
    after_step: int = 0,
    max_rows: int = 500,
) -> JobProgress:
    """How far a job has come.

    Args:
        ledger: The ledger.
        job: The job.
        stage: The stage whose rows of metrics are returned; by default the one that is being made.
        after_step: Only the rows after this step.
        max_rows: So many rows at most, evenly chosen; all with a validation loss and the last one are among
            them. With 0 no file of metrics is read.
    """
    state = _read_state(job.folder(ledger.root) / PROGRESS_FILE)
    if state is None:
        return JobProgress()
    training = state.get("training") or {}
    is_running = job.state == "running" and state.get("attempt") == job.attempt
    memory = training.get("peak_memory_bytes") or state.get("peak_memory_bytes")
    shown = stage or state.get("stage")
    run = state.get("run")
    rows: list[dict[str, Any]] = []
    if max_rows > 0 and run and shown:
        path = metrics_path(ledger.root.path / run, shown)
        rows = [row for row in read_rows(path) if row["step"] > after_step]
    return JobProgress(
        stage=state.get("stage"),
        command=state.get("command"),
        task=state.get("task"),
        unit=state.get("unit"),
        step=state.get("done"),
        steps=state.get("total"),
        eta_s=state.get("eta_s") if is_running else None,
        tokens_per_second=training.get("tokens_per_second"),
        memory_gb=None if memory is None else memory / 1e9,
        info=state.get("info") or "",
        updated=state.get("updated"),
        rows=thinned([{name: row[name] for name in _SHOWN if name in row} for row in rows], max_rows),
    )


def _read_state(path: Path) -> dict[str, Any] | None:
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return state if isinstance(state, dict) else None


def metrics_path(run: Path, stage: str) -> Path:
    """The file of metrics of a stage that trains: in its partial folder while it is being made."""
    partial = partial_folder(run / stage)
    in_work = partial / "scratch" / "metrics.jsonl"
    return in_work if partial.is_dir() else run / stage / "metrics.jsonl"


_readers: dict[Path, MetricsReader] = {}
_MAX_READERS = 16


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All rows of a file of metrics; what was read before is not read again."""
    reader = _readers.pop(path, None) or MetricsReader(path)
    rows = list(reader.read())
    _readers[path] = reader  # the one that was used last stands last
    while len(_readers) > _MAX_READERS:
        _readers.pop(next(iter(_readers)))
    return rows


def thinned(rows: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """At most about ``count`` of the rows, evenly chosen, with all that have a validation loss and the last.

    >>> [row["step"] for row in thinned([{"step": i} for i in range(1, 11)], 3)]
    [1, 5, 9, 10]
    """
    if len(rows) <= count:
        return list(rows)
    every = -(-len(rows) // count)
    return [row for i, row in enumerate(rows) if i % every == 0 or "valid_loss" in row or i == len(rows) - 1]
