"""The process of a job: it runs one command, writes down how it goes and how it ended, and starts the next
job.
"""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType

from mlx_distill.errors import FileError
from mlx_distill.jobs import lease
from mlx_distill.jobs.ended import Ended, write_end
from mlx_distill.jobs.outcome import keep_result
from mlx_distill.jobs.process import Process, this_process
from mlx_distill.jobs.queue import close, execute_command, finish_and_start
from mlx_distill.jobs.recorder import Recorder
from mlx_distill.jobs.store import Job, find, update
from mlx_distill.jobs.watchdog import explain_gpu_error
from mlx_distill.ledger.database import Ledger
from mlx_distill.progress import report_events

RETRY_S = (1.0, 5.0)
_MAX_LOG_BYTES = 4 << 20


def execute(
    ledger: Ledger,
    job_id: str,
    command: Callable[[Sequence[str]], Ended],
    next_command: Callable[[str, str], list[str]] = execute_command,
    pauses: Sequence[float] = RETRY_S,
) -> int:
    """Run a job in this process, which :func:`~mlx_distill.jobs.queue.dispatch` has started for it.

    Args:
        ledger: The ledger.
        job_id: The job.
        command: Runs a command line of this program in this process.
        next_command: The command line of the process of the next job.
        pauses: Seconds between attempts to write the end into a ledger that does not take it.

    Returns:
        The exit code: that of the command; 1 where this is not the process of the job.
    """
    with _interrupts() as interrupts:
        job = _begin(ledger, job_id)
        if job is None:
            return 1
        with _heartbeat(ledger, job):
            if job.requested is not None:
                ended = Ended(130)
            else:
                _keep_awake(job, ledger)
                recorder = Recorder(ledger, job)
                with report_events(recorder.event):
                    ended = _run(job, command, interrupts)
                recorder.finish()
            interrupts.ignored = True
            is_written = _end(ledger, job, ended, pauses)
        if is_written:
            finish_and_start(ledger, next_command)
    return ended.exit_code


class _Interrupts:
    """Whether signals stop what runs; see :func:`_interrupts`."""

    ignored = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        if not self.ignored:
            raise KeyboardInterrupt


@contextmanager
def _interrupts() -> Iterator[_Interrupts]:
    """Let SIGINT and SIGTERM interrupt the command, but not the writing of its end. A process that was
    started in the background may have inherited that SIGINT is ignored.
    """
    interrupts = _Interrupts()
    old = {number: signal.signal(number, interrupts.handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupts
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _begin(ledger: Ledger, job_id: str) -> Job | None:
    """Say that signals are handled from here on; None where the ledger does not know this process."""
    process = this_process()
    try:
        with ledger.write() as db:
            job = find(db, job_id)
            if not _is_of(job, process):
                return None
            _beat(db, job_id)
            return find(db, job_id)
    except FileError as error:
        with suppress(OSError):
            write_end(ledger.root.jobs / job_id, process, Ended(1, "file", error.message, error.fix))
        raise


def _is_of(job: Job, process: Process) -> bool:
    """Whether the ledger has a job as running in this process. It does not where another machine has taken it
    for dead.
    """
    return job.state == "running" and job.process == process


def _beat(db: sqlite3.Connection, job_id: str) -> None:
    update(db, job_id, heartbeat=time.time())
    lease.beat(db, job_id)


@contextmanager
def _heartbeat(ledger: Ledger, job: Job) -> Iterator[None]:
    """Write down every ten seconds that the process is alive, and keep its log from growing for ever. Where a
    signal cannot reach it, it interrupts itself.
    """
    interrupted = False

    def work() -> None:
        nonlocal interrupted
        limit_log(job.log(ledger.root))
        if _beat_or_stop(ledger, job) and not interrupted:
            interrupted = True
            os.kill(os.getpid(), signal.SIGINT)

    with lease.repeated(work):
        yield


def _beat_or_stop(ledger: Ledger, job: Job) -> bool:
    """Write a heartbeat; whether the job is to stop: it is no longer this process's, or somebody asked for
    it whose signals do not reach this process.
    """
    with ledger.write() as db:
        now = find(db, job.id)
        if job.process is None or not _is_of(now, job.process):
            return True
        _beat(db, job.id)
        return now.requested is not None and now.asked_from not in (None, job.pid_space)


def limit_log(log: Path, size: int = _MAX_LOG_BYTES) -> None:
    """Move a log that has grown above ``size`` to ``log.1.txt``. It is emptied in place, since the process
    goes on appending to it.
    """
    if log.is_file() and log.stat().st_size > size:
        shutil.copyfile(log, log.with_name("log.1.txt"))
        os.truncate(log, 0)


def awake_command(pid: int, system: str = sys.platform) -> list[str] | None:
    """The command that keeps a Mac awake, but not its display, while a process runs; None elsewhere.

    >>> awake_command(7, "darwin"), awake_command(7, "linux")
    (['/usr/bin/caffeinate', '-is', '-w', '7'], None)
    """
    return ["/usr/bin/caffeinate", "-is", "-w", str(pid)] if system == "darwin" else None


def _keep_awake(job: Job, ledger: Ledger) -> None:
    command = awake_command(os.getpid())
    if command is not None:
        with suppress(OSError):  # without it the job runs all the same
            subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)


def _run(job: Job, command: Callable[[Sequence[str]], Ended], interrupts: _Interrupts) -> Ended:
    """Run the job's command; no error leaves."""
    try:
        ended = command(job.command)
    except KeyboardInterrupt:
        ended = Ended(130)
    except BaseException as error:
        traceback.print_exc()
        ended = Ended(1, "unexpected", f"unexpected {type(error).__name__}: {error}", None)
    interrupts.ignored = True
    sys.stdout.flush()
    sys.stderr.flush()
    gpu = explain_gpu_error(ended.message or "", job.id)
    return Ended(ended.exit_code, gpu["code"], gpu["message"], gpu["fix"]) if gpu else ended


def _end(ledger: Ledger, job: Job, ended: Ended, pauses: Sequence[float]) -> bool:
    """Write down the end of the job, with what it has made; False where only its folder has it."""
    ended = replace(ended, at=time.time())
    process = this_process()
    try:
        write_end(job.folder(ledger.root), process, ended)
    except OSError:
        traceback.print_exc()
    for pause in (*pauses, None):
        try:
            result = keep_result(ledger, job) if ended.exit_code == 0 else None
            with ledger.write() as db:
                now = find(db, job.id)
                if _is_of(now, process):
                    state = ended.state(now.requested)
                    close(db, now, state, ended.exit_code, ended.error, result, ended.at)
            return True
        except FileError:
            traceback.print_exc()
            if pause is not None:
                time.sleep(pause)
    return False
