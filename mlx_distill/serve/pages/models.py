"""The pages of models, versions and deployments, and the forms that deploy, roll back and archive."""

from __future__ import annotations

import getpass
from typing import Annotated

from fastapi import APIRouter, Form, Request, Response

from mlx_distill.errors import DistillError, ModelError
from mlx_distill.registry import (
    GateLimits,
    archive,
    get_version,
    history,
    lineage,
    list_models,
    promote,
    rollback,
)
from mlx_distill.serve.pages.environment import error_of, error_page, page, see_other

router = APIRouter(include_in_schema=False)

Text = Annotated[str, Form(max_length=500)]


@router.get("/models")
def models(request: Request) -> Response:
    """All models with their versions."""
    return page(request, "models.html.j2", models=list_models(request.app.state.server.ledger))


@router.get("/models/{name}")
def model(request: Request, name: str) -> Response:
    """A model: its versions and the history of its aliases."""
    return _model(request, name)


@router.get("/models/{name}/{number}")
def version(request: Request, name: str, number: int) -> Response:
    """A version: what it was trained on, its figures, and where it comes from."""
    return _version(request, name, number)


@router.post("/models/{name}/rollback")
def roll_back(request: Request, name: str, reason: Text = "", alias: Text = "production") -> Response:
    """Let an alias serve again what it served before."""
    try:
        server = request.app.state.server
        rollback(server.ledger, name, alias, actor=_actor(), reason=reason, verifying=server.verifying)
    except DistillError as error:
        return _model(request, name, error)
    return see_other(f"/models/{name}")


@router.post("/models/{name}/{number}/promote")
def deploy(
    request: Request,
    name: str,
    number: int,
    reason: Text = "",
    alias: Text = "production",
    margin: Text = "",
    override: Text = "",
) -> Response:
    """Let an alias serve a version, if its gates allow it."""
    try:
        promote(
            request.app.state.server.ledger,
            name,
            number,
            alias or "production",
            actor=_actor(),
            reason=reason,
            override=override or None,
            limits=GateLimits(margin=margin or None),
            verifying=request.app.state.server.verifying,
        )
    except DistillError as error:
        return _version(request, name, number, error)
    return see_other(f"/models/{name}")


@router.post("/models/{name}/{number}/archive")
def archive_version(request: Request, name: str, number: int) -> Response:
    """Take a version out of use."""
    return _archive(request, name, number, restore=False)


@router.post("/models/{name}/{number}/restore")
def restore_version(request: Request, name: str, number: int) -> Response:
    """Take a version back into use."""
    return _archive(request, name, number, restore=True)


def _archive(request: Request, name: str, number: int, *, restore: bool) -> Response:
    try:
        archive(request.app.state.server.ledger, name, number, restore=restore)
    except DistillError as error:
        return _version(request, name, number, error)
    return see_other(f"/models/{name}/{number}")


def _actor() -> str:
    """Who does it: whoever started the server, from a browser."""
    return f"{getpass.getuser()} (browser)"


def _model(request: Request, name: str, error: DistillError | None = None) -> Response:
    ledger = request.app.state.server.ledger
    found = next((one for one in list_models(ledger) if one.name == name), None)
    if found is None:
        return error_page(request, 404, f"no model {name!r} in the registry", "see the list of models")
    past = history(ledger, name)
    return page(
        request, "model.html.j2", status=400 if error else 200, model=found, history=past, error=error
    )


def _version(request: Request, name: str, number: int, error: DistillError | None = None) -> Response:
    ledger = request.app.state.server.ledger
    try:
        found = get_version(ledger, name, number)
    except ModelError as missing:
        return error_of(request, missing, 404)
    past = [one for one in history(ledger, name) if one.version == number]
    gate = getattr(error, "facts", {}).get("gate")
    return page(
        request,
        "version.html.j2",
        status=400 if error else 200,
        version=found,
        steps=lineage(ledger, found),
        history=past,
        error=error,
        gate=gate,
    )
