"""The pages of data sets: add one, what is in it, export it."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Form, Request, Response

from mlx_distill.data_sets import add_data_set, get_data_set, list_data_sets
from mlx_distill.errors import ConfigError, DistillError
from mlx_distill.serve.exports import exported_file
from mlx_distill.serve.pages.environment import error_of, page, see_other
from mlx_distill.serve.pages.recipe_checks import served_task
from mlx_distill.tasks.task import task_names

router = APIRouter(include_in_schema=False)

LAYOUTS = ("openai", "alpaca", "chatml")
Text = Annotated[str, Form(max_length=1000)]


@router.get("/data")
def data_sets(request: Request) -> Response:
    """All data sets, and the form that adds one."""
    return _list(request)


@router.post("/data")
def add(request: Request, path: Text = "", name: Text = "", task: Text = "") -> Response:
    """Describe a file or a folder under the root, and keep that under a name."""
    ledger = request.app.state.server.ledger
    values = {"path": path, "name": name, "task": task}
    try:
        if not path.strip():
            raise ConfigError("no file is named", fix="give the path of a file or a folder under the root")
        known = served_task(ledger.root, task.strip()) if task.strip() else None
        added = add_data_set(ledger, path.strip(), name=name.strip() or None, task=known)
    except DistillError as error:
        return _list(request, values, error)
    return see_other(f"/data/{added.name}")


@router.get("/data/{name}")
def data_set(request: Request, name: str) -> Response:
    """A data set: its splits, labels, lengths, duplicates and leaks."""
    return _show(request, name)


@router.post("/data/{name}/export")
def export(request: Request, name: str, layout: Text = "", split: Text = "") -> Response:
    """The rows in another tool's layout, or the rows that it cannot hold."""
    try:
        if layout not in LAYOUTS:
            raise ConfigError(f"no layout {layout!r}", fix=f"one of {', '.join(LAYOUTS)}")
        return exported_file(request.app.state.server, name, layout, split or None)
    except DistillError as error:
        return _show(request, name, error)


def _list(
    request: Request, values: dict[str, str] | None = None, error: DistillError | None = None
) -> Response:
    return page(
        request,
        "data.html.j2",
        status=400 if error else 200,
        found=list_data_sets(request.app.state.server.ledger),
        values=values or {"path": "", "name": "", "task": ""},
        error=error,
        tasks=task_names(),
    )


def _show(request: Request, name: str, error: DistillError | None = None) -> Response:
    try:
        found = get_data_set(request.app.state.server.ledger, name)
    except ConfigError as missing:
        return error_of(request, missing, 404)
    about = found.description
    return page(
        request,
        "data_set.html.j2",
        status=400 if error else 200,
        found=found,
        about=about,
        labels=sorted({label for one in about.statistics.get("labels", {}).values() for label in one}),
        layouts=LAYOUTS,
        error=error,
    )
