"""Processes that are killed at random moments: a job's, the server's, both, while requests are answered.

``KILLS=50 pytest tests/jobs/test_kills.py`` does it fifty times, ``KILLED=server`` or ``KILLED=both`` to the
same processes each time.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from helpers.chat_run import write_recipe
from helpers.served import HEADERS, MODEL, served_process, write_root

from mlx_distill import pipeline
from mlx_distill.jobs import Job, dispatch, events, get, lease, resume, submit
from mlx_distill.ledger.database import Ledger
from mlx_distill.progress import NullProgress
from mlx_distill.storage import read_manifest

KILLS = int(os.environ.get("KILLS", "5"))
TARGETS = os.environ.get("KILLED", "job,server,both").split(",")
STEPS = 12 + 6 * max(0, KILLS - 5)  # so that the job does not end before the last kill
STALLED_S = 120.0
"""A process that does nothing for so long does not come back."""
ROW = {"item": {"title": "a", "artist": "b", "lyrics": "c", "id": "song"}, "max_tokens": 4}


def content(run: Path) -> dict[str, str]:
    """The hashes of the run's data and model, without times."""
    manifests = {name: read_manifest(run / name) for name in ("data", "teacher_base", "teacher")}
    return {name: manifest.content for name, manifest in manifests.items() if manifest is not None}


def wait(until: Callable[[], Any], seconds: float = STALLED_S) -> None:
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end
        time.sleep(0.02)


def ended(ledger: Ledger, job: Job) -> Job:
    """Wait for the end of a job, as long as it goes on: how long that takes depends on the number of kills
    and on the machine, that nothing happens to it for two minutes on neither.
    """
    before: Any = None
    since = time.monotonic()
    while (now := get(ledger, job.id)).state == "running":
        if (seen := events(ledger, job.id, newest=1)[0].id) != before:
            before, since = seen, time.monotonic()
        assert time.monotonic() - since < STALLED_S, f"nothing happens in attempt {now.attempt}"
        time.sleep(0.1)
    return now


def ended_within(ledger: Ledger, job: Job, seconds: float) -> bool:
    """Whether a job ends within some time, for which is waited else."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if get(ledger, job.id).state != "running":
            return True
        time.sleep(0.02)
    return False


class Service:
    """A server and a client that asks it all the time."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger, self.answers = ledger, Counter[Any]()
        self._stack = ExitStack()
        self._starts = 0
        self.start()

    def start(self) -> None:
        """Start a server: in turns one that waits for jobs, and one that answers while they run."""
        share = ["--share-accelerator"] if self._starts % 2 else []
        self._starts += 1
        self.address, self.process = self._stack.enter_context(
            served_process(self.ledger.root, "--model", MODEL, *share)
        )
        self._stack.enter_context(self._asking(self.address, self.process))

    @contextmanager
    def _asking(self, address: str, process: subprocess.Popen[str]) -> Iterator[None]:
        import httpx2

        done = threading.Event()

        def ask() -> None:
            with httpx2.Client(base_url=address, headers=HEADERS, timeout=30) as client:
                while not done.is_set():
                    try:
                        answer = client.post("/v1/analyze", json=ROW)
                    except httpx2.TransportError:  # it was killed
                        assert done.is_set() or process.wait(10) is not None
                        return
                    code = answer.json()["error"]["code"] if answer.status_code != 200 else None
                    self.answers[answer.status_code, code] += 1
                    done.wait(0.02)

        thread = threading.Thread(target=ask)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def kill(self) -> None:
        """End the server without a word."""
        self.process.kill()
        self.process.wait()
        self._stack.close()

    def stop(self) -> None:
        """End the server."""
        self._stack.close()


@pytest.mark.slow
def test_killed_jobs_and_servers_leave_true_states_and_the_job_ends_bit_equal(ledger: Ledger) -> None:
    root = ledger.root.path
    recipe = write_recipe(root, steps=STEPS, evaluate_every=3)
    pipeline.run(recipe, root / "whole", only=None, progress=NullProgress())
    whole = content(root / "whole")
    assert len(whole) == 3
    write_root(root)

    moments = random.Random(7)
    service = Service(ledger)
    try:
        job = started_job(ledger, service)
        kills = 0
        while kills < KILLS:
            job = get(ledger, job.id)
            if job.state != "running" or ended_within(ledger, job, moments.uniform(0.0, 3.0)):
                break
            target = TARGETS[kills % len(TARGETS)]
            kill(ledger, service, job, target)
            kills += 1
        job = ended(ledger, job)
        wait(lambda: service.answers[200, None])
    finally:
        service.stop()
    assert job.state == "succeeded" and kills >= min(KILLS, 3), (job, kills)
    print(f"{kills} kills of {', '.join(TARGETS)}, {job.attempt} starts, answers {dict(service.answers)}")
    assert content(root / "runs/killed") == whole
    check_records(ledger, job, kills, service)


def started_job(ledger: Ledger, service: Service) -> Job:
    """A job that the server has started. Before that it was stopped for a while, and kept its lease."""
    wait(lambda: service.answers[200, None])
    os.kill(service.process.pid, signal.SIGSTOP)
    job = submit(ledger, "run", ["recipe.yaml", "--out", "runs/killed"], run_path="runs/killed")
    assert dispatch(ledger) is None and get(ledger, job.id).state == "queued"
    held = lease.holder(ledger)
    assert held is not None and (held.holder, held.process.pid) == ("serve", service.process.pid)
    os.kill(service.process.pid, signal.SIGCONT)
    wait(lambda: get(ledger, job.id).state == "running")
    return job


def kill(ledger: Ledger, service: Service, job: Job, target: str) -> None:
    """End processes without a word, check what is told then, and let everything go on."""
    assert job.process is not None
    if target != "server":
        with suppress(ProcessLookupError):  # it has just ended
            os.kill(job.process.pid, signal.SIGKILL)
    if target != "job":
        service.kill()
    if target == "server":
        now = get(ledger, job.id)
        assert now.attempt == job.attempt and now.state in ("running", "succeeded")
        if now.state == "running" and now.process is not None and now.process.is_alive:
            dispatch(ledger)
            held = lease.holder(ledger)
            assert held is None or held.holder == job.id  # None: it has ended meanwhile
    else:

        def told_ended() -> bool:
            if target == "both":
                dispatch(ledger)  # as every command of jobs does; else the server does
            return get(ledger, job.id).state != "running"

        wait(told_ended)
        told = get(ledger, job.id)
        if told.state != "succeeded":  # it had ended before the signal came
            assert (told.state, told.error and told.error["code"]) == ("failed", "orphaned")
            resume(ledger, job.id)
    if target != "job":
        service.start()
    wait(lambda: get(ledger, job.id).state in ("running", "succeeded"))


def check_records(ledger: Ledger, job: Job, kills: int, service: Service) -> None:
    """No row or line is half-written, and each happening is told once."""
    types = Counter(event.type for event in events(ledger, job.id))
    assert types["succeeded"] == 1 and types["failed"] == types["resumed"] == types["started"] - 1
    with ledger.read() as db:
        assert db.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
        assert not db.execute("PRAGMA foreign_key_check").fetchall()
        assert db.execute("SELECT count(*) FROM leases").fetchone()[0] == 0
        served = [json.loads(row[0]) for row in db.execute("SELECT facts FROM costs WHERE kind = 'served'")]
    lines = [json.loads(line) for line in ledger.root.request_log.read_bytes().splitlines()]
    logged = Counter((line["status"], line["error"]) for line in lines)
    assert {status for status, _ in logged} <= {200, 503}
    for kind, count in service.answers.items():
        # The line is written behind the response: of each killed server one can be missing or be too many.
        assert abs(logged[kind] - count) <= kills, (kind, logged, service.answers)
    assert 0 < sum(one["calls"] for one in served) <= logged[200, None]
