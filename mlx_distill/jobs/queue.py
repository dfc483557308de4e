"""The queue: which job runs, and what pause, resume and cancel do.

There is no daemon. Every command of ``jobs``, the end of every job and the server call :func:`dispatch`. It
writes down the jobs whose process has ended without doing so, and starts the next one if the accelerator is
free. What takes long, as removing files, is done between the two transactions and not in them.
"""

from __future__ import annotations

import os
import signal
import sqlite3
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

from mlx_distill.errors import ConfigError
from mlx_distill.jobs import lease
from mlx_distill.jobs.discard import TO_DISCARD, discard, discard_all
from mlx_distill.jobs.ended import Ended, read_end, reserve_end
from mlx_distill.jobs.outcome import UNRECORDED, record_results
from mlx_distill.jobs.process import (
    FOREIGN_SILENT_S,
    Process,
    kill_group,
    reap,
    send,
    start,
    this_pid_space,
)
from mlx_distill.jobs.store import (
    Job,
    add_event,
    find,
    get,
    last_position,
    running,
    to_job,
    update,
)
from mlx_distill.jobs.watchdog import explain_death
from mlx_distill.ledger.database import Ledger, to_json

GRACE_S = 30.0
"""How long a job that is to be cancelled may take for its checkpoint before it is killed."""
_SECRETS = ("MLX_DISTILL_TOKEN",)
_RESUMABLE = ("paused", "cancelled", "failed")


def execute_command(job_id: str, root: str) -> list[str]:
    """The command line of a job's process. ``-P`` keeps modules in the root from being imported."""
    return [sys.executable, "-P", "-m", "mlx_distill", "jobs", "execute", job_id, "--root", root]


def dispatch(
    ledger: Ledger, grace_s: float = GRACE_S, command: Callable[[str, str], list[str]] = execute_command
) -> Job | None:
    """Write down which jobs have ended, end those whose time to save is over, and start the next one.

    Args:
        ledger: The ledger.
        grace_s: Seconds between the request to cancel a job and the end of its process.
        command: The command line of a job's process, from its identifier and the root.

    Returns:
        The job that was started, if one was.
    """
    reap()
    with ledger.read() as db:
        if not (lease.is_wanted(db) or _is_unfinished(db)):
            return None
    with ledger.write() as db:
        settle(db, ledger, grace_s)
    return finish_and_start(ledger, command)


def finish_and_start(
    ledger: Ledger, command: Callable[[str, str], list[str]] = execute_command
) -> Job | None:
    """Do what ended jobs have left to be done, then start the next one if the accelerator is free."""
    discard_all(ledger)
    record_results(ledger)
    with ledger.write() as db:
        settle(db, ledger)
        return start_next(db, ledger, command)


def _is_unfinished(db: sqlite3.Connection) -> bool:
    """Whether an ended job has left something to be done."""
    conditions = f"({TO_DISCARD}) OR ({UNRECORDED})"
    return db.execute(f"SELECT 1 FROM jobs WHERE {conditions} LIMIT 1").fetchone() is not None


def settle(db: sqlite3.Connection, ledger: Ledger, grace_s: float = GRACE_S) -> None:
    """Write down the ends of jobs whose process has ended without doing so, in a transaction."""
    for job in running(db):
        if job.lives and not _has_been_ended(db, job, grace_s):
            continue
        ended = read_end(job.folder(ledger.root), job.process)
        if ended is not None:
            add_event(db, job.id, "note", "its end was read from its folder: the ledger did not take it")
            close(db, job, ended.state(job.requested), ended.exit_code, ended.error, at=ended.at)
        else:
            close(db, job, *_death(job, ledger))


def _has_been_ended(db: sqlite3.Connection, job: Job, grace_s: float) -> bool:
    """End a living job whose time to save is over; False where it was not asked to stop, has time left, or
    does not end.
    """
    process = job.process
    asked = job.requested in ("cancel", "discard") and job.requested_at is not None
    if process is None or not asked:
        return False
    waited = time.time() - (job.requested_at or 0)
    if waited < 0:  # the clock was set back: its time to save begins anew
        update(db, job.id, requested_at=time.time())
        return False
    if process.is_local and waited >= grace_s:
        kill_group(process)
        message = f"had not stopped after {grace_s:g} s: its process was killed"
    elif not process.is_local and waited >= max(grace_s, FOREIGN_SILENT_S):
        # Nothing reaches it from here, and a clock ahead of ours would let its heartbeat look young for ever.
        message = f"had not stopped after {waited:.0f} s: {process} cannot be ended from here, and may go on"
    else:
        return False
    add_event(db, job.id, "warning", message, level="warn")
    return not process.is_local or _has_ended(process)


def _has_ended(process: Process) -> bool:
    for _ in range(100):
        reap()
        if not process.is_alive:
            return True
        time.sleep(0.02)
    return False


def _death(job: Job, ledger: Ledger) -> tuple[str, int | None, dict[str, Any] | None]:
    """State, exit code and error of a job whose process has ended without a word."""
    if job.requested is not None:
        return Ended(130).state(job.requested), None, None
    process = job.process
    if process is not None and not process.is_local:
        silent = time.time() - (job.heartbeat or job.started_at or 0)
        message = (
            f"{process} has written no heartbeat for {silent:.0f} s, and cannot be asked after from here: "
            "it is taken for dead"
        )
        fix = f"see to it that it has ended, then resume it: mlx-distill jobs resume {job.id}"
        return "failed", None, {"code": "orphaned", "message": message, "fix": fix}
    return "failed", None, explain_death(job.log(ledger.root), job.id)


def close(
    db: sqlite3.Connection,
    job: Job,
    state: str,
    exit_code: int | None,
    error: dict[str, Any] | None,
    result: dict[str, Any] | None = None,
    at: float | None = None,
) -> None:
    """Write down the end of a job and free its lease, in a transaction. A request to discard stays until that
    is done.
    """
    kept = job.requested if state == "cancelled" and job.requested == "discard" else None
    update(
        db,
        job.id,
        state=state,
        requested=kept,
        requested_at=None,
        asked_from=None,
        position=None,
        finished_at=at or time.time(),
        exit_code=exit_code,
        error=None if error is None else to_json(error),
        result=None if result is None else to_json(result),
    )
    lease.take_back(db, job.id)
    level: Literal["info", "error"] = "error" if state == "failed" else "info"
    message = state
    if error is not None:
        message = error["message"] + (f" (fix: {error['fix']})" if error.get("fix") else "")
    add_event(db, job.id, state, message, level=level, data={"exit_code": exit_code, **(error or {})})


def start_next(
    db: sqlite3.Connection, ledger: Ledger, command: Callable[[str, str], list[str]] = execute_command
) -> Job | None:
    """Start the next job if the accelerator is free, in a transaction.

    The process is started before the transaction ends. If that fails, the process does not find itself in
    the ledger and ends without having done anything.
    """
    if lease.current(db) is not None or running(db):
        return None
    # Not one whose folder is still to be cleared: what it makes there would be removed.
    row = db.execute(
        "SELECT * FROM jobs WHERE state = 'queued' AND ifnull(run_path, id) NOT IN"
        f" (SELECT ifnull(run_path, id) FROM jobs WHERE {TO_DISCARD}) ORDER BY position LIMIT 1"
    ).fetchone()
    if row is None:
        return None
    job = to_job(row)
    root = ledger.root
    job.folder(root).mkdir(parents=True, exist_ok=True)
    reserve_end(job.folder(root))
    environment = {name: value for name, value in os.environ.items() if name not in _SECRETS}
    process = start(
        command(job.id, str(root.path)), root.path, job.log(root), environment | dict(job.environment)
    )
    now = time.time()
    update(
        db,
        job.id,
        state="running",
        pid=process.pid,
        pid_started=process.started,
        host=process.host,
        pid_space=process.pid_space,
        heartbeat=None,
        started_at=now,
        finished_at=None,
        attempt=job.attempt + 1,
    )
    lease.give(db, job.id, process, job.title)
    again = f", attempt {job.attempt + 1}" if job.attempt else ""
    add_event(db, job.id, "started", f"started as process {process.pid}{again}", data={"pid": process.pid})
    return find(db, job.id)


def pause(ledger: Ledger, job_id: str) -> Job:
    """Let a job save and stop, so that :func:`resume` continues it. A queued one is taken out of the queue.

    Raises:
        ConfigError: it is finished, or is being cancelled.
    """
    return _stop(ledger, job_id, "pause")


def cancel(ledger: Ledger, job_id: str, discard: bool = False) -> Job:
    """Let a job save and stop; after 30 s its process is killed.

    Args:
        ledger: The ledger.
        job_id: The job.
        discard: Remove what is not finished: partial stages with their checkpoints. Finished stages stay.

    Raises:
        ConfigError: it is finished.
        FileError: another run uses its folder.
    """
    return _stop(ledger, job_id, "discard" if discard else "cancel")


def _stop(ledger: Ledger, job_id: str, request: Literal["pause", "cancel", "discard"]) -> Job:
    interrupt = None
    with ledger.write() as db:
        settle(db, ledger)
        job = find(db, job_id)
        if job.state == "running":
            interrupt = _ask(db, job, request)
        elif job.state in ("queued", "paused", *(_RESUMABLE if request == "discard" else ())):
            if request != "pause":
                asked = replace(job, requested=request)
                close(db, asked, "cancelled", job.exit_code, None)
            elif job.state == "queued":
                close(db, job, "paused", job.exit_code, None)
        else:
            verb = "pause" if request == "pause" else "cancel"
            raise ConfigError(
                f"{job_id} is {job.state}: there is nothing to {verb}", fix="see: mlx-distill jobs list"
            )
    if interrupt is not None:
        send(interrupt, signal.SIGINT)
    if request == "discard":
        discard(ledger, job_id)
    return get(ledger, job_id)


def _ask(db: sqlite3.Connection, job: Job, request: str) -> Process | None:
    """Write down the request; the process to interrupt, or None where it will read the request itself or was
    interrupted before: a second signal would end it without saving.
    """
    if job.requested is not None:
        if request == "pause" and job.requested != "pause":
            raise ConfigError(f"{job.id} is being cancelled", fix="resume it when it has ended")
        if request == job.requested:
            return None
    first = this_pid_space() if job.requested is None else job.asked_from
    update(db, job.id, requested=request, requested_at=time.time(), asked_from=first)
    text = {"pause": "asked to save and pause", "cancel": "asked to save and stop"}
    add_event(db, job.id, "requested", text.get(request, "asked to stop; what is not finished is removed"))
    # Before its first heartbeat it has not yet said how it handles signals; then it reads the request.
    ready = job.heartbeat is not None and job.requested is None
    return job.process if ready else None


def resume(ledger: Ledger, job_id: str) -> Job:
    """Put a paused, cancelled or failed job at the end of the queue. It continues from its last checkpoint,
    with the same result as if it had not been interrupted.

    Raises:
        ConfigError: it runs, waits or has succeeded.
    """
    discard(ledger, job_id)
    with ledger.write() as db:
        settle(db, ledger)
        job = find(db, job_id)
        if job.state == "cancelled" and job.requested is not None:
            raise ConfigError(
                f"{job_id}: what is not finished is still being removed", fix="try again in a moment"
            )
        if job.state not in _RESUMABLE:
            fix = "wait until it has stopped" if job.requested else "see: mlx-distill jobs list"
            raise ConfigError(f"{job_id} is {job.state}: there is nothing to resume", fix=fix)
        update(
            db,
            job_id,
            state="queued",
            position=last_position(db) + 1,
            error=None,
            exit_code=None,
            finished_at=None,
            pid=None,
            pid_started=None,
            heartbeat=None,
        )
        add_event(db, job_id, "resumed", "in the queue again")
        return find(db, job_id)


def move_first(ledger: Ledger, job_id: str) -> Job:
    """Let a queued job be the next one.

    Raises:
        ConfigError: it is not queued.
    """
    with ledger.write() as db:
        job = find(db, job_id)
        if job.state != "queued":
            raise ConfigError(f"{job_id} is {job.state}, not queued", fix="see: mlx-distill jobs list")
        row = db.execute("SELECT min(position) FROM jobs WHERE state = 'queued'").fetchone()
        if job.position != row[0]:
            update(db, job_id, position=row[0] - 1)
            add_event(db, job_id, "moved", "the next one in the queue")
        return find(db, job_id)
