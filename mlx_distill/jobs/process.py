"""Processes of jobs: who they are, whether they live, starting and signalling them.

A process is its number and the time at which it started: numbers are used again, the pair is not. A stopped
process (SIGSTOP, a sleeping machine) lives; one that has ended and whose parent has not asked yet does not.

Numbers mean something only where they were given: on another machine that shares the root, and in a container
of this one, the same number is another process or none. Such a process cannot be asked after or signalled;
whether it lives is judged by its heartbeat alone.
"""

from __future__ import annotations

import calendar
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

FOREIGN_SILENT_S = 120.0
"""A process elsewhere that has not written a heartbeat for so long is taken for dead."""
_UNREAPED: list[subprocess.Popen[bytes]] = []


@dataclass(frozen=True)
class Process:
    """A process.

    Attributes:
        pid: Its number.
        started: When it started: on Linux seconds since the machine started, which setting the clock does not
            change; on a Mac Unix seconds, as ``ps`` prints them.
        host: The name of its machine or container, for people. It may change.
        pid_space: Where its number was given, see :func:`this_pid_space`; None of one that an older program
            has written down, which is taken for one of here.
    """

    pid: int
    started: float
    host: str | None = field(default=None, compare=False)
    pid_space: str | None = None

    @property
    def is_local(self) -> bool:
        """Whether it can be asked after and signalled from here."""
        return self.pid_space in (None, this_pid_space())

    @property
    def is_alive(self) -> bool:
        """Whether it is one of here and has not ended yet."""
        return self.is_local and start_time(self.pid) == self.started

    def lives(self, heartbeat: float | None, now: float | None = None) -> bool:
        """Whether it has not ended, as far as that is known from here.

        Args:
            heartbeat: When it last wrote that it is alive, in Unix seconds. It counts only for a process
                elsewhere, whose clock may be ahead: a heartbeat of the future is one of now.
            now: The present, in Unix seconds.
        """
        if self.is_local:
            return self.is_alive
        if self.host == host_name() and _boot(self.pid_space or "") != _boot(this_pid_space()):
            return False  # this machine was started again
        return heartbeat is not None and (time.time() if now is None else now) - heartbeat < FOREIGN_SILENT_S

    def __str__(self) -> str:
        where = "" if self.is_local else f" on {self.host or 'another machine'}"
        return f"process {self.pid}{where}"


def this_process() -> Process:
    """The process that asks."""
    started = start_time(os.getpid())
    assert started is not None
    return local_process(os.getpid(), started)


def local_process(pid: int, started: float) -> Process:
    """A process of this machine or container."""
    return Process(pid, started, host_name(), this_pid_space())


def host_name() -> str:
    """The name of this machine or container."""
    return platform.node() or "unknown"


@cache
def this_pid_space() -> str:
    """Where the numbers of this process's machine are given: its start ("boot"), and on Linux the namespace
    of process numbers, which each container has of its own.
    """
    with suppress(OSError):
        if sys.platform == "linux":
            boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
            return f"{boot} {os.readlink('/proc/self/ns/pid')}"
        out = subprocess.run(
            ["/usr/sbin/sysctl", "-n", "kern.bootsessionuuid"], capture_output=True, text=True, check=False
        )
        if out.stdout.strip():
            return out.stdout.strip()
    return host_name()


def _boot(pid_space: str) -> str:
    return pid_space.partition(" ")[0]


def start_time(pid: int, system: str = sys.platform) -> float | None:
    """When the process of this number started, or None where there is none or it has ended."""
    if pid <= 0:
        return None
    if system == "linux":
        try:
            return parse_stat(Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace"))
        except (FileNotFoundError, ProcessLookupError):
            return None
    out = subprocess.run(
        ps_command(pid), capture_output=True, text=True, env={"LC_ALL": "C", "TZ": "UTC"}, check=False
    )
    return parse_ps(out.stdout)


def ps_command(pid: int) -> list[str]:
    """The command that prints the state and the start of a process, where there is no ``/proc``. Its
    environment has to name the language and the time zone, which may change while a process runs.
    """
    return ["/bin/ps", "-o", "stat=,lstart=", "-p", str(pid)]


def parse_stat(text: str) -> float | None:
    """The start of a process in ``/proc/PID/stat``, in seconds since the machine started; None where it has
    ended. The second field is the program's name in parentheses, in which anything may stand.

    >>> parse_stat("7 (a) Z (b) R 1 7 7 0 -1 0 0 0 0 0 0 0 0 0 20 0 1 0 250 0 0") == 250 / _ticks()
    True
    >>> parse_stat("7 (python) Z 1 7 7 0 -1 0 0 0 0 0 0 0 0 0 20 0 1 0 250 0 0") is None
    True
    """
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in "ZXx" else int(fields[19]) / _ticks()


def _ticks() -> int:
    return os.sysconf("SC_CLK_TCK")


def parse_ps(text: str) -> float | None:
    """The start of a process in what :func:`ps_command` prints, in Unix seconds; None where it prints nothing
    or the process has ended.

    >>> parse_ps("Ss   Thu Nov 26 17:02:09 2026\\n")
    1795712529.0
    >>> parse_ps("Z+   Thu Nov 26 17:02:09 2026\\n") is None, parse_ps("") is None
    (True, True)
    """
    state, _, started = text.strip().partition(" ")
    if not state or state.startswith("Z"):
        return None
    return float(calendar.timegm(time.strptime(started.strip(), "%a %b %d %H:%M:%S %Y")))


def start(command: Sequence[str], folder: Path, log: Path, environment: Mapping[str, str]) -> Process:
    """Start a process in a session of its own, so that it survives the terminal and the process that started
    it. What it prints is appended to ``log``.
    """
    reap()
    with open(log, "ab") as output:
        child = subprocess.Popen(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=dict(environment),
            start_new_session=True,
        )
    _UNREAPED.append(child)
    started = start_time(child.pid)
    # One that has ended already gets a start that no living process has.
    return local_process(child.pid, -1.0 if started is None else started)


def reap() -> None:
    """Ask after the processes that this one has started, so that those which have ended go away."""
    _UNREAPED[:] = [child for child in _UNREAPED if child.poll() is None]


def send(process: Process, number: signal.Signals) -> bool:
    """Send a signal to a process; False where it has ended or is not one of here."""
    if not process.is_alive:
        return False
    with suppress(ProcessLookupError):
        os.kill(process.pid, number)
        return True
    return False


def kill_group(process: Process) -> None:
    """End at once a process that has a session of its own, and all that it has started there."""
    if process.is_alive:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
