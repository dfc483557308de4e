"""Commands that run in the background, one at a time: a queue, a subprocess each, an accelerator lease."""

from __future__ import annotations

from mlx_distill.jobs.lease import waits_for
from mlx_distill.jobs.progress import JobProgress, progress
from mlx_distill.jobs.queue import cancel, dispatch, move_first, pause, resume
from mlx_distill.jobs.store import (
    KINDS,
    STATES,
    Event,
    Job,
    events,
    full_id,
    get,
    list_jobs,
    newest_success,
    queue,
    submit,
)

__all__ = [
    "KINDS",
    "STATES",
    "Event",
    "Job",
    "JobProgress",
    "cancel",
    "dispatch",
    "events",
    "full_id",
    "get",
    "list_jobs",
    "move_first",
    "newest_success",
    "pause",
    "progress",
    "queue",
    "resume",
    "submit",
    "waits_for",
]
