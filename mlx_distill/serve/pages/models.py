"""The pages of models, versions and deployments."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from mlx_distill.errors import ModelError
from mlx_distill.ledger.database import Ledger
from mlx_distill.registry import Deployment, get_version, lineage, list_models
from mlx_distill.registry.records import deployment_of
from mlx_distill.serve.pages.environment import error_of, error_page, page

router = APIRouter(include_in_schema=False)


def deployments(ledger: Ledger, model: str) -> list[Deployment]:
    """The deployments of a model, the newest first."""
    with ledger.read() as db:
        rows = db.execute("SELECT * FROM deployments WHERE model = ? ORDER BY id DESC", (model,)).fetchall()
    return [deployment_of(row) for row in rows]


@router.get("/models")
def models(request: Request) -> Response:
    """All models with their versions."""
    return page(request, "models.html.j2", models=list_models(request.app.state.server.ledger))


@router.get("/models/{name}")
def model(request: Request, name: str) -> Response:
    """A model: its versions and the history of its aliases."""
    ledger = request.app.state.server.ledger
    found = next((one for one in list_models(ledger) if one.name == name), None)
    if found is None:
        return error_page(request, 404, f"no model {name!r} in the registry", "see the list of models")
    return page(request, "model.html.j2", model=found, history=deployments(ledger, name))


@router.get("/models/{name}/{number}")
def version(request: Request, name: str, number: int) -> Response:
    """A version: what it was trained on, its figures, and where it comes from."""
    ledger = request.app.state.server.ledger
    try:
        found = get_version(ledger, name, number)
    except ModelError as error:
        return error_of(request, error, 404)
    history = [one for one in deployments(ledger, name) if one.version == number]
    steps = lineage(ledger, found)
    return page(request, "version.html.j2", version=found, steps=steps, history=history)
