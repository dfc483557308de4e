"""OpenAI's model endpoints: what the registry has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request

from mlx_distill.errors import ModelError
from mlx_distill.jobs import list_jobs
from mlx_distill.registry import ResolvedModel, list_models, resolve_model
from mlx_distill.serve.errors import ApiError
from mlx_distill.serve.fine_tuning import API, fine_tuned_model

router = APIRouter(prefix="/v1/models", tags=["models"])
_MAX_JOBS = 1000


def _object(name: str, created: float, owner: str = "local") -> dict[str, Any]:
    return {"id": name, "object": "model", "created": int(created), "owned_by": owner}


@router.get("")
def all_models(request: Request) -> dict[str, Any]:
    """Models of the registry with their versions that are ready, the models that fine-tuning jobs have made,
    and the model that the server was started with.
    """
    server = request.app.state.server
    data: dict[str, dict[str, Any]] = {}
    for model in list_models(server.ledger):
        ready = [version for version in model.versions if version.state == "READY"]
        if ready or model.aliases:
            data[model.name] = _object(model.name, model.created_at)
        for version in ready:
            data[version.name] = _object(version.name, version.created_at)
    for job in list_jobs(server.ledger, "succeeded", limit=_MAX_JOBS, api=API):
        name = fine_tuned_model(job)
        data[name] = _object(name, job.finished_at or job.created_at)
    own = server.settings.model
    if own is not None and own not in data:
        data[own] = retrieve_model(request, own)
    return {"object": "list", "data": list(data.values())}


@router.get("/{model:path}")
def retrieve_model(request: Request, model: str) -> dict[str, Any]:
    """One model, by any name that requests take."""
    return _object(model, _created(_found(request, model)))


@router.delete("/{model:path}")
def delete_model(request: Request, model: str) -> dict[str, Any]:
    """Refused: files of models are removed by their owner, and versions are archived with a reason."""
    _found(request, model)
    raise ApiError(
        403,
        f"{model}: models are not deleted over this API; a version is archived with: "
        "mlx-distill registry archive NAME:N",
        code="not_supported",
    )


def _found(request: Request, model: str) -> ResolvedModel:
    try:
        resolved: ResolvedModel = resolve_model(request.app.state.server.ledger, model)
    except ModelError as error:
        raise ApiError(404, str(error), code="model_not_found", param="model") from error
    return resolved


def _created(resolved: ResolvedModel) -> float:
    path = resolved.path
    return Path(path).stat().st_mtime if path is not None and Path(path).exists() else 0
