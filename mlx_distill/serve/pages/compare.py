"""The pages that compare two models, and show the comparisons that are kept."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Form, Request, Response

from mlx_distill.errors import ConfigError, DistillError
from mlx_distill.evaluate.comparison_text import shown_interval, shown_points
from mlx_distill.jobs import Job
from mlx_distill.registry.comparisons import (
    comparison_rows,
    list_comparisons,
    read_comparison,
    write_stored,
)
from mlx_distill.report.comparison_page import comparison_view
from mlx_distill.serve.comparing import start_comparison
from mlx_distill.serve.pages.environment import error_of, page, see_other
from mlx_distill.serve.pages.names import comparable_names

router = APIRouter(include_in_schema=False)

_TYPES = {
    "html": "text/html; charset=utf-8",
    "json": "application/json",
    "csv": "text/csv; charset=utf-8",
}
_Field = Annotated[str, Form(max_length=500)]


@router.get("/compare")
def compare(
    request: Request, a: str = "", b: str = "", margin: str = "3pt", rows: str = "", metric: str = ""
) -> Response:
    """The form, filled in from the address, and the list of comparisons."""
    return _form(request, {"a": a, "b": b, "margin": margin, "rows": rows, "metric": metric})


@router.post("/compare")
def make(
    request: Request,
    a: _Field = "",
    b: _Field = "",
    margin: _Field = "",
    rows: _Field = "",
    metric: _Field = "",
) -> Response:
    """Compare at once where the answers of both lie there; else a job lets the models answer first."""
    values = {"a": a.strip(), "b": b.strip(), "margin": margin.strip(), "rows": rows.strip()}
    values["metric"] = metric.strip()
    try:
        started = start_comparison(request.app.state.server, values)
    except DistillError as error:
        return _form(request, values, status=400, error=error)
    address = "/jobs" if isinstance(started, Job) else "/compare"
    return see_other(f"{address}/{started.id}")


def _form(
    request: Request, values: dict[str, str], *, status: int = 200, error: DistillError | None = None
) -> Response:
    ledger = request.app.state.server.ledger
    return page(
        request,
        "compare.html.j2",
        status=status,
        values=values,
        error=error,
        names=comparable_names(ledger),
        comparisons=list_comparisons(ledger),
        points=shown_points,
        range=shown_interval,
    )


@router.get("/compare/{id}")
def show(request: Request, id: str) -> Response:
    """A comparison: the page of ``mlx-distill compare --out page.html`` in the dashboard's frame."""
    ledger = request.app.state.server.ledger
    try:
        stored = read_comparison(ledger, id)
    except ConfigError as error:
        return error_of(request, error, 404)
    rows = comparison_rows(ledger, id)
    view: dict[str, Any] = comparison_view(stored.facts, rows, with_rows=True, tokens=stored.tokens)
    return page(
        request,
        "comparison_kept.html.j2",
        scripts=[view["script_hash"]],
        c=stored.facts,
        view=view,
        stored=stored,
        rows_gone=not rows,
    )


@router.get("/compare/{id}/comparison.{kind}")
def download(request: Request, id: str, kind: str, rows: bool = False) -> Response:
    """A comparison as a file; with ``rows`` also titles, inputs and answers."""
    if kind not in _TYPES:
        return error_of(request, ConfigError(f"no file of kind {kind}", fix="html, json or csv"), 404)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"comparison.{kind}"
        try:
            write_stored(request.app.state.server.ledger, id, path, with_rows=rows)
        except DistillError as error:
            return error_of(request, error, 404)
        content = path.read_bytes()
    name = f'attachment; filename="{id}.{kind}"'
    headers = {"Content-Disposition": name, "X-Content-Type-Options": "nosniff"}
    return Response(content, media_type=_TYPES[kind], headers=headers)
