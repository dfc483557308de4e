"""The pages of jobs: the list, and one job with its curves while it runs."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, Response, StreamingResponse

from mlx_distill.errors import DistillError
from mlx_distill.jobs import (
    STATES,
    Job,
    JobProgress,
    cancel,
    get,
    list_jobs,
    move_first,
    pause,
    progress,
    queue,
    resume,
)
from mlx_distill.jobs.curves import Curve, Curves
from mlx_distill.jobs.store import Event, events
from mlx_distill.jobs.watchdog import read_tail
from mlx_distill.report.charts import line_chart
from mlx_distill.serve.pages import job_form
from mlx_distill.serve.pages.environment import (
    environment,
    error_of,
    error_page,
    page,
    see_other,
    wants_fragment,
)
from mlx_distill.serve.pages.job_settings import from_previous, from_source
from mlx_distill.serve.pages.job_stream import MAX_EVENTS, SILENT_S, Cursor, View, curve_data, stream

router = APIRouter(include_in_schema=False)
router.include_router(job_form.router)

_PER_PAGE = 25
_SHOWN_EVENTS = 100
_LOG_BYTES = 16 << 10
_ACTIVE = ("queued", "running")
_CURVES = Curves()


@router.get("/jobs")
def jobs(request: Request, state: str = "", kind: str = "", after: str = "") -> HTMLResponse:
    """The list of jobs; the filters are the address."""
    server = request.app.state.server
    chosen = state if state in STATES else ""
    try:
        found = list_jobs(server.ledger, chosen or None, kind or None, after or None, _PER_PAGE + 1)
    except DistillError as error:
        return error_of(request, error, 404)
    waiting = {job.id: place for place, job in enumerate(queue(server.ledger), 1)}
    rows = [
        {"job": job, "progress": _progress(server, job), "place": waiting.get(job.id), "took": _took(job)}
        for job in found[:_PER_PAGE]
    ]
    filters = {"state": chosen, "kind": kind}
    return page(
        request,
        "jobs.html.j2",
        block="table" if wants_fragment(request) else None,
        live=True,
        rows=rows,
        filters=filters,
        is_filtered=bool(chosen or kind or after),
        states=STATES,
        active=any(job.state in _ACTIVE for job in found),
        more=_address(filters | {"after": found[_PER_PAGE - 1].id}) if len(found) > _PER_PAGE else None,
        here=_address(filters | {"after": after}),
        with_filter=lambda **changed: _address(filters | changed),
    )


def _address(query: Mapping[str, str]) -> str:
    text = urlencode({name: value for name, value in query.items() if value})
    return f"/jobs?{text}" if text else "/jobs"


def _progress(server: Any, job: Job) -> JobProgress:
    return progress(server.ledger, job, max_rows=0)


def _took(job: Job) -> float | None:
    """Seconds of the last start of a job, so far or until its end."""
    if job.started_at is None:
        return None
    end = time.time() if job.state == "running" else job.finished_at
    return None if end is None else max(0.0, end - job.started_at)


# -- one job


@router.get("/jobs/{job_id}")
def job(request: Request, job_id: str, x: str = "step", y: str = "linear", before: int = 0) -> HTMLResponse:
    """One job. ``x`` is step or time, ``y`` linear or log, ``before`` shows older events."""
    server = request.app.state.server
    try:
        found = get(server.ledger, job_id)
    except DistillError as error:
        return error_of(request, error, 404)
    if wants_fragment(request):
        return page(request, "job.html.j2", block="actions", job=found, **_actions(server, found))
    shown = events(server.ledger, job_id, newest=_SHOWN_EVENTS + 1, before=_id(before))
    curves = _curves(server, found)
    return page(
        request,
        "job.html.j2",
        live=True,
        job=found,
        progress_html=_status(server, found),
        **_actions(server, found),
        **_drawn(curves, x, y),
        **_happened(shown, before),
        **_watching(found, shown, curves, before),
        **_settings(server, found),
    )


def _actions(server: Any, job: Job) -> dict[str, Any]:
    """What the block ``actions`` of the page shows, which is exchanged alone."""
    return {
        "place": _place(server, job),
        "has_recipe": job.recipe(server.root).is_file(),
        "report": _report(server, job) is not None,
        "resumable": job.state in ("paused", "failed", "cancelled"),
    }


def _drawn(curves: dict[str, Curve], x: str, y: str) -> dict[str, Any]:
    """The curves, for the page's script and for those who see the page without it."""
    return {
        "charts": [_chart(name, curve) for name, curve in reversed(curves.items())],
        "points": [
            curve_data(name, curve.stride, curve.after(0), whole=True) for name, curve in curves.items()
        ],
        "x": "time" if x == "time" else "step",
        "y": "log" if y == "log" else "linear",
    }


def _happened(shown: Sequence[Event], before: int) -> dict[str, Any]:
    """The events, the newest first, and where older ones begin."""
    return {
        "events": [_shown(event) for event in reversed(shown[-_SHOWN_EVENTS:])],
        "older": shown[-_SHOWN_EVENTS].id if len(shown) > _SHOWN_EVENTS else None,
        "is_older": before > 0,
    }


def _watching(job: Job, shown: Sequence[Event], curves: dict[str, Curve], before: int) -> dict[str, Any]:
    """Where the page's stream of news begins, and whether there is one."""
    last = next(reversed(curves), "")
    step = max((point.step for point in curves[last].after(0)), default=0) if last else 0
    return {
        "cursor": Cursor(shown[-1].id if shown else 0, step, last),
        "buttons": _buttons_of(job),
        "watched": not _has_ended(job) and before <= 0,
        "silent_s": SILENT_S,
    }


def _settings(server: Any, job: Job) -> dict[str, Any]:
    """How the settings differ from earlier ones, and what the job printed last."""
    differences = (from_source(server.root, job), from_previous(server.ledger, job))
    return {
        "differences": [one for one in differences if one],
        "log": read_tail(job.log(server.root), _LOG_BYTES),
    }


def _id(number: int) -> int | None:
    """An identifier of the address that SQLite can compare with; None for 0."""
    return min(number, (1 << 63) - 1) if number > 0 else None


def _buttons_of(job: Job) -> str:
    """What the buttons of a job's page depend on."""
    return f"{job.state} {job.requested}" if job.requested else job.state


def _has_ended(job: Job) -> bool:
    """Whether nothing more happens to a job by itself. While its unfinished stages are removed, an event of
    that is still to come.
    """
    return job.is_finished and job.requested is None


def _curves(server: Any, job: Job) -> dict[str, Curve]:
    """The curves of a job's run; a queued one that never started has none, though its folder may have."""
    if job.run_path is None or not job.attempt:
        return {}
    return _CURVES.of(server.root.path / job.run_path)


def _chart(name: str, curve: Curve) -> dict[str, Any]:
    """A curve for those who see the page without its script."""
    points = curve.after(0)
    series = {
        "loss": [(p.step, p.loss) for p in points if p.loss is not None],
        "valid_loss": [(p.step, p.valid_loss) for p in points if p.valid_loss is not None],
    }
    drawn: dict[str, dict[str, list[float]]] = {
        key: {"step": [x for x, _ in pairs], "value": [y for _, y in pairs]}
        for key, pairs in series.items()
        if pairs
    }
    classes = {"loss": "loss", "valid_loss": "valid-loss"}
    return {
        "name": name,
        "stride": curve.stride,
        "last": curve.last,
        "svg": line_chart(drawn, classes, f"Losses of {name}") if drawn else None,
    }


def _status(server: Any, job: Job) -> str:
    """The HTML of a job's state and progress."""
    template = environment().get_template("job_status.html.j2")
    return template.render(job=job, progress=_progress(server, job), took=_took(job))


def _place(server: Any, job: Job) -> int | None:
    """The place of a queued job in the queue, from 1."""
    ids = [one.id for one in queue(server.ledger)] if job.state == "queued" else []
    return ids.index(job.id) + 1 if job.id in ids else None


def _report(server: Any, job: Job) -> Path | None:
    """The page that a job has written: the report of its run, or the result of its cross-validation."""
    if not job.run_path or job.state != "succeeded":
        return None
    name = "validation.html" if job.kind == "validate" else "report.html"
    try:
        path: Path = server.root.inside(f"{job.run_path}/{name}")
    except DistillError:  # a link that leaves the root
        return None
    return path if path.is_file() else None


@router.get("/jobs/{job_id}/report")
def report(request: Request, job_id: str) -> Response:
    """The report of a finished job, which is one file without scripts."""
    server = request.app.state.server
    try:
        path = _report(server, get(server.ledger, job_id))
    except DistillError as error:
        return error_of(request, error, 404)
    if path is None:
        return error_page(request, 404, f"{job_id} has no report", "see the job's page for what it has made")
    # A run's folder may hold anything under this name: the page runs and loads nothing, and is kept apart
    # from the pages of the server.
    policy = (
        "sandbox; default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
    return HTMLResponse(path.read_bytes(), headers={"Content-Security-Policy": policy})


def _shown(event: Event) -> dict[str, Any]:
    """An event as the page and its script show it."""
    clock = time.strftime("%H:%M:%S", time.localtime(event.created_at))
    return {"id": event.id, "time": clock, "level": event.level, "type": event.type, "message": event.message}


@router.get("/jobs/{job_id}/events")
def job_events(request: Request, job_id: str, after: str = "", state: str = "") -> Response:
    """What is new of a job, as server-sent events; see :mod:`mlx_distill.serve.pages.job_stream`."""
    server = request.app.state.server
    try:
        get(server.ledger, job_id)
    except DistillError as error:
        return error_of(request, error, 404)
    again = Cursor.read(request.headers.get("last-event-id"))
    cursor = again or Cursor.read(after) or Cursor()
    if again is not None:  # which buttons it shows is not known: the state may have changed and changed back
        state = "unknown"

    def look(event: int) -> View:
        found = get(server.ledger, job_id)
        new = events(server.ledger, job_id, event, MAX_EVENTS)
        return View(
            _buttons_of(found),
            _has_ended(found),
            _status(server, found),
            [_shown(one) for one in new],
            len(new) == MAX_EVENTS,
            _curves(server, found),
        )

    return StreamingResponse(
        stream(look, cursor, state=state or None, stopping=server.stopping.is_set),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
    )


# -- what the buttons do

_ACTIONS = {
    "pause": pause,
    "resume": resume,
    "cancel": cancel,
    "discard": lambda ledger, job_id: cancel(ledger, job_id, discard=True),
    "first": move_first,
}


@router.post("/jobs/{job_id}/{action}")
def act(request: Request, job_id: str, action: str) -> Response:
    """Pause, resume, cancel, discard, or move first."""
    server = request.app.state.server
    if action not in _ACTIONS:
        return error_page(request, 404, f"nothing is called {action!r} here")
    try:
        _ACTIONS[action](server.ledger, job_id)
    except DistillError as error:
        return error_of(request, error, 409)
    job_form.start_next(server)
    return see_other(f"/jobs/{job_id}")
