"""What ``/metrics`` tells Prometheus: counts and times, never a text, and no label of a client's making.

The names beginning with ``gen_ai_server`` are those of OpenTelemetry's conventions for generative AI, which
are not final; this module is the only place that has them.
"""

from __future__ import annotations

import re
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress

import mlx.core as mx
from fastapi import APIRouter, Request
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.responses import Response

from mlx_distill import __version__
from mlx_distill.errors import DistillError
from mlx_distill.infer.requests import Generation
from mlx_distill.jobs import STATES
from mlx_distill.ledger.database import Ledger
from mlx_distill.serve.loading import Resolved
from mlx_distill.serve.pool import Pool
from mlx_distill.serve.usage import Usage

router = APIRouter()

OTHER = "other"
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
# Those of OpenTelemetry's conventions, in seconds.
_SECONDS = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
_FIRST_TOKEN = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 30.0),
)
_EACH_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)


class Names:
    """The values of a label: the first ``limit`` different ones as they are, whatever comes after them is
    ``other``, so that a label never has more.

    >>> names = Names(1)
    >>> names("music:3"), names("music:4"), names("music:3"), names(None)
    ('music:3', 'other', 'music:3', 'none')
    """

    def __init__(self, limit: int) -> None:
        self._limit, self._known, self._lock = limit, set[str](), threading.Lock()

    def __call__(self, name: str | None) -> str:
        """The value of the label."""
        if name is None:
            return "none"
        with self._lock:
            if name not in self._known and len(self._known) < self._limit:
                self._known.add(name)
            return name if name in self._known else OTHER


class Metrics:
    """The instruments of one application.

    Args:
        models: The most model versions that are told apart.
    """

    def __init__(self, models: int = 50) -> None:
        self.registry = registry = CollectorRegistry()
        self.model_name, self._error_name = Names(models), Names(80)
        self._http = Counter(
            "mlx_distill_http_requests", "Requests.", ["method", "route", "status"], registry=registry
        )
        self._errors = Counter(
            "mlx_distill_errors", "Requests and rows without an answer.", ["route", "type"], registry=registry
        )
        self._duration = Histogram(
            "gen_ai_server_request_duration_seconds",
            "From a request to the end of its response, of requests for models.",
            ["route", "model", "outcome"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._first = Histogram(
            "gen_ai_server_time_to_first_token_seconds",
            "From the submission of a row or a chat to its first token.",
            ["model"],
            buckets=_FIRST_TOKEN,
            registry=registry,
        )
        self._each = Histogram(
            "gen_ai_server_time_per_output_token_seconds",
            "Mean time of the tokens behind the first one of an answer.",
            ["model"],
            buckets=_EACH_TOKEN,
            registry=registry,
        )
        self._tokens = Counter(
            "gen_ai_server_tokens", "Tokens read and generated.", ["model", "type"], registry=registry
        )
        self._answers = Counter(
            "gen_ai_server_answers", "Rows and chats that were answered.", ["model"], registry=registry
        )
        self._invalid = Counter(
            "gen_ai_server_invalid_answers", "Answers that are not valid.", ["model"], registry=registry
        )
        self._busy = Counter(
            "mlx_distill_engine_busy_seconds", "For which engines computed.", ["model"], registry=registry
        )
        self._lost = Counter(
            "mlx_distill_request_log_lost_lines",
            "Lines that the log of requests could not take.",
            registry=registry,
        )
        info = Gauge("mlx_distill_info", "The version of the program.", ["version"], registry=registry)
        info.labels(__version__).set(1)
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)

    def request(
        self, method: str, route: str | None, status: int, error: str | None, seconds: float, usage: Usage
    ) -> None:
        """Count a request that was answered.

        Args:
            method: One of :data:`METHODS`, else ``other``.
            route: The template of its path; None where no route was asked.
            status: Of HTTP.
            error: The code of its error, or None.
            seconds: That it took.
            usage: What it used.
        """
        route = route or OTHER
        self._http.labels(method, route, str(status)).inc()
        for kind in ([error] if error else []) + [one["type"] for one in usage.errors]:
            self._errors.labels(route, self._error_name(_word(kind))).inc()
        if usage.model is None:
            return
        model = self.model_name(usage.model)
        outcome = "ok" if status < 400 else "error"
        self._duration.labels(route, model, outcome).observe(seconds)
        self._answers.labels(model).inc(usage.calls)
        self._invalid.labels(model).inc(usage.invalid)
        self._tokens.labels(model, "input").inc(usage.prompt_tokens)
        self._tokens.labels(model, "output").inc(usage.tokens)

    def line_lost(self) -> None:
        """Count a line that the log of requests could not take."""
        self._lost.inc()

    def watcher(self, model: str, worked: Callable[[float], None]) -> ModelWatcher:
        """What the engine of a model is told to.

        Args:
            model: The version's name.
            worked: Is told of each time for which the engine computed, too.
        """
        name = self.model_name(model)
        return ModelWatcher(
            self._first.labels(name), self._each.labels(name), self._busy.labels(name), worked
        )


class ModelWatcher:
    """Counts what an engine does, in its thread."""

    def __init__(
        self, first: Histogram, each: Histogram, busy: Counter, worked: Callable[[float], None]
    ) -> None:
        self._first, self._each, self._busy, self._worked = first, each, busy, worked

    def worked(self, seconds: float) -> None:
        """The engine computed for so long."""
        self._busy.inc(seconds)
        self._worked(seconds)

    def answered(self, generation: Generation, first_token_seconds: float, seconds: float) -> None:
        """A row or a chat has its answer."""
        self._first.observe(first_token_seconds)
        if len(generation.tokens) > 1:
            self._each.observe(max(0.0, seconds - first_token_seconds) / (len(generation.tokens) - 1))


class ServerState(Collector):
    """What is looked at when Prometheus asks: the queue, the models in memory, the jobs.

    Args:
        ledger: Opens the ledger.
        pool: The models.
        name: What a model is called, of those of :func:`mlx_distill.serve.usage.version_name`.
    """

    def __init__(
        self,
        ledger: Callable[[], Ledger],
        pool: Pool,
        name: Callable[[Resolved], str],
    ) -> None:
        self._ledger, self._pool, self._name = ledger, pool, name

    def describe(self) -> Iterable[Metric]:
        """Nothing: the values are not read when the application is made."""
        return []

    def collect(self) -> Iterator[Metric]:
        """The values now."""
        requests, models = self._pool.contents()
        yield GaugeMetricFamily(
            "mlx_distill_queue_depth", "Requests for models at work or waiting.", requests
        )
        yield GaugeMetricFamily(
            "mlx_distill_queue_limit",
            "Of them, so many: a further one gets 503.",
            self._pool.settings.max_queue,
        )
        rows = GaugeMetricFamily(
            "mlx_distill_engine_requests", "Rows and chats at work or waiting in an engine.", labels=["model"]
        )
        loaded = GaugeMetricFamily("mlx_distill_model_loaded", "Models in memory.", labels=["model"])
        taken = GaugeMetricFamily(
            "mlx_distill_model_memory_bytes", "Of the weights of models in memory.", labels=["model"]
        )
        for name in dict.fromkeys(self._name(model.resolved) for model in models):
            same = [model for model in models if self._name(model.resolved) == name]
            rows.add_metric([name], sum(model.worker.requests for model in same))
            loaded.add_metric([name], len(same))
            taken.add_metric([name], sum(model.bytes for model in same))
        yield from (rows, loaded, taken)
        memory = GaugeMetricFamily("mlx_distill_mlx_memory_bytes", "MLX's memory.", labels=["kind"])
        memory.add_metric(["active"], mx.get_active_memory())
        memory.add_metric(["cache"], mx.get_cache_memory())
        memory.add_metric(["peak"], mx.get_peak_memory())
        yield memory
        # Without the ledger the other values are told all the same, and these are absent.
        with suppress(DistillError, sqlite3.Error):
            yield _jobs(self._ledger())


def _jobs(ledger: Ledger) -> Metric:
    with ledger.read() as db:
        counts = dict(db.execute("SELECT state, count(*) FROM jobs GROUP BY state").fetchall())
    jobs = GaugeMetricFamily("mlx_distill_jobs", "Jobs of the ledger.", labels=["state"])
    for state in STATES:
        jobs.add_metric([state], counts.get(state, 0))
    return jobs


def _word(kind: str) -> str:
    """A kind of error, which is a word of this program, never a text."""
    return kind if re.fullmatch(r"[a-z][a-z0-9_]{0,39}", kind) else OTHER


@router.get("/metrics", include_in_schema=False)
def metrics(request: Request) -> Response:
    """The values for Prometheus, with the token or the cookie."""
    encode, content_type = choose_encoder(request.headers.get("accept", ""))
    body = encode(request.app.state.server.metrics.registry)
    return Response(body, headers={"content-type": content_type})
