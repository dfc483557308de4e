"""A server and the jobs of its root use the accelerator in turns."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import fake_job
from helpers.served import client_of, make_app, write_root

from mlx_distill.jobs import cancel, dispatch, get, lease, queue, submit
from mlx_distill.jobs.alongside import accelerator
from mlx_distill.ledger.database import Ledger
from mlx_distill.serve.errors import ApiError

ROW = {"item": {"title": "a", "artist": "b", "lyrics": "c"}, "max_tokens": 2}


def wait(until: Callable[[], Any]) -> None:
    for _ in range(300):
        if until():
            return
        time.sleep(0.05)
    raise AssertionError("it did not happen within 15 seconds")


@pytest.mark.slow
def test_a_job_gets_the_accelerator_and_the_server_gets_it_back(tmp_path: Path) -> None:
    app = make_app(write_root(tmp_path), start_jobs=False)
    server = app.state.server
    # The process of a job is a made-up command.
    server.every_second.append(lambda: dispatch(server.ledger, command=fake_job.fake_command))
    with client_of(app) as client:
        assert client.post("/v1/analyze", json=ROW).status_code == 200
        held = lease.holder(server.ledger)
        assert held is not None and held.holder == "serve"
        assert "heartbeat" in {thread.name for thread in threading.enumerate()}
        job = submit(server.ledger, "run", ["work"])
        wait(lambda: get(server.ledger, job.id).state == "running")
        held = lease.holder(server.ledger)
        assert held is not None and held.holder == job.id
        refused = client.post("/v1/analyze", json=ROW)
        assert refused.status_code == 503
        error = refused.json()["error"]
        assert error["code"] == "accelerator_busy" and error["message"].startswith(f"{job.id}: ")
        assert int(refused.headers["retry-after"]) > 120 and refused.headers["x-should-retry"] == "false"
        assert client.get("/ready").json()["status"] == "paused for a job"
        cancel(server.ledger, job.id)
        wait(lambda: get(server.ledger, job.id).state == "cancelled" and not queue(server.ledger))
        wait(lambda: client.post("/v1/analyze", json=ROW).status_code == 200)
    assert lease.holder(server.ledger) is None


@pytest.mark.slow
def test_a_shared_accelerator_goes_on_answering(tmp_path: Path) -> None:
    app = make_app(write_root(tmp_path), share_accelerator=True, start_jobs=False)
    server = app.state.server
    with client_of(app) as client:
        submit(server.ledger, "run", ["ok"])
        time.sleep(1.2)  # a tick
        assert client.post("/v1/analyze", json=ROW).status_code == 200
        assert lease.holder(server.ledger) is None


def test_it_is_said_what_has_the_accelerator_where_that_is_no_job(tmp_path: Path) -> None:
    server = make_app(write_root(tmp_path), start_jobs=False).state.server
    Ledger(server.root)
    with (
        accelerator("mlx-distill run demo.yaml", server.root.path),
        pytest.raises(ApiError, match=r"^mlx-distill run demo.yaml \(.*\) uses the accelerator") as caught,
        server.pool.get(),
    ):
        pass
    assert caught.value.code == "accelerator_busy"
    server.stop()
