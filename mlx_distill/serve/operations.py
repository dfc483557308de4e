"""The registry, data sets and costs as JSON: what the commands ``registry``, ``data`` and ``costs`` show."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import FileResponse

from mlx_distill.data_sets import DataSet, add_data_set, get_data_set, list_data_sets
from mlx_distill.errors import ConfigError
from mlx_distill.registry import Model, Version, list_models
from mlx_distill.running_costs import cost_report, record_runs
from mlx_distill.serve.errors import ApiError
from mlx_distill.serve.exports import exported_file
from mlx_distill.serve.pages.recipe_checks import served_task
from mlx_distill.text import known_names

router = APIRouter(prefix="/v1/mlx")


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class NewDataSet(_Body):
    """A file or a folder under the root that is to be described and kept under a name."""

    path: str = Field(min_length=1, max_length=1000)
    name: str | None = Field(None, max_length=100)
    task: str | None = Field(
        None,
        max_length=1000,
        description="A packaged task, or a YAML file under the root; none: chats of any kind.",
    )


class Export(_Body):
    """The layout in which the rows of a data set are wanted."""

    layout: str = Field(max_length=20, description="openai, alpaca or chatml")
    split: str | None = Field(None, max_length=20)


@router.get("/models")
def registry_models(request: Request) -> dict[str, Any]:
    """The models of the registry with their versions and aliases."""
    models = list_models(request.app.state.server.ledger)
    return {"object": "list", "data": [_model(model) for model in models]}


@router.get("/models/{name}")
def registry_model(request: Request, name: str) -> dict[str, Any]:
    """One model of the registry."""
    return _model(find_model(request, name))


@router.get("/data")
def data_sets(request: Request) -> dict[str, Any]:
    """All data sets, by name."""
    found = list_data_sets(request.app.state.server.ledger)
    return {"object": "list", "data": [_data_set(one) for one in found]}


@router.post("/data")
def create_data_set(request: Request, body: NewDataSet) -> dict[str, Any]:
    """Describe a file or a folder under the root, and keep that under a name."""
    server = request.app.state.server
    task = None if body.task is None else served_task(server.root, body.task)
    return _data_set(add_data_set(server.ledger, body.path, name=body.name, task=task))


@router.get("/data/{name}")
def data_set(request: Request, name: str) -> dict[str, Any]:
    """One data set, and whether its content has changed since it was described."""
    found = _named(request, name)
    return _data_set(found) | {"changed": found.changed}


@router.post(
    "/data/{name}/export",
    response_class=FileResponse,
    responses={200: {"content": {"application/x-ndjson": {}}, "description": "The file."}},
)
def export(request: Request, name: str, body: Export) -> FileResponse:
    """The rows of a data set in another tool's layout; refused with the rows that it cannot hold."""
    found = _named(request, name)
    return exported_file(request.app.state.server, found.name, body.layout, body.split)


@router.get("/costs")
def costs(request: Request) -> dict[str, Any]:
    """What runs and served calls under the root have cost so far: seconds and tokens, and money where it was
    recorded.
    """
    ledger = request.app.state.server.ledger
    record_runs(ledger)
    return asdict(cost_report(ledger))


def find_model(request: Request, name: str) -> Model:
    """The model of the registry of a name.

    Raises:
        ApiError: 404, there is none.
    """
    models = {model.name: model for model in list_models(request.app.state.server.ledger)}
    if name not in models:
        fix = known_names(name, list(models), "models")
        raise ApiError(404, f"no model of this name in the registry ({fix})", code="model_not_found")
    return models[name]


def _named(request: Request, name: str) -> DataSet:
    """The data set of a name, which is never a path."""
    try:
        return get_data_set(request.app.state.server.ledger, name)
    except ConfigError as error:
        raise ApiError(404, str(error), code="data_set_not_found") from error


def _model(model: Model) -> dict[str, Any]:
    return {
        "name": model.name,
        "description": model.description,
        "created_at": model.created_at,
        "aliases": dict(model.aliases),
        "versions": [_version(version) for version in model.versions],
    }


def _version(version: Version) -> dict[str, Any]:
    return {**asdict(version), "name": version.name}


def _data_set(found: DataSet) -> dict[str, Any]:
    return {
        "name": found.name,
        "path": found.path,
        "task": found.task,
        "sha256": found.sha256,
        "facts": dict(found.facts),
    }
