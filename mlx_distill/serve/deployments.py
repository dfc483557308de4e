"""Deployments and comparisons as JSON: what the commands ``registry`` and ``compare`` do.

What an alias may point to over HTTP are versions of the registry: an analyzer outside of it is deployed on
the command line, since it names code or an address.
"""

from __future__ import annotations

import getpass
from dataclasses import asdict
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from mlx_distill.errors import ConfigError, QualityGateError
from mlx_distill.jobs import Job
from mlx_distill.registry import Deployment, GateLimits, archive, get_version, history, promote, rollback
from mlx_distill.registry.comparisons import StoredComparison, list_comparisons, read_comparison
from mlx_distill.serve.comparing import start_comparison
from mlx_distill.serve.errors import ApiError, from_distill_error
from mlx_distill.serve.operations import find_model
from mlx_distill.serve.responses import PlainJSON

router = APIRouter(prefix="/v1/mlx")

Name = Annotated[str, Field(min_length=1, max_length=100)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Reason = Annotated[str, Field(min_length=1, max_length=500)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Move(_Body):
    reason: Reason
    alias: Name = "production"
    actor: Name | None = Field(None, description="Who does it; the owner of the server where absent.")


class Promotion(_Move):
    """Why an alias is to serve a version, what its gates ask for, and how it is served."""

    override: Reason | None = Field(None, description="Why it is done although a gate refuses.")
    margin: str | None = Field(None, max_length=20, description="3pt or 5%")
    metric: Name | None = None
    set_name: Name | None = None
    constrained: bool = False
    max_false_positive_rate: Share | None = None
    max_false_negative_rate: Share | None = None
    max_invalid: Share | None = None
    max_p95_s: float | None = Field(None, gt=0, allow_inf_nan=False)
    require: list[Name] = Field(default_factory=list, max_length=20)
    context_length: int | None = Field(None, ge=1, le=2**40)
    memory_limit_gb: float | None = Field(None, gt=0, le=1e6, allow_inf_nan=False)


class Rollback(_Move):
    """Why an alias is to serve again what it served before."""

    to: int | None = Field(None, ge=1, le=2**53, description="A version that it has served.")


class Comparing(_Body):
    """Two versions, runs or models under the root that are to be compared."""

    a: str = Field(min_length=1, max_length=500)
    b: str = Field(min_length=1, max_length=500)
    margin: str = Field("", max_length=20, description="3pt or 5%")
    metric: str = Field("", max_length=100)
    rows: str = Field("", max_length=500, description="Other rows, which the models answer in a job.")


@router.post("/models/{name}/versions/{number}/promote", response_model=None)
def promote_version(request: Request, name: str, number: int, body: Promotion) -> dict[str, Any] | Response:
    """Let an alias serve a version, after its gates were judged and it was verified. Where a gate refuses:
    422, with all checks under ``gate``.
    """
    server = request.app.state.server
    _require_version(request, name, number)
    given: dict[str, Any] = body.model_dump(
        exclude={"reason", "alias", "actor", "override"}, exclude_none=True
    )
    settings: dict[str, Any] = {
        key: given.pop(key) for key in ("context_length", "memory_limit_gb") if key in given
    }
    try:
        done = promote(
            server.ledger,
            name,
            number,
            body.alias,
            actor=body.actor or _actor(),
            reason=body.reason,
            override=body.override,
            settings=settings or None,
            limits=GateLimits(**{**given, "require": tuple(body.require)}),
            verifying=server.verifying,
        )
    except QualityGateError as error:
        refused = from_distill_error(error)
        return PlainJSON({**refused.body(), "gate": error.facts["gate"]}, refused.status, refused.headers)
    return _deployment(done)


@router.post("/models/{name}/rollback")
def roll_back(request: Request, name: str, body: Rollback) -> dict[str, Any]:
    """Let an alias serve again what it served before, after that was verified."""
    find_model(request, name)
    server = request.app.state.server
    words = {"actor": body.actor or _actor(), "reason": body.reason}
    return _deployment(
        rollback(server.ledger, name, body.alias, to=body.to, verifying=server.verifying, **words)
    )


@router.post("/models/{name}/versions/{number}/{action}")
def archive_version(
    request: Request, name: str, number: int, action: Literal["archive", "restore"]
) -> dict[str, Any]:
    """Take a version out of use, or back into it. What an alias serves is refused."""
    _require_version(request, name, number)
    done = archive(request.app.state.server.ledger, name, number, restore=action == "restore")
    return {**asdict(done), "name": done.name}


@router.get("/models/{name}/history")
def deployments(
    request: Request, name: str, alias: Annotated[str | None, Query(max_length=100)] = None
) -> dict[str, Any]:
    """Who let what serve, when and why; the newest first."""
    find_model(request, name)
    found = history(request.app.state.server.ledger, name, alias)
    return {"object": "list", "data": [_deployment(one) for one in found]}


@router.post("/compare", responses={202: {"description": "A job lets the models answer first."}})
def compare(request: Request, response: Response, body: Comparing) -> dict[str, Any]:
    """Compare two models: the comparison where both have their answers already; else 202 and a job, whose
    result names the comparison.
    """
    started = start_comparison(request.app.state.server, body.model_dump())
    if isinstance(started, Job):
        response.status_code = 202
        return {"object": "job", "id": started.id, "state": started.state, "title": started.title}
    return _comparison(started) | {"facts": dict(started.facts)}


@router.get("/comparisons")
def comparisons(request: Request, limit: Annotated[int, Query(ge=1, le=200)] = 50) -> dict[str, Any]:
    """The comparisons that are kept, the newest first."""
    found = list_comparisons(request.app.state.server.ledger, limit)
    return {"object": "list", "data": [_comparison(one) for one in found]}


@router.get("/comparisons/{id}")
def comparison(request: Request, id: str) -> dict[str, Any]:
    """One comparison with all that was measured."""
    try:
        found = read_comparison(request.app.state.server.ledger, id)
    except ConfigError as error:
        raise ApiError(404, str(error), code="comparison_not_found") from error
    return _comparison(found) | {"facts": dict(found.facts)}


def _require_version(request: Request, name: str, number: int) -> None:
    find_model(request, name)
    if not 0 < number < 2**53:
        raise ApiError(404, f"{name} has no such version", code="model_not_found")
    get_version(request.app.state.server.ledger, name, number)


def _deployment(done: Deployment) -> dict[str, Any]:
    return {"object": "deployment", **asdict(done), "serves": done.serves}


def _comparison(stored: StoredComparison) -> dict[str, Any]:
    return {
        "object": "comparison",
        "id": stored.id,
        "a": dict(stored.a),
        "b": dict(stored.b),
        "verdict": stored.facts["verdict"],
        "sentence": stored.facts["sentence"],
        "created_at": stored.created_at,
    }


def _actor() -> str:
    """Who does it: whoever started the server, over HTTP."""
    return f"{getpass.getuser()} (API)"
