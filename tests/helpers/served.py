"""Servers on a small model: inside the test, in a thread, in a process of their own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from helpers.small_model import write_small_model
from mlx_distill.ledger.root import Root
from mlx_distill.models.trained_on import write_trained_on
from mlx_distill.tasks.task import load_task

TOKEN = "token-of-the-tests-0123456789"
HEADERS = {"authorization": f"Bearer {TOKEN}"}
MODEL = "models/small"  # under the root


def write_root(folder: Path, task: str | None = "music", **changes: int) -> Root:
    """A root with a model that answers fast, and was trained on a task.

    Args:
        folder: The root.
        task: A packaged task, or None.
        **changes: To the model's configuration.
    """
    model = folder / MODEL
    model.parent.mkdir(parents=True, exist_ok=True)
    write_small_model(model, **changes)
    if task is not None:
        trained = load_task(task)
        system, _ = trained.prompt(dict.fromkeys(trained.input_fields, "x"))
        write_trained_on(model, trained, [{"messages": [{"role": "system", "content": system}]}])
    return Root.at(folder)


def make_app(root: Root | Path, **settings: Any) -> Any:
    """The application of a root, with the token of the tests; the served model is :data:`MODEL`."""
    from mlx_distill.serve.app import create_app
    from mlx_distill.serve.settings import ServerSettings

    root = root if isinstance(root, Root) else Root.at(root)
    return create_app(ServerSettings(root, **{"token": TOKEN, "model": MODEL, **settings}))


@contextmanager
def client_of(app: Any, *, token: bool = True, cookie: bool = False) -> Iterator[Any]:
    """A client inside the test, with the token, or with the cookie of a browser that has logged in."""
    from starlette.testclient import TestClient

    with TestClient(
        app, base_url="http://127.0.0.1:8000", headers=HEADERS if token else {}, follow_redirects=False
    ) as client:
        if cookie:
            assert client.post("/login", data={"token": TOKEN}).status_code == 303
        yield client


@contextmanager
def served_in_thread(root: Root | Path, **settings: Any) -> Iterator[str]:
    """The address of a real server, with a free port, in a thread."""
    from mlx_distill.serve.main import http_server
    from mlx_distill.serve.settings import ServerSettings

    root = root if isinstance(root, Root) else Root.at(root)
    server, listening, address = http_server(
        ServerSettings(root, **{"token": TOKEN, "model": MODEL, "port": 0, **settings})
    )
    thread = threading.Thread(target=lambda: server.run(sockets=[listening]), daemon=True)
    thread.start()
    try:
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        yield address
    finally:
        server.handle_exit(signal.SIGTERM, None)
        thread.join(timeout=60)


@contextmanager
def served_process(
    root: Root | Path, *arguments: str, environment: Mapping[str, str] | None = None
) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The address and the process of ``mlx-distill serve`` on a free port."""
    path = root.path if isinstance(root, Root) else root
    tree = str(Path(__file__).resolve().parents[2])
    process = subprocess.Popen(
        [sys.executable, "-m", "mlx_distill", "serve", "--root", str(path), "--port", "0", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": tree, "PYTHONUNBUFFERED": "1", "MLX_DISTILL_TOKEN": TOKEN}
        | dict(environment or {}),
    )
    try:
        assert process.stdout is not None
        address = None
        for line in process.stdout:
            if found := re.search(r" at (http://\S+)", line):
                address = found.group(1)
                break
        assert address is not None, process.stderr and process.stderr.read()
        yield address, process
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()
