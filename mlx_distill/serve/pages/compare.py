"""The pages that compare two models, and show the comparisons that are kept."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Form, Request, Response

from mlx_distill.errors import ConfigError, DistillError
from mlx_distill.evaluate.comparison_text import shown_interval, shown_points
from mlx_distill.jobs import submit
from mlx_distill.ledger.database import Ledger
from mlx_distill.registry.comparisons import (
    comparison_rows,
    comparison_source,
    keep_comparison,
    list_comparisons,
    read_comparison,
    write_stored,
)
from mlx_distill.report.comparison_page import comparison_view
from mlx_distill.serve.pages.environment import error_of, page, see_other
from mlx_distill.serve.pages.job_form import start_next
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
    ledger: Ledger = request.app.state.server.ledger
    values = {"a": a.strip(), "b": b.strip(), "margin": margin.strip(), "rows": rows.strip()}
    values["metric"] = metric.strip()
    try:
        if not values["a"] or not values["b"]:
            raise ConfigError("two models are needed", fix="choose A and B")
        kept_answers = not values["rows"]
        sides = [comparison_source(ledger, values[side], answers_kept=kept_answers) for side in "ab"]
        options: dict[str, Any] = {name: values[name] for name in ("margin", "metric") if values[name]}
        if kept_answers and all(side.answered for side in sides):
            kept, _ = keep_comparison(ledger, values["a"], values["b"], **options)
            return see_other(f"/compare/{kept.id}")
        arguments = compare_arguments(values)
        if values["rows"] and not values["rows"].startswith("asset:"):
            ledger.root.inside(values["rows"])
        title = f"{values['b']} against {values['a']}"
        job = submit(ledger, "compare", arguments, title=title, dedupe_seconds=60)
        start_next(request.app.state.server)
    except DistillError as error:
        return _form(request, values, status=400, error=error)
    return see_other(f"/jobs/{job.id}")


def compare_arguments(values: dict[str, str]) -> list[str]:
    """The arguments of ``mlx-distill compare`` for the fields of the form."""
    options = [
        part
        for name in ("margin", "metric", "rows")
        if values.get(name)
        for part in (f"--{name}", values[name])
    ]
    return [values["a"], values["b"], *options, "--keep"]


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
