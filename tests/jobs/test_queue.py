"""The queue: one job at a time, in order; pause, resume, cancel; the states that are told."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys

import pytest
from helpers.fake_job import dispatch, fake_command, wait

from mlx_distill import jobs
from mlx_distill.errors import ConfigError
from mlx_distill.jobs import lease
from mlx_distill.jobs.store import Job
from mlx_distill.ledger.database import Ledger


def start(ledger: Ledger, what: str = "work") -> Job:
    """A job that runs, and has come so far that it handles signals."""
    job = jobs.submit(ledger, "run", [what])
    dispatch(ledger)
    working = ledger.root.path / "working"
    return wait(ledger, job.id, lambda job: job.heartbeat is not None and working.exists())


def types(ledger: Ledger, job: Job) -> list[str]:
    return [event.type for event in jobs.events(ledger, job.id)]


def test_jobs_run_one_at_a_time_in_order_and_each_starts_the_next(ledger: Ledger) -> None:
    first, second, third = (jobs.submit(ledger, "run", ["ok", str(i)]) for i in range(3))
    assert [job.id for job in jobs.queue(ledger)] == [first.id, second.id, third.id]
    jobs.move_first(ledger, third.id)
    assert [job.id for job in jobs.queue(ledger)] == [third.id, first.id, second.id]
    started = dispatch(ledger)
    assert started is not None and started.id == third.id and dispatch(ledger) is None
    done = [wait(ledger, job.id, lambda job: job.state == "succeeded") for job in (third, first, second)]
    for before, after in itertools.pairwise(done):
        assert (before.finished_at or 0) <= (after.started_at or 0)
    assert lease.holder(ledger) is None and not lease.wanted(ledger)
    assert types(ledger, first) == ["submitted", "started", "succeeded"]
    assert done[0].exit_code == 0 and "doing ok" in first.log(ledger.root).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("what", "exit_code", "code"),
    [("fail", 1, "data"), ("gate", 3, "quality_gate"), ("gpu", 1, "gpu_watchdog")],
)
def test_a_failed_job_says_why(ledger: Ledger, what: str, exit_code: int, code: str) -> None:
    job = jobs.submit(ledger, "run", [what])
    dispatch(ledger)
    job = wait(ledger, job.id, lambda job: job.is_finished)
    assert (job.state, job.exit_code, (job.error or {})["code"]) == ("failed", exit_code, code)
    assert jobs.resume(ledger, job.id).state == "queued"


def test_an_abort_of_the_gpu_is_read_from_the_log(ledger: Ledger) -> None:
    job = jobs.submit(ledger, "run", ["abort"])
    dispatch(ledger)
    wait(ledger, job.id, lambda job: job.process is not None and not job.process.is_alive)
    dispatch(ledger)
    error = jobs.get(ledger, job.id).error
    assert error is not None and error["code"] == "gpu_watchdog" and "let the display sleep" in error["fix"]


def test_pause_saves_and_resume_puts_it_back_into_the_queue(ledger: Ledger) -> None:
    job, waiting = start(ledger), jobs.submit(ledger, "run", ["ok"])
    assert jobs.pause(ledger, job.id).requested == "pause"
    job = wait(ledger, job.id, lambda job: job.state == "paused")
    assert job.exit_code == 130 and job.requested is None
    assert (ledger.root.path / "saved").exists()
    wait(ledger, waiting.id, lambda job: job.state == "succeeded")  # the accelerator was free for it
    (ledger.root.path / "working").unlink()
    assert jobs.resume(ledger, job.id).state == "queued"
    dispatch(ledger)
    again = wait(ledger, job.id, lambda job: job.heartbeat is not None)
    assert (again.state, again.attempt) == ("running", 2)
    jobs.cancel(ledger, job.id)
    assert wait(ledger, job.id, lambda job: job.is_finished).state == "cancelled"
    assert types(ledger, job) == [
        *("submitted", "started", "requested", "paused", "resumed", "started", "requested", "cancelled")
    ]


def test_a_job_that_does_not_stop_is_killed(ledger: Ledger) -> None:
    job = start(ledger, "stubborn")
    jobs.cancel(ledger, job.id)
    dispatch(ledger)
    assert jobs.get(ledger, job.id).state == "running"
    dispatch(ledger, grace_s=0)
    job = jobs.get(ledger, job.id)
    assert job.state == "cancelled" and job.process is not None and not job.process.is_alive
    assert "warning" in types(ledger, job)


def test_a_killed_job_is_failed_and_can_be_resumed(ledger: Ledger) -> None:
    job = start(ledger)
    assert job.process is not None
    os.kill(job.process.pid, signal.SIGKILL)
    wait(ledger, job.id, lambda job: job.process is not None and not job.process.is_alive)
    dispatch(ledger)
    job = jobs.get(ledger, job.id)
    assert (job.state, (job.error or {})["code"]) == ("failed", "orphaned")
    assert lease.holder(ledger) is None
    assert jobs.resume(ledger, job.id).state == "queued"


def test_a_killed_job_that_was_asked_to_pause_is_paused(ledger: Ledger) -> None:
    job = start(ledger, "stubborn")
    jobs.pause(ledger, job.id)
    assert job.process is not None
    os.kill(job.process.pid, signal.SIGKILL)
    wait(ledger, job.id, lambda job: job.process is not None and not job.process.is_alive)
    dispatch(ledger)
    assert jobs.get(ledger, job.id).state == "paused"


def test_a_stopped_job_runs(ledger: Ledger) -> None:
    job = start(ledger)
    assert job.process is not None
    os.kill(job.process.pid, signal.SIGSTOP)
    jobs.submit(ledger, "run", ["ok"])
    assert dispatch(ledger) is None
    job = jobs.get(ledger, job.id)
    assert job.state == "running" and job.state_text() == "running"
    assert job.state_text((job.heartbeat or 0) + 90) == "running, no heartbeat for 90 s"
    os.kill(job.process.pid if job.process else 0, signal.SIGCONT)
    jobs.cancel(ledger, job.id)
    assert wait(ledger, job.id, lambda job: job.is_finished).state == "cancelled"


def test_a_request_before_the_process_handles_signals_is_read_by_it(ledger: Ledger) -> None:
    job = jobs.submit(ledger, "run", ["work"])
    started = dispatch(ledger)
    assert started is not None and started.process is not None
    os.kill(started.process.pid, signal.SIGSTOP)  # while it still imports
    if jobs.get(ledger, job.id).heartbeat is None:
        assert jobs.pause(ledger, job.id).requested == "pause"
    os.kill(started.process.pid, signal.SIGCONT)
    assert wait(ledger, job.id, lambda job: job.state == "paused").exit_code == 130
    assert not (ledger.root.path / "working").exists()


def test_two_processes_that_dispatch_at_once_start_one_job(ledger: Ledger) -> None:
    for _ in range(3):
        jobs.submit(ledger, "run", ["work"])
    code = (
        "import sys; from helpers.fake_job import dispatch;"
        "from mlx_distill.ledger.database import Ledger; from mlx_distill.ledger.root import Root;"
        "l = Ledger(Root.at(sys.argv[1])); print('ready', flush=True); sys.stdin.readline();"
        "print(sum(dispatch(l) is not None for _ in range(5)))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, str(ledger.root.path)]
    pipe = subprocess.PIPE
    both = [subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment) for _ in range(2)]
    for one in both:
        assert one.stdout is not None and one.stdout.readline() == "ready\n"
    for one in both:
        assert one.stdin is not None
        one.stdin.write("\n")
        one.stdin.flush()
    assert sorted(int(one.communicate(timeout=30)[0]) for one in both) == [0, 1]
    assert len(jobs.list_jobs(ledger, "running")) == 1


def test_a_process_that_the_ledger_does_not_know_does_nothing(ledger: Ledger) -> None:
    job = jobs.submit(ledger, "run", ["ok"])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(fake_command(job.id, str(ledger.root.path)), env=environment, check=False)
    assert done.returncode == 1 and jobs.get(ledger, job.id).state == "queued"


def test_the_states_of_a_job_that_does_not_run(ledger: Ledger) -> None:
    job = jobs.submit(ledger, "run", ["ok"])
    assert jobs.pause(ledger, job.id).state == "paused"
    assert jobs.queue(ledger) == [] and dispatch(ledger) is None
    assert jobs.resume(ledger, job.id).state == "queued"
    assert jobs.cancel(ledger, job.id).state == "cancelled"
    for refused in (jobs.pause, jobs.cancel, jobs.move_first):
        with pytest.raises(ConfigError, match="is cancelled"):
            refused(ledger, job.id)
    with pytest.raises(ConfigError, match="no job 'x'"):
        jobs.resume(ledger, "x")


def test_serving_lets_go_of_the_lease_for_jobs(ledger: Ledger) -> None:
    assert lease.acquire(ledger, "serve", "serving") and lease.acquire(ledger, "serve", "serving")
    assert not lease.acquire(ledger, "other", "serving")
    job = jobs.submit(ledger, "run", ["ok"])
    assert dispatch(ledger) is None and lease.wanted(ledger)
    lease.release(ledger, "serve")
    assert not lease.acquire(ledger, "serve", "serving")  # the job comes first
    assert dispatch(ledger) is not None
    wait(ledger, job.id, lambda job: job.is_finished)
    assert lease.acquire(ledger, "serve", "serving")


def test_a_lease_of_a_process_that_has_ended_is_free(ledger: Ledger) -> None:
    code = (
        "import sys; from mlx_distill.jobs.lease import acquire;"
        "from mlx_distill.ledger.database import Ledger;"
        "from mlx_distill.ledger.root import Root; print(acquire(Ledger(Root.at(sys.argv[1])), 'serve', 'x'))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, str(ledger.root.path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "True\n" and lease.holder(ledger) is None
    assert lease.acquire(ledger, "serve", "again")
