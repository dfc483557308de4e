"""A job's process with a made-up command: fake_job.py ID ROOT. The first argument of the job says what it
does.

``ok``, ``fail``, ``gate``, ``gpu`` and ``abort`` end at once, ``full`` with a disk on which no file can grow.
``work`` works until it is interrupted, and then saves; ``stubborn`` does not stop for that.
"""

from __future__ import annotations

import resource
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mlx_distill.jobs.ended import Ended
from mlx_distill.jobs.execute import execute
from mlx_distill.jobs.queue import dispatch as dispatch_queue
from mlx_distill.jobs.store import Job, get
from mlx_distill.ledger.database import Ledger
from mlx_distill.ledger.root import Root
from mlx_distill.progress import make_progress

GPU_ERROR = (
    "[METAL] Command buffer execution failed: Impacting Interactivity "
    "(0000000e:kIOGPUCommandBufferCallbackErrorImpactingInteractivity)"
)


def fake_command(job_id: str, root: str) -> list[str]:
    """The command line of such a process."""
    return [sys.executable, __file__, job_id, root]


def dispatch(ledger: Ledger, grace_s: float = 30.0) -> Job | None:
    """Start the next job as such a process."""
    return dispatch_queue(ledger, grace_s, fake_command)


def wait(ledger: Ledger, job_id: str, until: Callable[[Job], bool], seconds: float = 30) -> Job:
    """The job when it is as wanted."""
    end = time.monotonic() + seconds
    while not until(job := get(ledger, job_id)):
        assert time.monotonic() < end, (job, job.log(ledger.root).read_text(encoding="utf-8"))
        time.sleep(0.02)
    return job


def command(arguments: Sequence[str]) -> Ended:
    """Do what the job says."""
    what: Any = arguments[1]
    print(f"doing {what}", flush=True)
    if what == "fail":
        return Ended(1, "data", "rows.jsonl:3: no answer", "drop the row")
    if what == "gate":
        return Ended(3, "quality_gate", "a goal is not met")
    if what == "gpu":
        return Ended(1, "unexpected", f"unexpected RuntimeError: {GPU_ERROR}")
    if what == "abort":
        print(f"libc++abi: terminating due to uncaught exception of type std::runtime_error: {GPU_ERROR}")
        sys.stdout.flush()
        signal.raise_signal(signal.SIGKILL)
    if what == "full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    if what in ("work", "stubborn"):
        _work(what == "stubborn")
    return Ended(0)


def _work(stubborn: bool) -> None:
    if stubborn:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    with make_progress().task("work", total=1000, unit="step") as bar:
        for step in range(1000):
            try:
                bar.update(step)
                Path("working").write_text(str(step), encoding="utf-8")
                time.sleep(0.05)
            except KeyboardInterrupt:
                Path("saved").write_text(str(step), encoding="utf-8")
                raise


if __name__ == "__main__":
    sys.exit(execute(Ledger(Root.at(sys.argv[2])), sys.argv[1], command, fake_command, pauses=(0.1,)))
