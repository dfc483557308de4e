"""Removing what a job has not finished.

A job that was cancelled with ``discard`` keeps that request in the ledger until its files are gone. They are
removed outside of any transaction, so that nobody waits for it. Where the process is killed in between, the
next :func:`~mlx_distill.jobs.queue.dispatch` goes on.
"""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import ExitStack, suppress
from pathlib import Path

from mlx_distill.errors import DistillError, FileError
from mlx_distill.jobs.store import Job, add_event, find, update
from mlx_distill.ledger.database import Ledger
from mlx_distill.ledger.root import Root
from mlx_distill.storage import lock_folder, os_errors, partial_folder
from mlx_distill.storage.stage_folder import MANIFEST
from mlx_distill.text import counted

TO_DISCARD = "state = 'cancelled' AND requested = 'discard'"
"""The condition of the jobs whose files are still to be removed."""


def discard(ledger: Ledger, job_id: str) -> None:
    """Remove the unfinished stages of a cancelled job that was asked to; nothing where that is done, or where
    another process is doing it. What cannot be removed stays, with a warning among the job's events.

    Raises:
        FileError: another run uses the job's folder, or a file cannot be removed.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(lock_folder(ledger.root.jobs / job_id))
        except FileError:
            return
        with ledger.read() as db:
            job = find(db, job_id)
        if (job.state, job.requested) != ("cancelled", "discard"):
            return
        try:
            removed = remove_unfinished(job, ledger.root)
        except DistillError as error:
            with ledger.write() as db:
                _done(db, job, f"what is not finished was not removed: {error}", "warning")
            raise
        with ledger.write() as db:
            _done(db, job, f"removed {counted(len(removed), 'unfinished stage')}", "note")


def discard_all(ledger: Ledger) -> None:
    """:func:`discard` for each job that still has to be; what cannot be removed is among their events."""
    with ledger.read() as db:
        waiting = [row["id"] for row in db.execute(f"SELECT id FROM jobs WHERE {TO_DISCARD}")]
    for job_id in waiting:
        with suppress(DistillError):
            discard(ledger, job_id)


def _done(db: sqlite3.Connection, job: Job, message: str, type: str) -> None:
    update(db, job.id, requested=None, requested_at=None)
    add_event(db, job.id, type, message, level="warn" if type == "warning" else "info")


def remove_unfinished(job: Job, root: Root) -> list[Path]:
    """Remove the partial stages of a job that has been started, with their checkpoints. Finished stages stay.

    Returns:
        The folders that were removed.

    Raises:
        FileError: another run uses the job's folder, or a file cannot be removed.
    """
    if job.run_path is None or not job.attempt:
        return []
    out = root.inside(job.run_path)
    beside = partial_folder(out)
    unfinished = [beside] if job.kind == "convert" and beside.is_dir() else []
    if out.is_dir():
        with lock_folder(out):
            unfinished += _partial_folders(out)
            return _remove(unfinished)
    return _remove(unfinished)


def _partial_folders(out: Path) -> list[Path]:
    """The partial folders in a run or a cross-validation; one with a manifest is finished."""
    found = [path for path in sorted(out.rglob(".*.partial")) if path.is_dir() and not path.is_symlink()]
    return [path for path in found if not (path / MANIFEST).is_file()]


def _remove(folders: list[Path]) -> list[Path]:
    with os_errors():
        for folder in folders:
            if folder.exists():
                shutil.rmtree(folder)
    return folders
