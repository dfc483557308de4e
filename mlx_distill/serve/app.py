"""The application: every router, behind the guards of :mod:`mlx_distill.serve.security`."""

from __future__ import annotations

import logging
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from functools import cached_property
from importlib import import_module

from fastapi import FastAPI

from mlx_distill import __version__
from mlx_distill.errors import ConfigError
from mlx_distill.jobs import dispatch, lease
from mlx_distill.ledger.database import Ledger
from mlx_distill.registry import Version
from mlx_distill.registry.resolve import ResolvedModel, resolve_model
from mlx_distill.serve.checked import load_checked, require_files
from mlx_distill.serve.errors import ErrorBody, add_error_handlers
from mlx_distill.serve.external import ExternalAnalyzer, check_external
from mlx_distill.serve.loading import LoadedModel, Resolved, load_model
from mlx_distill.serve.memory import HeapTrimmer
from mlx_distill.serve.metrics import Metrics, ServerState
from mlx_distill.serve.observer import Observer
from mlx_distill.serve.pool import Pool
from mlx_distill.serve.request_log import RequestLog
from mlx_distill.serve.responses import PlainJSON
from mlx_distill.serve.security import Guard
from mlx_distill.serve.served_calls import ServedCallCounts
from mlx_distill.serve.settings import ServerSettings
from mlx_distill.serve.tokens import Tokens, find_token
from mlx_distill.serve.usage import version_name

log = logging.getLogger("mlx_distill.serve")

# Modules that have a ``router``.
ROUTERS = (
    "session",
    "health",
    "metrics",
    "analysis",
    "chat",
    "files",
    "fine_tuning",
    "models",
    "operations",
    "deployments",
    "pages.static",
    "pages.login",
    "pages.overview",
    "pages.data",
    "pages.jobs",
    "pages.models",
    "pages.compare",
    "pages.costs",
)
_HOLDER = "serve"  # of the lease
_TICK = 1.0  # seconds
_OTHER_THREADS = 40  # beside those of requests that wait for a model


class Server:
    """What the routes share, as ``request.app.state.server``.

    Args:
        settings: The server's.

    Attributes:
        root: The folder whose models, runs and jobs it knows.
        settings: As given.
        tokens: The token and the cookie.
        pool: The models in memory.
        metrics: What ``/metrics`` tells.
        calls: Those that are recorded as costs.
        request_log: One line a request.
        stopping: Is set when the process was told to end: streams of events end then.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self.settings, self.root = settings, settings.root
        token, self.token_is_new = find_token(self.root, settings.token)
        self.tokens = Tokens(self.root, token)
        self.stopping = threading.Event()
        self.metrics = Metrics()
        self.calls = ServedCallCounts(lambda: self.ledger)
        self.request_log = RequestLog(self.root.request_log, on_lost=self.metrics.line_lost)
        self.pool = Pool(
            settings,
            self._resolve,
            self._load,
            may_load=self._take_accelerator,
            user=self._accelerator_user,
            may_resume=lambda: not lease.wanted(self.ledger),
            check_files=lambda resolved: require_files(self.ledger, resolved),
            on_change=self.request_log.write,
        )
        self.metrics.registry.register(
            ServerState(
                lambda: self.ledger, self.pool, lambda model: self.metrics.model_name(self.name(model))
            )
        )
        self.every_second: list[Callable[[], None]] = [
            self._serve_jobs,
            self.pool.tick,
            self.calls.tick,
            HeapTrimmer().tick,
        ]
        self._has_lease = False
        self._heartbeat = ExitStack()
        self._verifying_lock = threading.Lock()
        self._verifications = 0  # under way
        self._ticker: threading.Thread | None = None

    @cached_property
    def ledger(self) -> Ledger:
        """The ledger under the root, which is made if there is none."""
        return Ledger(self.root)

    def _resolve(self, name: str) -> ResolvedModel:
        return resolve_model(self.ledger, name)

    def name(self, resolved: Resolved) -> str:
        """What metrics, log and costs call a model."""
        return version_name(resolved, self.root)

    def _load(self, resolved: Resolved) -> LoadedModel | ExternalAnalyzer:
        if resolved.target is not None:
            return check_external(self.ledger, resolved, self.settings.external_seconds)

        def load() -> LoadedModel:
            name = self.name(resolved)
            watcher = self.metrics.watcher(name, self.calls.worked(name))
            return load_model(resolved, batch_size=self.settings.batch_size, watcher=watcher)

        return load_checked(self.ledger, resolved, load)

    def _take_accelerator(self) -> bool:
        """Take the lease for the models of this server; jobs come first."""
        if not self.settings.share_accelerator:
            self._has_lease = lease.acquire(self.ledger, _HOLDER, "answers requests")
            return self._has_lease
        return True

    def _accelerator_user(self) -> str:
        """Who uses the accelerator while this server may not, for people."""
        other = None if self._has_lease else lease.user(self.ledger)
        return other or "a job"

    def _beat(self) -> None:
        """Write down that the lease's holder is alive, for programs that cannot see this process."""
        if self._has_lease:
            with self.ledger.write() as db:
                lease.beat(db, _HOLDER)

    @contextmanager
    def verifying(self, version: Version) -> Iterator[None]:
        """Hold the accelerator, and room beside the models in memory, while a version is loaded to be
        verified before a deployment; a job that comes waits for the end of that.

        Raises:
            ConfigError: a job or another program has it, or a job waits for it.
            ApiError: memory has no room.
        """
        with self._verifying_lock:
            shared = self.settings.share_accelerator
            if not shared and (lease.wanted(self.ledger) or not self._take_accelerator()):
                why = lease.waits_for(self.ledger) or "a job waits for it"
                raise ConfigError(
                    f"the version has to be loaded to be verified, and the accelerator is in use: {why}",
                    fix="try again when that has ended, or pause the job",
                )
            self._verifications += 1
        try:
            with self.pool.room_for(self.root.inside(version.path)):
                yield
        finally:
            with self._verifying_lock:
                self._verifications -= 1

    def _serve_jobs(self) -> None:
        """Let go of the accelerator where a job waits for it, and start the next job."""
        if not self.settings.share_accelerator:
            if not lease.wanted(self.ledger):
                self.pool.resume()
            elif self.pool.pause():
                with self._verifying_lock:
                    if self._has_lease and not self._verifications:
                        lease.release(self.ledger, _HOLDER)
                        self._has_lease = False
        if self.settings.start_jobs:
            dispatch(self.ledger)

    def start(self) -> None:
        """Begin the work that is done every second, and the heartbeats of the lease, which a model that is
        being loaded must not delay.
        """
        self._heartbeat.enter_context(lease.repeated(self._beat))
        self._ticker = threading.Thread(target=self._tick, name="every second", daemon=True)
        self._ticker.start()

    def stop(self) -> None:
        """End it, and free the models."""
        self.stopping.set()
        self.pool.close()
        if self._ticker is not None:
            self._ticker.join(timeout=5)
        try:
            self.calls.record()
        except Exception:  # the process ends all the same
            log.exception("the calls of the last minute could not be recorded")
        self._heartbeat.close()
        if self._has_lease:
            lease.release(self.ledger, _HOLDER)

    def _tick(self) -> None:
        failed: set[str] = set()
        while not self.stopping.wait(_TICK):
            for work in self.every_second:
                try:
                    work()
                except Exception as error:  # the next second tries again; said once
                    if str(error) not in failed:
                        log.exception("every second: %s", work.__qualname__)
                    failed.add(str(error))


def create_app(settings: ServerSettings) -> FastAPI:
    """The application of a server.

    Args:
        settings: What it serves, and its limits.

    Raises:
        ConfigError: the token or the root cannot be used.
    """
    server = Server(settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        from anyio import to_thread

        to_thread.current_default_thread_limiter().total_tokens = settings.max_queue + _OTHER_THREADS
        server.start()
        try:
            yield
        finally:
            await to_thread.run_sync(server.stop)

    app = FastAPI(
        title="mlx-distill",
        version=__version__,
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
        docs_url=None,  # both load scripts of other hosts
        redoc_url=None,
        openapi_url="/v1/openapi.json",
        default_response_class=PlainJSON,
        responses={"default": {"model": ErrorBody, "description": "What is wrong, and how to mend it."}},
        lifespan=lifespan,
    )
    app.state.server = server
    for name in ROUTERS:
        app.include_router(import_module(f"mlx_distill.serve.{name}").router)
    add_error_handlers(app)
    app.add_middleware(Guard, settings=settings, tokens=server.tokens)
    app.add_middleware(
        Observer, metrics=server.metrics, requests=server.request_log, calls=server.calls
    )  # the outermost: it sees what the guard refuses, too
    return app
