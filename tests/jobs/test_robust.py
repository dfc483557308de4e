"""Jobs whose ledger cannot be written, whose process is elsewhere, and whose files are removed."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from helpers.fake_job import dispatch, fake_command, wait

from mlx_distill import jobs
from mlx_distill.cli import cli
from mlx_distill.errors import ConfigError, FileError
from mlx_distill.jobs import lease
from mlx_distill.jobs.alongside import accelerator
from mlx_distill.jobs.discard import discard
from mlx_distill.jobs.ended import Ended, read_end, reserve_end, write_end
from mlx_distill.jobs.execute import execute
from mlx_distill.jobs.process import (
    FOREIGN_SILENT_S,
    Process,
    host_name,
    local_process,
    start_time,
    this_pid_space,
    this_process,
)
from mlx_distill.jobs.store import Job, update
from mlx_distill.ledger.database import Ledger
from mlx_distill.storage import lock_folder, write_json, write_jsonl

ELSEWHERE = "another-boot pid:[7]"
SLEEP = [sys.executable, "-S", "-c", "import time; time.sleep(60)"]


def here(ledger: Ledger, what: str = "ok", process: Process | None = None) -> Job:
    """A job that runs in this process, or in the one that is given."""
    job = jobs.submit(ledger, "run", [what], run_path="runs/a")
    process = process or this_process()
    reserve(ledger, job)
    with ledger.write() as db:
        now = time.time()
        update(db, job.id, state="running", started_at=now, heartbeat=now, attempt=1)
        update(db, job.id, pid=process.pid, pid_started=process.started)
        update(db, job.id, host=process.host, pid_space=process.pid_space)
        lease.give(db, job.id, process, "x")
    return jobs.get(ledger, job.id)


def reserve(ledger: Ledger, job: Job) -> None:
    job.folder(ledger.root).mkdir(parents=True)
    reserve_end(job.folder(ledger.root))


def as_dead(ledger: Ledger, job: Job) -> Job:
    """Let the job be that of a process of here which has ended, with what it wrote into its folder."""
    ended = read_end(job.folder(ledger.root), job.process)
    process = replace(this_process(), started=-1.0)
    with ledger.write() as db:
        update(db, job.id, pid_started=-1.0)
    if ended is not None:
        write_end(job.folder(ledger.root), process, ended)
    return jobs.get(ledger, job.id)


def messages(ledger: Ledger, job: Job) -> list[str]:
    return [event.message for event in jobs.events(ledger, job.id)]


# --- the end of a job ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ended", "requested", "state"),
    [
        (Ended(0), None, "succeeded"),
        (Ended(130), "pause", "paused"),
        (Ended(130), "cancel", "cancelled"),
        (Ended(1, "data", "rows.jsonl:3: no answer", "drop the row"), None, "failed"),
    ],
)
def test_an_end_that_the_ledger_did_not_take_is_read_from_the_folder(
    ledger: Ledger, ended: Ended, requested: str | None, state: str
) -> None:
    job = here(ledger)
    with ledger.write() as db:
        update(db, job.id, requested=requested)
        db.execute("CREATE TRIGGER full BEFORE UPDATE OF state ON jobs BEGIN SELECT RAISE(FAIL, 'x'); END")

    def refuse(*_: object) -> Ended:
        return ended

    # The trigger stands for whatever refuses the write; only FileErrors are tried again, so it is one here.
    ledger.write = failing(ledger)  # type: ignore[method-assign]
    assert execute(ledger, job.id, refuse, fake_command, pauses=(0.0,)) == ended.exit_code
    del ledger.__dict__["write"]
    with ledger.write() as db:
        db.execute("DROP TRIGGER full")
    assert jobs.get(ledger, job.id).state == "running"
    as_dead(ledger, job)
    dispatch(ledger)
    told = jobs.get(ledger, job.id)
    assert (told.state, told.exit_code) == (state, ended.exit_code)
    assert told.error == ended.error
    assert lease.holder(ledger) is None
    assert (told.result is not None) == (state == "succeeded")


def failing(ledger: Ledger) -> Callable[[], object]:
    """``ledger.write`` that turns the trigger's refusal into what a full disk raises."""
    from contextlib import contextmanager

    write = ledger.write

    @contextmanager
    def wrapped():  # type: ignore[no-untyped-def]
        try:
            with write() as db:
                yield db
        except sqlite3.IntegrityError as error:
            raise FileError("the disk is full", fix="make room") from error

    return wrapped


def test_a_process_killed_before_its_end_is_written_is_told_as_orphaned(ledger: Ledger) -> None:
    job = as_dead(ledger, here(ledger))
    dispatch(ledger)
    assert (jobs.get(ledger, job.id).error or {})["code"] == "orphaned"


def test_the_file_of_an_end_keeps_its_size_and_is_that_of_one_process(tmp_path: Path) -> None:
    reserve_end(tmp_path)
    size = (tmp_path / "end.json").stat().st_size
    process = this_process()
    assert read_end(tmp_path, process) is None
    for ended in (Ended(1, "data", "é" * 5000, "x" * 5000, 1.0), Ended(1, "x", "𐍈" * 5000, None, 1.0)):
        write_end(tmp_path, process, ended)
        read = read_end(tmp_path, process)
        assert read is not None and (read.exit_code, read.code, read.at) == (1, ended.code, 1.0)
        assert (tmp_path / "end.json").stat().st_size == size
    assert read_end(tmp_path, replace(process, started=0.5)) is None
    assert read_end(tmp_path, replace(process, pid_space=ELSEWHERE)) is None


def test_a_full_disk_at_the_end_of_a_job(ledger: Ledger) -> None:
    job = jobs.submit(ledger, "run", ["full"])
    dispatch(ledger)
    log = wait(ledger, job.id, lambda job: job.process is not None and not job.lives).log(ledger.root)
    assert "nothing that was committed is lost" in log.read_text(encoding="utf-8")
    assert jobs.get(ledger, job.id).state == "running"
    dispatch(ledger)
    told = jobs.get(ledger, job.id)
    assert (told.state, told.exit_code, told.result) == ("succeeded", 0, {})
    assert "its end was read from its folder: the ledger did not take it" in messages(ledger, job)


def test_a_job_that_cannot_begin_says_why(ledger: Ledger) -> None:
    job = here(ledger)
    with ledger.write() as db:
        db.execute("CREATE TRIGGER full BEFORE UPDATE ON jobs BEGIN SELECT RAISE(FAIL, 'x'); END")
    ledger.write = failing(ledger)  # type: ignore[method-assign]
    with pytest.raises(FileError, match="the disk is full"):
        execute(ledger, job.id, lambda _: Ended(0), fake_command)
    del ledger.__dict__["write"]
    with ledger.write() as db:
        db.execute("DROP TRIGGER full")
    as_dead(ledger, job)
    dispatch(ledger)
    error = jobs.get(ledger, job.id).error
    assert error == {"code": "file", "message": "the disk is full", "fix": "make room"}


# --- discard ------------------------------------------------------------------------------------------------


def unfinished(ledger: Ledger) -> Path:
    partial = ledger.root.path / "runs/a/.teacher.partial"
    partial.mkdir(parents=True)
    (partial / "key").write_text("k", encoding="utf-8")
    return partial


def cancelled(ledger: Ledger) -> Job:
    """A job that was started and is paused, with a partial stage."""
    job = as_dead(ledger, here(ledger))
    with ledger.write() as db:
        update(db, job.id, state="paused")
    return job


def test_discard_removes_after_the_transaction(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    job, partial = cancelled(ledger), unfinished(ledger)
    states = []

    def rmtree(path: Path) -> None:
        with ledger.write():  # waits for ever where the files are removed in a transaction
            states.append(jobs.get(ledger, job.id).state_text())
        remove(path)

    remove = shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", rmtree)
    told = jobs.cancel(ledger, job.id, discard=True)
    assert states == ["cancelled, what is not finished is being removed"]
    assert not partial.exists() and (told.state, told.requested) == ("cancelled", None)
    assert "removed 1 unfinished stage" in messages(ledger, job)


def test_a_discard_that_was_killed_goes_on_with_the_next_dispatch(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, partial = cancelled(ledger), unfinished(ledger)
    remove = shutil.rmtree

    def killed(path: Path) -> None:
        (path / "key").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        jobs.cancel(ledger, job.id, discard=True)
    monkeypatch.setattr(shutil, "rmtree", remove)
    again = jobs.submit(ledger, "run", ["ok"], run_path="runs/a")
    with lock_folder(job.folder(ledger.root)):  # somebody else is at it: nothing may begin in that folder
        assert dispatch(ledger) is None and partial.exists()
        with pytest.raises(ConfigError, match="still being removed"):
            jobs.resume(ledger, job.id)
    started = dispatch(ledger)
    assert started is not None and started.id == again.id
    assert not partial.exists() and jobs.get(ledger, job.id).requested is None


def test_a_discard_beside_another_run_is_refused_and_forgotten(ledger: Ledger) -> None:
    job, partial = cancelled(ledger), unfinished(ledger)
    with lock_folder(ledger.root.path / "runs/a"), pytest.raises(FileError, match="another run"):
        jobs.cancel(ledger, job.id, discard=True)
    assert jobs.get(ledger, job.id).requested is None
    dispatch(ledger)
    assert partial.exists() and any("was not removed" in message for message in messages(ledger, job))
    discard(ledger, job.id)
    assert partial.exists()


# --- processes elsewhere ------------------------------------------------------------------------------------


def test_where_a_process_is(ledger: Ledger) -> None:
    here_ = this_process()
    assert here_.is_local and here_.pid_space == this_pid_space() and str(here_) == f"process {here_.pid}"
    assert replace(here_, pid_space=None).is_alive  # of an older program
    elsewhere = replace(here_, pid_space=ELSEWHERE, host="box")
    assert not elsewhere.is_alive and str(elsewhere) == f"process {here_.pid} on box"
    now = 1e9
    assert elsewhere.lives(now - 5, now) and elsewhere.lives(now + 1e6, now)  # a clock that is ahead
    assert not elsewhere.lives(now - FOREIGN_SILENT_S, now) and not elsewhere.lives(None, now)
    assert not replace(elsewhere, host=host_name()).lives(now, now)  # this machine was started again
    if sys.platform == "linux":
        assert replace(here_, pid_space=this_pid_space() + "0").lives(now, now)  # a container of this machine


def foreign(ledger: Ledger) -> Job:
    return here(ledger, process=Process(1, 2.0, "box", ELSEWHERE))


def heartbeat(ledger: Ledger, job: Job, seconds_ago: float) -> None:
    with ledger.write() as db:
        update(db, job.id, heartbeat=time.time() - seconds_ago)
        db.execute("UPDATE leases SET heartbeat = ?", (time.time() - seconds_ago,))


def test_a_job_elsewhere_is_judged_by_its_heartbeat(ledger: Ledger) -> None:
    job = foreign(ledger)
    assert dispatch(ledger) is None
    held = lease.holder(ledger)
    assert held is not None and held.process.host == "box"
    assert jobs.get(ledger, job.id).state_text() == "running, process 1 on box"
    heartbeat(ledger, job, -3600)  # its clock is an hour ahead
    assert dispatch(ledger) is None
    assert "in the future: check the clocks" in jobs.get(ledger, job.id).state_text()
    heartbeat(ledger, job, FOREIGN_SILENT_S + 1)
    assert lease.holder(ledger) is None
    dispatch(ledger)
    told = jobs.get(ledger, job.id)
    assert told.state == "failed" and told.error is not None and told.error["code"] == "orphaned"
    assert "process 1 on box has written no heartbeat for 12" in told.error["message"]


def test_only_its_own_lease_gets_a_heartbeat(ledger: Ledger) -> None:
    job = foreign(ledger)
    heartbeat(ledger, job, 60)
    with ledger.write() as db:
        lease.beat(db, job.id)
        before = db.execute("SELECT heartbeat FROM leases").fetchone()[0]
        assert before < time.time() - 50
        lease.give(db, "serve", this_process(), "x")
        db.execute("UPDATE leases SET heartbeat = 0")
        lease.beat(db, "serve")
        assert db.execute("SELECT heartbeat FROM leases").fetchone()[0] > before


def test_a_job_elsewhere_that_is_cancelled_is_freed(ledger: Ledger) -> None:
    job = foreign(ledger)
    asked = jobs.cancel(ledger, job.id)
    assert (asked.state, asked.asked_from) == ("running", this_pid_space())
    dispatch(ledger, grace_s=0)
    assert jobs.get(ledger, job.id).state == "running"  # it reads the request with its next heartbeat
    with ledger.write() as db:
        update(db, job.id, requested_at=time.time() - FOREIGN_SILENT_S)
    heartbeat(ledger, job, -3600)
    dispatch(ledger)
    assert jobs.get(ledger, job.id).state == "cancelled"
    assert any("process 1 on box cannot be ended from here" in message for message in messages(ledger, job))


def test_a_job_that_was_taken_for_dead_writes_nothing_more(ledger: Ledger) -> None:
    job = here(ledger)

    def meanwhile(*_: object) -> Ended:
        with ledger.write() as db:
            update(db, job.id, state="failed", pid=None)
        return Ended(0)

    assert execute(ledger, job.id, meanwhile, fake_command) == 0
    assert jobs.get(ledger, job.id).state == "failed" and "succeeded" not in messages(ledger, job)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("unshare") or os.getuid() != 0, reason="needs a namespace of its own")
def test_a_process_in_a_container_is_not_taken_for_dead(ledger: Ledger) -> None:
    code = (
        "import sys, time; from mlx_distill.jobs.lease import acquire;"
        "from mlx_distill.ledger.database import Ledger; from mlx_distill.ledger.root import Root;"
        "print(acquire(Ledger(Root.at(sys.argv[1])), 'serve', 'x'), flush=True); time.sleep(60)"
    )
    command = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", sys.executable, "-c", code]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.Popen(
        [*command, str(ledger.root.path)], stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert child.stdout is not None
        if child.stdout.readline() != "True\n":
            pytest.skip("no namespaces here")
        held = lease.holder(ledger)
        assert held is not None and not held.process.is_local and held.process.pid < 10
        assert not lease.acquire(ledger, "serve", "x")
    finally:
        child.kill()
        child.wait()


# --- clocks, names, a server that is gone -----------------------------------------------------------------


def test_a_clock_that_was_set_back(ledger: Ledger) -> None:
    child = subprocess.Popen(SLEEP, start_new_session=True)
    try:
        started = start_time(child.pid)
        assert started is not None
        job = here(ledger, process=local_process(child.pid, started))
        heartbeat(ledger, job, -3600)
        dispatch(ledger)
        told = jobs.get(ledger, job.id)
        assert told.state == "running" and "in the future: check the clocks" in told.state_text()
        with ledger.write() as db:
            update(db, job.id, heartbeat=None)  # so that no signal is sent to it
        jobs.cancel(ledger, job.id)
        with ledger.write() as db:
            update(db, job.id, requested_at=time.time() + 3600)
        dispatch(ledger, grace_s=0)  # its time to save begins anew, and not in an hour
        assert jobs.get(ledger, job.id).state == "running"
        dispatch(ledger, grace_s=0)
        assert jobs.get(ledger, job.id).state == "cancelled"
    finally:
        child.kill()
        child.wait()


def test_a_job_is_named_by_its_beginning(ledger: Ledger, runner: Any) -> None:
    for name in ("job-3f2a00000000", "job-3f2b00000000", "job-77"):
        jobs.submit(ledger, "run", [name], job_id=name)
        jobs.pause(ledger, name)
    root = ["--root", str(ledger.root.path)]
    for text in ("job-3f2a", "3f2a", "job-3f2a00000000"):
        shown = runner.invoke(cli, ["jobs", "show", text, *root, "--json"])
        assert json.loads(shown.stdout)["id"] == "job-3f2a00000000"
    assert jobs.full_id(ledger, "job-77") == "job-77"
    several = runner.invoke(cli, ["jobs", "cancel", "3f2", *root])
    assert several.exit_code == 2 and "the beginning of 2 jobs" in several.output
    assert "job-3f2b00000000, job-3f2a00000000" in several.output
    for text in ("4", "", "ob-77", "%"):
        with pytest.raises(ConfigError, match="no job"):
            jobs.full_id(ledger, text)


@pytest.mark.slow
def test_a_job_and_who_watches_it_go_on_when_the_server_is_killed(ledger: Ledger, runner: Any) -> None:
    job = jobs.submit(ledger, "run", ["work"])
    code = (
        "import sys, time; from helpers.fake_job import fake_command;"
        "from mlx_distill.jobs.queue import dispatch; from mlx_distill.ledger.database import Ledger;"
        "from mlx_distill.ledger.root import Root; l = Ledger(Root.at(sys.argv[1]));"
        "dispatch(l, 30, fake_command); time.sleep(60)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    server = subprocess.Popen([sys.executable, "-c", code, str(ledger.root.path)], env=environment)
    try:
        wait(ledger, job.id, lambda job: job.heartbeat is not None)
    finally:
        server.kill()
        server.wait()

    def pause_later() -> None:
        time.sleep(1.0)
        jobs.pause(ledger, job.id)

    later = Thread(target=pause_later)
    later.start()
    watched = runner.invoke(cli, ["jobs", "watch", job.id[:8], "--root", str(ledger.root.path)])
    later.join()
    assert watched.exit_code == 130 and "asked to save and pause" in watched.output, watched.output
    assert jobs.get(ledger, job.id).state == "paused" and (ledger.root.path / "saved").exists()


# --- progress -----------------------------------------------------------------------------------------------


def test_progress_has_the_curve_of_the_stage_that_is_being_made(ledger: Ledger) -> None:
    job = here(ledger)
    lines = [{"step": step, "loss": 1 / step, "learning_rate": 0.1} for step in range(1, 101)]
    write_jsonl(ledger.root.path / "runs/a/.teacher.partial/scratch/metrics.jsonl", lines)
    state = {"attempt": 1, "run": "runs/a", "stage": "teacher", "done": 100, "total": 200, "eta_s": 5.0}
    write_json(job.folder(ledger.root) / "progress.json", state)
    done = jobs.progress(ledger, job)
    assert (done.stage, done.step, done.steps, done.eta_s) == ("teacher", 100, 200, 5.0)
    assert done.rows == [{"step": step, "loss": 1 / step} for step in range(1, 101)]
    few = jobs.progress(ledger, job, max_rows=20).rows
    assert few[0]["step"] == 1 and few[-1]["step"] == 100 and len(few) <= 21
    assert jobs.progress(ledger, job, max_rows=0).rows == ()
    assert jobs.progress(ledger, replace(job, state="paused")).eta_s is None


# --- commands in a terminal ---------------------------------------------------------------------------------


def test_a_command_in_a_terminal_takes_the_lease_and_lets_the_queue_go_on(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    with accelerator("mlx-distill run a", ledger.root.path):
        held = lease.holder(ledger)
        assert held is not None and (held.purpose, held.process) == ("mlx-distill run a", this_process())
        job = jobs.submit(ledger, "run", ["no-such-recipe"])
        assert dispatch(ledger) is None
        assert jobs.waits_for(ledger) == f"waits for mlx-distill run a ({this_process()})"
    assert jobs.get(ledger, job.id).state == "running"  # started when the terminal's command had ended
    assert capsys.readouterr().err == ""


def test_a_command_in_a_terminal_says_who_has_the_accelerator(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job = foreign(ledger)
    with accelerator("mlx-distill run a", ledger.root.path):
        held = lease.holder(ledger)
        assert held is not None and held.holder == job.id
    err = capsys.readouterr().err
    assert f"{job.id} (x, process 1 on box) uses the accelerator" in err and "jobs submit" in err
    assert lease.holder(ledger) is not None
    with ledger.write() as db:
        update(db, job.id, state="queued")
        lease.take_back(db, job.id)
    with accelerator("mlx-distill run a", ledger.root.path):
        assert lease.holder(ledger) is None  # the queued job comes first
    assert f"{job.id} (run ok) waits for the accelerator" in capsys.readouterr().err


def test_a_command_of_a_job_has_the_lease_already(ledger: Ledger, capsys: pytest.CaptureFixture[str]) -> None:
    job = here(ledger)
    with accelerator("mlx-distill run a", ledger.root.path):
        held = lease.holder(ledger)
        assert held is not None and held.holder == job.id
    assert lease.holder(ledger) is not None and capsys.readouterr().err == ""


def test_a_command_where_no_ledger_is_makes_none(tmp_path: Path) -> None:
    with accelerator("mlx-distill run a", tmp_path / "plain"):
        pass
    assert not (tmp_path / "plain").exists()
    damaged = tmp_path / ".mlx-distill"
    damaged.mkdir()
    (damaged / "ledger.db").write_text("no database", encoding="utf-8")
    with accelerator("mlx-distill run a", tmp_path):
        pass
