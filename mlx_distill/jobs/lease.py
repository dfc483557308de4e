"""The lease of the accelerator: one process at a time trains, evaluates or serves.

A lease belongs to a process; that of one that has ended is free. Its heartbeat is information only: a stopped
process keeps its lease. Only of a process on another machine, or in another container, that shares the root
nothing but the heartbeat is known.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from mlx_distill.errors import DistillError
from mlx_distill.jobs.process import Process, this_process
from mlx_distill.ledger.database import Ledger

ACCELERATOR = "accelerator"
BEAT_S = 10.0
"""Seconds between two heartbeats."""


@dataclass(frozen=True)
class Lease:
    """Who has the accelerator.

    Attributes:
        holder: A job's identifier, or a name such as ``serve``.
        process: Its process.
        heartbeat: When it last wrote that it is alive, in Unix seconds.
        purpose: What it does, for people.
    """

    holder: str
    process: Process
    heartbeat: float
    purpose: str


def holder(ledger: Ledger) -> Lease | None:
    """The lease as it is, None where the accelerator is free or the process that had it has ended."""
    with ledger.read() as db:
        return current(db)


def user(ledger: Ledger) -> str | None:
    """Who uses the accelerator, for people; None where it is free."""
    lease = holder(ledger)
    if lease is None:
        return None
    job = f"{lease.holder}: " if lease.holder.startswith("job-") else ""
    return f"{job}{lease.purpose} ({lease.process})"


def waits_for(ledger: Ledger) -> str | None:
    """What a queued job waits for, for people; None where the accelerator is free."""
    other = user(ledger)
    return None if other is None else f"waits for {other}"


def current(db: sqlite3.Connection) -> Lease | None:
    """The lease, on a connection; see :func:`holder`."""
    row = db.execute("SELECT * FROM leases WHERE name = ?", (ACCELERATOR,)).fetchone()
    if row is None:
        return None
    process = Process(row["pid"], row["pid_started"], row["host"], row["pid_space"])
    lease = Lease(row["holder"], process, row["heartbeat"], row["purpose"])
    return lease if process.lives(lease.heartbeat) else None


def give(db: sqlite3.Connection, name: str, process: Process, purpose: str) -> None:
    """Let a process have the lease, in a transaction that has seen that it is free."""
    db.execute(
        "INSERT OR REPLACE INTO leases (name, holder, pid, pid_started, host, pid_space, heartbeat, purpose)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        (
            ACCELERATOR,
            name,
            process.pid,
            process.started,
            process.host,
            process.pid_space,
            time.time(),
            purpose,
        ),
    )


def take_back(db: sqlite3.Connection, name: str) -> None:
    """Free the lease if this holder has it, in a transaction."""
    db.execute("DELETE FROM leases WHERE name = ? AND holder = ?", (ACCELERATOR, name))


def acquire(ledger: Ledger, name: str, purpose: str) -> bool:
    """Take the lease for this process, as something that is no job; jobs come first.

    Args:
        ledger: The ledger.
        name: Who takes it, such as ``serve``.
        purpose: What for, for people.

    Returns:
        Whether this process has it now. False while another has it, or a job waits for it.
    """
    process = this_process()
    with ledger.write() as db:
        lease = current(db)
        if lease is not None:
            is_ours = lease.holder == name and lease.process == process
            if is_ours:
                beat(db, name)
            return is_ours
        if is_wanted(db):
            return False
        give(db, name, process, purpose)
        return True


def release(ledger: Ledger, name: str) -> None:
    """Free the lease if this holder has it in this process."""
    process = this_process()
    with ledger.write() as db:
        lease = current(db)
        if lease is not None and lease.process == process:
            take_back(db, name)


def wanted(ledger: Ledger) -> bool:
    """Whether a job waits for the accelerator or has it, so that who serves has to let go of it."""
    with ledger.read() as db:
        return is_wanted(db)


def is_wanted(db: sqlite3.Connection) -> bool:
    """Whether a job is queued or running, on a connection."""
    row = db.execute("SELECT 1 FROM jobs WHERE state IN ('queued', 'running') LIMIT 1").fetchone()
    return row is not None


def beat(db: sqlite3.Connection, name: str) -> None:
    """Write down that the holder is alive, in a transaction, where that is this process: another one may have
    taken it for dead, and have the lease now.
    """
    process = this_process()
    db.execute(
        "UPDATE leases SET heartbeat = ? WHERE name = ? AND holder = ? AND pid = ? AND pid_started = ?"
        " AND (pid_space IS NULL OR pid_space = ?)",
        (time.time(), ACCELERATOR, name, process.pid, process.started, process.pid_space),
    )


@contextmanager
def kept(ledger: Ledger, name: str) -> Iterator[None]:
    """Write the heartbeats of a lease that this process has, during a block."""

    def work() -> None:
        with ledger.write() as db:
            beat(db, name)

    with repeated(work):
        yield


@contextmanager
def repeated(work: Callable[[], None], seconds: float = BEAT_S) -> Iterator[None]:
    """Do something every ten seconds in a thread, during a block. It is information only: it may be missing,
    as on a full disk.
    """
    done = threading.Event()

    def loop() -> None:
        while not done.wait(seconds):
            with suppress(DistillError, OSError):
                work()

    thread = threading.Thread(target=loop, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
