"""Whether the process lives, and whether its model answers."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from mlx_distill import __version__

router = APIRouter()


@router.get("/health")
async def health() -> dict[str, str]:
    """Whether the process answers; says nothing of models."""
    return {"status": "ok", "version": __version__}


@router.get("/ready", responses={503: {"description": "It is loading, or a job uses the accelerator."}})
async def ready(request: Request, response: Response) -> dict[str, Any]:
    """Whether requests are answered now: 200, else 503. With the token or the cookie it says which models are
    in memory, with version and hash, and whether the last change of one failed.
    """
    state = request.app.state.server.pool.state()
    if state["status"] != "ready":
        response.status_code = 503
    return state if request.state.authenticated else {"status": state["status"]}
