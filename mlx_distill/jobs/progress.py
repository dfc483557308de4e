"""How far a job has come, for those who watch it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_distill.jobs.curves import Curve, training_files
from mlx_distill.jobs.recorder import PROGRESS_FILE
from mlx_distill.jobs.store import Job
from mlx_distill.ledger.database import Ledger


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
        rows: The curve of the stage, if it trains: see :class:`~mlx_distill.jobs.curves.Point`, without what
            was not measured.
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


def progress(
    ledger: Ledger,
    job: Job,
    *,
    max_rows: int = 500,
) -> JobProgress:
    """How far a job has come.

    Args:
        ledger: The ledger.
        job: The job.
        max_rows: So many rows of training at most, evenly chosen, and as many with a validation loss; the
            last one is among them. With 0 no file of metrics is read.
    """
    state = _read_state(job.folder(ledger.root) / PROGRESS_FILE)
    if state is None:
        return JobProgress()
    training = state.get("training") or {}
    is_running = job.state == "running" and state.get("attempt") == job.attempt
    memory = training.get("peak_memory_bytes") or state.get("peak_memory_bytes")
    rows: Sequence[dict[str, Any]] = ()
    if max_rows > 0 and state.get("run"):
        path = training_files(ledger.root.path / state["run"]).get(state.get("stage") or "")
        rows = _rows(path, max_rows) if path is not None else ()
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
        rows=rows,
    )


def _read_state(path: Path) -> dict[str, Any] | None:
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return state if isinstance(state, dict) else None


def _rows(path: Path, count: int) -> list[dict[str, Any]]:
    curve = Curve(path, limit=max(1, count // 2))
    curve.read()
    return [
        {name: value for name, value in point._asdict().items() if value is not None}
        for point in curve.after(0)
    ]
