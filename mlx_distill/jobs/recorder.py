"""What a job's process writes down while its command runs: events, and how far it has come."""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import suppress
from typing import Any, Literal

from mlx_distill.errors import DistillError
from mlx_distill.jobs.store import Job, add_event
from mlx_distill.ledger.database import Ledger
from mlx_distill.progress import Estimate, show_info
from mlx_distill.recipe import VALIDATION_METRICS

PROGRESS_FILE = "progress.json"
COMPARISON_EVENT = "comparison"
"""The type of the event that has the id of a comparison that the job has kept."""
_EVERY_S = 0.5
_ROWS_PER_TRAINING = 100


class Recorder:
    """Takes the events of a command (see :func:`mlx_distill.pipeline.run`). What happens rarely becomes an
    event of the job in the ledger, how far it has come a small file that is replaced twice a second at most.
    Neither ever stops the command.

    Args:
        ledger: The ledger.
        job: The job.
    """

    def __init__(self, ledger: Ledger, job: Job) -> None:
        self.ledger, self.job = ledger, job
        self.path = job.folder(ledger.root) / PROGRESS_FILE
        self.state: dict[str, Any] = {"attempt": job.attempt, "started_at": job.started_at}
        self.estimate = Estimate(None)
        self.written = 0.0

    def event(self, event: dict[str, Any]) -> None:
        """Write down an event of the command."""
        handler = getattr(self, f"_{event['event']}", None)
        if handler is not None:
            handler(event)

    def finish(self) -> None:
        """Write how far it has come at its end."""
        self._write(at_once=True)

    def _stage_started(self, event: dict[str, Any]) -> None:
        self.state |= {"stage": event["stage"], "command": event["command"], "run": event["run"]}
        self.state |= {"task": None, "done": None, "total": None, "eta_s": None, "training": None}
        self._add("stage_started", f"{event['stage']}: started", event)
        self._write(at_once=True)

    def _stage_made(self, event: dict[str, Any]) -> None:
        seconds = event.get("seconds")
        took = f" in {seconds:.0f} s" if seconds is not None else ""
        self._add("stage_made", f"{event['stage']}: made{took}", event)

    def _stage_current(self, event: dict[str, Any]) -> None:
        self._add("stage_current", f"{event['stage']}: current", event)

    def _task_started(self, event: dict[str, Any]) -> None:
        self.estimate = Estimate(event["total"])
        self._task(event, None, at_once=True)

    def _progress(self, event: dict[str, Any]) -> None:
        self._task(event, self.estimate.left(event["done"]))

    def _task_ended(self, event: dict[str, Any]) -> None:
        self._task(event, None, at_once=True)

    def _task(self, event: dict[str, Any], left: float | None, at_once: bool = False) -> None:
        names = ("task", "done", "total", "unit")
        self.state |= {name: event[name] for name in names}
        self.state |= {"eta_s": left, "info": show_info(event["info"])}
        self._write(at_once)

    def _note(self, event: dict[str, Any]) -> None:
        self._add("note", event["text"], None)

    def _comparison_kept(self, event: dict[str, Any]) -> None:
        self._add(COMPARISON_EVENT, f"{event['sentence']} (kept as {event['id']})", {"id": event["id"]})

    def _checkpoint(self, event: dict[str, Any]) -> None:
        text = f"checkpoint at step {event['step']} of {event['steps']}"
        self._add("checkpoint", text, event | {"stage": self.state.get("stage")})

    def _training_row(self, event: dict[str, Any]) -> None:
        row = event["row"] | {"stage": self.state.get("stage")}
        self.state["training"] = {
            name: row.get(name)
            for name in ("stage", "step", "steps", "loss", "tokens_per_second", "peak_memory_bytes", "eta_s")
        }
        valid = row.get("valid_loss")
        every = max(1, row["steps"] // _ROWS_PER_TRAINING)
        if valid is None and row["step"] % every:
            return
        text = f"step {row['step']} of {row['steps']}: loss {row['loss']:.4g}"
        if valid is not None:
            text += f", validation {valid:.4g}"
        answers = {key: row[f"valid_{key}"] for key in VALIDATION_METRICS if f"valid_{key}" in row}
        answers.pop("loss", None)
        text += f", {show_info(answers)}" if answers else ""
        names = ["stage", "step", "steps", "loss", "valid_loss", "tokens_per_second", "learning_rate"]
        names += [f"valid_{key}" for key in answers]
        self._add("metrics", text, {name: row[name] for name in names if name in row})

    def _add(
        self, type: str, message: str, data: Any, level: Literal["info", "warn", "error"] = "info"
    ) -> None:
        data = {key: value for key, value in data.items() if key not in ("event", "run")} if data else None
        with suppress(DistillError), self.ledger.write() as db:
            add_event(db, self.job.id, type, message, level=level, data=data)

    def _write(self, at_once: bool = False) -> None:
        now = time.monotonic()
        if not at_once and now - self.written < _EVERY_S:
            return
        self.written = now
        state = {**self.state, "updated": time.time(), "peak_memory_bytes": _peak_memory()}
        partial = self.path.with_suffix(".tmp")
        with suppress(OSError):
            partial.write_text(json.dumps(state, ensure_ascii=False), encoding="utf-8")
            os.replace(partial, self.path)


def _peak_memory() -> int | None:
    if "mlx.core" not in sys.modules:
        return None
    from mlx_distill.runtime import peak_memory

    return peak_memory()
