"""The page that asks for the token."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse

from mlx_distill.serve.pages.environment import page

router = APIRouter()


@router.get("/login", include_in_schema=False)
def login(request: Request, next: str = "/") -> HTMLResponse:
    """The form of the token; it is posted to ``/login``, and leads to ``next``."""
    return login_page(request, next)


def login_page(request: Request, next: str, *, failed: bool = False) -> HTMLResponse:
    """The form, after a wrong token with status 401."""
    status = 401 if failed else 200
    return page(request, "login.html.j2", status=status, signed_in=False, next=next, failed=failed)
