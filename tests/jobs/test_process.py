"""Who a process is, and whether it lives."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from mlx_distill.jobs.process import Process, parse_ps, ps_command, start, start_time, this_process

SLEEP = [sys.executable, "-S", "-c", "import time; time.sleep(60)"]


def test_a_process_is_its_number_and_its_start() -> None:
    this = this_process()
    assert this.is_alive and this.pid == os.getpid()
    assert not Process(this.pid, this.started - 0.01).is_alive  # its number was used again
    assert start_time(0) is None and start_time(-1) is None


def test_a_stopped_process_lives_and_one_that_nobody_has_asked_after_does_not(tmp_path: Path) -> None:
    child = subprocess.Popen(SLEEP)
    try:
        started = start_time(child.pid)
        assert started is not None
        process = Process(child.pid, started)
        os.kill(child.pid, signal.SIGSTOP)
        assert process.is_alive
        os.kill(child.pid, signal.SIGKILL)
        os.kill(child.pid, signal.SIGCONT)
        end = time.monotonic() + 10
        while process.is_alive and time.monotonic() < end:
            time.sleep(0.01)
        assert not process.is_alive  # a zombie: its parent has not waited for it
    finally:
        child.kill()
        child.wait()


def test_on_a_mac_a_process_is_what_ps_prints_of_it() -> None:
    # Of macOS 15 in English and UTC, which is what the environment asks for.
    assert parse_ps("S    Fri Nov 27 08:24:57 2026    \n") == 1795767897.0
    assert parse_ps("Us+  Fri Nov  6 08:24:57 2026\n") == 1793953497.0
    assert parse_ps("Z    Fri Nov 27 08:24:57 2026\n") is None
    assert parse_ps("\n") is None
    assert ps_command(12) == ["/bin/ps", "-o", "stat=,lstart=", "-p", "12"]


def test_ps_and_proc_mean_the_same_process() -> None:
    if sys.platform != "linux" or not Path("/bin/ps").exists():
        return
    child = subprocess.Popen(SLEEP)
    try:
        first = start_time(child.pid, "darwin")
        assert first is not None and abs(first - time.time()) < 60
        assert start_time(child.pid, "darwin") == first
    finally:
        child.kill()
        child.wait()
    assert start_time(child.pid, "darwin") is None


def test_a_process_is_started_in_a_session_of_its_own(tmp_path: Path) -> None:
    code = "import os, sys; print(os.getsid(0) == os.getpid(), os.getcwd()); print('e', file=sys.stderr)"
    log = tmp_path / "log.txt"
    process = start([sys.executable, "-c", code], tmp_path, log, os.environ)
    end = time.monotonic() + 20
    while process.is_alive and time.monotonic() < end:
        time.sleep(0.01)
    assert log.read_text(encoding="utf-8").splitlines() == [f"True {tmp_path}", "e"]
