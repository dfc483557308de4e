"""A headless Chromium that may talk to this machine alone, and a connection to it that can be cut."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)
_ARGUMENTS = (
    "--no-sandbox",  # the tests of CI run as root
    "--disable-gpu",
    "--disable-background-networking",
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
)


@dataclass
class Seen:
    """What a browser said and asked for.

    Attributes:
        messages: Warnings and errors of the console, and exceptions of scripts.
        requests: The addresses of all requests.
    """

    messages: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def watch(self, context: Any) -> None:
        """Write down what the pages of a context do."""
        context.on(
            "console",
            lambda one: (
                self.messages.append(f"{one.location['url']}: {one.text}")
                if one.type in ("error", "warning")
                else None
            ),
        )
        context.on("weberror", lambda error: self.messages.append(str(error.error)))
        context.on("request", lambda request: self.requests.append(request.url))

    @property
    def hosts(self) -> set[str]:
        """The hosts of the requests."""
        return {urlsplit(url).netloc for url in self.requests if urlsplit(url).scheme not in ("data", "blob")}


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser of Playwright. Where there is none, tests that need it are skipped; with
    ``MLX_DISTILL_BROWSER=required`` they fail, since nothing else tests the scripts of the pages.
    """
    missing = "Chromium" if CHROMIUM is None else "playwright"
    if CHROMIUM is None or importlib.util.find_spec("playwright") is None:
        text = f"{missing} is not installed: sudo apt install chromium; pip install -e '.[test]'"
        (pytest.fail if os.environ.get("MLX_DISTILL_BROWSER") == "required" else pytest.skip)(text)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(_ARGUMENTS))
        try:
            yield browser
        finally:
            browser.close()


class Wire:
    """A connection to a server that can be cut: what is open is closed, and what is new is refused; or that
    goes silent: nothing is closed or refused, and nothing arrives.

    Args:
        address: Of the server, such as ``http://127.0.0.1:8000``.
    """

    def __init__(self, address: str) -> None:
        parts = urlsplit(address)
        self._server = (parts.hostname or "127.0.0.1", parts.port or 80)
        self._open: set[socket.socket] = set()
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._port = self._listening.getsockname()[1]
        self.address = f"http://127.0.0.1:{self._port}"
        self._flows = threading.Event()
        self._flows.set()
        self._accept()

    def cut(self) -> None:
        """Lose the connection."""
        # shutdown wakes the thread that accepts; close alone does not.
        for one in (self._listening, *self._open):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
        self._open.clear()

    def silence(self) -> None:
        """Let nothing through, without a word to either end."""
        self._flows.clear()

    def resume(self) -> None:
        """Let everything through that was held up, and what comes."""
        self._flows.set()

    def mend(self) -> None:
        """Let it work again after a cut, at the same address."""
        self._listening = socket.create_server(("127.0.0.1", self._port))
        self._accept()

    def _accept(self) -> None:
        threading.Thread(target=self._serve, args=(self._listening,), daemon=True).start()

    def _serve(self, listening: socket.socket) -> None:
        with suppress(OSError):
            while True:
                near, _ = listening.accept()
                far = socket.create_connection(self._server)
                self._open |= {near, far}
                for one, other in ((near, far), (far, near)):
                    threading.Thread(target=self._copy, args=(one, other), daemon=True).start()

    def _copy(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                self._flows.wait()
                sink.sendall(data)
        for one in (source, sink):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
