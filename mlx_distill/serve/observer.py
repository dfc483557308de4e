"""The middleware around all others: what became of each request, for metrics, log and costs."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlx_distill.serve.metrics import METHODS, OTHER, Metrics
from mlx_distill.serve.request_log import RequestLog
from mlx_distill.serve.served_calls import ServedCallCounts
from mlx_distill.serve.usage import Usage

_MOST_IDS = 1000  # in one line of the log
_GONE = 499  # the client went before its response began


class Observer:
    """Gives each request a :class:`~mlx_distill.serve.usage.Usage` as ``request.state.usage``, and reads it
    when the response has been sent.

    Args:
        app: The application.
        metrics: What is counted.
        requests: The log.
        calls: For the costs.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, requests: RequestLog, calls: ServedCallCounts) -> None:
        self.app, self.metrics, self.requests, self.calls = app, metrics, requests, calls

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, and count it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        usage = state["usage"] = Usage()
        began, at, status = time.perf_counter(), datetime.now(UTC), _GONE

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, watched)
        finally:
            seconds = time.perf_counter() - began
            route, error = getattr(scope.get("route"), "path", None), state.get("error")
            code = None if error is None else error.code or error.type
            method = scope["method"] if scope["method"] in METHODS else OTHER
            self.metrics.request(method, route, status, code, seconds, usage)
            self.calls.add(usage)
            self.requests.write(
                {
                    "time": at.isoformat(timespec="milliseconds"),
                    "request_id": state.get("request_id"),
                    "method": method,
                    "route": route or OTHER,
                    "status": status,
                    "error": code,
                    "latency_ms": round(1000 * seconds, 3),
                    **_used(usage),
                }
            )


def _used(usage: Usage) -> dict[str, Any]:
    """What the log says of a request that a model was asked in."""
    if usage.model is None:
        return {}
    return {
        "model": usage.model,
        "calls": usage.calls,
        "invalid": usage.invalid,
        "prompt_tokens": usage.prompt_tokens,
        "tokens": usage.tokens,
        "items": usage.ids[:_MOST_IDS],
        "errors": usage.errors[:_MOST_IDS],
    }
