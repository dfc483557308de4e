"""The end of a server's process."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from helpers.served import HEADERS, MODEL, served_process, write_root

from mlx_distill.serve.main import http_server
from mlx_distill.serve.settings import ServerSettings

ROW = {"title": "a", "artist": "b", "lyrics": "c"}


def test_the_handler_of_a_signal_takes_no_lock(tmp_path: Path) -> None:
    """A second signal that interrupted it there would let it wait for itself."""
    server, listening, _ = http_server(ServerSettings(write_root(tmp_path), token="x" * 20, port=0))
    try:
        server.handle_exit(signal.SIGTERM, None)
        assert server.should_exit and not server.force_exit
        assert not server.config.app.state.server.stopping.is_set()  # type: ignore[union-attr]
        server.handle_exit(signal.SIGTERM, None)
        assert server.force_exit
    finally:
        listening.close()


@pytest.mark.slow
def test_a_request_under_way_is_answered_before_the_process_ends(tmp_path: Path) -> None:
    import httpx2

    answers: list[Any] = []
    with (
        served_process(write_root(tmp_path), "--model", MODEL) as (address, process),
        httpx2.Client(base_url=address, headers=HEADERS, timeout=60) as client,
    ):
        assert client.post("/v1/analyze", json={"item": ROW, "max_tokens": 1}).status_code == 200
        body = {"items": [ROW] * 60, "max_tokens": 60, "constrain": False}
        asking = threading.Thread(target=lambda: answers.append(client.post("/v1/analyze/batch", json=body)))
        asking.start()
        while not asked(address):
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        asking.join()
        assert process.wait(timeout=30) == 0
    assert answers[0].status_code == 200 and len(answers[0].json()["data"]) == 60


def asked(address: str) -> bool:
    import httpx2

    state = httpx2.get(f"{address}/ready", headers=HEADERS, timeout=10).json()
    return bool(state["requests"])
