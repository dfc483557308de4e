"""Logging a browser in and out."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Form, Request
from starlette.responses import RedirectResponse, Response

from mlx_distill.serve.pages.login import login_page
from mlx_distill.serve.security import safe_target

router = APIRouter(include_in_schema=False)
_DAYS = 30


@router.post("/login")
def login(request: Request, token: Annotated[str, Form()], next: Annotated[str, Form()] = "/") -> Response:
    """Take the token from a form and set the cookie of the pages."""
    tokens = request.app.state.server.tokens
    if not tokens.is_token(token.strip()):
        return login_page(request, safe_target(next), failed=True)
    response = RedirectResponse(safe_target(next), 303)
    response.set_cookie(
        tokens.cookie,
        tokens.session,
        max_age=_DAYS * 86400,
        httponly=True,
        samesite="strict",
        secure=request.url.scheme == "https",
    )
    return response


@router.post("/logout")
def logout(request: Request) -> Response:
    """Forget the cookie."""
    response = RedirectResponse("/login", 303)
    response.delete_cookie(request.app.state.server.tokens.cookie, httponly=True, samesite="strict")
    return response
