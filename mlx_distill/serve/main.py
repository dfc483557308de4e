"""The process of a server: its socket, what it prints, and its end."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from dataclasses import replace
from types import FrameType

import uvicorn

from mlx_distill.errors import ConfigError, from_os_error
from mlx_distill.serve.app import Server, create_app
from mlx_distill.serve.security import loopback
from mlx_distill.serve.settings import ServerSettings
from mlx_distill.serve.tokens import ENVIRONMENT


class HttpServer(uvicorn.Server):
    """uvicorn's, which tells streams of events that it ends, and exits with 0 when it was told to end."""

    def __init__(self, config: uvicorn.Config, server: Server) -> None:
        super().__init__(config)
        self._server = server

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """End after the requests under way; at once when told again.

        It takes no lock: a second signal may interrupt the first one's handler, which would then wait for
        itself.
        """
        self.force_exit = self.should_exit
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let streams of events end, then wait for the requests under way."""
        self._server.stopping.set()
        await super().shutdown(sockets=sockets)


def http_server(settings: ServerSettings) -> tuple[HttpServer, socket.socket, str]:
    """A server that has its socket and does not run yet.

    Returns:
        The server, to be run with ``run(sockets=[socket])``; its socket; its address.

    Raises:
        ConfigError: the port is in use, or a host other than this machine without a token of one's own.
    """
    if not loopback(settings.host) and not (settings.token or os.environ.get(ENVIRONMENT, "").strip()):
        raise ConfigError(
            f"--host {settings.host}: other machines could reach the server",
            fix=f"set {ENVIRONMENT} to a token of your own, and put a proxy with TLS before it",
        )
    listening = _listen(settings.host, settings.port)
    port = listening.getsockname()[1]
    try:
        app = create_app(replace(settings, port=port))
    except BaseException:
        listening.close()
        raise
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=max(1, round(settings.stop_seconds)),
        timeout_keep_alive=15,
    )
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return HttpServer(config, app.state.server), listening, f"http://{host}:{port}"


def serve(settings: ServerSettings, say: Callable[[str], None]) -> None:
    """Serve until the process is told to end.

    Args:
        settings: The server's.
        say: Prints a line.
    """
    server, listening, address = http_server(settings)
    state: Server = server.config.app.state.server  # type: ignore[union-attr]
    if state.token_is_new:
        say(f"token: {state.tokens.value}")
        say(f"  made now and kept in {state.root.token}; it is not printed again (another: --new-token)")
    if not loopback(settings.host):
        say(f"note: {settings.host} can be reached from other machines, and the token travels unencrypted:")
        say("  put a proxy with TLS before it")
    say(f"serving {state.root.path} at {address} (stop: Ctrl+C)")
    server.run(sockets=[listening])


def _listen(host: str, port: int) -> socket.socket:
    """A socket at an address."""
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen(2048)
    except OSError as error:
        listening.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"port {port} of {host} is in use", fix="stop the other server, or give another: --port 8001"
            ) from error
        if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
            raise ConfigError(
                f"--host {host}: no address of this machine", fix="leave it out: 127.0.0.1"
            ) from error
        raise from_os_error(error, f"port {port}") from error
    return listening
